"""The update of a weight whose gradient is a product, beside forming the gradient.

    python -m bench.bench_product_update [--minutes 8] [--largest N]

An element of a 16-bit weight moves 4 bytes, read and written, and the factors are read once; the
product is 2 operations for each element and token. Rivals are told by the same bytes.
"""

import functools

import torch

from lomo_kernels import ops

from . import shapes, suite
from .bench_lomo_update import ALL, LR, PLAIN, backends, options_of
from .timing import Rival


def traffic(case, options):
    extra = 4 if "split" in options else 0
    return case.numel * (2 * case.dtype.itemsize + extra) + case.factors_nbytes


def flops(case):
    return 2 * case.tokens * case.numel


def methods(device):
    """(backend, method) that run here; first what runs where nobody names one."""
    found = backends(device)
    epilogue = [("triton", "epilogue")] if "triton" in found else []
    return [("auto", "auto"), *epilogue, *((backend, "blocks") for backend in found)]


def ours(case, where, backend, method, name):
    arguments = options_of(where.device)[name]

    def make(each):
        (param,) = each.params
        low = torch.zeros_like(param, dtype=torch.int16) if "split" in name else None
        return functools.partial(
            ops.product_update_, param, case.pairs(each), lr=LR, low=low, backend=backend,
            method=method, **arguments,
        )  # fmt: skip

    options = name if method == "auto" else f"{method}, {name}"
    return Rival(backend, options, traffic(case, name), make, captured=True, flops=flops(case))


def alone(case, each):
    """The product alone, in the weight's dtype: no update."""
    ((left, right),), (param,) = case.pairs(each), each.params
    out = torch.empty_like(param)
    return lambda: torch.mm(left.T, right, out=out)


def formed(case, each):
    """What autograd and the fused update do: the gradient is written and read."""
    ((left, right),), (param,) = case.pairs(each), each.params

    def run():
        ops.lomo_update_(param, torch.mm(left.T, right), lr=LR)

    return run


def add(case, each):
    ((left, right),), (param,) = case.pairs(each), each.params
    return lambda: param.add_(torch.mm(left.T, right), alpha=-LR)


def rivals(case, where):
    names = [PLAIN, ALL]
    names += ["all, stochastic"] if case.dtype.itemsize == 2 else []
    names += ["all, split"] if case.dtype is torch.bfloat16 else []
    found = [ours(case, where, *how, name) for how in methods(where.device) for name in names]
    others = {"dW alone": alone, "dW, lomo_update_": formed, "dW, p.add_": add}
    return found + [
        Rival(what, PLAIN, traffic(case, PLAIN), functools.partial(make, case), True, flops(case))
        for what, make in others.items()
    ]


def jobs(where):
    square, large, others = shapes.chosen(where.largest)

    def job(rank, case, tokens, dtype=torch.bfloat16):
        (matrix,) = case.shapes
        case = shapes.Products(
            f"{case.name}, {tokens} tokens", ((*matrix, 0),), tokens, dtype, updated=True
        )
        return suite.timed(rank, where, "product_update", case, rivals)

    if square.numel > where.largest:  # to try every path
        yield job(1, shapes.Case("small 64x48", ((64, 48),)), 32)
        return
    # A product of 16-bit factors in fp32 is slow on a CPU: there it is told with few tokens.
    first, *more = (512, 2048, 8192) if where.gpu else (64,)
    for case in (square, large):
        if len(case.shapes[0]) == 2:
            yield job(1, case, first)
            for tokens in more:
                yield job(3, case, tokens)
    yield job(6, square, first, torch.float32)
    for case in others:
        if where.gpu and len(case.shapes[0]) == 2:
            yield job(6, case, first)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
