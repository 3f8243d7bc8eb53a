"""AdaLomo: csrc/adalomo.h, Note [Tiles]."""

import torch
import triton
import triton.language as tl

from .. import reference
from .common import (
    EXACT,
    GROUP,
    GROUP_BITS,
    as_bits,
    bits_to_float,
    clipped,
    deal,
    in_groups,
    is_finite,
    merge,
    name_of,
    on_current,
    one_or,
    pick,
    random_group,
    round_nearest,
    round_stochastic,
    split_high,
    split_low,
)
from .grad_sumsq import LEVELS, add_neighbours, sum_lanes

# csrc/adalomo.h, Note [Tiles]. A tile is looked at some of its rows at a time, as many as lanes.
TILE_ROWS, TILE_COLS = tl.constexpr(reference.TILE_ROWS), tl.constexpr(reference.TILE_COLS)
LANES = tl.constexpr(reference.ADALOMO_LANES)
STEPS = tl.constexpr(reference.TILE_ROWS // reference.ADALOMO_LANES)
SIZE = tl.constexpr(reference.NORM_LANES)  # elements of a step
TILE_LEVELS = tl.constexpr(LEVELS)  # of pairs, until one of them is left
ROW_LEVELS = tl.constexpr(reference.TILE_COLS.bit_length() - 1)


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
    """[LANES, TILE_COLS] -> [TILE_COLS]: neighbouring rows in pairs."""
    left, right = tl.split(tl.permute(tl.reshape(lanes, [4, 2, TILE_COLS]), (0, 2, 1)))
    left, right = tl.split(tl.permute(tl.reshape(left + right, [2, 2, TILE_COLS]), (0, 2, 1)))
    left, right = tl.split(tl.permute(tl.reshape(left + right, [2, TILE_COLS]), (1, 0)))
    return left + right


@triton.jit
def tile_sum(lanes):
    return add_neighbours(tl.reshape(lanes, [SIZE]), TILE_LEVELS)


@triton.jit
def tile_rows(tile, step, rows, cols, numel, down, across):
    """Rows of a tile: index of each element [LANES, TILE_COLS], and whether there is one."""
    line = tile // across
    batch = (line // down).to(tl.int64)
    row = (line % down) * TILE_ROWS + step * LANES + tl.arange(0, LANES)
    col = (tile % across) * TILE_COLS + tl.arange(0, TILE_COLS)
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
    lanes = tl.zeros([LANES, TILE_COLS], tl.float32)
    for step in tl.range(0, STEPS, num_stages=3):  # unrolled, Triton 3.6 spills registers
        at, live = tile_rows(tile, step, rows, cols, numel, down, across)
        g = bits_to_float(tl.load(g_ptr + at, mask=live, other=0), G)
        x = clipped(tl.where(is_finite(g), g, float("nan")), inv_scale, clip_value, clip_coef)
        square = x * x
        lanes = lanes + square
        row = ti * TILE_ROWS + step * LANES + tl.arange(0, LANES)
        sums = add_neighbours(tl.reshape(square, [SIZE]), ROW_LEVELS)
        tl.store(row_parts_ptr + (batch * across + tj) * rows + row, sums, mask=row < rows)
    col = tj * TILE_COLS + tl.arange(0, TILE_COLS)
    tl.store(col_parts_ptr + (batch * down + ti) * cols + col, add_eight(lanes), mask=col < cols)


@triton.jit
def ada_moments_kernel(
    parts_ptr, before_ptr, new_ptr, means_ptr, parts, size, other, groups,
    step_ptr, weights_ptr, weights_count, eps,
):  # fmt: skip
    """TILE_COLS rows, or columns, of one matrix: their sums of `parts` parts and their new moments;
    the sums instead where there is no `before_ptr`."""
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    place = group * TILE_COLS + tl.arange(0, TILE_COLS)
    first = parts_ptr + batch * parts * size
    lanes = tl.zeros([LANES, TILE_COLS], tl.float32)
    k = 0
    while k < parts:
        part = k + tl.arange(0, LANES)
        live = (part < parts)[:, None] & (place < size)[None, :]
        at = part.to(tl.int64)[:, None] * size + place[None, :]
        lanes = lanes + tl.load(first + at, mask=live, other=0.0)
        k += LANES
    new = add_eight(lanes)
    live = place < size
    if before_ptr is not None:
        mean = tl.div_rn(new, tl.full([TILE_COLS], 1.0, tl.float32) * other.to(tl.float32))
        weight = weight_of(tl.load(step_ptr), weights_ptr, weights_count)
        before = tl.load(before_ptr + batch * size + place, mask=live, other=0.0)
        new = tl.where(live, moment(before, mean, weight, eps), 0.0)
    tl.store(new_ptr + batch * size + place, new, mask=live)
    if means_ptr is not None:
        at = means_ptr + batch * groups + group
        tl.store(at + tl.arange(0, 1), add_neighbours(new, ROW_LEVELS))


@triton.jit
def ada_updates(
    g, at, live, tile, step, mean, col_factor, row_ptr, rows, down, across,
    inv_scale, clip_value, clip_coef, weight, eps, FACTORED: tl.constexpr,
):  # fmt: skip
    """The updates [LANES, TILE_COLS], 0 where there is no element, and the new moments or, again,
    the updates."""
    x = clipped(tl.where(is_finite(g), g, float("nan")), inv_scale, clip_value, clip_coef)
    if FACTORED:
        line = tile // across
        row = (line % down) * TILE_ROWS + step * LANES + tl.arange(0, LANES)
        of_row = row_ptr + (line // down).to(tl.int64) * rows + row
        ratio = tl.div_rn(tl.load(of_row, mask=row < rows, other=0.0), mean)
        u = (x * inverse_root(ratio)[:, None]) * col_factor[None, :]
        new = u
    else:
        new = moment(tl.load(row_ptr + at, mask=live, other=0.0), x * x, weight, eps)
        u = x * inverse_root(new)
    return tl.where(live, u, 0.0), new


@triton.jit
def mean_row(means_ptr, tile, groups, whole_rows, down, across):
    batch = (tile // across // down).to(tl.int64)
    total = sum_lanes(means_ptr + batch * groups, groups, ROW_LEVELS)
    return tl.div_rn(total, tl.full([1], 1.0, tl.float32) * whole_rows.to(tl.float32))


@triton.jit
def col_factors(col_ptr, tile, cols, down, across):
    col = (tile % across) * TILE_COLS + tl.arange(0, TILE_COLS)
    batch = (tile // across // down).to(tl.int64)
    return inverse_root(tl.load(col_ptr + batch * cols + col, mask=col < cols, other=0.0))


@triton.jit
def ada_norm_kernel(
    g_ptr, row_ptr, col_ptr, means_ptr, groups, whole_rows, norms_ptr,
    rows, cols, numel, down, across,
    inv_scale_ptr, clip_value, clip_coef_ptr, step_ptr, weights_ptr, weights_count, eps,
    G: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # its end is in the cache still
    inv_scale, clip_coef = one_or(inv_scale_ptr, 1.0), one_or(clip_coef_ptr, 1.0)
    weight = weight_of(tl.load(step_ptr), weights_ptr, weights_count)
    mean, col_factor = 0.0, 0.0
    if FACTORED:
        mean = mean_row(means_ptr, tile, groups, whole_rows, down, across)
        col_factor = col_factors(col_ptr, tile, cols, down, across)
    lanes = tl.zeros([LANES, TILE_COLS], tl.float32)
    step = 0
    while step < STEPS:  # unrolled it would take too many registers
        at, live = tile_rows(tile, step, rows, cols, numel, down, across)
        g = bits_to_float(tl.load(g_ptr + at, mask=live, other=0), G)
        u, _ = ada_updates(
            g, at, live, tile, step, mean, col_factor, row_ptr, rows, down, across,
            inv_scale, clip_value, clip_coef, weight, eps, FACTORED,
        )  # fmt: skip
        lanes = lanes + u * u
        step += 1
    tl.store(norms_ptr + tile + tl.arange(0, 1), tile_sum(lanes))


@triton.jit
def ada_sums_kernel(p_ptr, sums_ptr, rows, cols, numel, down, across, P: tl.constexpr):
    tile = tl.program_id(0)
    lanes = tl.zeros([LANES, TILE_COLS], tl.float32)
    for step in tl.static_range(STEPS):
        at, live = tile_rows(tile, step, rows, cols, numel, down, across)
        x = bits_to_float(tl.load(p_ptr + at, mask=live, other=0), P)
        lanes = lanes + x * x
    tl.store(sums_ptr + tile + tl.arange(0, 1), tile_sum(lanes))


@triton.jit
def ada_step_kernel(
    norms_ptr, sums_ptr, tiles, numel, scalars_ptr, step_ptr,
    lr, weight_decay, eps_rms, clip_threshold, found_inf_ptr, skip_ptr,
):  # fmt: skip
    """step_of() of csrc/adalomo.h"""
    n = tl.full([1], 1.0, tl.float32) * tl.maximum(numel, 1).to(tl.float32)
    update_square = sum_lanes(norms_ptr, tiles, TILE_LEVELS)
    param_square = sum_lanes(sums_ptr, tiles, TILE_LEVELS)
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


@triton.jit
def ada_tell_kernel(out_ptr, norms_ptr, tiles, means_ptr, groups):
    """A part's sums for the other ranks: of squares and, after the first sweep, of moments."""
    tl.store(out_ptr + tl.arange(0, 1), sum_lanes(norms_ptr, tiles, TILE_LEVELS))
    if means_ptr is not None:
        tl.store(out_ptr + 1 + tl.arange(0, 1), sum_lanes(means_ptr, groups, ROW_LEVELS))


@triton.jit(do_not_specialize=["offset", "param_id", "seed"])
def ada_update_kernel(
    p_ptr, g_ptr, low_ptr, row_ptr, col_ptr, new_row_ptr, new_col_ptr, means_ptr, groups,
    whole_rows, sums_ptr, scalars_ptr, step_ptr, weights_ptr, weights_count,
    rows, cols, numel, down, across, offset, param_id, seed,
    inv_scale_ptr, clip_value, clip_coef_ptr, eps,
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
            mean = mean_row(means_ptr, tile, groups, whole_rows, down, across)
            col_factor = col_factors(new_col_ptr, tile, cols, down, across)
            if tj == 0:
                row = ti * TILE_ROWS + tl.arange(0, TILE_ROWS)
                new = tl.load(new_row_ptr + batch * rows + row, mask=row < rows)
                tl.store(row_ptr + batch * rows + row, new, mask=row < rows)
            if ti == 0:
                col = tj * TILE_COLS + tl.arange(0, TILE_COLS)
                new = tl.load(new_col_ptr + batch * cols + col, mask=col < cols)
                tl.store(col_ptr + batch * cols + col, new, mask=col < cols)
        lanes = tl.zeros([LANES, TILE_COLS], tl.float32)
        step = 0
        while step < STEPS:
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
                    row = ti * TILE_ROWS + step * LANES + tl.arange(0, LANES)
                    first = (batch * rows + row) * (cols // GROUP) + tj * (TILE_COLS // GROUP)
                    group = first[:, None] + tl.arange(0, TILE_COLS // GROUP)[None, :]
                    group = offset // GROUP + group
                    w0, w1, w2, w3 = random_group(group, seed, number, param_id)
                    random = tl.reshape(deal(w0, w1, w2, w3), [LANES, TILE_COLS])
                else:
                    element = at + offset
                    w0, w1, w2, w3 = random_group(element >> GROUP_BITS, seed, number, param_id)
                    random = pick(w0, w1, w2, w3, element)
                rounded = round_stochastic(master, random, P)
            else:
                rounded = round_nearest(master, P)
            tl.store(p_ptr + at, rounded, mask=live)
            x = tl.where(live, bits_to_float(rounded, P), 0.0)
            lanes = lanes + x * x
            step += 1
        tl.store(sums_ptr + tile + tl.arange(0, 1), tile_sum(lanes))


class Sweeps:
    """The launches for one item, and the memory they share."""

    def __init__(
        self, item, *, lr, weight_decay, eps, clip_threshold, clip_value, seed, rounding, weights,
        inv_scale, clip_coef, found_inf, skip,
    ):  # fmt: skip
        self.item, self.seed, self.rounding = item, seed, rounding
        self.of_step = lr, weight_decay, eps[1], clip_threshold, found_inf, skip
        self.clip = {
            "inv_scale_ptr": inv_scale, "clip_value": clip_value, "clip_coef_ptr": clip_coef,
        }  # fmt: skip
        self.table = {"weights_ptr": weights, "weights_count": len(weights)}
        self.eps, self.launch = eps[0], {"num_warps": 8, **EXACT}
        tiles, self.shape = item.tiles, _shape(item.tiles, item.param)
        self.factored = tiles.factored and item.param.numel() > 0
        self.kind = {"G": name_of(item.grad.dtype), "FACTORED": self.factored}
        # The mean of the rows' moments: sums of groups of rows, and their number; of how many rows.
        self.means, self.whole_rows = None, tiles.rows
        self.groups = triton.cdiv(tiles.rows, reference.TILE_COLS)
        sizes = [2, tiles.count]
        if tiles.factored:
            sizes += [tiles.batch * n for n in (tiles.rows, tiles.cols, self.groups)]
        self.scalars, self.norms, *moments = weights.new_empty(sum(sizes)).split(sizes)
        if tiles.factored:
            self.row, self.col, self.means = moments
        else:
            self.row, self.col = item.full, None

    def statistics(self, told_cols=None):
        """The new moments of rows, and of columns or the columns' sums for the other ranks."""
        item, down, across = self.item, self.shape["down"], self.shape["across"]
        batch, rows, cols, _ = item.tiles
        sizes = [batch * across * rows, batch * down * cols]
        row_parts, col_parts = self.norms.new_empty(sum(sizes)).split(sizes)
        ada_stats_kernel[(item.tiles.count,)](
            as_bits(item.grad), row_parts, col_parts, **self.shape, **self.clip,
            G=self.kind["G"], **self.launch,
        )  # fmt: skip
        self.moments(row_parts, item.row, self.row, self.means, across, rows, cols)
        before, new = (item.col, self.col) if told_cols is None else (None, told_cols)
        self.moments(col_parts, before, new, None, down, cols, rows)

    def moments(self, parts, before, new, means, count, size, other):
        groups = triton.cdiv(size, reference.TILE_COLS)
        ada_moments_kernel[(self.item.tiles.batch * groups,)](
            parts, before, new, means, count, size, other, groups, self.item.step, **self.table,
            eps=self.eps, **self.launch,
        )  # fmt: skip

    def norm(self):
        ada_norm_kernel[(self.item.tiles.count,)](
            as_bits(self.item.grad), self.row, self.col, self.means, self.groups, self.whole_rows,
            self.norms, **self.shape, **self.clip, step_ptr=self.item.step, **self.table,
            eps=self.eps, **self.kind, **self.launch,
        )  # fmt: skip

    def tell(self, out, norms, means):
        ada_tell_kernel[(1,)](
            out, norms, self.item.tiles.count, means, self.groups, **self.launch
        )  # fmt: skip

    def step(self, update_squares, param_squares, tiles, numel):
        ada_step_kernel[(1,)](
            update_squares, param_squares, tiles, numel, self.scalars, self.item.step,
            *self.of_step, **self.launch,
        )  # fmt: skip

    def update(self):
        item = self.item
        own = item.row if item.tiles.factored else item.full
        grouped = in_groups(self.shape["cols"], item.part.offset)
        ada_update_kernel[(item.tiles.count,)](
            as_bits(item.param), as_bits(item.grad), item.low, own, item.col, self.row, self.col,
            self.means, self.groups, self.whole_rows, item.sums, self.scalars, item.step,
            *self.table.values(), **self.shape, offset=item.part.offset, param_id=item.param_id,
            seed=self.seed, **self.clip, eps=self.eps, P=name_of(item.param.dtype),
            ROUNDING=self.rounding, GROUPED=grouped, **self.kind, **self.launch,
        )  # fmt: skip


def adalomo_update_(items, **options):
    with on_current(options["weights"].device):
        for item in items:
            sweeps = Sweeps(item, **options)
            if sweeps.factored:
                sweeps.statistics()
            sweeps.norm()
            sweeps.step(sweeps.norms, item.sums, item.tiles.count, item.param.numel())
            sweeps.update()


def adalomo_statistics_(out, items, **options):
    """Returns what the other calls get as `kept`: each item's sweeps."""
    kept = []
    with on_current(out.device):
        for item in items:
            sweeps, told = Sweeps(item, **options), out[item.part.slot :][: item.part.length]
            kept.append(sweeps)
            if item.part.joined and not sweeps.factored:  # no rows
                told.zero_()
                continue
            if sweeps.factored:
                sweeps.statistics(told[2:] if item.part.joined else None)
            sweeps.tell(told, item.sums, sweeps.means if item.part.joined else None)
    return kept


def adalomo_squares_(out, items, kept, statistics, **options):
    with on_current(out.device):
        for item, sweeps in zip(items, kept):
            part = item.part
            if part.joined:
                rows, *_ = part.shape
                told = statistics[part.slot :][: part.length]
                sweeps.moments(told[2:], item.col, sweeps.col, None, 1, item.tiles.cols, rows)
                sweeps.means, sweeps.groups, sweeps.whole_rows = told[1:], 1, rows
            sweeps.norm()
            sweeps.tell(out[part.number :], sweeps.norms, None)


def adalomo_parts_update_(items, kept, statistics, squares, **options):
    with on_current(squares.device):
        for item, sweeps in zip(items, kept):
            part = item.part
            sweeps.step(squares[part.number :], statistics[part.slot :], 1, part.shape.numel())
            sweeps.update()
            if part.joined and not sweeps.factored:  # no tile writes its columns
                made = ~sweeps.scalars[1].isnan()
                item.col.copy_(torch.where(made, sweeps.col, item.col))


def adalomo_sums_(sums, param, tiles):
    with on_current(param.device):
        ada_sums_kernel[(tiles.count,)](
            as_bits(param), sums, **_shape(tiles, param), P=name_of(param.dtype), num_warps=8,
            **EXACT,
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
