"""What the kernels share: formats, roundings and random bits of an element, and launches.

Stored 16-bit values are handled as integers: Triton's interpreter truncates fp32 to bf16 and
flushes bf16 subnormals (3.6 to 3.9), integer operations are exact there and compile to the same few
instructions.
"""

import contextlib

import torch
import triton
import triton.language as tl

try:
    from triton import knobs
except ImportError as error:
    raise ImportError(f"the kernels need triton 3.4 or later, got {triton.__version__}") from error

EXACT = {"enable_fp_fusion": False}  # one rounding per operation
INTERPRETED = tl.constexpr(knobs.runtime.interpret)
# Elements whose random bits are one call of Philox (csrc/philox.h): 2**GROUP_BITS.
GROUP, GROUP_BITS = tl.constexpr(8), tl.constexpr(3)


def columns(count):
    """Places in a row of a table of `count` columns, and after them `count` itself."""
    return map(tl.constexpr, range(count + 1))


@triton.jit
def bits_to_float(bits, DTYPE: tl.constexpr):
    if DTYPE == "bfloat16":
        return (bits.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_nearest(x, DTYPE: tl.constexpr):
    if DTYPE == "bfloat16":
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)
    elif DTYPE == "float16":
        return x.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def round_stochastic(x, random, DTYPE: tl.constexpr):
    u = x.to(tl.uint32, bitcast=True)
    if DTYPE == "bfloat16":
        rounded = tl.where(x != x, 0x7FC0, (u + random) >> 16)
    else:
        a = tl.minimum(u & 0x7FFFFFFF, 0x47800000)
        exponent = a >> 23
        mantissa = (a & 0x7FFFFF) | tl.where(exponent > 0, 0x800000, 0).to(tl.uint32)
        right = 110 - tl.minimum(exponent, 110)
        left = tl.maximum(exponent, 110) - 110
        subnormal = (mantissa >> tl.minimum(right, 31)) << tl.minimum(left, 2)
        scaled = tl.where(a < 0x38800000, subnormal, (a - 0x38000000) << 3)
        rounded = tl.where(x != x, 0x7E00, ((u >> 16) & 0x8000) | ((scaled + random) >> 16))
    return rounded.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def merge(high, low):
    h = high.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    u = h + low.to(tl.int32).to(tl.uint32, bitcast=True)
    return tl.where(((u ^ h) >> 31) != 0, h, u).to(tl.float32, bitcast=True)


@triton.jit
def split_high(x):
    rounded = (x.to(tl.uint32, bitcast=True) + 0x8000) >> 16
    return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def split_low(x):
    low = x.to(tl.uint32, bitcast=True) & 0xFFFF
    return tl.where(x != x, 0, low).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def is_finite(x):
    return (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def random_group(group, seed, step, param_id):
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    step = (group * 0 + step).to(tl.uint32)
    param_id = (group * 0 + param_id).to(tl.uint32)
    return tl.philox(seed, low, high, step, param_id)


@triton.jit
def deal(w0, w1, w2, w3):
    """[...] words of groups -> [..., 2, 2, 2] bits of their elements."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., word >> 1, word & 1]
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def pick(w0, w1, w2, w3, element):
    """The bits of each element from the words of its group."""
    k = (element & (GROUP - 1)) >> 1
    word = tl.where(k < 2, tl.where(k == 0, w0, w1), tl.where(k == 2, w2, w3))
    return (word >> ((element & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def random_bits(first, seed, step, param_id, SIZE: tl.constexpr, GROUPED: tl.constexpr):
    """Sixteen bits for each of the elements [first, first + SIZE)."""
    if GROUPED:  # first is a multiple of GROUP: one call for its elements, dealt out by joins
        group = first // GROUP + tl.arange(0, SIZE // GROUP)
        w0, w1, w2, w3 = random_group(group, seed, step, param_id)
        return tl.reshape(deal(w0, w1, w2, w3), [SIZE])
    else:
        element = first + tl.arange(0, SIZE)
        w0, w1, w2, w3 = random_group(element >> GROUP_BITS, seed, step, param_id)
        return pick(w0, w1, w2, w3, element)


@triton.jit
def clipped(g, inv_scale, clip_value, clip_coef):
    g = g * inv_scale
    g = tl.where(g > clip_value, clip_value, g)
    g = tl.where(g < -clip_value, -clip_value, g)
    return g * clip_coef


@triton.jit
def lomo_update(p, g, lr, decay, inv_scale, clip_value, clip_coef):
    return p * decay - lr * clipped(g, inv_scale, clip_value, clip_coef)


@triton.jit
def add_dot(a, b, acc):
    """a @ b + acc in fp32: tensor cores for 16-bit factors, never TF32 for fp32 ones."""
    if INTERPRETED:
        if a.dtype == tl.bfloat16:  # of which the interpreter would multiply the bits
            a = bits_to_float(a.to(tl.int16, bitcast=True), "bfloat16")
            b = bits_to_float(b.to(tl.int16, bitcast=True), "bfloat16")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def one_or(pointer, value):
    if pointer is not None:
        value = tl.load(pointer)
    return value


def in_groups(*numbers):
    """Whether elements begin and end where groups of random bits do."""
    return all(number % GROUP.value == 0 for number in numbers)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def as_bits(tensor):
    """A tensor of integers on the same memory, for the pointer's type alone."""
    return None if tensor is None else tensor.detach().view(int_dtype(tensor.dtype))


def int_dtype(dtype):
    return torch.int32 if dtype is torch.float32 else torch.int16


def int_type(dtype):
    return tl.int32 if dtype is torch.float32 else tl.int16


def to_device(table, device):
    """Uploads without stopping the host: a copy from pageable memory would wait for the stream."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def on_current(device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def shared_memory(device):
    """Bytes of it that a block can have; whether the device is AMD's."""
    if device.type == "cpu":  # the interpreter, which takes everything
        return 1 << 17, False
    properties = torch.cuda.get_device_properties(device)
    amd = torch.version.hip is not None
    return getattr(properties, "shared_memory_per_block_optin", 0), amd


def type_of(dtype):
    """What Triton calls a dtype of torch."""
    return getattr(tl, name_of(dtype))


if knobs.runtime.interpret:

    def steps(begin, end, step):
        """As tl.range: the one of Triton 3.6's interpreter fails with numpy 2.4."""
        begin, end, step = (
            x if isinstance(x, int) else int(x.handle.data.item())
            for x in (getattr(x, "value", x) for x in (begin, end, step))
        )
        return range(begin, end, step)

else:
    steps = tl.range
