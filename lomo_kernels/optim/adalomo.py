"""AdaLomo: Adafactor's adaptive learning rates in the memory of LOMO."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.adalomo import adalomo_state_shapes, adalomo_weights, check_adalomo
from ..ops.annotations import Backend
from . import notices
from .annotations import Norm, Rounding, Scale, Strategy, Trained
from .gradient import Piece
from .optimizer import FusedOptimizer
from .sharding import local

_CUT = ("low", "exp_avg_sq_row", "exp_avg_sq")  # states with a row for each of the parameter


class AdaLomo(FusedOptimizer):
    """Low-memory optimization with adaptive learning rate (Lv et al., arXiv 2310.10195).

    Each gradient is used in a backward hook, as with `Lomo`, by a rule that is Adafactor's: a
    running mean of the squares of each row and of each column, `ops.adalomo_update_` has the
    formula. State is 4 bytes for each row and column of a weight matrix: 0.1 % of a 7B model's
    weights. Driven like `Lomo`, in the same three ways.

    Args:
        model_or_params: a module, parameters, pairs of a name and a parameter, or param groups
            (each with its own lr, weight_decay, clip_grad_value, rounding, eps, clip_threshold,
            decay_rate). Tensors of any rank.
        lr: learning rate, relative to the root mean square of each parameter.
        loss_scale: the factor by which `backward`, `fused_backward`, `grad_norm` and `scale`
            multiply the loss, and the updates divide; a bare `loss.backward()` is neither
            multiplied nor divided. A number; "dynamic" or a `LossScale`; None or 0.
        eps: added to squares of gradients; the smallest root mean square of a parameter.
        clip_threshold: an update with a larger root mean square is scaled down to it.
        decay_rate: the running means keep the share 1 - t ** decay_rate, t from 1.
        clip_grad_norm, clip_grad_value, weight_decay: as in `Lomo`.
        norm, strategy, factor_budget, rounding, backend, seed: as in `Lomo`, but there is no
            strategy "immediate": the rule needs the whole gradient of a weight. Where the gradient
            of a weight waits as factors, it is formed for its update, one at a time.

    Overflow: a gradient that is not finite changes neither its parameter nor its state. With a
    global norm nothing at all is written in such a step; otherwise nothing after the parameter that
    met it, in backward order. `last_step_skipped` tells. The kernels never make the host wait.

    `state`, in `state_dict()`: for each parameter "step", and "exp_avg_sq_row" and "exp_avg_sq_col"
    or "exp_avg_sq", in float32; a resumed run gives the same bits as an uninterrupted one.
    """

    finetune_lr = 1e-3
    whole_gradients = whole_rows = True
    must_scale = False  # the reference's default is a scale, and a bare loss.backward() no mistake
    dtypes = ops.DTYPES

    def __init__(
        self,
        model_or_params: Trained,
        lr: float = 1e-3,
        loss_scale: Scale = 2**10,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        weight_decay: float = 0.0,
        *,
        norm: Norm = "global",
        strategy: Strategy = "auto",
        factor_budget: int | None = None,
        rounding: Rounding = "auto",
        backend: Backend = "auto",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "weight_decay": weight_decay,
            "clip_grad_value": clip_grad_value,
            "rounding": rounding,
            "seed": seed,
        }
        # By id(param): (sums of squares, version and address of the parameter), and a weak
        # reference to the tensor that `.data` gave.
        self._sums: dict[int, Any] = {}
        self._aliases: dict[int, Any] = {}
        super().__init__(
            model_or_params,
            defaults,
            clip_grad_norm=clip_grad_norm,
            norm=norm,
            strategy=strategy,
            factor_budget=factor_budget,
            loss_scale=loss_scale or None,
            loss_scale_args=None,
            backend=backend,
        )

    def _check_group(self, group):
        super()._check_group(group)
        check_adalomo(group["eps"], group["clip_threshold"], group["decay_rate"])
        for param in group["params"]:
            adalomo_weights(param.device, group["decay_rate"])  # made here, not in a captured graph

    def make_state(self, param: Tensor, group: dict[str, Any]) -> None:
        super().make_state(param, group)
        state = self.state[param]
        if "step" not in state:
            state.update(ops.adalomo_state(local(param)))

    def _is_cut(self, name, param):
        # the column moments of a matrix are sums over all rows, the same on all ranks
        return (name == "exp_avg_sq_col" and param.ndim > 2) or name in _CUT

    def update(
        self,
        pieces: list[Piece],
        group: dict[str, Any],
        numbers: list[int],
        scalars: dict[str, Any],
    ) -> None:
        if self.ranks is not None:
            self.update_all([(pieces, group, numbers, scalars)])
            return
        tensors, options = self._arguments(pieces, group, numbers, scalars)
        ops.adalomo_update_(*tensors, **options)
        self._keep(pieces, options["sums"])

    def update_all(self, updates: Iterable[tuple[Any, ...]]) -> None:
        """Of sharded parameters with two messages, however many there are."""
        if self.ranks is None:
            super().update_all(updates)
            return
        calls, kept = [], []
        for update in updates:
            pieces, (tensors, options) = update[0], self._arguments(*update)
            calls.append(
                ops.AdalomoParts(
                    *tensors,
                    shape=[piece.param.shape for piece in pieces],
                    offset=[piece.offset for piece in pieces],
                    counts=[self.ranks.part(piece.param).counts for piece in pieces],
                    **options,
                )
            )
            kept.append((pieces, options["sums"]))
        every = self._gather([call.statistics for call in calls])
        every = self._gather([call.squares(part) for call, part in zip(calls, every)])
        for call, part, sums in zip(calls, every, kept):
            call.update_(part)
            self._keep(*sums)

    def _gather(self, values):
        """One message for all: of each tensor what every rank has, [ranks, n] on its device."""
        device = values[0].device
        every = self.ranks.gather(torch.cat([value.to(device) for value in values]))
        parts = every.split([value.numel() for value in values], dim=1)
        return [part.to(value.device).contiguous() for part, value in zip(parts, values)]

    def _arguments(self, pieces, group, numbers, scalars):
        """-> (parameters, gradients and states; all else)."""
        tensors, states, lows, sums = [piece.tensor for piece in pieces], [], [], []
        for piece, tensor in zip(pieces, tensors):
            param = piece.param
            self.make_state(param, group)
            rounding, low = self.rounding_of(param, group)
            self._check_shape(param, self.state[param])
            kept, of = self._sums.get(id(param), (None, None))
            if of != _identity(tensor) or self._aliases.get(id(param), lambda: None)() is not None:
                # another writer has changed it, or may have, or it is the first step
                kept = ops.adalomo_sums_(tensor, kept, backend=self.backend_name)
            states.append(self.state[param])
            lows.append(low)
            sums.append(kept)
        return (tensors, [piece.grad for piece in pieces], states), {
            "lr": group["lr"], "weight_decay": group["weight_decay"], "eps": group["eps"],
            "clip_threshold": group["clip_threshold"], "decay_rate": group["decay_rate"],
            "clip_value": group["clip_grad_value"], "rounding": rounding, "low": lows,
            "seed": group["seed"], "param_id": numbers, "sums": sums,
            "backend": self.backend_name, **scalars,
        }  # fmt: skip

    def _keep(self, pieces, sums):
        for piece, kept in zip(pieces, sums):
            self._sums[id(piece.param)] = (kept, _identity(piece.tensor))

    def on_data(self, param, data):
        """A write through `.data` changes no version counter: the sums are made anew, as long as
        the reader's tensor lives."""
        self._sums.pop(id(param), None)
        if data is not None:
            self._aliases[id(param)] = weakref.ref(data)

    def _check_shape(self, param, state):
        for name, value in adalomo_state_shapes(local(param)).items():
            if state[name].shape != value:
                notices.refuse_shape(self.name_of(param), param, name, state[name])


def _identity(tensor):
    return tensor._version, tensor.data_ptr()
