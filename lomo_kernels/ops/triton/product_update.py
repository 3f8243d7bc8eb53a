"""A matrix product with the update as its epilogue: the gradient never leaves the registers."""

import torch
import triton
import triton.language as tl

from .common import (
    EXACT,
    GROUP,
    GROUP_BITS,
    add_dot,
    as_bits,
    bits_to_float,
    columns,
    deal,
    in_groups,
    is_finite,
    lomo_update,
    merge,
    name_of,
    on_current,
    one_or,
    pick,
    random_group,
    round_nearest,
    round_stochastic,
    shared_memory,
    split_high,
    split_low,
    steps,
    to_device,
    type_of,
)

# Of the table of further products, a row for each.
LEFT, RIGHT, TOKENS, LEFT_STRIDE, RIGHT_STRIDE, ROW = columns(5)
TILES_TOGETHER = tl.constexpr(8)  # rows of tiles
STRIPS = tl.constexpr(4)  # of a tile, one after the other: its whole width would spill registers


@triton.jit
def add_product(
    acc, left_ptr, right_ptr, tokens, ld_left, ld_right, m, n, rows, cols, BK: tl.constexpr
):
    """acc [BM, BN] + left.T @ right, of which m are rows and n columns."""
    k = tl.arange(0, BK)
    step = tl.full([], BK, tl.int64)
    left = left_ptr + k[None, :].to(tl.int64) * ld_left + m[:, None]  # as it is multiplied
    right = right_ptr + k[:, None].to(tl.int64) * ld_right + n[None, :]
    for first in steps(0, tokens, BK):
        live = first + k < tokens
        a = tl.load(left, mask=(m < rows)[:, None] & live[None, :], other=0.0)
        b = tl.load(right, mask=live[:, None] & (n < cols)[None, :], other=0.0)
        acc = add_dot(a, b, acc)
        left += step * ld_left
        right += step * ld_right
    return acc


