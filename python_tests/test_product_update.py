"""The update of a gradient that is a product: the sum over tokens, and what is made of it."""

import contextlib
import math
import re

import pytest
import torch
import torch.nn.functional as F
from backends import BF16, F16, F32, bits, format_id, random_bits, same_bits, shifted

from lomo_kernels import ops
from lomo_kernels.ops import crossings, factors
from lomo_kernels.ops.product_update import ERROR_PER_TOKEN

pytestmark = pytest.mark.filterwarnings(  # numpy, under Triton's interpreter
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOW = pytest.mark.parametrize(
    ("backend", "method"),
    [
        ("reference", "blocks"), ("native", "blocks"), ("triton", "blocks"),
        ("triton", "epilogue"),
    ],
    ids=lambda value: value,
)  # fmt: skip
DTYPES = (F32, BF16, F16)
FORMATS = [
    (param, factor, rounding)
    for param in DTYPES
    for factor in DTYPES
    for rounding in ("nearest", "stochastic", "split")
    if rounding == "nearest" or param is BF16 or (param is F16 and rounding == "stochastic")
]
# Tokens, rows, columns: none, one, around the edges of a tile of 128 and of a step of 64 tokens.
SHAPES = ((0, 5, 7), (1, 1, 1), (3, 130, 17), (65, 16, 48), (130, 129, 136), (2, 0, 3), (2, 3, 0))
EVERYTHING = {
    "lr": 0.013,
    "weight_decay": 0.1,
    "inv_scale": 1 / 16,
    "clip_value": 0.2,
    "clip_coef": 0.37,
    "seed": 2**63 + 12345,
    "step": 77,
    "param_id": 2**31 + 5,
}


def whole_numbers(dtype, *shape):
    """Factors whose sums of products are exact in fp32, whatever their order."""
    return torch.randint(-4, 5, shape).to(dtype)


def options_on(device, options):
    return {
        name: torch.tensor([value], device=device)
        if name in ("inv_scale", "clip_coef", "found_inf", "skip")
        else value
        for name, value in options.items()
    }


def updated(backend, method, param, products, low=None, **options):
    """(param, low, found_inf) after one update of copies."""
    param = param.to(DEVICE, copy=True)
    low = None if low is None else low.to(DEVICE, copy=True)
    products = [(left.to(DEVICE), right.to(DEVICE)) for left, right in products]
    options = options_on(DEVICE, {"found_inf": 0.0, **options})
    ops.product_update_(param, products, low=low, backend=backend, method=method, **options)
    return param.cpu(), None if low is None else low.cpu(), options["found_inf"].item()


def expected(param, products, low=None, **options):
    """`lomo_update_` with a gradient that was added up in float64 and rounded to fp32."""
    param, low = param.clone(), None if low is None else low.clone()
    options = options_on("cpu", {"found_inf": 0.0, **options})
    grad = sum(
        (left if left.ndim == 2 else F.one_hot(left.long(), len(param))).double().T @ right.double()
        for left, right in products
    ).float()
    ops.lomo_update_(param, grad, low=low, backend="reference", **options)
    return param, low, options["found_inf"].item()


def check(backend, method, param, products, low=None, **options):
    got = updated(backend, method, param, products, low, **options)
    want = expected(param, products, low, **options)
    assert same_bits(got[0], want[0])
    assert low is None or torch.equal(got[1], want[1])
    assert got[2] == want[2]
    return got


def low_for(param, rounding):
    if rounding == "split" and param.dtype is BF16:
        return torch.randint(-(2**15), 2**15, param.shape, dtype=torch.int16)
    return None


@HOW
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_update_of_the_sum_in_every_bit(backend, method, format, shape):
    (tokens, rows, cols), (dtype, factor, rounding) = shape, format
    param = torch.randn(rows, cols).to(dtype)
    pair = whole_numbers(factor, tokens, rows), whole_numbers(factor, tokens, cols)
    low = low_for(param, rounding)
    check(backend, method, param, [pair], low, lr=0.01, rounding=rounding)
    check(backend, method, param, [pair], low, rounding=rounding, **EVERYTHING)


@HOW
@pytest.mark.parametrize("factor", DTYPES, ids=str)
def test_one_token_of_any_bits(backend, method, factor):
    """Every pattern of the factors' formats. A product is one rounding; NaN, infinity and what
    overflows leave their elements alone."""
    rows, cols = 70, 60
    left, right = random_bits(rows, factor), random_bits(cols, factor)
    if factor is not F16:  # products below the normal numbers are nobody's promise on a GPU
        small = 2.0**-62
        left = torch.where(left.abs() < small, small, left)
        right = torch.where(right.abs() < small, small, right)
    param = torch.randn(rows, cols).to(BF16)
    param[0] = -0.0
    pair = (left[None], right[None])
    _, _, found = check(backend, method, param, [pair], lr=0.1)
    assert found == 1.0


@HOW
@pytest.mark.parametrize("factor", DTYPES, ids=str)
def test_subnormal_factors_count(backend, method, factor):
    tiny = torch.tensor(1, dtype=torch.int32 if factor is F32 else torch.int16).view(factor)
    large = torch.tensor(2.0**120 if factor is not F16 else 2.0**14).to(factor)
    left, right = tiny.expand(2, 16), large.expand(2, 16)
    got, _, found = updated(backend, method, torch.zeros(16, 16), [(left, right)], lr=1.0)
    assert (got == -2 * tiny.double() * large.double()).all()
    assert found == 0.0


@HOW
@pytest.mark.parametrize("factor", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 100, 700])
def test_the_sum_is_within_its_tolerance(backend, method, factor, tokens):
    left, right = torch.randn(tokens, 40).to(factor), torch.randn(tokens, 50).to(factor)
    got, _, _ = updated(backend, method, torch.zeros(40, 50), [(left, right)], lr=1.0)
    sizes = left.double().abs().T @ right.double().abs()
    error = (got + left.double().T @ right.double()).abs()
    assert (error <= ERROR_PER_TOKEN * tokens * sizes).all()


