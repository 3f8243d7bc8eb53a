"""LOMO: stochastic gradient descent whose gradients never exist all at once."""

from typing import Any

from .. import ops
from ..ops.annotations import Backend
from ..ops.factors import tokens_of
from .annotations import Norm, Rounding, Scale, Strategy, Trained
from .gradient import Piece
from .optimizer import FusedOptimizer


class Lomo(FusedOptimizer):
    """LOw-Memory Optimization (Lv et al., arXiv 2306.09782), a `torch.optim.Optimizer`.

    Each gradient is used by one fused kernel in a backward hook the moment it exists, and freed::

        g = clamp(grad / loss_scale, +-clip_grad_value) * clip_coef
        p = p * (1 - lr * weight_decay) - lr * g        (fp32, one rounding per operation)

    Three ways to drive it, the same numbers::

        loss.backward(); opt.step(); opt.zero_grad()         # any torch loop, Trainer
        opt.grad_norm(loss); opt.fused_backward(loss, lr)    # lomo_optim's loop
        opt.backward(loss)                                   # what the configuration needs

    Args:
        model_or_params: a module, parameters, pairs of a name and a parameter, or param groups
            (each with its own lr, weight_decay, clip_grad_value, rounding). Frozen parameters are
            taken up when they are unfrozen.
        lr: learning rate.
        clip_grad_norm: largest norm; the coefficient is min(1, clip_grad_norm / (norm + 1e-6)), of
            the gradients after unscaling and before clipping by value. Paper, section 3.3.
        clip_grad_value: largest absolute value of an element, after unscaling. Paper, section 3.3.
        weight_decay: decoupled, applied in fp32 inside the update.
        loss_scale_args: lomo_optim's way to ask for dynamic loss scaling: a dict with init_scale,
            scale_factor (growth, and one over backoff), scale_window (growth interval), min_scale.
        norm: "global": one norm of all gradients, known before the first update. "tensor": each
            tensor is clipped by its own norm, inside backward.
        strategy: how the global norm is known before the first update. "one_backward": gradients
            wait for `step()`, those of weight matrices, experts and convolutions as the two factors
            they are a product of (input and output gradient of the layer), or as they are where
            that is smaller; so too, where asked for, without clip_grad_norm. Backwards before a
            step then add up.
            "two_backward": backward runs twice, as in the paper, and nothing waits; for `backward`
            and `grad_norm`. "partial": likewise, but gradients of the layers nearest the input
            wait, up to `factor_budget`, and the second backward ends above them. "auto": one
            backward, unless what would wait beside the room of activations (all of it where they
            are recomputed) is more than `factor_budget`; then "partial". A `loss.backward()` of
            one's own is always the one backward. `explain()` names the strategy and the bytes.
            Without a global norm "immediate" updates weight matrices block by block in backward,
            so that not even one of their gradients exists.
        factor_budget: bytes; None: a quarter of the parameters' bytes.
        rounding: of the stored parameter: "nearest", "stochastic", "split" (see
            `ops.lomo_update_`), or "auto": stochastic for bf16, where nearest loses most of a small
            update, nearest for fp16 and fp32.
        loss_scale: the factor by which `backward`, `fused_backward`, `grad_norm` and `scale`
            multiply the loss, and the updates divide. A number; "dynamic" or a `LossScale`, which
            follow `torch.amp.GradScaler`; None; or "auto": dynamic where a trained parameter is
            float16, else None, and a bare `loss.backward()` is neither multiplied nor divided.
        backend: "auto", "native", "triton" or "reference".
        seed: of stochastic rounding; the same seed and data give the same weights.

    Overflow: an element whose gradient is not finite is never written. With a global norm nothing
    at all is written in such a step; otherwise nothing after the parameter that met it, in backward
    order. `last_step_skipped` tells. The kernels never make the host wait.
    """

    takes_products = True
    finetune_lr = 0.1  # of fine-tuning with clip_grad_norm=1.0

    def __init__(
        self,
        model_or_params: Trained,
        lr: float = 1e-3,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        loss_scale_args: dict[str, Any] | None = None,
        *,
        norm: Norm = "global",
        strategy: Strategy = "auto",
        factor_budget: int | None = None,
        rounding: Rounding = "auto",
        loss_scale: Scale = "auto",
        backend: Backend = "auto",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "clip_grad_value": clip_grad_value,
            "rounding": rounding,
            "seed": seed,
        }
        super().__init__(
            model_or_params,
            defaults,
            clip_grad_norm=clip_grad_norm,
            norm=norm,
            strategy=strategy,
            factor_budget=factor_budget,
            loss_scale=loss_scale,
            loss_scale_args=loss_scale_args,
            backend=backend,
        )

    def update(
        self,
        pieces: list[Piece],
        group: dict[str, Any],
        numbers: list[int],
        scalars: dict[str, Any],
    ) -> None:
        kept = [self.rounding_of(piece.param, group) for piece in pieces]
        ops.lomo_update_(
            [piece.tensor for piece in pieces],
            [piece.grad for piece in pieces],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            clip_value=group["clip_grad_value"],
            rounding=kept[0][0],
            low=[piece.of(low) for piece, (_, low) in zip(pieces, kept)],
            seed=group["seed"],
            step=group["step"],
            param_id=numbers,
            offset=[piece.offset for piece in pieces],
            backend=self.backend_name,
            **scalars,
        )

    def update_product(
        self, pieces: list[Piece], group: dict[str, Any], number: int, scalars: dict[str, Any]
    ) -> None:
        rounding, low = self.rounding_of(pieces[0].param, group)
        if not group["weight_decay"]:  # experts without tokens stay as they are
            pieces = [each for each in pieces if tokens_of(each.pairs)] or pieces[:1]
        for piece in pieces:
            ops.product_update_(
                piece.tensor,
                piece.pairs,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                clip_value=group["clip_grad_value"],
                rounding=rounding,
                low=piece.of(low),
                seed=group["seed"],
                step=group["step"],
                param_id=number,
                offset=piece.offset,
                backend=self.backend_name,
                **scalars,
            )
