"""The contract of the fused update; see the package's docstring."""

from typing import Any

import torch
from torch import Tensor

from . import checks
from .annotations import Backend, Integers, Lows, Rounding, Tensors
from .backends import pick_backend
from .lists import grouped


def lomo_update_(
    param: Tensors,
    grad: Tensors,
    *,
    lr: float,
    weight_decay: float = 0.0,
    inv_scale: Tensor | None = None,
    clip_value: float | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    skip: Tensor | None = None,
    rounding: Rounding = "nearest",
    low: Lows = None,
    seed: int = 0,
    step: int = 0,
    param_id: Integers = None,
    offset: Integers = None,
    backend: Backend = "auto",
) -> None:
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
        params, lows = [param], [low]
        grads: list[Any] = [grad]
        offsets = [0 if offset is None else offset]
        param_ids = [0 if param_id is None else param_id]
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

    rows, keys = [], []
    for p, g, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
        checks.check_pair(p, g, device, checks.WITH_FLOAT64)
        checks.check_integer("offset", offset, 2**63)
        checks.check_integer("param_id", param_id, 2**32)
        rule = checks.rounding_of(p, low, rounding)
        if not (p.is_contiguous() and g.is_contiguous()):
            g = checks.in_layout_of(p, g)
        rows.append((p, g, low, offset, param_id))
        keys.append((p.dtype, g.dtype, rule))

    wide = checks.widest(*params, inv_scale, clip_coef, found_inf, skip)
    run = pick_backend(device, backend, wide).lomo_update_
    for (dtype, _, rule), group in grouped(keys, rows).items():
        once = float if dtype is torch.float64 else checks.float32
        run(
            *zip(*group),
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