@HOW
def test_several_products_add_up(backend, method):
    rows, cols = 40, 33
    param = torch.randn(rows, cols).to(BF16)
    products = [
        (whole_numbers(BF16, tokens, rows), whole_numbers(BF16, tokens, cols))
        for tokens in (3, 0, 129, 1)
    ]
    got = check(backend, method, param, products, rounding="stochastic", **EVERYTHING)
    together = [tuple(torch.cat(each) for each in zip(*products))]
    assert same_bits(got[0], expected(param, together, rounding="stochastic", **EVERYTHING)[0])


@HOW
@pytest.mark.parametrize("factor", DTYPES, ids=str)
def test_factors_that_lie_anywhere(backend, method, factor):
    """Columns of a wider matrix, views that start at odd addresses, transposed, expanded ones."""
    tokens, rows, cols = 20, 48, 32
    param = torch.randn(rows, cols).to(BF16)
    left, right = whole_numbers(factor, tokens, rows), whole_numbers(factor, tokens, cols)
    wider = whole_numbers(factor, tokens, 3 * rows)
    views = [
        (wider[:, 5 : 5 + rows], right),
        (left, shifted(right.flatten(), 3, "cpu").view(tokens, cols)),
        (left.T.contiguous().T, right.T.contiguous().T),
        (left[:1].expand(tokens, rows), right[:, :1].expand(tokens, cols)),
        (left.flip(0)[::2], right[::2]),
    ]
    for each in views:
        check(backend, method, param, [each], lr=0.01)
    for each in views:
        check(backend, method, param, [(left, right), each], lr=0.01)


@HOW
@pytest.mark.parametrize("shift", [1, 3, 8])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
def test_params_that_start_anywhere(backend, method, shift, rounding):
    rows, cols = 20, 40
    values, low = torch.randn(rows * cols).to(BF16), torch.zeros(rows * cols, dtype=torch.int16)
    pair = whole_numbers(BF16, 5, rows), whole_numbers(BF16, 5, cols)
    param = shifted(values, shift, DEVICE).view(rows, cols)
    rest = shifted(low, shift, DEVICE).view(rows, cols) if rounding == "split" else None
    ops.product_update_(
        param, [tuple(x.to(DEVICE) for x in pair)], low=rest, lr=0.01, rounding=rounding,
        backend=backend, method=method,
    )  # fmt: skip
    first = low.view(rows, cols) if rounding == "split" else None
    want = expected(values.view(rows, cols), [pair], first, lr=0.01, rounding=rounding)
    assert same_bits(param, want[0])
    assert rest is None or torch.equal(rest.cpu(), want[1])


