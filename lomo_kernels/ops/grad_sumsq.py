"""The contract of a gradient's squared norm; see the package's docstring."""

import torch
from torch import Tensor

from . import checks
from .annotations import Backend, Tensors
from .backends import pick_backend
from .lists import grouped, scatter_


def grad_sumsq_(
    sumsq: Tensor,
    grad: Tensors,
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
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
    dense = []
    for g in grads:
        checks.check_tensor("grad", g, checks.WITH_FLOAT64)
        if g.device != sumsq.device:
            raise ValueError(f"grad must be on sumsq's device {sumsq.device}, got {g.device}")
        dense.append(g if checks.is_dense(g) else g.contiguous())

    wide = checks.widest(sumsq, *grads, inv_scale, found_inf)
    run = pick_backend(sumsq.device, backend, wide).grad_sumsq_
    flat = sumsq.view(-1)
    for places in grouped(g.dtype for g in grads).values():
        out = flat if len(places) == len(grads) else flat.new_empty(len(places))
        run(out, [dense[k] for k in places], inv_scale=inv_scale, found_inf=found_inf)
        if out is not flat:
            scatter_(flat, places, out)
    torch.autograd.graph.increment_version(sumsq)
