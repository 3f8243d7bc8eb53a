"""The fused update; csrc/lomo_update.h and csrc/lomo_update.cuh."""

import torch
import triton
import triton.language as tl

from .common import (
    EXACT,
    as_bits,
    bits_to_float,
    columns,
    in_groups,
    int_type,
    is_finite,
    lomo_update,
    merge,
    name_of,
    on_current,
    one_or,
    random_bits,
    round_nearest,
    round_stochastic,
    split_high,
    split_low,
    to_device,
)

# Of the table of a list, a row for each tensor.
PARAM, GRAD, LOW, NUMEL, OFFSET, PARAM_ID, FIRST_BLOCK, ROW = columns(7)
BLOCK = 1024  # elements of a program: 8 for each of the 128 threads, 16 bytes of a 16-bit type


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
    row = rows_ptr + tl.load(tensor_of_block_ptr + tl.program_id(0)) * ROW
    p_ptr = tl.load(row + PARAM).to(tl.pointer_type(P_INT))
    g_ptr = tl.load(row + GRAD).to(tl.pointer_type(G_INT))
    low_ptr = tl.load(row + LOW).to(tl.pointer_type(tl.int16))
    n = tl.load(row + NUMEL)
    if ALIGNED:  # what Triton finds out by itself about arguments
        p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
        low_ptr, n = tl.multiple_of(low_ptr, 16), tl.multiple_of(n, 16)
    begin = (tl.program_id(0) - tl.load(row + FIRST_BLOCK)) * SIZE
    update_block(
        p_ptr, g_ptr, low_ptr, begin, n, tl.load(row + OFFSET), tl.load(row + PARAM_ID),
        lr, decay, clip_value, step, seed,
        inv_scale_ptr, clip_coef_ptr, found_inf_ptr, skip_ptr, P, G, ROUNDING, GROUPED, SIZE,
    )  # fmt: skip


def _blocks(tensor):
    return max(1, triton.cdiv(tensor.numel(), BLOCK))


def lomo_update_(
    params, grads, lows, offsets, param_ids, *, lr, decay, clip_value, step, seed, rounding,
    inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    device = params[0].device
    formats = {"P": name_of(params[0].dtype), "G": name_of(grads[0].dtype), "ROUNDING": rounding}
    scalars = (lr, decay, clip_value, step, seed, inv_scale, clip_coef, found_inf, skip)
    grouped = in_groups(*offsets)
    with on_current(device):
        if len(params) == 1:
            lomo_update_kernel[(_blocks(params[0]),)](
                as_bits(params[0]), as_bits(grads[0]), lows[0], params[0].numel(),
                offsets[0], param_ids[0], *scalars, **formats,
                GROUPED=grouped, SIZE=BLOCK, num_warps=4, **EXACT,
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
        aligned = all(value % 16 == 0 for row in rows for value in row[: NUMEL.value + 1])
        lomo_update_list_kernel[(first,)](
            to_device(table, device), to_device(which, device), *scalars, **formats,
            P_INT=int_type(params[0].dtype), G_INT=int_type(grads[0].dtype),
            GROUPED=grouped, ALIGNED=aligned, SIZE=BLOCK, num_warps=4, **EXACT,
        )  # fmt: skip