@HOW
@pytest.mark.parametrize("cols", [16, 20, 33])
@pytest.mark.parametrize("offset", [0, 8, 5, 2**34 + 3, 2**40])
def test_rows_draw_the_bits_of_the_whole(backend, method, cols, offset):
    rows, cut = 24, 9
    param = torch.randn(rows, cols).to(BF16)
    left, right = whole_numbers(BF16, 6, rows), whole_numbers(BF16, 6, cols)
    options = {**EVERYTHING, "rounding": "stochastic"}
    whole, _, _ = check(backend, method, param, [(left, right)], **options, offset=offset)
    for rows_of, start in ((slice(cut), 0), (slice(cut, None), cut * cols)):
        part, _, _ = updated(
            backend, method, param[rows_of], [(left[:, rows_of], right)],
            **options, offset=offset + start,
        )  # fmt: skip
        assert same_bits(part, whole[rows_of])


@HOW
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
def test_what_is_not_finite_is_left_alone_and_reported(backend, method, rounding):
    rows, cols = 130, 40
    param = random_bits(rows * cols, BF16).view(rows, cols)
    low = low_for(param, rounding)
    left, right = whole_numbers(BF16, 9, rows), whole_numbers(BF16, 9, cols) + 5.0
    for bad in (math.nan, math.inf, -math.inf):
        left[4, 7], left[0, 129] = bad, bad
        got, rest, found = check(
            backend, method, param, [(left, right)], low, rounding=rounding, **EVERYTHING
        )
        assert found == 1.0
        for row in (7, 129):
            assert torch.equal(bits(got)[row], bits(param)[row])  # also the payload of a NaN
            assert low is None or torch.equal(rest[row], low[row])


@HOW
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
@pytest.mark.parametrize("shape", [(3, 20, 24), (0, 3, 5), (3, 0, 5)], ids=str)
def test_skip_writes_nothing_but_the_flag(backend, method, rounding, shape):
    tokens, rows, cols = shape
    param = random_bits(rows * cols, BF16).view(rows, cols)
    low = low_for(param, rounding)
    pair = whole_numbers(BF16, tokens, rows), whole_numbers(BF16, tokens, cols)
    options = {**EVERYTHING, "rounding": rounding}
    got, rest, found = updated(backend, method, param, [pair], low, **options, skip=1.0)
    assert torch.equal(bits(got), bits(param))
    assert low is None or torch.equal(rest, low)
    assert found == 1.0
    assert check(backend, method, param, [pair], low, **options, skip=0.0)[2] == 0.0


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("block", [1, 40, 1 << 22])
def test_embeddings_and_blocks_of_any_size(backend, block, monkeypatch):
    """A tied weight: used by a product and as an embedding, some rows twice and some not at all."""
    monkeypatch.setattr(factors, "BLOCK", block)
    rows, cols = 13, 20
    param = torch.randn(rows, cols).to(BF16)
    numbers = torch.tensor([3, 3, 0, 12, 3])
    products = [
        (numbers, whole_numbers(BF16, 5, cols)),
        (whole_numbers(F32, 4, rows), whole_numbers(F32, 4, cols)),
        (numbers.int()[:2], whole_numbers(BF16, 2, cols)),
    ]
    check(backend, "auto", param, products, rounding="stochastic", **EVERYTHING)
    check(backend, "auto", param, products[:1], lr=0.1)


@HOW
def test_equal_to_autograd_and_sgd(backend, method):
    layer = torch.nn.Linear(30, 20, bias=False)
    x = torch.randn(50, 30)
    y = layer(x)
    y.retain_grad()
    y.square().mean().backward()
    got, _, _ = updated(backend, method, layer.weight.detach(), [(y.grad, x)], lr=0.5)
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    torch.testing.assert_close(got, layer.weight.detach(), rtol=1e-6, atol=1e-7)


