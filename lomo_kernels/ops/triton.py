"""The kernels in Triton: what runs on AMD, and on NVIDIA where the package was built without CUDA.

Same names and the same maths as csrc/update.h and csrc/sumsq.cuh. Stored 16-bit values are handled
as integers: Triton's interpreter truncates fp32 to bf16 and flushes bf16 subnormals (3.6 to 3.9),
integer operations are exact there and compile to the same few instructions. No autotuning: trying
configurations on a kernel that works in place would apply the update several times.
"""

import contextlib

import torch
import triton
import triton.language as tl

from . import reference

BLOCK = 1024  # elements of a program: 8 for each of the 128 threads, 16 bytes of a 16-bit type
_EXACT = {"enable_fp_fusion": False}  # one rounding per operation


def unavailable(device):
    """Why this backend cannot run on `device`; None: it can."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda":
        return None
    return f"Triton has no {device.type} compiler here (TRITON_INTERPRET=1 runs it, slowly)"


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
def random_bits(first, seed, step, param_id, SIZE: tl.constexpr, GROUPED: tl.constexpr):
    """Sixteen bits for each of the elements [first, first + SIZE)."""
    if GROUPED:  # first is a multiple of 8: one call for eight elements, dealt out by joins
        w0, w1, w2, w3 = random_group(first // 8 + tl.arange(0, SIZE // 8), seed, step, param_id)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [group, word >> 1, word & 1]
        return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [SIZE])
    else:
        element = first + tl.arange(0, SIZE)
        w0, w1, w2, w3 = random_group(element >> 3, seed, step, param_id)
        k = (element & 7) >> 1
        word = tl.where(k < 2, tl.where(k == 0, w0, w1), tl.where(k == 2, w2, w3))
        return (word >> ((element & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def lomo_update(p, g, lr, decay, inv_scale, clip_value, clip_coef):
    g = g * inv_scale
    g = tl.where(g > clip_value, clip_value, g)
    g = tl.where(g < -clip_value, -clip_value, g)
    g = g * clip_coef
    return p * decay - lr * g


@triton.jit
def one_or(pointer, value):
    if pointer is not None:
        value = tl.load(pointer)
    return value


@triton.jit
def update_block(
    p_ptr, g_ptr, low_ptr, begin, n, offset, param_id, lr, decay, clip_value, step, seed,
    inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr,
    P: tl.constexpr, G: tl.constexpr, ROUNDING: tl.constexpr, GROUPED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Updates elements [begin, begin + SIZE) of a tensor of n."""
    i = begin + tl.arange(0, SIZE)
    live = i < n
    p = tl.load(p_ptr + i, mask=live, other=0)
    g = bits_to_float(tl.load(g_ptr + i, mask=live, other=0), G)
    good = is_finite(g)
    skip = 0.0
    if skip_ptr is not None:
        skip = tl.load(skip_ptr)
    if found_inf_ptr is not None:
        if (tl.max((live & (good == 0)).to(tl.int32), 0) > 0) | (skip != 0.0):
            tl.store(found_inf_ptr, 1.0)
    inv_scale = one_or(inv_scale_ptr, 1.0)
    clip_coef = one_or(clip_coef_ptr, 1.0)
    # What must not change is written back as it was: a mask that differs from element to element
    # would break the 16-byte stores.
    if ROUNDING == "split":
        low = tl.load(low_ptr + i, mask=live, other=0)
        master = lomo_update(merge(p, low), g, lr, decay, inv_scale, clip_value, clip_coef)
        rounded = split_high(master)
        if skip == 0.0:
            tl.store(low_ptr + i, tl.where(good, split_low(master), low), mask=live)
    else:
        x = lomo_update(bits_to_float(p, P), g, lr, decay, inv_scale, clip_value, clip_coef)
        if ROUNDING == "stochastic":
            random = random_bits(offset + begin, seed, step, param_id, SIZE, GROUPED)
            rounded = round_stochastic(x, random, P)
        else:
            rounded = round_nearest(x, P)
    if skip == 0.0:
        tl.store(p_ptr + i, tl.where(good, rounded, p), mask=live)


