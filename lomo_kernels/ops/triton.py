"""The kernels in Triton: what runs on AMD, and on NVIDIA where the package was built without CUDA.

Same names and the same maths as csrc/update.h, csrc/sumsq.cuh and csrc/adalomo.cuh. Stored 16-bit
values are handled as integers: Triton's interpreter truncates fp32 to bf16 and flushes bf16
subnormals (3.6 to 3.9), integer operations are exact there and compile to the same few
instructions. No autotuning: trying configurations on a kernel that works in place would apply the
update several times.
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
def deal(w0, w1, w2, w3):
    """[...] words of groups -> [..., 2, 2, 2] bits of their elements."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., word >> 1, word & 1]
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def pick(w0, w1, w2, w3, element):
    """The bits of each element from the words of its group."""
    k = (element & 7) >> 1
    word = tl.where(k < 2, tl.where(k == 0, w0, w1), tl.where(k == 2, w2, w3))
    return (word >> ((element & 1) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def random_bits(first, seed, step, param_id, SIZE: tl.constexpr, GROUPED: tl.constexpr):
    """Sixteen bits for each of the elements [first, first + SIZE)."""
    if GROUPED:  # first is a multiple of 8: one call for eight elements, dealt out by joins
        w0, w1, w2, w3 = random_group(first // 8 + tl.arange(0, SIZE // 8), seed, step, param_id)
        return tl.reshape(deal(w0, w1, w2, w3), [SIZE])
    else:
        element = first + tl.arange(0, SIZE)
        w0, w1, w2, w3 = random_group(element >> 3, seed, step, param_id)
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
def sum_lanes(partials_ptr, n, LEVELS: tl.constexpr):
    """2**LEVELS lanes that each add every 2**LEVELS-th of n numbers, then in pairs; [1]."""
    LANES: tl.constexpr = 2**LEVELS
    lanes = tl.zeros([LANES], tl.float32)
    row = 0
    while row < n:  # not range(): its interpreter in Triton 3.6 fails with numpy 2.4
        i = row + tl.arange(0, LANES)
        lanes = lanes + tl.load(partials_ptr + i, mask=i < n, other=0.0)
        row += LANES
    return add_neighbours(lanes, LEVELS)


@triton.jit
def sum_partials_kernel(partials_ptr, n, out_ptr, LEVELS: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 1), sum_lanes(partials_ptr, n, LEVELS))


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


# -- AdaLomo: csrc/adalomo.h, Note [Tiles] ---------------------------------------------------------


@triton.jit
def inverse_root(x):
    return tl.where(is_finite(x), tl.div_rn(1.0, tl.sqrt_rn(x)), float("nan"))


@triton.jit
def weight_of(step, weights_ptr, weights_count):
    return tl.load(weights_ptr + tl.minimum(step, weights_count - 1))


@triton.jit
def moment(before, square, weight, eps):
    return before * (1.0 - weight) + weight * (square + eps)


@triton.jit
def add_eight(lanes):
    """[8, 256] -> [256]: neighbouring rows in pairs."""
    left, right = tl.split(tl.permute(tl.reshape(lanes, [4, 2, 256]), (0, 2, 1)))
    left, right = tl.split(tl.permute(tl.reshape(left + right, [2, 2, 256]), (0, 2, 1)))
    left, right = tl.split(tl.permute(tl.reshape(left + right, [2, 256]), (1, 0)))
    return left + right


@triton.jit
def tile_rows(tile, step, rows, cols, numel, down, across):
    """Eight rows of a tile: index of each element [8, 256], and whether there is one."""
    line = tile // across
    batch = (line // down).to(tl.int64)
    row = (line % down) * 64 + step * 8 + tl.arange(0, 8)
    col = (tile % across) * 256 + tl.arange(0, 256)
    first = (batch * rows + row) * cols
    at = first[:, None] + col[None, :]
    return at, (row < rows)[:, None] & (col < cols)[None, :] & (at < numel)


@triton.jit
def ada_stats_kernel(
    g_ptr, row_parts_ptr, col_parts_ptr, rows, cols, numel, down, across,
    inv_scale_ptr, clip_value, clip_coef_ptr, G: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    line = tile // across
    batch, ti, tj = (line // down).to(tl.int64), line % down, tile % across
    inv_scale, clip_coef = one_or(inv_scale_ptr, 1.0), one_or(clip_coef_ptr, 1.0)
    lanes = tl.zeros([8, 256], tl.float32)
    for step in tl.range(0, 8, num_stages=3):  # unrolled, Triton 3.6 spills registers
        at, live = tile_rows(tile, step, rows, cols, numel, down, across)
        g = bits_to_float(tl.load(g_ptr + at, mask=live, other=0), G)
        x = clipped(tl.where(is_finite(g), g, float("nan")), inv_scale, clip_value, clip_coef)
        square = x * x
        lanes = lanes + square
        row = ti * 64 + step * 8 + tl.arange(0, 8)
        sums = add_neighbours(tl.reshape(square, [2048]), 8)
        tl.store(row_parts_ptr + (batch * across + tj) * rows + row, sums, mask=row < rows)
    col = tj * 256 + tl.arange(0, 256)
    tl.store(col_parts_ptr + (batch * down + ti) * cols + col, add_eight(lanes), mask=col < cols)


@triton.jit
def ada_moments_kernel(
    parts_ptr, before_ptr, new_ptr, means_ptr, parts, size, other, groups,
    step_ptr, weights_ptr, weights_count, eps,
):  # fmt: skip
    """256 rows, or columns, of one matrix: their sums of `parts` parts and their new moments."""
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    place = group * 256 + tl.arange(0, 256)
    first = parts_ptr + batch * parts * size
    lanes = tl.zeros([8, 256], tl.float32)
    k = 0
    while k < parts:
        part = k + tl.arange(0, 8)
        live = (part < parts)[:, None] & (place < size)[None, :]
        at = part.to(tl.int64)[:, None] * size + place[None, :]
        lanes = lanes + tl.load(first + at, mask=live, other=0.0)
        k += 8
    mean = tl.div_rn(add_eight(lanes), tl.full([256], 1.0, tl.float32) * other.to(tl.float32))
    weight = weight_of(tl.load(step_ptr), weights_ptr, weights_count)
    live = place < size
    before = tl.load(before_ptr + batch * size + place, mask=live, other=0.0)
    new = tl.where(live, moment(before, mean, weight, eps), 0.0)
    tl.store(new_ptr + batch * size + place, new, mask=live)
    if means_ptr is not None:
        at = means_ptr + batch * groups + group
        tl.store(at + tl.arange(0, 1), add_neighbours(new, 8))


@triton.jit
def ada_updates(
    g, at, live, tile, step, mean, col_factor, row_ptr, rows, down, across,
    inv_scale, clip_value, clip_coef, weight, eps, FACTORED: tl.constexpr,
):  # fmt: skip
    """The updates [8, 256], 0 where there is no element, and the new moments or the updates."""
    x = clipped(tl.where(is_finite(g), g, float("nan")), inv_scale, clip_value, clip_coef)
    if FACTORED:
        line = tile // across
        row = (line % down) * 64 + step * 8 + tl.arange(0, 8)
        of_row = row_ptr + (line // down).to(tl.int64) * rows + row
        ratio = tl.div_rn(tl.load(of_row, mask=row < rows, other=0.0), mean)
        u = (x * inverse_root(ratio)[:, None]) * col_factor[None, :]
        new = u
    else:
        new = moment(tl.load(row_ptr + at, mask=live, other=0.0), x * x, weight, eps)
        u = x * inverse_root(new)
    return tl.where(live, u, 0.0), new


@triton.jit
def mean_row(means_ptr, tile, rows, down, across):
    groups = (rows + 255) // 256
    batch = (tile // across // down).to(tl.int64)
    total = sum_lanes(means_ptr + batch * groups, groups, 8)
    return tl.div_rn(total, tl.full([1], 1.0, tl.float32) * rows.to(tl.float32))


@triton.jit
def col_factors(col_ptr, tile, cols, down, across):
    col = (tile % across) * 256 + tl.arange(0, 256)
    batch = (tile // across // down).to(tl.int64)
    return inverse_root(tl.load(col_ptr + batch * cols + col, mask=col < cols, other=0.0))


@triton.jit
def ada_norm_kernel(
    g_ptr, row_ptr, col_ptr, means_ptr, norms_ptr, rows, cols, numel, down, across,
    inv_scale_ptr, clip_value, clip_coef_ptr, step_ptr, weights_ptr, weights_count, eps,
    G: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # its end is in the cache still
    inv_scale, clip_coef = one_or(inv_scale_ptr, 1.0), one_or(clip_coef_ptr, 1.0)
    weight = weight_of(tl.load(step_ptr), weights_ptr, weights_count)
    mean, col_factor = 0.0, 0.0
    if FACTORED:
        mean = mean_row(means_ptr, tile, rows, down, across)
        col_factor = col_factors(col_ptr, tile, cols, down, across)
    lanes = tl.zeros([8, 256], tl.float32)
    step = 0
    while step < 8:  # unrolled it would take too many registers
        at, live = tile_rows(tile, step, rows, cols, numel, down, across)
        g = bits_to_float(tl.load(g_ptr + at, mask=live, other=0), G)
        u, _ = ada_updates(
            g, at, live, tile, step, mean, col_factor, row_ptr, rows, down, across,
            inv_scale, clip_value, clip_coef, weight, eps, FACTORED,
        )  # fmt: skip
        lanes = lanes + u * u
        step += 1
    tl.store(norms_ptr + tile + tl.arange(0, 1), add_neighbours(tl.reshape(lanes, [2048]), 11))


@triton.jit
def ada_sums_kernel(p_ptr, sums_ptr, rows, cols, numel, down, across, P: tl.constexpr):
    tile = tl.program_id(0)
    lanes = tl.zeros([8, 256], tl.float32)
    for step in tl.static_range(8):
        at, live = tile_rows(tile, step, rows, cols, numel, down, across)
        x = bits_to_float(tl.load(p_ptr + at, mask=live, other=0), P)
        lanes = lanes + x * x
    tl.store(sums_ptr + tile + tl.arange(0, 1), add_neighbours(tl.reshape(lanes, [2048]), 11))


@triton.jit
def ada_step_kernel(
    norms_ptr, sums_ptr, tiles, numel, scalars_ptr, step_ptr,
    lr, weight_decay, eps_rms, clip_threshold, found_inf_ptr, skip_ptr,
):  # fmt: skip
    """step_of() of csrc/adalomo.h"""
    n = tl.full([1], 1.0, tl.float32) * tl.maximum(numel, 1).to(tl.float32)
    update_square = sum_lanes(norms_ptr, tiles, 11)
    param_square = sum_lanes(sums_ptr, tiles, 11)
    rms = tl.div_rn(tl.sqrt_rn(tl.div_rn(update_square, n)), clip_threshold + n * 0.0)
    divisor = tl.where(rms < 1.0, 1.0, rms)
    size = tl.sqrt_rn(tl.div_rn(param_square, n))
    own_lr = lr * tl.where(size < eps_rms, eps_rms, size)
    one = tl.arange(0, 1)
    made = is_finite(update_square) & is_finite(own_lr)
    if skip_ptr is not None:
        made = made & (tl.load(skip_ptr + one) == 0.0)
    tl.store(scalars_ptr + one, own_lr * weight_decay)
    tl.store(scalars_ptr + 1 + one, tl.where(made, tl.div_rn(own_lr, divisor), float("nan")))
    tl.store(step_ptr + one, tl.load(step_ptr + one) + made.to(tl.int32))
    if found_inf_ptr is not None:
        tl.store(found_inf_ptr + one, tl.full([1], 1.0, tl.float32), mask=made == 0)


@triton.jit(do_not_specialize=["param_id", "seed"])
def ada_update_kernel(
    p_ptr, g_ptr, low_ptr, row_ptr, col_ptr, new_row_ptr, new_col_ptr, means_ptr,
    sums_ptr, scalars_ptr, step_ptr, weights_ptr, weights_count, rows, cols, numel, down, across,
    param_id, seed, inv_scale_ptr, clip_value, clip_coef_ptr, eps,
    P: tl.constexpr, G: tl.constexpr, ROUNDING: tl.constexpr, GROUPED: tl.constexpr,
    FACTORED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    shrink, size = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    if size == size:
        number = tl.load(step_ptr) - 1  # it counts this one already
        weight = weight_of(number, weights_ptr, weights_count)
        inv_scale, clip_coef = one_or(inv_scale_ptr, 1.0), one_or(clip_coef_ptr, 1.0)
        mean, col_factor = 0.0, 0.0
        line = tile // across
        batch, ti, tj = (line // down).to(tl.int64), line % down, tile % across
        if FACTORED:
            mean = mean_row(means_ptr, tile, rows, down, across)
            col_factor = col_factors(new_col_ptr, tile, cols, down, across)
            if tj == 0:
                row = ti * 64 + tl.arange(0, 64)
                new = tl.load(new_row_ptr + batch * rows + row, mask=row < rows)
                tl.store(row_ptr + batch * rows + row, new, mask=row < rows)
            if ti == 0:
                col = tj * 256 + tl.arange(0, 256)
                new = tl.load(new_col_ptr + batch * cols + col, mask=col < cols)
                tl.store(col_ptr + batch * cols + col, new, mask=col < cols)
        lanes = tl.zeros([8, 256], tl.float32)
        step = 0
        while step < 8:
            at, live = tile_rows(tile, step, rows, cols, numel, down, across)
            p = tl.load(p_ptr + at, mask=live, other=0)
            g = bits_to_float(tl.load(g_ptr + at, mask=live, other=0), G)
            u, new = ada_updates(
                g, at, live, tile, step, mean, col_factor, new_row_ptr if FACTORED else row_ptr,
                rows, down, across, inv_scale, clip_value, clip_coef, weight, eps, FACTORED,
            )  # fmt: skip
            if not FACTORED:
                tl.store(row_ptr + at, new, mask=live)
            if ROUNDING == "split":
                low = tl.load(low_ptr + at, mask=live, other=0)
                master = merge(p, low)
            else:
                master = bits_to_float(p, P)
            master = master - (shrink * master + size * u)
            if ROUNDING == "split":
                rounded = split_high(master)
                tl.store(low_ptr + at, split_low(master), mask=live)
            elif ROUNDING == "stochastic":
                if GROUPED:
                    row = ti * 64 + step * 8 + tl.arange(0, 8)
                    first = (batch * rows + row) * (cols // 8) + tj * 32
                    group = first[:, None] + tl.arange(0, 32)[None, :]
                    w0, w1, w2, w3 = random_group(group, seed, number, param_id)
                    random = tl.reshape(deal(w0, w1, w2, w3), [8, 256])
                else:
                    w0, w1, w2, w3 = random_group(at >> 3, seed, number, param_id)
                    random = pick(w0, w1, w2, w3, at)
                rounded = round_stochastic(master, random, P)
            else:
                rounded = round_nearest(master, P)
            tl.store(p_ptr + at, rounded, mask=live)
            x = tl.where(live, bits_to_float(rounded, P), 0.0)
            lanes = lanes + x * x
            step += 1
        tl.store(sums_ptr + tile + tl.arange(0, 1), add_neighbours(tl.reshape(lanes, [2048]), 11))


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


def adalomo_update_(
    items, *, lr, weight_decay, eps, clip_threshold, clip_value, seed, rounding, weights,
    inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    table = {"weights_ptr": weights, "weights_count": len(weights)}
    clip = {
        "inv_scale_ptr": inv_scale, "clip_value": clip_value, "clip_coef_ptr": clip_coef,
    }  # fmt: skip
    launch = {"num_warps": 8, **_EXACT}
    with _current(weights.device):
        for item in items:
            tiles, p, g = item.tiles, _as_bits(item.param), _as_bits(item.grad)
            shape = _shape(tiles, item.param)
            factored = tiles.factored and item.param.numel() > 0
            batch, rows, cols = tiles[:3]
            down, across = shape["down"], shape["across"]
            sizes = [2, tiles.count]
            if factored:
                groups = [triton.cdiv(rows, 256), triton.cdiv(cols, 256)]
                parts = [batch * across * rows, batch * down * cols]
                sizes += [*parts, batch * rows, batch * cols, batch * groups[0]]
            scalars, norms, *rest = weights.new_empty(sum(sizes)).split(sizes)
            own = item.row if tiles.factored else item.full
            moments = {"row_ptr": own, "col_ptr": None, "means_ptr": None}
            if factored:
                row_parts, col_parts, new_row, new_col, means = rest
                ada_stats_kernel[(tiles.count,)](
                    g, row_parts, col_parts, **shape, **clip, G=_name(item.grad.dtype), **launch
                )
                for part, before, new, sums, count, size, other, group in (
                    (row_parts, item.row, new_row, means, across, rows, cols, groups[0]),
                    (col_parts, item.col, new_col, None, down, cols, rows, groups[1]),
                ):
                    ada_moments_kernel[(batch * group,)](
                        part, before, new, sums, count, size, other, group, item.step,
                        **table, eps=eps[0], **launch,
                    )  # fmt: skip
                moments = {"row_ptr": new_row, "col_ptr": new_col, "means_ptr": means}
            kind = {"G": _name(item.grad.dtype), "FACTORED": factored}
            ada_norm_kernel[(tiles.count,)](
                g, **moments, norms_ptr=norms, **shape, **clip, step_ptr=item.step, **table,
                eps=eps[0], **kind, **launch,
            )  # fmt: skip
            ada_step_kernel[(1,)](
                norms, item.sums, tiles.count, item.param.numel(), scalars, item.step,
                lr, weight_decay, eps[1], clip_threshold, found_inf, skip, **launch,
            )  # fmt: skip
            ada_update_kernel[(tiles.count,)](
                p, g, item.low, own, item.col, *moments.values(), item.sums, scalars,
                item.step, *table.values(), **shape, param_id=item.param_id, seed=seed, **clip,
                eps=eps[0], P=_name(item.param.dtype), ROUNDING=rounding, GROUPED=cols % 8 == 0,
                **kind, **launch,
            )  # fmt: skip


def adalomo_sums_(sums, param, tiles):
    with _current(param.device):
        ada_sums_kernel[(tiles.count,)](
            _as_bits(param), sums, **_shape(tiles, param), P=_name(param.dtype), num_warps=8,
            **_EXACT,
        )  # fmt: skip


def _shape(tiles, param):
    empty = param.numel() == 0
    return {
        "rows": 0 if empty else tiles.rows,
        "cols": 0 if empty else tiles.cols,
        "numel": param.numel(),
        "down": max(1, triton.cdiv(tiles.rows, reference.TILE_ROWS)),
        "across": max(1, triton.cdiv(tiles.cols, reference.TILE_COLS)),
    }