@HOW
def test_autograd_is_told_of_the_write(backend, method):
    w = torch.randn(4, 4, device=DEVICE, requires_grad=True)
    y = (w * w).sum()
    ones = torch.ones(1, 4, device=DEVICE)
    ops.product_update_(w.detach(), [(ones, ones)], lr=0.1, backend=backend, method=method)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_factors_of_autograd_may_be_given_as_they_are():
    left, right = torch.ones(1, 2, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    param = torch.zeros(2, 3)
    ops.product_update_(param, [(left, right)], lr=1.0)
    assert (param == -1).all()


def test_fp32_is_fp32_whatever_the_process_allows(monkeypatch):
    """`set_float32_matmul_precision("medium")` is for the model's products, not for these."""
    seen, real = [], torch.addmm

    def addmm(*args, **kwargs):
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        if len(seen) == 2:
            raise RuntimeError("no room")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", addmm)
    param, ones = torch.zeros(2, 2), torch.ones(1, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        for outcome in (contextlib.nullcontext(), pytest.raises(RuntimeError, match="no room")):
            with outcome:
                ops.product_update_(param, [(ones, ones)], lr=1.0)
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee", "ieee"]


def test_crossings(monkeypatch):
    class Factor:
        def __init__(self, device, size):
            self.device, self.size = torch.device(device), size

        def element_size(self):
            return self.size

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(crossings, "MEASURED", {"H200": 1, "H100": 3000})
    half = Factor("cuda", 2)
    assert crossings.method_for(half, 4096, 4096, 2999) == "epilogue"
    assert crossings.method_for(half, 4096, 4096, 3000) == "blocks"
    assert crossings.method_for(half, 4096, 4100, 1) == "blocks"
    assert crossings.method_for(half, 4100, 4096, 1) == "blocks"
    assert crossings.method_for(Factor("cuda", 4), 4096, 4096, 1) == "blocks"
    assert crossings.method_for(Factor("cpu", 2), 4096, 4096, 1) == "blocks"
    monkeypatch.setattr(crossings, "MEASURED", {})
    assert crossings.method_for(half, 4096, 4096, crossings.DEFAULT - 1) == "epilogue"
    assert crossings.method_for(half, 4096, 4096, crossings.DEFAULT) == "blocks"


def ones(*shape, dtype=F32, **kwargs):
    return torch.ones(*shape, dtype=dtype, **kwargs)


PAIR = (ones(2, 3), ones(2, 4))
REFUSED = {
    "param is no tensor": ({"param": 3}, TypeError, "param must be a tensor, got int"),
    "param of one dimension": (
        {"param": ones(3)}, ValueError,
        "param must be a contiguous matrix, got shape (3,) with strides (1,)",
    ),
    "param is transposed": (
        {"param": ones(4, 3).T}, ValueError,
        "param must be a contiguous matrix, got shape (3, 4) with strides (1, 3)",
    ),
    "products is a tensor": (
        {"products": ones(3)}, TypeError,
        "products must be a sequence of pairs (left, right), got Tensor",
    ),
    "no product": (
        {"products": []}, ValueError,
        "products must have at least one pair (left, right), got none",
    ),
    "one pair in place of a sequence": (
        {"products": PAIR}, TypeError, "products must hold pairs (left, right), got Tensor",
    ),
    "three factors": (
        {"products": [(*PAIR, 3)]}, TypeError, "products must hold pairs (left, right), got tuple",
    ),
    "right is no tensor": (
        {"products": [(PAIR[0], None)]}, TypeError, "right must be a tensor, got NoneType",
    ),
    "left is no tensor": (
        {"products": [(None, PAIR[1])]}, TypeError, "left must be a tensor, got NoneType",
    ),
    "right of other columns": (
        {"products": [(PAIR[0], ones(2, 5))]}, ValueError,
        "right must have shape [tokens, 4], got (2, 5)",
    ),
    "left of other rows": (
        {"products": [(ones(2, 5), PAIR[1])]}, ValueError,
        "left must have shape (2, 3), got (2, 5)",
    ),
    "left of other tokens": (
        {"products": [(ones(3, 3), PAIR[1])]}, ValueError,
        "left must have shape (2, 3), got (3, 3)",
    ),
    "two dtypes": (
        {"products": [(ones(2, 3, dtype=BF16), PAIR[1])]}, TypeError,
        "left must have right's dtype torch.float32, got torch.bfloat16",
    ),
    "integer factors": (
        {"products": [(ones(2, 3, dtype=torch.int32), ones(2, 4, dtype=torch.int32))]}, TypeError,
        "right must be float32, bfloat16 or float16, got torch.int32",
    ),
    "row numbers that are no integers": (
        {"products": [(ones(2), PAIR[1])]}, TypeError,
        "left of one dimension must be int64 or int32, got torch.float32",
    ),
    "row numbers of other tokens": (
        {"products": [(ones(3, dtype=torch.int64), PAIR[1])]}, ValueError,
        "left must have shape (2,), got (3,)",
    ),
    "right elsewhere": (
        {"products": [(PAIR[0], ones(2, 4, device="meta"))]}, ValueError,
        "right must be on cpu, got meta",
    ),
    "low in fp16": (
        {"param": ones(3, 4, dtype=F16), "rounding": "split"}, TypeError,
        "rounding 'split' needs a bfloat16 or float32 param, got torch.float16",
    ),
    "split without low": (
        {"param": ones(3, 4, dtype=BF16), "rounding": "split"}, TypeError,
        "low must be an int16 tensor for rounding 'split', got NoneType",
    ),
    "negative lr": ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
    "negative step": ({"step": -1}, ValueError, "step must be in [0, 4294967296), got -1"),
    "param_id is a float": ({"param_id": 1.5}, TypeError, "param_id must be an integer, got float"),
    "negative offset": ({"offset": -8}, ValueError, "offset must be in [0, "),
    "clip_coef is a number": (
        {"clip_coef": 0.5}, TypeError,
        "clip_coef must be a one-element float32 tensor or None, got float",
    ),
    "unknown method": (
        {"method": "fast"}, ValueError,
        "method must be one of ('auto', 'blocks', 'epilogue'), got 'fast'",
    ),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend must be 'auto' or one of"),
    "an embedding in the epilogue": (
        {"products": [(ones(2, dtype=torch.int64), PAIR[1])], "method": "epilogue"}, ValueError,
        "method 'epilogue' takes products of two matrices, got row numbers of an embedding",
    ),
    "two dtypes in the epilogue": (
        {
            "products": [PAIR, tuple(x.to(BF16) for x in PAIR)], "method": "epilogue",
        },
        ValueError,
        "method 'epilogue' takes factors of one dtype, got ['torch.bfloat16', 'torch.float32']",
    ),
    "another backend's epilogue": (
        {"method": "epilogue", "backend": "native"}, ValueError,
        "method 'epilogue' is Triton's: backend must be 'auto' or 'triton', got 'native'",
    ),
    "an epilogue where Triton does not run": (
        {
            "param": ones(3, 4, device="meta"), "method": "epilogue",
            "products": [tuple(x.to("meta") for x in PAIR)],
        },
        ValueError, "method 'epilogue' cannot run on meta: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case, monkeypatch):
    changes, error, message = REFUSED[case]
    if "Triton does not run" in case:
        triton = pytest.importorskip("triton")
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    arguments = {"param": ones(3, 4), "products": [PAIR], "lr": 0.1} | changes
    param = arguments["param"]
    with pytest.raises(error, match=re.escape(message)):
        ops.product_update_(arguments.pop("param"), arguments.pop("products"), **arguments)
    if isinstance(param, torch.Tensor) and param.device.type == "cpu":
        assert (param == 1).all()


def test_an_inference_tensor_is_refused():
    with torch.inference_mode():
        param = ones(3, 4)
    with pytest.raises(ValueError, match="param must not be an inference tensor"):
        ops.product_update_(param, [PAIR], lr=0.1)
