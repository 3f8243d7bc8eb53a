"""The contract of AdaLomo's update; see the package's docstring."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .annotations import Backend, Integers, Lows, Rounding, State, Tensors
from .backends import pick_backend
from .lists import grouped
from .reference import Part, Tiles

LAST_STEP = 1 << 20


class Item(NamedTuple):
    """One tensor as a backend gets it: everything contiguous."""

    param: torch.Tensor
    grad: torch.Tensor
    row: torch.Tensor | None
    col: torch.Tensor | None
    full: torch.Tensor | None
    step: torch.Tensor
    low: torch.Tensor | None
    sums: torch.Tensor
    param_id: int
    tiles: Tiles
    part: Part


def adalomo_state_shapes(param):
    """The shapes of the running means that `adalomo_state` makes, by name."""
    if param.ndim < 2:
        return {"exp_avg_sq": param.shape}
    return {
        "exp_avg_sq_row": param.shape[:-1],
        "exp_avg_sq_col": param.shape[:-2] + param.shape[-1:],
    }


def adalomo_state(param: Tensor) -> State:
    """State of a parameter that has made no step: a dict of tensors on its device, all zero.

    "step": int32, how many updates were made. A parameter of shape [..., R, C] has the running
    means "exp_avg_sq_row" [..., R] and "exp_avg_sq_col" [..., C], one of less than two dimensions
    has "exp_avg_sq" of its own shape; float32. Names as in transformers' Adafactor.
    """
    state = {"step": torch.zeros((), dtype=torch.int32, device=param.device)}
    for name, shape in adalomo_state_shapes(param).items():
        state[name] = torch.zeros(shape, dtype=torch.float32, device=param.device)
    return state


def adalomo_sums_(param: Tensor, out: Tensor | None = None, backend: Backend = "auto") -> Tensor:
    """Sums of squares of a parameter's tiles, one read of it.

    Args:
        param: a dense tensor in fp32, bf16 or fp16.
        out: a contiguous float32 tensor, overwritten; None: a new one.
        backend: "auto", "native", "triton" or "reference".

    Returns:
        `out`: what `adalomo_update_` takes as `sums`, in csrc/adalomo.h, Note [Tiles].

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came.
        RuntimeError: the backend cannot run on param's device, or its kernel failed.
    """
    checks.check_tensor("param", param)
    tiles = Tiles.of(param.shape)
    if out is None:
        out = torch.empty(tiles.count, device=param.device)
    _check_sums("out", out, param, tiles)
    pick_backend(param.device, backend).adalomo_sums_(out, param.detach().contiguous(), tiles)
    torch.autograd.graph.increment_version(out)
    return out


def adalomo_update_(
    param: Tensors,
    grad: Tensors,
    state: State | Sequence[State],
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    inv_scale: Tensor | None = None,
    clip_value: float | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    skip: Tensor | None = None,
    rounding: Rounding = "nearest",
    low: Lows = None,
    seed: int = 0,
    param_id: Integers = None,
    sums: Lows = None,
    backend: Backend = "auto",
) -> None:
    """The fused update of AdaLomo (arXiv 2310.10195, algorithm 1), which is Adafactor's rule.

    For a tensor [..., R, C], with t the number of this update, from 1, and every operation rounded
    once to fp32::

        g    = clamp(grad * inv_scale, -clip_value, clip_value) * clip_coef
        w    = t ** decay_rate
        row  = row * (1 - w) + w * (mean_over_C(g**2) + eps[0])
        col  = col * (1 - w) + w * (mean_over_R(g**2) + eps[0])
        u    = (g / sqrt(row / mean_over_R(row))) / sqrt(col)
        size = lr * max(eps[1], rms(param)) / max(1, rms(u) / clip_threshold)
        param = round(param - (lr * max(eps[1], rms(param)) * weight_decay * param + size * u))

    where rms is over the whole tensor. Tensors of less than two dimensions keep the second moment
    of each element instead: u = g / sqrt(exp_avg_sq). Three sweeps: 2 bytes read twice, and 6 read
    and written, for each element of a 16-bit param and grad; sums have a declared order
    (csrc/adalomo.h, Note [Tiles]), so all backends agree in every bit.

    An element of grad that is not finite, or whose squares overflow in a sum, leaves the tensor and
    its state as they are and sets `found_inf`.

    Args:
        param: a tensor in fp32, bf16 or fp16, written in place; or a sequence of tensors, of which
            those of less than two dimensions share kernel launches. One that is not contiguous is
            copied, and copied back.
        grad: same shape and device; the same dtype, or one of the two is fp32.
        state: as `adalomo_state` makes it, written in place.
        lr, weight_decay: Python numbers >= 0.
        eps: two numbers > 0: added to squares; the smallest rms(param) that counts.
        clip_threshold: > 0: largest rms(u) that is used unchanged.
        decay_rate: < 0. After 2**20 updates w stays as it is.
        inv_scale, clip_value, clip_coef, found_inf, skip: as in `lomo_update_`.
        rounding, low, seed, param_id: as in `lomo_update_`; random bits are those of step t - 1.
        sums: from `adalomo_sums_` for the present param; written for the new one, so that the next
            update need not read param once more for its rms. None: it is read.
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend cannot run on param's device, or its kernel failed.
    """
    if isinstance(param, torch.Tensor):
        params, grads, states, lows, all_sums = [param], [grad], [state], [low], [sums]
        param_ids = [0 if param_id is None else param_id]
    else:
        params = list(param)
        grads, states, lows, all_sums, param_ids = as_lists(
            len(params), grad, state, low, sums, param_id
        )
    update = Update(
        params, grads, states, lows, all_sums, param_ids, None, lr, weight_decay, eps,
        clip_threshold, decay_rate, inv_scale, clip_value, clip_coef, found_inf, skip, rounding,
        seed, backend,
    )  # fmt: skip
    for items, options in update.groups:
        update.module.adalomo_update_(items, **options)
    update.finish()


def as_lists(
    length, grad, state, low, sums, param_id
) -> tuple[list[Any], list[Any], list[Any], list[Any], list[Any]]:
    """What comes beside a sequence of parameters of that length."""
    return (
        checks.as_list("grad", grad, length),
        checks.as_list("state", state, length),
        checks.as_list("low", low, length, [None] * length),
        checks.as_list("sums", sums, length, [None] * length),
        checks.as_list("param_id", param_id, length, range(length)),
    )


class Update:
    """The arguments of an update, checked: a backend's module, and `groups`, the pairs of items
    and options that it gets. `finish()` when they are written."""

    def __init__(
        self, params, grads, states, lows, all_sums, param_ids, parts, lr, weight_decay, eps,
        clip_threshold, decay_rate, inv_scale, clip_value, clip_coef, found_inf, skip, rounding,
        seed, backend,
    ):  # fmt: skip
        clip_value = checks.check_options(lr, weight_decay, clip_value, rounding, seed)
        check_adalomo(eps, clip_threshold, decay_rate)
        self.groups, self._params, self._copied = [], params, []
        if not params:
            return
        checks.check_tensor("param", params[0])
        device = params[0].device
        checks.check_scalars(device, inv_scale, clip_coef, found_inf, skip)
        if parts is None:
            parts = [None] * len(params)

        rows, keys = [], []
        for p, g, own, low, sums, param_id, part in zip(
            params, grads, states, lows, all_sums, param_ids, parts
        ):
            checks.check_pair(p, g, device)
            checks.check_integer("param_id", param_id, 2**32)
            tiles = Tiles.of(p.shape)
            _check_state(own, p)
            if sums is not None:
                _check_sums("sums", sums, p, tiles)
            keys.append((p.dtype, g.dtype, checks.rounding_of(p, low, rounding)))
            rows.append((p, g, own, low, sums, param_id, tiles, part or Part(p.shape)))

        wide = checks.widest(inv_scale, clip_coef, found_inf, skip, *all_sums)
        self.module = pick_backend(device, backend, wide)
        options = {
            "lr": checks.float32(lr),
            "weight_decay": checks.float32(weight_decay),
            "eps": tuple(map(checks.float32, eps)),
            "clip_threshold": checks.float32(clip_threshold),
            "clip_value": checks.float32(clip_value),
            "seed": seed,
            "weights": adalomo_weights(device, decay_rate),
            "inv_scale": inv_scale,
            "clip_coef": clip_coef,
            "found_inf": found_inf,
            "skip": skip,
        }
        for (_, _, rule), group in grouped(keys, rows).items():
            items = []
            for p, g, own, low, sums, param_id, tiles, part in group:
                dense, low = p.detach(), low if rule == "split" else None
                if not p.is_contiguous():
                    dense, dense_low = dense.contiguous(), None if low is None else low.contiguous()
                    self._copied.append((p, dense, low, dense_low))
                    low = dense_low
                items.append(
                    Item(
                        dense, g.contiguous(), own.get("exp_avg_sq_row"), own.get("exp_avg_sq_col"),
                        own.get("exp_avg_sq"), own["step"], low,
                        adalomo_sums_(p, backend=backend) if sums is None else sums, param_id,
                        tiles, part,
                    )
                )  # fmt: skip
            self.groups.append((items, {"rounding": rule, **options}))

    @torch.no_grad()
    def finish(self):
        """Copies back what was not contiguous, and tells autograd what was written."""
        for p, dense, low, dense_low in self._copied:
            p.copy_(dense)
            if low is not None:
                low.copy_(dense_low)
        torch.autograd.graph.increment_version(self._params)


def check_adalomo(eps, clip_threshold, decay_rate):
    """Raises TypeError or ValueError for what `adalomo_update_` does not take."""
    if not (isinstance(eps, (tuple, list)) and len(eps) == 2):
        raise TypeError(f"eps must be two numbers, got {eps!r}")
    smallest = torch.finfo(torch.float32).tiny
    for name, value in (("eps[0]", eps[0]), ("eps[1]", eps[1]), ("clip_threshold", clip_threshold)):
        checks.check_number(name, value, smallest)
    if not isinstance(decay_rate, (float, int)) or not -math.inf < decay_rate < 0:
        raise ValueError(f"decay_rate must be a finite number less than 0, got {decay_rate!r}")


@functools.lru_cache
def adalomo_weights(device, decay_rate):
    """t ** decay_rate for t = 1, 2, ..., computed once in float64.

    A table instead of a power in the kernels: how many updates a parameter has made is known on the
    device alone, because overflows do not count, and no two machines agree on the last bit of pow.
    """
    steps = torch.arange(1, LAST_STEP + 1, dtype=torch.float64)
    return steps.pow(decay_rate).float().to(device)


def _check_sums(name, sums, param, tiles):
    checks.check_floats(name, sums)
    if sums.device != param.device:
        raise ValueError(f"{name} must be on param's device {param.device}, got {sums.device}")
    if sums.numel() != tiles.count:
        raise ValueError(
            f"{name} must have {tiles.count} elements for shape {tuple(param.shape)}, "
            f"got {sums.numel()}"
        )


def _check_state(state, param):
    if not isinstance(state, dict):
        raise TypeError(f"state must be a dict of tensors, got {type(state).__name__}")
    wanted = {"step": ((), torch.int32)}
    wanted |= {n: (shape, torch.float32) for n, shape in adalomo_state_shapes(param).items()}
    for name, (shape, dtype) in wanted.items():
        value = state.get(name)
        label = f"state[{name!r}]"
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{label} must be a tensor, got {type(value).__name__}")
        if value.dtype is not dtype or not value.is_contiguous():
            raise TypeError(
                f"{label} must be contiguous {dtype}, got {value.dtype} with strides "
                f"{value.stride()}"
            )
        if value.shape != shape or value.device != param.device:
            raise ValueError(
                f"{label} must have shape {tuple(shape)} on {param.device}, "
                f"got {tuple(value.shape)} on {value.device}"
            )
