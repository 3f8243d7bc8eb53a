"""Conversions, roundings and random bits, exhaustively where the inputs can be counted."""

import ctypes
import math

import cuda_on_cpu
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lomo_kernels.ops import native, reference
from lomo_kernels.ops.triton import common as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PATTERNS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)


@triton.jit
def load_kernel(bits_ptr, out_ptr, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + i, kernels.bits_to_float(tl.load(bits_ptr + i), DTYPE))


@triton.jit
def nearest_kernel(x_ptr, out_ptr, n, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, kernels.round_nearest(x, DTYPE), mask=i < n)


@triton.jit
def stochastic_kernel(x_ptr, random_ptr, out_ptr, n, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    random = tl.load(random_ptr + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + i, kernels.round_stochastic(x, random, DTYPE), mask=i < n)


@triton.jit
def split_kernel(x_ptr, high_ptr, low_ptr, back_ptr, n, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0)
    high, low = kernels.split_high(x), kernels.split_low(x)
    tl.store(high_ptr + i, high, mask=i < n)
    tl.store(low_ptr + i, low, mask=i < n)
    tl.store(back_ptr + i, kernels.merge(high, low), mask=i < n)


@triton.jit
def philox_kernel(out_ptr, c0, c1, c2, c3, seed):
    at = tl.arange(0, 1)
    w0, w1, w2, w3 = tl.philox(seed, at + c0, at + c1, at + c2, at + c3)
    tl.store(out_ptr + at, w0)
    tl.store(out_ptr + 1 + at, w1)
    tl.store(out_ptr + 2 + at, w2)
    tl.store(out_ptr + 3 + at, w3)


def grid(n, size=4096):
    return {"grid": (triton.cdiv(n, size),), "size": size}


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def code(name):
    return ctypes.c_int(native._C.dtypes[name])


def equal(a, b):
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def awkward_floats(name):
    """Every value of the format, the midpoints between them, and what is just beside both."""
    values = PATTERNS.view(FORMATS[name]).float()
    finite = values[values.isfinite()].unique()
    middles = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    at = torch.cat([values, middles, -values])
    up = torch.nextafter(at, torch.tensor(math.inf))
    down = torch.nextafter(at, torch.tensor(-math.inf))
    extremes = torch.tensor(
        [0.0, -0.0, 65504.0, 65519.99, 65520.0, 3.4e38, 1e-45, 2.0**-25, 2.0**-26]
    )
    # adding or subtracting zero bits would not do: -0 must stay -0
    return torch.cat([at, up, down, extremes, -extremes])


@pytest.mark.parametrize("name", FORMATS)
def test_every_pattern_is_loaded_exactly(name):
    want = PATTERNS.view(FORMATS[name]).float()
    cpp = torch.empty(2**16)
    cuda_on_cpu.library().test_load(
        code(name), ctypes.c_int64(2**16), pointer(PATTERNS), pointer(cpp)
    )
    assert equal(cpp, want)
    assert torch.equal(cpp.signbit(), want.signbit())
    out = torch.empty(2**16, device=DEVICE)
    load_kernel[(16,)](PATTERNS.to(DEVICE), out, DTYPE=name, SIZE=4096)
    assert equal(out.cpu(), want)
    assert torch.equal(out.cpu().signbit(), want.signbit())


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")  # numpy, to inf
@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_torch_s_own_rounding(name):
    x = awkward_floats(name)
    want = x.to(FORMATS[name])
    cpp = torch.empty(x.numel(), dtype=torch.int16)
    cuda_on_cpu.library().test_nearest(
        code(name), ctypes.c_int64(x.numel()), pointer(x), pointer(cpp)
    )
    out = torch.empty(x.numel(), dtype=torch.int16, device=DEVICE)
    nearest_kernel[(triton.cdiv(x.numel(), 4096),)](
        x.to(DEVICE), out, x.numel(), DTYPE=name, SIZE=4096
    )
    for got in (cpp, out.cpu()):
        got = got.view(FORMATS[name])
        assert equal(got, want)
        assert torch.equal(got.signbit()[~want.isnan()], want.signbit()[~want.isnan()])


def neighbours(x, dtype):
    """The values of the format at or below |x| and above it, computed in float64."""
    values = torch.arange(0x7C00 if dtype is torch.float16 else 0x7F80).to(torch.int16)
    values = torch.cat([values.view(dtype).double(), torch.tensor([math.inf], dtype=torch.float64)])
    above = torch.searchsorted(values, x.abs().double(), right=True)
    return values[above - 1], values[above.clamp(max=len(values) - 1)]


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_goes_up_exactly_as_often_as_it_should(name):
    """round(x, r) is the neighbour above for exactly the r >= 2^16 * (1 - fraction)."""
    dtype = FORMATS[name]
    x = awkward_floats(name)
    x = x[x.isfinite()]
    x = torch.cat(
        [x[torch.randperm(x.numel())[:40_000]], torch.randn(20_000), torch.randn(20_000) * 1e-6]
    )
    below, above = neighbours(x, dtype)
    # Where the format overflows the next step has the size of the one before.
    top = torch.where(above.isinf(), torch.finfo(dtype).max * 2.0, above)
    if dtype is torch.float16:
        top = torch.where(above.isinf(), 65536.0, above)
    else:
        top = torch.where(above.isinf(), 2.0**128, above)
    fraction = ((x.abs().double() - below) / (top - below) * 2**16).floor()
    if dtype is torch.float16:
        fraction = torch.where(x.abs() >= 65536, torch.full_like(fraction, 2.0**17), fraction)
    random = torch.randint(0, 2**16, x.shape, dtype=torch.int32)
    edge = (2**16 - fraction).clamp(0, 2**16 - 1).int()
    for r in (
        random,
        edge,
        (edge - 1).clamp(min=0),
        torch.zeros_like(random),
        torch.full_like(random, 65535),
    ):
        up = fraction + r >= 2**16
        want = (torch.where(up, above, below) * torch.where(x.signbit(), -1.0, 1.0)).to(dtype)
        cpp = torch.empty(x.numel(), dtype=torch.int16)
        cuda_on_cpu.library().test_stochastic(
            code(name), ctypes.c_int64(x.numel()), pointer(x), pointer(r), pointer(cpp)
        )
        out = torch.empty(x.numel(), dtype=torch.int16, device=DEVICE)
        stochastic_kernel[(triton.cdiv(x.numel(), 4096),)](
            x.to(DEVICE), r.to(DEVICE), out, x.numel(), DTYPE=name, SIZE=4096
        )
        for got in (
            cpp.view(dtype),
            reference.round_stochastic(x, dtype, r.long()),
            out.cpu().view(dtype),
        ):
            assert torch.equal(got, want)
            assert torch.equal(got.signbit(), want.signbit())


@pytest.mark.parametrize("name", FORMATS)
def test_stochastic_keeps_what_has_no_fraction(name):
    """Values of the format, infinities and NaN do not depend on the random bits."""
    dtype = FORMATS[name]
    values = PATTERNS.view(dtype)
    for r in (0, 1, 0x7FFF, 0xFFFF):
        got = reference.round_stochastic(values.float(), dtype, torch.full((2**16,), r))
        assert equal(got, values)


def test_split_pair_holds_fp32_exactly():
    """For every upper half and all awkward lower halves: merge(split(x)) is x, bit for bit."""
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1234])
    x = ((torch.arange(2**16) << 16).unsqueeze(1) + lower).flatten()
    x = torch.where(x >= 2**31, x - 2**32, x).to(torch.int32).view(torch.float32)
    n = x.numel()
    ties_away = torch.where(  # bf16 nearest, but a tie goes away from zero
        (x.view(torch.int32) & 0xFFFF) == 0x8000,
        torch.nextafter(x, x.sign() * math.inf),
        x,
    ).to(torch.bfloat16)

    high, low = reference.split(x)
    results = [(high, low, reference.merge(high, low))]
    cpp_high, cpp_low = torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16)
    cpp_back = torch.empty(n)
    library = cuda_on_cpu.library()
    library.test_split(ctypes.c_int64(n), pointer(x), pointer(cpp_high), pointer(cpp_low))
    library.test_merge(ctypes.c_int64(n), pointer(cpp_high), pointer(cpp_low), pointer(cpp_back))
    results.append((cpp_high, cpp_low, cpp_back))
    t_high = torch.empty(n, dtype=torch.int16, device=DEVICE)
    t_low, t_back = torch.empty_like(t_high), torch.empty(n, device=DEVICE)
    split_kernel[(triton.cdiv(n, 4096),)](x.to(DEVICE), t_high, t_low, t_back, n, SIZE=4096)
    results.append((t_high.cpu().view(torch.bfloat16), t_low.cpu(), t_back.cpu()))
    for high, low, back in results:
        same = (back.view(torch.int32) == x.view(torch.int32)) | (back.isnan() & x.isnan())
        assert same.all()
        assert equal(high, ties_away)
        assert torch.equal(low, results[0][1])


