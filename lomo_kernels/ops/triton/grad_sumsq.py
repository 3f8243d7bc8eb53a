"""Squared norm of a gradient in the declared order; csrc/grad_sumsq.cuh."""

import triton
import triton.language as tl

from .. import reference
from .common import EXACT, as_bits, bits_to_float, name_of, on_current, one_or

LEVELS = reference.NORM_LANES.bit_length() - 1  # of pairs until one lane is left
ROWS = reference.NORM_CHUNK // reference.NORM_LANES


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


def grad_sumsq_(sumsq, grads, *, inv_scale, found_inf):
    sizes = {"LEVELS": LEVELS, "num_warps": 8, **EXACT}
    with on_current(sumsq.device):
        for k, grad in enumerate(grads):
            chunks = max(1, triton.cdiv(grad.numel(), reference.NORM_CHUNK))
            partials = sumsq[k] if chunks == 1 else sumsq.new_empty(chunks)
            sumsq_chunk_kernel[(chunks,)](
                as_bits(grad), grad.numel(), inv_scale, found_inf, partials,
                G=name_of(grad.dtype), ROWS=ROWS, **sizes,
            )  # fmt: skip
            if chunks > 1:
                # CUDA's last block does this. Here nothing orders a program's store before a count
                # that another of its threads makes.
                sum_partials_kernel[(1,)](partials, chunks, sumsq[k], **sizes)
