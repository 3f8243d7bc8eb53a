"""Norms of gradients that are products, from Gram matrices; against the products in float64."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from backends import BF16, F16, F32, shifted
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lomo_kernels import ops
from lomo_kernels.ops import factors, product_sumsq

pytestmark = pytest.mark.filterwarnings(  # numpy, under Triton's interpreter
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = pytest.mark.parametrize("backend", ["reference", "native", "triton"])
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
F64 = torch.float64
# Of the magnitude: products of up to 300 numbers and sums of up to 128 terms in fp32.
TOLERANCE = 1e-6


def pair(tokens, rows, cols, dtype):
    return torch.randn(tokens, rows).to(dtype), torch.randn(tokens, cols).to(dtype)


def signs(tokens, rows, cols, dtype):
    """Factors whose Gram matrices and whose terms' sums are exact in fp32."""
    left, right = (torch.randint(-1, 2, (tokens, n)).to(dtype) for n in (rows, cols))
    return left, right


def measured(backend, products, inv_scale=None):
    """(squared norms, magnitudes, found_inf)"""
    products = [[(left.to(DEVICE), right.to(DEVICE)) for left, right in each] for each in products]
    sumsq, magnitude = (torch.full((len(products),), math.nan, device=DEVICE) for _ in range(2))
    found = torch.zeros(1, device=DEVICE)
    scale = None if inv_scale is None else torch.tensor([inv_scale], device=DEVICE)
    ops.product_sumsq_(
        sumsq, magnitude, products, inv_scale=scale, found_inf=found, backend=backend
    )
    return sumsq.cpu(), magnitude.cpu(), found.item()


def rows_of(pairs):
    return next((left.shape[1] for left, _ in pairs if left.ndim == 2), 1 + max(
        (int(left.max()) for left, _ in pairs if left.numel()), default=0
    ))  # fmt: skip


def wanted(pairs, inv_scale=1.0):
    """In float64: the product's squared norm, and the sum of magnitudes of the Gram matrices."""
    lefts = [
        left if left.ndim == 2 else F.one_hot(left.long(), rows_of(pairs)) for left, _ in pairs
    ]
    left = torch.cat([x.double() for x in lefts])
    right = torch.cat([x.double() for _, x in pairs])
    terms = (left @ left.T) * (right @ right.T)
    square = (left.T @ right).square().sum()
    return square * inv_scale**2, terms.abs().sum() * inv_scale**2


def check(backend, products, inv_scale=1.0):
    sumsq, magnitude, found = measured(backend, products, inv_scale)
    for got, size, pairs in zip(sumsq, magnitude, products):
        total, sizes = wanted(pairs, inv_scale)
        assert abs(got - total) <= TOLERANCE * sizes
        assert abs(size - sizes) <= TOLERANCE * sizes
    assert found == 0.0
    return sumsq


@BACKENDS
@DTYPES
@pytest.mark.parametrize("tokens", [0, 1, 7, 127, 128, 129, 300])
def test_squared_norms_of_products(backend, dtype, tokens):
    sizes = ((1, 1), (7, 33), (64, 16), (130, 257))
    check(backend, [[pair(tokens, *size, dtype)] for size in sizes], inv_scale=0.25)


@BACKENDS
@DTYPES
def test_exact_where_fp32_is(backend, dtype):
    """Several uses, none of them a whole number of tiles; embeddings; a tied head: all at once."""
    numbers = torch.tensor([3, 0, 3, 4, 4, 4, 9])
    products = [
        [signs(150, 17, 40, dtype), signs(1, 17, 40, dtype), signs(0, 17, 40, dtype)],
        [signs(129, 10, 8, dtype), (numbers, signs(7, 1, 8, dtype)[1])],
        [(numbers.int(), signs(7, 1, 8, dtype)[1]), (numbers[:3], signs(3, 1, 8, F32)[1])],
        [signs(64, 16, 16, dtype)],
    ]
    sumsq, magnitude, _ = measured(backend, products)
    for got, size, pairs in zip(sumsq, magnitude, products):
        total, sizes = wanted(pairs)
        assert got == total.float()
        assert size == sizes.float()


@BACKENDS
def test_dtypes_side_by_side(backend):
    products = [
        [pair(20, 9, 8, dtype), pair(30, 9, 8, dtype)] for dtype in (F32, BF16, F16, BF16, F64)
        if dtype is not F64 or F64 in ops.DTYPES
    ]  # fmt: skip
    check(backend, products)


@BACKENDS
@DTYPES
def test_factors_that_lie_anywhere(backend, dtype):
    left, right = pair(60, 32, 48, dtype)
    wider = pair(60, 100, 5, dtype)[0]
    products = [
        [(wider[:, 3:35], right)],
        [(left, shifted(right.flatten(), 3, "cpu").view(60, 48))],
        [(left.T.contiguous().T, right.T.contiguous().T)],
        [(left[:1].expand(60, 32), right[:, :1].expand(60, 48))],
        [(left[::2], right[30:])],
    ]
    check(backend, products)


