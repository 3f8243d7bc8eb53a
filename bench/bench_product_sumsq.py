"""Squared norms of gradients that are products, of all matrices of decoder layers at once.

    python -m bench.bench_product_sumsq [--minutes 8] [--largest N]

The factors are read once. Of the Gram matrices [tokens, tokens] the tiles of one half are formed,
those of inputs that weights share once. Rivals are told by the same bytes and operations.
"""

import functools
import math

import torch

from lomo_kernels import ops
from lomo_kernels.ops.product_sumsq import TILE

from . import shapes, suite
from .bench_lomo_update import PLAIN, backends
from .llama import MODELS, Shape
from .timing import Rival

SMALLEST = 2**20  # elements of the factors of a whole layer


def flops(case):
    return case.tokens * (case.tokens + TILE) * sum(width for _, width in case.grad_shapes)


def ours(case, where, backend):
    def make(each):
        sumsq, magnitude = torch.zeros(2, len(case.matrices), device=where.device)
        pairs = [[pair] for pair in case.pairs(each)]
        return functools.partial(ops.product_sumsq_, sumsq, magnitude, pairs, backend=backend)

    # The tables of Triton's kernel lie in memory of the host that a replay would find in other use.
    return _rival(backend, case, make, captured=backend != "triton")


def one_by_one(case, where, backend):
    def make(each):
        sumsq, magnitude = torch.zeros(2, 1, device=where.device)
        pairs = case.pairs(each)

        def run():
            for pair in pairs:
                ops.product_sumsq_(sumsq, magnitude, [[pair]], backend=backend)

        return run

    return _rival(backend, case, make, "one by one")


def formed(norm, case, each):
    """Every gradient, in the dtype of its factors; with its norm, as autograd and clipping do."""
    pairs = case.pairs(each)

    def run():
        for left, right in pairs:
            grad = torch.mm(left.T, right)
            if norm:
                torch.linalg.vector_norm(grad, dtype=torch.float32)

    return run


def _rival(what, case, make, options=PLAIN, captured=False):
    return Rival(what, options, case.factors_nbytes, make, captured, flops(case))


def rivals(case, where):
    found = []
    for backend in backends(where.device):
        found += [ours(case, where, backend), one_by_one(case, where, backend)]
    return [
        *found,
        _rival("dW alone", case, functools.partial(formed, False, case), captured=True),
        _rival("dW, vector_norm", case, functools.partial(formed, True, case), captured=True),
    ]


def jobs(where):
    def job(rank, name, *of_layers, shape=None):
        case = shapes.products_of(name, shape or MODELS[name], *of_layers)
        job = suite.timed(rank, where, "product_sumsq", case, rivals)
        return job._replace(numel=sum(map(math.prod, case.grad_shapes)))  # no weight is there

    if where.largest < SMALLEST:  # to try every path
        yield job(1, "width 32", 16, 1, shape=Shape(32, 48, 1, 4, 4, 0))
        return
    if not where.gpu:
        yield job(4, "width 1024", 128, 1, shape=Shape(1024, 2816, 1, 8, 8, 0))
        return
    yield job(1, "LLaMA-7B", 512, 32)
    yield job(3, "LLaMA-7B", 2048, 8)
    yield job(6, "Llama-3-8B", 512, 8)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
