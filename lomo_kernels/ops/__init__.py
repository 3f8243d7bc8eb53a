"""Operations on one tensor, or on a list of tensors, at a time.

`lomo_update_`, `adalomo_update_`, `grad_sumsq_` and `decide_` are the contract that every backend
keeps: this package checks the arguments, chooses the backend and tells autograd what was written.
Backends, in order of preference: `native` (C++ and CUDA), `triton`, `reference` (plain PyTorch).
"""

import math
from collections import defaultdict

import torch

from . import checks
from .adalomo import (
    adalomo_state,
    adalomo_sums_,
    adalomo_update_,
)
from .adalomo_parts import AdalomoParts
from .backends import BACKENDS, build_info, pick_backend, unavailable
from .checks import DTYPES, ROUNDINGS
from .lists import scatter_
from .product_sumsq import gram_is_cheaper, product_sumsq_
from .product_update import product_update_

__all__ = [
    "BACKENDS",
    "DECISIONS",
    "DTYPES",
    "ROUNDINGS",
    "AdalomoParts",
    "adalomo_state",
    "adalomo_sums_",
    "adalomo_update_",
    "build_info",
    "decide_",
    "grad_sumsq_",
    "gram_is_cheaper",
    "lomo_update_",
    "pick_backend",
    "product_sumsq_",
    "product_update_",
    "unavailable",
]

# Elements of the tensor that `decide_` works on.
DECISIONS = (
    "inv_scale", "clip_coef", "found_inf", "skip", "total_norm", "grad_scale", "growth_tracker",
    "stuck",
)  # fmt: skip


def lomo_update_(
    param,
    grad,
    *,
    lr,
    weight_decay=0.0,
    inv_scale=None,
    clip_value=None,
    clip_coef=None,
    found_inf=None,
    skip=None,
    rounding="nearest",
    low=None,
    seed=0,
    step=0,
    param_id=None,
    offset=None,
    backend="auto",
):
    """The fused update of LOMO (arXiv 2306.09782, section 3): one read of grad, one of param.

    For each element, every operation rounded once to fp32::

        g     = clamp(grad * inv_scale, -clip_value, clip_value) * clip_coef
        param = round(param * decay - lr * g),   decay = 1 - lr * weight_decay

    An element whose grad is not finite keeps its bits and sets `found_inf`. All backends agree in
    every bit (a NaN compares as a NaN).

    Args:
        param: a dense tensor in fp32, bf16 or fp16, written in place; or a sequence of tensors,
            updated with as few kernel launches as their dtypes allow (one, for many small ones).
            fp64 too, on the reference backend alone and in fp64 arithmetic, to check the maths.
        grad: same shape and device; the same dtype, or one of the two is fp32. A grad whose memory
            layout differs from param's is copied into it first. A sequence where param is one.
        lr, weight_decay: Python numbers >= 0, in units of the unscaled gradient.
        inv_scale: 1 / grad_scale. This and the following scalars are one-element float32 tensors
            on param's device, so that deciding them never stops the host. None: 1. (float64 ones
            are for the reference backend.)
        clip_value: a Python number > 0. None: no clipping by value.
        clip_coef: from clipping by norm. None: 1.
        found_inf: set to 1 when an element of grad is not finite or `skip` is set, else left alone.
        skip: not 0: nothing but found_inf is written. Must not be found_inf itself.
        rounding: how param is stored. "nearest": ties to even. "stochastic": unbiased, from
            Philox4x32-10 with key `seed` and counter (element index, `step`, `param_id`). "split":
            bf16 alone; param and `low` together hold an fp32 master exactly, and param is the
            master rounded to nearest. In fp32 all three are the same and `low` may be None.
        low: int16 tensor like param for "split", zeros to begin with; a sequence where param is.
        seed: 0 <= seed < 2**64. step: 0 <= step < 2**32.
        param_id: 0 <= param_id < 2**32; the default is the place in the sequence.
        offset: global index of param's first element, where param is a shard; default 0.
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend cannot run on param's device, or its kernel failed.
    """
    if isinstance(param, torch.Tensor):
        params, grads, lows = (param,), (grad,), (low,)
        offsets = (0 if offset is None else offset,)
        param_ids = (0 if param_id is None else param_id,)
    else:
        params = list(param)
        grads = checks.as_list("grad", grad, len(params))
        lows = checks.as_list("low", low, len(params), [None] * len(params))
        offsets = checks.as_list("offset", offset, len(params), [0] * len(params))
        param_ids = checks.as_list("param_id", param_id, len(params), range(len(params)))

    clip_value = checks.check_options(lr, weight_decay, clip_value, rounding, seed)
    checks.check_integer("step", step, 2**32)
    if not params:
        return
    checks.check_tensor("param", params[0], checks.WITH_FLOAT64)
    device = params[0].device
    checks.check_scalars(device, inv_scale, clip_coef, found_inf, skip)

    groups = {}
    for p, g, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
        checks.check_pair(p, g, device, checks.WITH_FLOAT64)
        checks.check_integer("offset", offset, 2**63)
        checks.check_integer("param_id", param_id, 2**32)
        rule = rounding
        if p.dtype in (torch.float32, torch.float64):
            rule = "nearest"
        elif rule == "split":
            checks.check_low(low, p)
        if not (p.is_contiguous() and g.is_contiguous()):
            g = checks.in_layout_of(p, g)
        key = (p.dtype, g.dtype, rule)
        groups.setdefault(key, []).append((p, g, low, offset, param_id))

    wide = checks.widest(*params, inv_scale, clip_coef, found_inf, skip)
    run = pick_backend(device, backend, wide).lomo_update_
    for (dtype, _, rule), rows in groups.items():
        once = float if dtype is torch.float64 else checks.float32
        run(
            *zip(*rows),
            lr=once(lr),
            decay=once(1.0 - lr * weight_decay),
            clip_value=once(clip_value),
            step=step,
            seed=seed,
            rounding=rule,
            inv_scale=inv_scale,
            clip_coef=clip_coef,
            found_inf=found_inf,
            skip=skip,
        )
    # Kernels write through addresses, which autograd cannot see: without this a graph that saved
    # param would use the new values and return wrong gradients in silence.
    torch.autograd.graph.increment_version(params)