# Integers that change from call to call must not be specialised: a new kernel for each would be
# compiled.
@triton.jit(do_not_specialize=["offset", "param_id", "step", "seed"])
def lomo_update_kernel(
    p_ptr, g_ptr, low_ptr, n, offset, param_id, lr, decay, clip_value, step, seed,
    inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr,
    P: tl.constexpr, G: tl.constexpr, ROUNDING: tl.constexpr, GROUPED: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * SIZE
    update_block(
        p_ptr, g_ptr, low_ptr, begin, n, offset, param_id, lr, decay, clip_value, step, seed,
        inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr, P, G, ROUNDING, GROUPED, SIZE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["step", "seed"])
def lomo_update_list_kernel(
    rows_ptr, tensor_of_block_ptr, lr, decay, clip_value, step, seed,
    inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr,
    P: tl.constexpr, G: tl.constexpr, P_INT: tl.constexpr, G_INT: tl.constexpr,
    ROUNDING: tl.constexpr, GROUPED: tl.constexpr, ALIGNED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    row = rows_ptr + tl.load(tensor_of_block_ptr + tl.program_id(0)) * 7
    p_ptr = tl.load(row).to(tl.pointer_type(P_INT))
    g_ptr = tl.load(row + 1).to(tl.pointer_type(G_INT))
    low_ptr = tl.load(row + 2).to(tl.pointer_type(tl.int16))
    n = tl.load(row + 3)
    if ALIGNED:  # what Triton finds out by itself about arguments
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        low_ptr, n = tl.multiple_of(low_ptr, 16), tl.multiple_of(n, 16)
    begin = (tl.program_id(0) - tl.load(row + 6)) * SIZE
    update_block(
        p_ptr, g_ptr, low_ptr, begin, n, tl.load(row + 4), tl.load(row + 5),
        lr, decay, clip_value, step, seed,
        inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr, P, G, ROUNDING, GROUPED, SIZE,
    )  # fmt: skip


@triton.jit
def add_neighbours(lanes, LEVELS: tl.constexpr):
    """Adds 2**LEVELS neighbouring lanes in pairs: the declared tree, not tl.sum's own."""
    for _ in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(lanes, [lanes.shape[0] // 2, 2]))
        lanes = left + right
    return lanes


@triton.jit
def sumsq_block(
    g_ptr, begin, n, inv_scale_ptr, found_inf_ptr,
    G: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum of squares of the chunk that begins at `begin`, as a tensor of one element."""
    LANES: tl.constexpr = 2**LEVELS
    inv_scale = one_or(inv_scale_ptr, 1.0)
    lanes = tl.zeros([LANES], tl.float32)
    largest = tl.zeros([LANES], tl.uint32)
    for row in tl.static_range(ROWS):
        i = begin + row * LANES + tl.arange(0, LANES)
        stored = bits_to_float(tl.load(g_ptr + i, mask=i < n, other=0), G)
        largest = tl.maximum(largest, stored.to(tl.uint32, bitcast=True) & 0x7FFFFFFF)
        x = stored * inv_scale
        lanes = lanes + x * x
    if found_inf_ptr is not None:
        if tl.max(largest, 0) >= 0x7F800000:
            tl.store(found_inf_ptr, 1.0)
    return add_neighbours(lanes, LEVELS)


@triton.jit
def sumsq_chunk_kernel(
    g_ptr, n, inv_scale_ptr, found_inf_ptr, partials_ptr,
    G: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0).to(tl.int64) * (2**LEVELS * ROWS)
    total = sumsq_block(g_ptr, begin, n, inv_scale_ptr, found_inf_ptr, G, LEVELS, ROWS)
    tl.store(partials_ptr + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def sum_partials_kernel(partials_ptr, n, out_ptr, LEVELS: tl.constexpr):
    LANES: tl.constexpr = 2**LEVELS
    lanes = tl.zeros([LANES], tl.float32)
    row = 0
    while row < n:  # not range(): its interpreter in Triton 3.6 fails with numpy 2.4
        i = row + tl.arange(0, LANES)
        lanes = lanes + tl.load(partials_ptr + i, mask=i < n, other=0.0)
        row += LANES
    tl.store(out_ptr + tl.arange(0, 1), add_neighbours(lanes, LEVELS))


@triton.jit(do_not_specialize=["count", "flags"])
def decide_kernel(
    d_ptr, out_ptr, sumsq_ptr, count, found_ptr, flags, max_norm, min_scale,
    CLIP: tl.constexpr, GROWTH: tl.constexpr, BACKOFF: tl.constexpr, INTERVAL: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """csrc/decide.h. The factors are constants, because a float argument would be rounded to
    fp32."""
    if sumsq_ptr is not None:
        LANES: tl.constexpr = 2**LEVELS
        lanes = tl.zeros([LANES], tl.float64)
        row = 0
        while row < count:
            i = row + tl.arange(0, LANES)
            lanes = lanes + tl.load(sumsq_ptr + i, mask=i < count, other=0.0).to(tl.float64)
            row += LANES
        total = tl.sum(add_neighbours(lanes, LEVELS), 0)  # of one element
        norm = tl.sqrt_rn(total.to(tl.float32))
        tl.store(d_ptr + 4, norm)
        if CLIP:
            coef = tl.div_rn(max_norm, norm + 1e-6)
            tl.store(d_ptr + 1, tl.where(coef > 1.0, 1.0, coef))
    found = (tl.load(d_ptr + 2) != 0.0) | (tl.load(d_ptr + 3) != 0.0)
    if found_ptr is not None:
        k = 0
        while k < flags:
            found = found | (tl.load(found_ptr + k) != 0.0)
            k += 1
    flag = tl.where(found, 1.0, 0.0)
    tl.store(d_ptr + 2, flag)
    tl.store(d_ptr + 3, flag)
    if out_ptr is not None:
        scale = tl.load(d_ptr + 5)
        tracker = tl.load(d_ptr + 6)
        stuck = tl.load(d_ptr + 7)
        if INTERVAL > 0:
            wide = scale.to(tl.float64)
            lower = (wide * tl.full([], BACKOFF, tl.float64)).to(tl.float32)
            lower = tl.where(lower > min_scale, lower, min_scale)
            higher = (wide * tl.full([], GROWTH, tl.float64)).to(tl.float32)
            at_floor = scale <= min_scale
            grow = tracker + 1.0 >= INTERVAL
            kept = tl.where(grow & is_finite(higher), higher, scale)
            scale = tl.where(found, tl.where(at_floor, scale, lower), kept)
            tracker = tl.where(found | grow, 0.0, tracker + 1.0)
            stuck = tl.where(found & at_floor, stuck + 1.0, 0.0)
        tl.store(out_ptr, tl.div_rn(1.0, scale))
        tl.store(out_ptr + 1, 1.0)
        tl.store(out_ptr + 2, 0.0)
        tl.store(out_ptr + 3, 0.0)
        tl.store(out_ptr + 4, 0.0)
        tl.store(out_ptr + 5, scale)
        tl.store(out_ptr + 6, tracker)
        tl.store(out_ptr + 7, stuck)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _as_bits(tensor):
    """A tensor of integers on the same memory, for the pointer's type alone."""
    return None if tensor is None else tensor.detach().view(_int_dtype(tensor.dtype))


def _int_dtype(dtype):
    return torch.int32 if dtype is torch.float32 else torch.int16


def _int_type(dtype):
    return tl.int32 if dtype is torch.float32 else tl.int16


def _blocks(tensor):
    return max(1, triton.cdiv(tensor.numel(), BLOCK))


def _to_device(table, device):
    """Uploads without stopping the host: a copy from pageable memory would wait for the stream."""
    if device.type == "cpu":
        return table
    return table.pin_memory().to(device, non_blocking=True)


def _current(device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def lomo_update_(
    params, grads, lows, offsets, param_ids, *, lr, decay, clip_value, step, seed, rounding,
    inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    device = params[0].device
    formats = {"P": _name(params[0].dtype), "G": _name(grads[0].dtype), "ROUNDING": rounding}
    scalars = (lr, decay, clip_value, step, seed, inv_scale, clip_coef, found_inf, skip)
    grouped = all(offset % 8 == 0 for offset in offsets)
    with _current(device):
        if len(params) == 1:
            lomo_update_kernel[(_blocks(params[0]),)](
                _as_bits(params[0]), _as_bits(grads[0]), lows[0], params[0].numel(),
                offsets[0], param_ids[0], *scalars, **formats,
                GROUPED=grouped, SIZE=BLOCK, num_warps=4, **_EXACT,
            )  # fmt: skip
            return
        rows, blocks, first = [], [], 0
        for p, g, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
            low = 0 if low is None else low.data_ptr()
            rows.append((p.data_ptr(), g.data_ptr(), low, p.numel(), offset, param_id, first))
            blocks.append(_blocks(p))
            first += blocks[-1]
        table = torch.tensor(rows, dtype=torch.int64)
        which = torch.arange(len(rows)).repeat_interleave(torch.tensor(blocks))
        aligned = all(value % 16 == 0 for row in rows for value in row[:4])
        lomo_update_list_kernel[(first,)](
            _to_device(table, device), _to_device(which, device), *scalars, **formats,
            P_INT=_int_type(params[0].dtype), G_INT=_int_type(grads[0].dtype),
            GROUPED=grouped, ALIGNED=aligned, SIZE=BLOCK, num_warps=4, **_EXACT,
        )  # fmt: skip


def grad_sumsq_(sumsq, grads, *, inv_scale, found_inf):
    chunk = reference.NORM_CHUNK
    sizes = {"LEVELS": reference.NORM_LANES.bit_length() - 1, "num_warps": 8, **_EXACT}
    with _current(sumsq.device):
        for k, grad in enumerate(grads):
            chunks = max(1, triton.cdiv(grad.numel(), chunk))
            partials = sumsq[k] if chunks == 1 else sumsq.new_empty(chunks)
            sumsq_chunk_kernel[(chunks,)](
                _as_bits(grad), grad.numel(), inv_scale, found_inf, partials,
                G=_name(grad.dtype), ROWS=chunk // reference.NORM_LANES, **sizes,
            )  # fmt: skip
            if chunks > 1:
                sum_partials_kernel[(1,)](partials, chunks, sumsq[k], **sizes)


def decide_(
    decisions, sumsq, found_inf, out, *, max_norm, min_scale, growth_factor, backoff_factor,
    growth_interval,
):  # fmt: skip
    with _current(decisions.device):
        decide_kernel[(1,)](
            decisions, out, sumsq, 0 if sumsq is None else sumsq.numel(),
            found_inf, 0 if found_inf is None else found_inf.numel(), max_norm, min_scale,
            CLIP=max_norm > 0, GROWTH=growth_factor, BACKOFF=backoff_factor,
            INTERVAL=growth_interval, LEVELS=reference.DECIDE_LANES.bit_length() - 1,
            num_warps=4, **_EXACT,
        )  # fmt: skip
