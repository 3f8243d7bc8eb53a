"""Squared norms of products from Gram matrices of their factors: tiles of all in one launch."""

import itertools

import torch
import triton
import triton.language as tl

from .common import (
    EXACT,
    add_dot,
    columns,
    is_finite,
    on_current,
    one_or,
    shared_memory,
    steps,
    to_device,
    type_of,
)
from .product_update import dense_rows

# Columns of the tables in int64, and after them how many a row has.
FIRST_PROGRAM, FIRST_WEIGHT, WEIGHTS, USES, GROUP = columns(4)  # weights with the same inputs
ROWS, COLS, FIRST_USE, FIRST_PARTIAL, WEIGHT = columns(4)
LEFT, RIGHT, LEFT_STRIDE, RIGHT_STRIDE, TOKENS, FIRST_TILE, USE = columns(6)
PLACE, FIRST, COUNT, SUM = columns(3)  # of a weight: its partial sums, and where their sum goes


@triton.jit
def use_of(uses_ptr, count, tile):
    """The row of the use that holds a tile of the weight's tokens."""
    found = uses_ptr
    k = 1
    while k < count:
        if tile >= tl.load(uses_ptr + k * USE + FIRST_TILE):
            found = uses_ptr + k * USE
        k += 1
    return found


@triton.jit
def gram(
    use_a, use_b, side, tile_a, tile_b, width, FACTOR: tl.constexpr, ALIGNED: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile [BT, BT] of products of rows of left (side LEFT) or right (RIGHT) of two uses."""
    a_ptr = tl.load(use_a + side).to(tl.pointer_type(FACTOR))
    b_ptr = tl.load(use_b + side).to(tl.pointer_type(FACTOR))
    ld_a, ld_b = tl.load(use_a + LEFT_STRIDE + side), tl.load(use_b + LEFT_STRIDE + side)
    if ALIGNED:
        a_ptr, b_ptr = tl.multiple_of(a_ptr, 16), tl.multiple_of(b_ptr, 16)
        ld_a, ld_b = tl.multiple_of(ld_a, 16), tl.multiple_of(ld_b, 16)
    row_a = (tile_a - tl.load(use_a + FIRST_TILE)).to(tl.int32) * BT + tl.arange(0, BT)
    row_b = (tile_b - tl.load(use_b + FIRST_TILE)).to(tl.int32) * BT + tl.arange(0, BT)
    live_a = row_a < tl.load(use_a + TOKENS).to(tl.int32)
    live_b = row_b < tl.load(use_b + TOKENS).to(tl.int32)
    k = tl.arange(0, BK)
    a_ptr += row_a[:, None] * ld_a + k[None, :]
    b_ptr += row_b[None, :] * ld_b + k[:, None]
    acc = tl.zeros([BT, BT], tl.float32)
    for first in steps(0, width, BK):
        live = first + k < width
        a = tl.load(a_ptr, mask=live_a[:, None] & live[None, :], other=0.0)
        b = tl.load(b_ptr, mask=live[:, None] & live_b[None, :], other=0.0)
        acc = add_dot(a, b, acc)
        a_ptr += BK
        b_ptr += BK
    return acc


@triton.jit
def product_tiles_kernel(
    group_of_program_ptr, groups_ptr, weights_ptr, uses_ptr, partials_ptr,
    FACTOR: tl.constexpr, ALIGNED: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Tile (i, j <= i) of the Gram matrices of a group: sums and magnitudes for each weight."""
    group = groups_ptr + tl.load(group_of_program_ptr + tl.program_id(0)) * GROUP
    number = tl.program_id(0) - tl.load(group + FIRST_PROGRAM).to(tl.int32)
    # number = i (i + 1) / 2 + j; the root is not exact
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    twice = tl.where(i == j, 1.0, 2.0)

    weight = weights_ptr + tl.load(group + FIRST_WEIGHT) * WEIGHT
    count, uses = tl.load(group + WEIGHTS).to(tl.int32), tl.load(group + USES).to(tl.int32)
    first_use = uses_ptr + tl.load(weight + FIRST_USE) * USE
    use_a, use_b = use_of(first_use, uses, i), use_of(first_use, uses, j)
    cols = tl.load(weight + COLS)
    if ALIGNED:  # said of an argument of a function, it would be lost
        cols = tl.multiple_of(cols, 16)
    inputs = gram(use_a, use_b, RIGHT, i, j, cols, FACTOR, ALIGNED, BT, BK)
    k = 0
    while k < count:  # the uses of the next weight of the group follow, in the same order
        own = weight + k * WEIGHT
        rows = tl.load(own + ROWS)
        if ALIGNED:
            rows = tl.multiple_of(rows, 16)
        further = k * uses * USE
        grads = gram(use_a + further, use_b + further, LEFT, i, j, rows, FACTOR, ALIGNED, BT, BK)
        terms = inputs * grads
        out = partials_ptr + 2 * (tl.load(own + FIRST_PARTIAL) + number)
        # Lines of a tile in fp32, as its products are; all that is longer in fp64.
        total = tl.sum(tl.sum(terms, 1).to(tl.float64), 0)
        tl.store(out, total * twice)
        tl.store(out + 1, tl.sum(tl.sum(tl.abs(terms), 1).to(tl.float64), 0) * twice)
        k += 1


@triton.jit
def sum_every_second(partials_ptr, n, LANES: tl.constexpr):
    lanes = tl.zeros([LANES], tl.float64)
    row = 0
    while row < n:
        i = row + tl.arange(0, LANES)
        lanes = lanes + tl.load(partials_ptr + 2 * i, mask=i < n, other=0.0)
        row += LANES
    return tl.sum(lanes, 0)


@triton.jit
def product_sums_kernel(
    sums_ptr, partials_ptr, sumsq_ptr, magnitude_ptr, inv_scale_ptr, found_inf_ptr,
    LANES: tl.constexpr,
):  # fmt: skip
    row = sums_ptr + tl.program_id(0) * SUM
    place, first, count = tl.load(row + PLACE), tl.load(row + FIRST), tl.load(row + COUNT)
    scale = (one_or(inv_scale_ptr, 1.0) + tl.zeros([], tl.float32)).to(tl.float64)
    total = sum_every_second(partials_ptr + 2 * first, count, LANES)
    total = tl.where(total < 0.0, 0.0, total) * scale * scale
    size = sum_every_second(partials_ptr + 2 * first + 1, count, LANES) * scale * scale
    tl.store(sumsq_ptr + place, total.to(tl.float32))
    tl.store(magnitude_ptr + place, size.to(tl.float32))
    if found_inf_ptr is not None:
        if is_finite(total.to(tl.float32)) == 0:
            tl.store(found_inf_ptr, 1.0)


def configuration(dtype, shared, amd):
    """As of product_update.configuration; BT: tokens of a tile."""
    if dtype is torch.float32:
        return {"BT": 64, "BK": 16, "num_warps": 8, "num_stages": 2}
    if amd:
        return {"BT": 128, "BK": 32, "num_warps": 8, "num_stages": 2}
    stages = min(4, shared // (2 * 128 * 64 * 2))
    return {"BT": 128, "BK": 64, "num_warps": 8, "num_stages": max(2, stages)}


def tables(groups, tile):
    """Groups of (places, weights' pairs) -> how many programs each has, the rows of the tables one
    after the other, how many partial sums there are."""
    programs, group_rows, weight_rows, use_rows, sums = [], [], [], [], []
    first_program = partials = 0
    for places, weights in groups:
        first_tiles, tiles = [], 0
        for _, right in weights[0]:
            first_tiles.append(tiles)
            tiles += triton.cdiv(right.shape[0], tile)
        count = tiles * (tiles + 1) // 2
        first_weight = len(weight_rows) // WEIGHT.value
        group_rows += (first_program, first_weight, len(weights), len(weights[0]))
        programs.append(count)
        first_program += count
        for place, pairs in zip(places, weights):
            left, right = pairs[0]
            weight_rows += (left.shape[1], right.shape[1], len(use_rows) // USE.value, partials)
            sums += (place, partials, count)
            partials += count
            for (left, right), first in zip(pairs, first_tiles):
                use_rows += (
                    left.data_ptr(), right.data_ptr(), left.stride(0), right.stride(0),
                    left.shape[0], first,
                )  # fmt: skip
    return programs, (group_rows, weight_rows, use_rows, sums), partials


def product_sumsq_(sumsq, magnitude, groups, *, inv_scale, found_inf):
    """groups: (places, weights' pairs) of one dtype; those of a group have the same inputs."""
    device, dtype = sumsq.device, groups[0][1][0][0][1].dtype
    groups = [
        (places, [[(dense_rows(x), dense_rows(y)) for x, y in pairs] for pairs in weights])
        for places, weights in groups
    ]
    sizes = configuration(dtype, *shared_memory(device))
    programs, rows, partials = tables(groups, sizes["BT"])
    _, weight_rows, use_rows, _ = rows
    aligned = all(
        value % 16 == 0
        for table, width, kept in (
            (weight_rows, WEIGHT, (ROWS, COLS)),
            (use_rows, USE, (LEFT, RIGHT, LEFT_STRIDE, RIGHT_STRIDE)),
        )
        for column in kept
        for value in table[column.value :: width.value]
    )
    table = to_device(torch.tensor([*itertools.chain(*rows)], dtype=torch.int64), device)
    group_rows, weight_rows, use_rows, sums = table.split([len(each) for each in rows])
    which = torch.arange(len(programs), dtype=torch.int32)
    which = to_device(which.repeat_interleave(torch.tensor(programs)), device)
    sums_of_tiles = sumsq.new_empty(2 * partials, dtype=torch.float64)
    with on_current(device):
        if len(which):
            product_tiles_kernel[(len(which),)](
                which, group_rows, weight_rows, use_rows, sums_of_tiles,
                FACTOR=type_of(dtype), ALIGNED=aligned, **sizes, **EXACT,
            )  # fmt: skip
        product_sums_kernel[(len(sums) // SUM.value,)](
            sums, sums_of_tiles, sumsq, magnitude, inv_scale, found_inf,
            LANES=256, num_warps=4, **EXACT,
        )  # fmt: skip