def test_a_stale_low_never_makes_a_nan():
    """Somebody else wrote the parameter: the pair no longer belongs together."""
    high = PATTERNS.view(torch.bfloat16)
    finite = high.isfinite()
    for low in (-(2**15), -1, 0, 1, 2**15 - 1):
        back = reference.merge(high, torch.full((2**16,), low, dtype=torch.int16))[finite]
        spacing = (
            high.float() - torch.nextafter(high, torch.tensor(0.0, dtype=torch.bfloat16)).float()
        )
        inside = (back - high[finite].float()).abs() <= spacing[finite].abs().clamp(min=2.0**-133)
        assert (inside | back.isinf()).all()
        assert not back.isnan().any()


# Random123 1.14, tests/kat_vectors: philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_philox_gives_the_published_vectors(counter, key, want):
    seed = key[1] << 32 | key[0]
    words = reference.philox4x32_10([torch.tensor([c]) for c in counter], seed)
    assert tuple(int(w) for w in words) == want

    out = (ctypes.c_uint32 * 4)()
    cuda_on_cpu.library().test_philox((ctypes.c_uint32 * 4)(*counter), ctypes.c_uint64(seed), out)
    assert tuple(out) == want

    signed = np.array(counter, dtype=np.uint32).view(np.int32)
    result = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    philox_kernel[(1,)](result, *(int(c) for c in signed), seed)
    assert tuple(int(w) & 0xFFFFFFFF for w in result.cpu()) == want