def grad_sumsq_(sumsq, grad, *, inv_scale=None, found_inf=None, backend="auto"):
    """Squared norm and overflow of a gradient in one read, the same bits on every backend and run.

    `sumsq[k] = sum((grad[k] * inv_scale)**2)` in fp32, added in a fixed order that no grid, thread
    or backend changes (csrc/kernels.h, Note [Summation order]). The sum of finite elements may
    still overflow to infinity; `found_inf` looks at the elements themselves.

    Args:
        sumsq: contiguous float32 tensor of as many elements as there are gradients, overwritten.
            float64 on the reference backend alone, whose sums are then float64.
        grad: a dense tensor in fp32, bf16 or fp16, or a sequence of tensors.
        inv_scale: 1 / grad_scale, a one-element float32 tensor on grad's device. None: 1.
        found_inf: likewise; set to 1 when an element is not finite, else left alone.
        backend: "auto", "native", "triton" or "reference".

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend cannot run on grad's device, or its kernel failed.
    """
    grads = [grad] if isinstance(grad, torch.Tensor) else list(grad)
    checks.check_floats("sumsq", sumsq)
    if sumsq.numel() != len(grads):
        raise ValueError(
            f"sumsq must have one element per gradient ({len(grads)}), got {sumsq.numel()}"
        )
    checks.check_scalar("inv_scale", inv_scale, sumsq.device)
    checks.check_scalar("found_inf", found_inf, sumsq.device)
    groups = defaultdict(list)
    for k, g in enumerate(grads):
        checks.check_tensor("grad", g, checks.WITH_FLOAT64)
        if g.device != sumsq.device:
            raise ValueError(f"grad must be on sumsq's device {sumsq.device}, got {g.device}")
        dense = g if checks.is_dense(g) else g.contiguous()
        groups[g.dtype].append((k, dense))

    wide = checks.widest(sumsq, *grads, inv_scale, found_inf)
    run = pick_backend(sumsq.device, backend, wide).grad_sumsq_
    flat = sumsq.view(-1)
    for rows in groups.values():
        places, group = map(list, zip(*rows))
        out = flat if len(rows) == len(grads) else flat.new_empty(len(rows))
        run(out, group, inv_scale=inv_scale, found_inf=found_inf)
        if out is not flat:
            scatter_(flat, places, out)
    torch.autograd.graph.increment_version(sumsq)


def decide_(
    decisions,
    sumsq=None,
    *,
    found_inf=None,
    max_norm=None,
    out=None,
    growth_factor=2.0,
    backoff_factor=0.5,
    growth_interval=0,
    min_scale=1.0,
    backend="auto",
):
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
