"""The update of AdaLomo, beside others of Adafactor's rule.

    python -m bench.bench_adalomo [--minutes 8] [--largest N]

An element moves 10 bytes with 16-bit parameters and gradients: two sweeps over the gradient, then
one that reads both and writes the parameter. "split" moves 4 more.
"""

import functools

import torch

from lomo_kernels import ops

from . import peers, shapes, suite
from .bench_lomo_update import ALL, PLAIN, backends, lows, options_of
from .timing import Rival

LR = 1e-3


def traffic(case, options):
    size, grad = case.sizes
    return case.numel * (2 * size + 3 * grad + (4 if "split" in options else 0))


def ours(case, where, backend, name):
    arguments = options_of(where.device)[name]

    def make(each):
        states = [ops.adalomo_state(p) for p in each.params]
        sums = [ops.adalomo_sums_(p, backend=backend) for p in each.params]
        return functools.partial(
            ops.adalomo_update_,
            *each,
            states,
            lr=LR,
            sums=sums,
            backend=backend,
            **arguments,
            **lows(each, arguments),
        )

    return Rival(backend, name, traffic(case, name), make, captured=True)


def rivals(case, where):
    names = [PLAIN, ALL, "all, stochastic", "all, split"]
    if case.dtype is torch.float32:
        names = names[:2]
    elif case.dtype is torch.float16:
        names = names[:3]
    found = [ours(case, where, b, name) for b in backends(where.device) for name in names]
    alike = {
        "transformers' Adafactor": peers.transformers_adafactor,
        "torch's Adafactor": peers.torch_adafactor, "lomo-optim": peers.lomo_optim_adalomo,
    }  # fmt: skip
    return found + [
        Rival(what, PLAIN, traffic(case, PLAIN), functools.partial(make, lr=LR))
        for what, make in alike.items()
    ]


def jobs(where):
    square, large, others = shapes.chosen(where.largest)

    def job(rank, case):
        return suite.timed(rank, where, "adalomo", case, rivals)

    for case in (square, large):
        yield job(2, case)
        for dtype in (torch.float16, torch.float32):
            yield job(6, case._replace(dtype=dtype, grad_dtype=dtype))
    yield job(4, shapes.experts(where.largest))
    for case in others:
        yield job(7, case)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