def test_elements_take_their_bits_in_the_declared_order():
    """Word (e & 7) >> 1 of the group e >> 3, low half first."""
    drawn = reference.random_bits(40, 3, seed=11, step=5, param_id=9, device="cpu")
    for i, element in enumerate(range(3, 43)):
        counter = [torch.tensor([c]) for c in (element >> 3, 0, 5, 9)]
        word = int(reference.philox4x32_10(counter, 11)[(element & 7) >> 1])
        assert int(drawn[i]) == (word >> 16 * (element & 1)) & 0xFFFF


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("magnitude", [1.0, 3e-6])  # normal numbers; subnormal in fp16
def test_mean_of_stochastic_rounding_is_the_value(name, magnitude):
    """Within four standard deviations of the mean of 2^20 draws, for 16 fractions."""
    dtype, draws = FORMATS[name], 2**20
    below = torch.tensor(magnitude).to(dtype)
    spacing = float(
        torch.nextafter(below, torch.tensor(math.inf, dtype=dtype)).double() - below.double()
    )
    for k in range(16):
        fraction = (k + 0.37) / 16
        x = float(below) + fraction * spacing
        x = torch.full((draws,), x)
        exact = (float(x[0]) - float(below)) / spacing
        random = reference.random_bits(draws, 0, seed=1234, step=k, param_id=0, device="cpu")
        ups = (reference.round_stochastic(x, dtype, random) > below).double().mean().item()
        sigma = math.sqrt(exact * (1 - exact) / draws)
        assert abs(ups - exact) < 4 * sigma