@triton.jit
def halves(acc):
    """[M, N] -> its first and its last N / 2 columns."""
    parts = tl.reshape(acc, [acc.shape[0], 2, acc.shape[1] // 2])
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def update_strip(
    g, begin, m, p_ptr, low_ptr, rows, cols, offset, param_id, lr, decay, step, seed,
    inv_scale, clip_value, clip_coef, found_inf_ptr, skip,
    P: tl.constexpr, ROUNDING: tl.constexpr, GROUPED: tl.constexpr,
):  # fmt: skip
    """Updates rows m, columns [begin, begin + width of g), as lomo_update.update_block does."""
    M: tl.constexpr = g.shape[0]
    N: tl.constexpr = g.shape[1]
    n = begin + tl.arange(0, N)
    at = m[:, None].to(tl.int64) * cols + n[None, :]
    live = (m < rows)[:, None] & (n < cols)[None, :]
    p = tl.load(p_ptr + at, mask=live, other=0)
    good = is_finite(g)
    if found_inf_ptr is not None:
        # Beside the weight a product is not finite only where it is not in the weight's row either.
        if (tl.max(tl.max((good == 0).to(tl.int32), 1), 0) > 0) | (skip != 0.0):
            tl.store(found_inf_ptr, 1.0)
    if ROUNDING == "split":
        low = tl.load(low_ptr + at, mask=live, other=0)
        master = lomo_update(merge(p, low), g, lr, decay, inv_scale, clip_value, clip_coef)
        rounded = split_high(master)
        if skip == 0.0:
            tl.store(low_ptr + at, tl.where(good, split_low(master), low), mask=live)
    else:
        x = lomo_update(bits_to_float(p, P), g, lr, decay, inv_scale, clip_value, clip_coef)
        if ROUNDING == "stochastic":
            if GROUPED:  # offset and cols are multiples of GROUP: one call for its elements
                first = offset // GROUP + m.to(tl.int64) * (cols // GROUP) + begin // GROUP
                group = first[:, None] + tl.arange(0, N // GROUP)[None, :]
                w0, w1, w2, w3 = random_group(group, seed, step, param_id)
                random = tl.reshape(deal(w0, w1, w2, w3), [M, N])
            else:
                element = offset + at
                w0, w1, w2, w3 = random_group(element >> GROUP_BITS, seed, step, param_id)
                random = pick(w0, w1, w2, w3, element)
            rounded = round_stochastic(x, random, P)
        else:
            rounded = round_nearest(x, P)
    if skip == 0.0:
        tl.store(p_ptr + at, tl.where(good, rounded, p), mask=live)


@triton.jit(do_not_specialize=["tokens", "more", "offset", "param_id", "step", "seed"])
def product_update_kernel(
    left_ptr, right_ptr, tokens, ld_left, ld_right, more_ptr, more,
    p_ptr, low_ptr, rows, cols, offset, param_id, lr, decay, clip_value, step, seed,
    inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr,
    P: tl.constexpr, FACTOR: tl.constexpr, ROUNDING: tl.constexpr, GROUPED: tl.constexpr,
    ALIGNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of the weight. more_ptr: rows of further products, as `_row` has them."""
    # Tiles that run at one time share rows and columns in the cache.
    down, across = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    tile = tl.program_id(0)
    together = TILES_TOGETHER * across
    top = tile // together * TILES_TOGETHER
    height = tl.minimum(down - top, TILES_TOGETHER)
    m = (top + tile % together % height) * BM + tl.arange(0, BM)
    begin = (tile % together // height) * BN
    n = begin + tl.arange(0, BN)

    acc = tl.zeros([BM, BN], tl.float32)
    acc = add_product(
        acc, left_ptr, right_ptr, tokens, ld_left, ld_right, m, n, rows, cols, BK
    )  # fmt: skip
    if more_ptr is not None:
        k = 0
        while k < more:
            row = more_ptr + k * ROW
            left = tl.load(row + LEFT).to(tl.pointer_type(FACTOR))
            right = tl.load(row + RIGHT).to(tl.pointer_type(FACTOR))
            ld_l, ld_r = tl.load(row + LEFT_STRIDE), tl.load(row + RIGHT_STRIDE)
            if ALIGNED:
                left, right = tl.multiple_of(left, 16), tl.multiple_of(right, 16)
                ld_l, ld_r = tl.multiple_of(ld_l, 16), tl.multiple_of(ld_r, 16)
            count = tl.load(row + TOKENS).to(tl.int32)
            acc = add_product(acc, left, right, count, ld_l, ld_r, m, n, rows, cols, BK)
            k += 1

    skip = one_or(skip_ptr, 0.0)
    inv_scale, clip_coef = one_or(inv_scale_ptr, 1.0), one_or(clip_coef_ptr, 1.0)
    left_half, right_half = halves(acc)
    for k in tl.static_range(STRIPS):
        if k % 2 == 0:
            first, second = halves(left_half if k == 0 else right_half)
        strip = first if k % 2 == 0 else second
        update_strip(
            strip, begin + k * (BN // STRIPS), m, p_ptr, low_ptr, rows, cols, offset, param_id,
            lr, decay, step, seed, inv_scale, clip_value, clip_coef, found_inf_ptr, skip,
            P, ROUNDING, GROUPED,
        )  # fmt: skip


def configuration(dtype, shared, amd):
    """Sizes of a tile, warps and stages; `shared`: bytes of shared memory a block can have."""
    if dtype is torch.float32:  # no tensor cores: products in fp32 are what was asked for
        return {"BM": 64, "BN": 64, "BK": 16, "num_warps": 4, "num_stages": 2}
    if amd:
        return {"BM": 128, "BN": 128, "BK": 32, "num_warps": 8, "num_stages": 2}
    stages = min(4, shared // (2 * 128 * 64 * 2))  # both factors' parts of a step
    return {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": max(2, stages)}


def dense_rows(tensor):
    """With columns one beside the other; rows may lie anywhere."""
    ordered = tensor.stride(1) == 1 or tensor.shape[1] < 2
    return tensor if ordered and tensor.stride(0) >= 0 else tensor.contiguous()


def _row(left, right):
    return left.data_ptr(), right.data_ptr(), left.shape[0], left.stride(0), right.stride(0)


def product_update_(
    param, pairs, low, offset, param_id, *, lr, decay, clip_value, step, seed, rounding,
    inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    pairs = [(dense_rows(left), dense_rows(right)) for left, right in pairs]
    (left, right), *rest = pairs
    (rows, cols), device = param.shape, param.device
    more, aligned = None, False
    if rest:
        table = [_row(*pair) for pair in rest]
        aligned = all(value % 16 == 0 for row in table for value in row[:2] + row[3:])
        more = to_device(torch.tensor(table, dtype=torch.int64), device)
    sizes = configuration(right.dtype, *shared_memory(device))
    with on_current(device):
        product_update_kernel[(triton.cdiv(rows, sizes["BM"]) * triton.cdiv(cols, sizes["BN"]),)](
            left, right, left.shape[0], left.stride(0), right.stride(0), more, len(rest),
            as_bits(param), None if rounding != "split" else low, rows, cols, offset, param_id,
            lr, decay, clip_value, step, seed, inv_scale, clip_coef, found_inf, skip,
            P=name_of(param.dtype), FACTOR=type_of(right.dtype), ROUNDING=rounding,
            GROUPED=in_groups(offset, cols), ALIGNED=aligned, **sizes, **EXACT,
        )  # fmt: skip