@BACKENDS
def test_inputs_that_several_weights_share_are_squared_once(backend, monkeypatch):
    """Queries, keys and values: one product of the inputs, one of each gradient."""
    calls, real = [], factors.matmul
    monkeypatch.setattr(factors, "matmul", lambda a, b: calls.append(a.shape) or real(a, b))
    _, x = pair(100, 1, 64, BF16)
    other = x.clone()
    rows = (32, 16, 16)
    shared = [[(pair(100, n, 1, BF16)[0], x)] for n in rows]
    alone = [[(left, other)] for ((left, _),) in shared[:1]]
    sumsq = check(backend, [shared[0], *alone, *shared[1:]])
    one_by_one = torch.cat([measured(backend, [each])[0] for each in shared])
    assert torch.equal(sumsq[[0, 2, 3]], one_by_one)
    if backend == "triton":
        assert not calls
        from lomo_kernels.ops.triton.product_sumsq import tables

        programs, _, partials = tables([((0, 2, 3), shared), ((1,), alone)], 128)
        assert (programs, partials) == ([1, 1], 4)
    else:
        together, separate = 1 + 3 + 2, 3 * 2
        assert len(calls) == together + separate


@BACKENDS
def test_shared_inputs_of_several_uses(backend):
    """Two layers' worth of uses: the same inputs in the same order, or in another."""
    x, y = pair(130, 1, 24, BF16)[1], pair(20, 1, 24, BF16)[1]
    products = []
    for rows, inputs in ((16, (x, y)), (5, (x, y)), (16, (y, x)), (33, (x, y))):
        products.append([(pair(len(each), rows, 1, BF16)[0], each) for each in inputs])
    check(backend, products)


@BACKENDS
def test_views_of_one_memory_are_not_taken_for_one_another(backend):
    left, right = pair(40, 16, 32, BF16)
    halves = [[(left, right[:, :16])], [(left, right[:, 16:])], [(left[:20], right[:20, :16])]]
    check(backend, halves)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor) and each._base is None and not each._is_view():
                self.numel = max(self.numel, each.numel())
        return result


@BACKENDS
def test_no_matrix_of_all_tokens_is_stored(backend):
    products = [[pair(700, 8, 8, F32)]]
    with Largest() as largest:
        check_only = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
        on_device = [[tuple(x.to(DEVICE) for x in each) for each in products[0]]]
        ops.product_sumsq_(*check_only, on_device, backend=backend)
    tile = 1024 if DEVICE == "cuda" else product_sumsq.TILE
    assert 0 < largest.numel <= max(tile**2, 700 * 8)


@BACKENDS
def test_terms_that_cancel_show_in_the_magnitude(backend):
    """A large common part of the inputs that the gradients cancel, which fp32 cannot resolve."""
    right = 1000 * torch.randn(1, 64) + torch.randn(256, 64)
    left = torch.randn(256, 32)
    left -= left.mean(0)
    (total,), (magnitude,), _ = measured(backend, [[(left, right)]])
    assert magnitude / total > 256
    exact, sizes = wanted([(left, right)])
    assert abs(total - exact) <= TOLERANCE * sizes
    (total,), (magnitude,), _ = measured(backend, [[(left, right - right.mean(0))]])
    assert magnitude / total < 256


@BACKENDS
def test_a_squared_norm_is_not_negative(backend):
    """Gradients that add up to nothing, of one input: what rounding leaves of 0, on either side."""
    products = []
    for _ in range(20):
        left, right = pair(60, 40, 50, F32)
        products.append([(left - left.mean(0), right[:1].repeat(60, 1))])
    sumsq, magnitude, _ = measured(backend, products)
    assert ((sumsq >= 0.0) & (sumsq <= TOLERANCE * magnitude)).all()
    assert (sumsq == 0.0).any()  # those that would have been less


@BACKENDS
@DTYPES
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_reported(backend, dtype, bad, side):
    products = [[pair(130, 9, 8, dtype)] for _ in range(3)]
    assert measured(backend, products)[2] == 0.0
    products[1][0][side][129, 7] = bad
    sumsq, _, found = measured(backend, products)
    assert found == 1.0
    assert sumsq.isfinite().tolist() == [True, False, True]


@BACKENDS
def test_found_inf_is_left_alone_and_may_be_left_out(backend):
    sumsq, magnitude, found = (torch.ones(1, device=DEVICE) for _ in range(3))
    products = [[tuple(x.to(DEVICE) for x in pair(3, 2, 2, F32))]]
    ops.product_sumsq_(sumsq, magnitude, products, found_inf=found, backend=backend)
    assert found == 1.0
    before = sumsq.clone()
    ops.product_sumsq_(sumsq, magnitude, products, backend=backend)
    assert torch.equal(sumsq, before)


@BACKENDS
def test_right_where_torch_s_gradient_is(backend):
    layer = torch.nn.Linear(30, 20, bias=False)
    x = torch.randn(50, 30)
    y = layer(x)
    y.retain_grad()
    y.square().mean().backward()
    (total,), _, _ = measured(backend, [[(y.grad, x)]])
    assert total.sqrt().item() == pytest.approx(layer.weight.grad.norm().item(), rel=1e-6)


