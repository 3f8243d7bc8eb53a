"""Squared norm and overflow of a gradient, beside what else gives a norm.

    python -m bench.bench_grad_sumsq [--minutes 8] [--largest N]

An element moves the bytes of its gradient: one read.
"""

import functools

import torch

from lomo_kernels import ops

from . import peers, shapes, suite
from .bench_lomo_update import ALL, PLAIN, backends, captured, scalars
from .timing import Rival


def ours(case, where, backend, name):
    known = scalars(where.device)
    arguments = {k: known[k] for k in ("inv_scale", "found_inf")} if name == ALL else {}

    def make(each):
        sumsq = torch.zeros(len(each.grads), device=where.device)
        return functools.partial(ops.grad_sumsq_, sumsq, each.grads, backend=backend, **arguments)

    return Rival(backend, name, traffic(case), make, captured(case, backend))


def traffic(case):
    return case.numel * case.sizes[1]


def rivals(case, where):
    found = [ours(case, where, b, name) for b in backends(where.device) for name in (PLAIN, ALL)]
    alike = {
        "vector_norm": peers.vector_norm, "foreach": peers.foreach_norm,
        "lomo-optim's": peers.float_norm,
    }  # fmt: skip
    return found + [
        Rival(what, PLAIN, traffic(case), make, captured=True) for what, make in alike.items()
    ]


def jobs(where):
    square, large, _ = shapes.chosen(where.largest)

    def job(rank, case):
        return suite.timed(rank, where, "grad_sumsq", case, rivals)

    yield job(1, square)
    yield job(0, large)
    yield job(4, shapes.experts(where.largest))
    for case in (square, large):
        for dtype in (torch.float16, torch.float32):
            yield job(6, case._replace(dtype=dtype, grad_dtype=dtype))
    for case in shapes.sweep():
        yield job(8, case)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
