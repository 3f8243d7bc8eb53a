"""The contract of what a step decides; see the package's docstring."""

import math

import torch
from torch import Tensor

from . import checks
from .annotations import Backend
from .backends import pick_backend
from .reference import DECISIONS


def decide_(
    decisions: Tensor,
    sumsq: Tensor | None = None,
    *,
    found_inf: Tensor | None = None,
    max_norm: float | None = None,
    out: Tensor | None = None,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    growth_interval: int = 0,
    min_scale: float = 1.0,
    backend: Backend = "auto",
) -> None:
    """From squared norms and overflow flags to what a step does, in one launch, on the device.

    `decisions` holds the scalars of a step in the order of `DECISIONS`. With `sumsq`::

        total_norm = sqrt(sum(sumsq))
        clip_coef  = min(1, max_norm / (total_norm + 1e-6))      if max_norm is given

    The sum is taken in float64 in a fixed order (256 lanes that each add every 256th element, then
    neighbouring lanes in pairs) and rounded to fp32; square root and quotient are rounded once.
    Then found_inf and skip are both set to 1 if one of them or of the further flags is not 0, and
    to 0 otherwise. inv_scale, grad_scale, growth_tracker and stuck stay, because the step is not
    over: `out` becomes the decisions that the next step begins with, with inv_scale = 1 /
    grad_scale, clip_coef 1, the flags and the norm 0. If growth_interval > 0 its scale follows
    `torch.amp.GradScaler`, rounded once from float64, with a floor::

        found:  grad_scale = max(grad_scale * backoff_factor, min_scale) and growth_tracker = 0;
                stuck counts such steps in a row at which grad_scale could not be lowered
        else:   growth_tracker += 1; at growth_interval it becomes 0, and
                grad_scale = grad_scale * growth_factor unless that is infinite

    Args:
        decisions: contiguous float32 tensor of `len(DECISIONS)` elements, written in place;
            float64, like all other tensors then, on the reference backend alone.
        sumsq: contiguous float32 tensor of squared norms, one or more. None: no norm.
        found_inf: contiguous float32 tensor of further flags, any number of them.
        max_norm: a Python number > 0. None: clip_coef stays.
        out: another tensor like decisions, overwritten. None: nothing of the next step is decided.
        growth_factor, backoff_factor, min_scale: Python numbers, > 1, in (0, 1) and > 0.
        growth_interval: 0 <= growth_interval <= 2**24; 0: the scale stays.
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend cannot run on decisions' device, or its kernel failed.
    """
    checks.check_floats("decisions", decisions)
    device = decisions.device
    for name, tensor in (("sumsq", sumsq), ("found_inf", found_inf), ("out", out)):
        if tensor is not None:
            checks.check_floats(name, tensor)
            if tensor.dtype is not decisions.dtype:
                raise TypeError(f"{name} must be {decisions.dtype} as decisions is, "
                                f"got {tensor.dtype}")  # fmt: skip
            if tensor.device != device:
                raise ValueError(
                    f"{name} must be on decisions' device {device}, got {tensor.device}"
                )
    for name, tensor in (("decisions", decisions), ("out", out)):
        if tensor is not None and tensor.numel() != len(DECISIONS):
            raise ValueError(f"{name} must have {len(DECISIONS)} elements, got {tensor.numel()}")
    if sumsq is not None and sumsq.numel() == 0:
        raise ValueError("sumsq must have at least one element, got none")
    if out is not None and checks.is_same(out, decisions):
        raise ValueError("out and decisions must be two tensors, got the same one twice")
    if max_norm is not None and not (
        isinstance(max_norm, (float, int)) and 0 < max_norm < math.inf
    ):
        raise ValueError(f"max_norm must be a finite number greater than 0, got {max_norm!r}")
    for name, value, low, high in (
        ("growth_factor", growth_factor, 1, math.inf),
        ("backoff_factor", backoff_factor, 0, 1),
        ("min_scale", min_scale, 0, math.inf),
    ):
        if not (isinstance(value, (float, int)) and low < value < high):
            raise ValueError(f"{name} must be a number between {low} and {high}, got {value!r}")
    checks.check_integer("growth_interval", growth_interval, 2**24 + 1)
    once = float if decisions.dtype is torch.float64 else checks.float32
    pick_backend(device, backend, decisions.dtype).decide_(
        decisions,
        sumsq,
        found_inf,
        out,
        max_norm=0.0 if max_norm is None else once(max_norm),
        min_scale=once(min_scale),
        growth_factor=float(growth_factor),
        backoff_factor=float(backoff_factor),
        growth_interval=growth_interval,
    )
    torch.autograd.graph.increment_version([t for t in (decisions, out) if t is not None])