@BACKENDS
def test_autograd_is_told_of_the_write(backend):
    sumsq, magnitude = torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE)
    versions = sumsq._version, magnitude._version
    products = [[tuple(x.to(DEVICE) for x in pair(3, 2, 2, F32))]]
    ops.product_sumsq_(sumsq, magnitude, products, backend=backend)
    assert sumsq._version > versions[0]
    assert magnitude._version > versions[1]


def test_no_weight_is_nothing_to_do():
    ops.product_sumsq_(torch.empty(0), torch.empty(0), [])


@pytest.mark.parametrize(
    ("tokens", "rows", "cols"),
    [(128, 64, 640), (256, 1024, 512), (512, 512, 512), (640, 1024, 640), (512, 128, 4096)],
)
def test_the_rule_counts_what_is_multiplied(tokens, rows, cols):
    """Tokens that are whole tiles: the rule is the count."""
    left, right = torch.zeros(tokens, rows), torch.zeros(tokens, cols)
    with FlopCounterMode(display=False) as gram:
        ops.product_sumsq_(torch.zeros(1), torch.zeros(1), [[(left, right)]], backend="reference")
    with FlopCounterMode(display=False) as product:
        left.T @ right
    cheaper = gram.get_total_flops() < product.get_total_flops()
    assert ops.gram_is_cheaper(tokens, rows, cols) == cheaper


def test_the_break_even_is_at_twice_the_tokens_of_whole_matrices():
    for rows, cols in ((4096, 4096), (11008, 4096), (4096, 11008), (32000, 4096)):
        whole = rows * cols // (rows + cols)  # where two full Gram matrices cost what dW costs
        assert ops.gram_is_cheaper(2 * whole - product_sumsq.TILE - 1, rows, cols)
        assert not ops.gram_is_cheaper(2 * whole - product_sumsq.TILE + 2, rows, cols)


def ones(*shape, dtype=F32, **kwargs):
    return torch.ones(*shape, dtype=dtype, **kwargs)


PAIR = (ones(2, 3), ones(2, 4))
REFUSED = {
    "sumsq is no tensor": ({"sumsq": 3.0}, TypeError, "sumsq must be a tensor, got float"),
    "sumsq of another dtype": (
        {"sumsq": ones(1, dtype=BF16)}, TypeError, "sumsq must be contiguous float32",
    ),
    "sumsq of two elements": (
        {"sumsq": ones(2)}, ValueError, "sumsq must have one element per weight (1), got 2",
    ),
    "magnitude of another dtype": (
        {"magnitude": ones(1, dtype=BF16)}, TypeError, "magnitude must be contiguous float32",
    ),
    "magnitude of two elements": (
        {"magnitude": ones(2)}, ValueError, "magnitude must have one element per weight (1), got 2",
    ),
    "magnitude elsewhere": (
        {"magnitude": ones(1, device="meta")}, ValueError,
        "magnitude must be on sumsq's device cpu, got meta",
    ),
    "products is a tensor": (
        {"products": ones(1)}, TypeError,
        "products must be a sequence with a sequence of pairs for each weight, got Tensor",
    ),
    "a weight without pairs": (
        {"products": [[]]}, ValueError,
        "products must have at least one pair (left, right), got none",
    ),
    "a weight that is a pair": (
        {"products": [PAIR]}, TypeError, "products must hold pairs (left, right), got Tensor",
    ),
    "rows that differ": (
        {"products": [[PAIR, (ones(2, 5), PAIR[1])]]}, ValueError,
        "left must have shape (2, 3), got (2, 5)",
    ),
    "columns that differ": (
        {"products": [[PAIR, (PAIR[0], ones(2, 5))]]}, ValueError,
        "right must have shape [tokens, 4], got (2, 5)",
    ),
    "two dtypes in a pair": (
        {"products": [[(ones(2, 3, dtype=BF16), PAIR[1])]]}, TypeError,
        "left must have right's dtype torch.float32, got torch.bfloat16",
    ),
    "factors elsewhere": (
        {"products": [[tuple(x.to("meta") for x in PAIR)]]}, ValueError,
        "left must be on cpu, got meta",
    ),
    "inv_scale is a number": (
        {"inv_scale": 2.0}, TypeError, "inv_scale must be a one-element float32 tensor",
    ),
    "found_inf of two elements": (
        {"found_inf": ones(2)}, TypeError, "found_inf must be a one-element float32 tensor",
    ),
    "unknown backend": ({"backend": "none"}, ValueError, "backend must be 'auto' or one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    changes, error, message = REFUSED[case]
    arguments = {"sumsq": ones(1), "magnitude": ones(1), "products": [[PAIR]]} | changes
    with pytest.raises(error, match=re.escape(message)):
        ops.product_sumsq_(
            arguments.pop("sumsq"), arguments.pop("magnitude"), arguments.pop("products"),
            **arguments,
        )  # fmt: skip
