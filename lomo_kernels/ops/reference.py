"""The formulas in plain PyTorch: the definition of correct for every other backend.

Written to be checked by eye. Runs on every device, stops nowhere to ask the host, and is slow.
"""

from typing import NamedTuple

import torch

NORM_LANES = 2048
NORM_CHUNK = 8 * NORM_LANES
DECIDE_LANES = 256
# Elements of the tensor that `decide_` works on.
DECISIONS = (
    "inv_scale", "clip_coef", "found_inf", "skip", "total_norm", "grad_scale", "growth_tracker",
    "stuck",
)  # fmt: skip
TILE_ROWS, TILE_COLS = 64, 256  # together a NORM_CHUNK
ADALOMO_LANES = 8
_LOW_32_BITS = 0xFFFFFFFF


def unavailable(device):
    """Why this backend cannot run on `device`; None: it can."""
    return None


def philox4x32_10(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011): four int64 tensors of 32-bit words, a 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW_32_BITS, key >> 32
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps modulo 2**64: all 64 bits are right
        c0, c1 = ((b >> 32) & _LOW_32_BITS) ^ c1 ^ k0, b & _LOW_32_BITS
        c2, c3 = ((a >> 32) & _LOW_32_BITS) ^ c3 ^ k1, a & _LOW_32_BITS
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32_BITS, (k1 + 0xBB67AE85) & _LOW_32_BITS
    return c0, c1, c2, c3


def random_bits(numel, offset, seed, step, param_id, device):
    """Sixteen bits for each of the elements [offset, offset + numel) of a parameter, as int64."""
    element = torch.arange(offset, offset + numel, device=device)
    group = element >> 3
    words = philox4x32_10(
        (group & _LOW_32_BITS, group >> 32, group * 0 + step, group * 0 + param_id), seed
    )
    word = torch.stack(words, 1).gather(1, (element >> 1 & 3).unsqueeze(1)).squeeze(1)
    return word >> 16 * (element & 1) & 0xFFFF


def _bits(x):
    return x.view(torch.int32).long() & _LOW_32_BITS


def _as_int16(bits):
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16)


def round_stochastic(x, dtype, random):
    """fp32 to bf16 or fp16, up with probability (x - below) / (above - below)."""
    u = _bits(x)
    sign, a = u & 0x80000000, u & 0x7FFFFFFF
    if dtype is torch.bfloat16:
        rounded, nan = (u + random) >> 16 & 0xFFFF, 0x7FC0
    else:
        a = a.clamp(max=0x47800000)  # 2**16: this and above is infinity
        # 2**-16ths of the spacing of fp16: normal numbers, and below 2**-14 multiples of 2**-24.
        mantissa = (a & 0x7FFFFF) | torch.where(a >= 0x800000, 0x800000, 0)
        shift = 110 - (a >> 23)
        subnormal = torch.where(
            shift > 0, mantissa >> shift.clamp(0, 31), mantissa << (-shift).clamp(0, 2)
        )
        scaled = torch.where(a < 0x38800000, subnormal, (a - 0x38000000) << 3)
        rounded, nan = (sign >> 16) | (scaled + random) >> 16, 0x7E00
    return _as_int16(torch.where(x.isnan(), nan, rounded)).view(dtype)


def merge(high, low):
    """The fp32 master of a bf16 and the int16 beside it (csrc/float16.h, Note [Split master])."""
    h = high.view(torch.int16).int() << 16
    u = h + low.int()
    return torch.where((u ^ h) < 0, h, u).view(torch.float32)


def split(master):
    """The pair that `merge` turns back: bf16, nearest with ties away from zero, and int16."""
    nan = master.isnan()
    u = _bits(master)
    high = torch.where(nan, 0x7FC0, (u + 0x8000) >> 16 & 0xFFFF)
    low = torch.where(nan, 0, u & 0xFFFF)
    return _as_int16(high).view(torch.bfloat16), _as_int16(low)


def _flat(tensor):
    return tensor.detach().as_strided((tensor.numel(),), (1,))


@torch.no_grad()
def lomo_update_(
    params, grads, lows, offsets, param_ids, *, lr, decay, clip_value, step, seed, rounding,
    inv_scale, clip_coef, found_inf, skip,
):  # fmt: skip
    """See `lomo_kernels.ops.lomo_update_`; scalars are already rounded to fp32."""
    for param, grad, low, offset, param_id in zip(params, grads, lows, offsets, param_ids):
        p, g = _flat(param), _precise(_flat(grad))
        good = g.isfinite()
        if skip is not None:
            good = good & (skip == 0)
        if found_inf is not None:
            found_inf.masked_fill_(~good.all(), 1.0)
            if skip is not None:  # an empty gradient has nothing that is not good
                found_inf.masked_fill_(skip != 0, 1.0)

        g = _clipped(g, inv_scale, clip_value, clip_coef)
        master = _master(p, low, rounding)
        master = master * decay - lr * g
        _store(master, good, p, low, rounding, offset, seed, step, param_id)


def _precise(x):
    """In fp32, or in fp64 where it is in fp64."""
    return x if x.dtype is torch.float64 else x.float()


def _clipped(g, inv_scale, clip_value, clip_coef):
    if inv_scale is not None:
        g = g * inv_scale
    g = g.clamp(-clip_value, clip_value)
    return g if clip_coef is None else g * clip_coef


def _master(p, low, rounding):
    return merge(p, _flat(low)) if rounding == "split" else _precise(p)


def _store(master, good, p, low, rounding, offset, seed, step, param_id):
    """Rounds into p (and low) where `good`; what is not good keeps its bits."""
    if rounding == "split":
        high, rest = split(master)
        _flat(low).copy_(torch.where(good, rest, _flat(low)))
    elif rounding == "stochastic":
        bits = random_bits(p.numel(), offset, seed, step, param_id, p.device)
        high = round_stochastic(master, p.dtype, bits)
    else:
        high = master.to(p.dtype)
    p.copy_(torch.where(good, high, p))


def _add_in_order(rows):
    """Sums [..., rows, lanes]: down the rows, then neighbouring lanes in pairs."""
    lanes = rows[..., 0, :]
    for row in range(1, rows.shape[-2]):
        lanes = lanes + rows[..., row, :]
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    return lanes[..., 0]


def _padded(x, multiple):
    missing = -x.numel() % multiple if x.numel() else multiple
    return torch.nn.functional.pad(x, (0, missing))


@torch.no_grad()
def grad_sumsq_(sumsq, grads, *, inv_scale, found_inf):
    """See `lomo_kernels.ops.grad_sumsq_`; csrc/kernels.h, Note [Summation order]."""
    for k, grad in enumerate(grads):
        g = _flat(grad).to(torch.promote_types(sumsq.dtype, torch.float32))
        if found_inf is not None:
            found_inf.masked_fill_(~g.isfinite().all(), 1.0)
        if inv_scale is not None:
            g = g * inv_scale
        chunks = _padded(g * g, NORM_CHUNK).view(-1, NORM_CHUNK // NORM_LANES, NORM_LANES)
        sumsq[k] = _total(_add_in_order(chunks))


def _total(partials):
    if partials.numel() > 1:
        partials = _add_in_order(_padded(partials, NORM_LANES).view(-1, NORM_LANES))
    return partials.view(())


def _root(x):
    """Rounded once: torch's own fp32 root on a CPU is not always the nearest number."""
    return x.double().sqrt().to(x.dtype)


@torch.no_grad()
def decide_(
    decisions, sumsq, found_inf, out, *, max_norm, min_scale, growth_factor, backoff_factor,
    growth_interval,
):  # fmt: skip
    """See `lomo_kernels.ops.decide_`."""
    _, clip_coef, *_, total_norm, scale, tracker, stuck = decisions.unbind()
    if sumsq is not None:
        lanes = _padded(sumsq.double(), DECIDE_LANES).view(-1, DECIDE_LANES)
        total_norm.copy_(_root(_add_in_order(lanes).to(decisions.dtype)))
        if max_norm > 0:  # a number divided by a tensor would be its reciprocal times the number
            limit = torch.full_like(total_norm, max_norm)
            clip_coef.copy_((limit / (total_norm + 1e-6)).clamp(max=1.0))
    flags = decisions[2:4]
    found = (flags != 0).any()
    if found_inf is not None:
        found = found | (found_inf != 0).any()
    flags.copy_(found)
    if out is None:
        return
    if growth_interval > 0:
        at_floor = scale <= min_scale
        lower = torch.where(
            at_floor, scale, (scale.double() * backoff_factor).to(scale.dtype).clamp(min=min_scale)
        )
        higher = (scale.double() * growth_factor).to(scale.dtype)
        grow = tracker + 1 >= growth_interval
        kept = torch.where(grow & higher.isfinite(), higher, scale)
        scale = torch.where(found, lower, kept)
        tracker = torch.where(found | grow, 0.0, tracker + 1)
        stuck = torch.where(found & at_floor, stuck + 1, 0.0)
    one, zero = torch.ones_like(scale), torch.zeros_like(scale)
    out.copy_(torch.stack((one / scale, one, zero, zero, zero, scale, tracker, stuck)))


class Part(NamedTuple):
    """What an item is of a tensor, and where its sums are in the messages (csrc/adalomo.h, Note
    [Parts])."""

    shape: torch.Size  # of the whole tensor
    offset: int = 0  # of its first element in it
    slot: int = 0  # in the first message
    number: int = 0  # in the second

    @property
    def joined(self):
        """Rows of a matrix: other ranks have more of its columns and of its mean row."""
        return len(self.shape) == 2 and self.shape.numel() > 0

    @property
    def length(self):
        """Of its statistics."""
        return 2 + self.shape[1] if self.joined else 1


class Tiles(NamedTuple):
    """How AdaLomo's reductions see a tensor (csrc/adalomo.h, Note [Tiles])."""

    batch: int
    rows: int
    cols: int
    factored: bool

    @classmethod
    def of(cls, shape):
        if len(shape) < 2:  # as a matrix whose tiles are chunks of consecutive elements
            numel = shape[0] if shape else 1
            return cls(1, -(-numel // TILE_COLS), TILE_COLS, False)
        *batch, rows, cols = shape
        return cls(torch.Size(batch).numel(), rows, cols, True)

    @property
    def count(self):
        down, across = -(-self.rows // TILE_ROWS), -(-self.cols // TILE_COLS)
        return max(1, self.batch * down * across)

    def cut(self, flat):
        """[batch, down, TILE_ROWS, across, TILE_COLS]; what is missing counts as 0."""
        pad = torch.nn.functional.pad
        missing = self.batch * self.rows * self.cols - flat.numel()
        x = pad(flat, (0, missing)).view(self.batch, self.rows, self.cols)
        x = pad(x, (0, -self.cols % TILE_COLS, 0, -self.rows % TILE_ROWS))
        across, down = x.shape[2] // TILE_COLS, x.shape[1] // TILE_ROWS
        return x.view(self.batch, down, TILE_ROWS, across, TILE_COLS)

    def sums(self, flat):
        """The sum of every tile, in the order of a chunk of grad_sumsq_."""
        if flat.numel() == 0:
            return flat.new_zeros(1)
        tiles = self.cut(flat).transpose(2, 3).reshape(-1, NORM_CHUNK // NORM_LANES, NORM_LANES)
        return _add_in_order(tiles)


def _add_eight(x):
    """Sums [..., n] in eight lanes: lane l adds elements l, l + 8, ..., then lanes in pairs."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % ADALOMO_LANES))
    return _add_in_order(x.view(*x.shape[:-1], -1, ADALOMO_LANES))


def _sums_of_squares(x, tiles):
    """Of each row [batch, rows] and each column [batch, cols] of [batch, rows, cols]."""
    if x.numel() == 0:
        return x.sum(2), x.sum(1)
    cut = tiles.cut((x * x).view(-1))
    rows = _add_in_order(cut.unsqueeze(-2)).transpose(2, 3)  # [batch, down, across, TILE_ROWS]
    cols = _add_eight(cut.permute(0, 1, 3, 4, 2))  # [batch, down, across, TILE_COLS]
    rows = _add_eight(rows.transpose(2, 3)).flatten(1)
    cols = _add_eight(cols.permute(0, 2, 3, 1)).flatten(1)
    return rows[:, : tiles.rows], cols[:, : tiles.cols]


def _sum_of_rows(rows):
    """[batch, rows] -> [batch, 1]: 256 at a time in pairs, then the sums in 256 lanes."""
    if rows.numel() == 0:
        return rows.new_zeros(len(rows), 1)
    pad = torch.nn.functional.pad
    parts = pad(rows, (0, -rows.shape[1] % TILE_COLS)).view(len(rows), -1, 1, TILE_COLS)
    parts = _add_in_order(parts)
    parts = pad(parts, (0, -parts.shape[1] % TILE_COLS)).view(len(rows), -1, TILE_COLS)
    return _add_in_order(parts).unsqueeze(1)


def _inverse_root(x):
    return torch.where(x.isfinite(), 1.0 / _root(x), torch.nan)


def _squares(item, *, eps, clip_value, weights, inv_scale, clip_coef, **_):
    """The gradient, the new moments of rows, the squares of columns, and the part's statistics."""
    tiles, part, g = item.tiles, item.part, _flat(item.grad).float()
    x = _clipped(torch.where(g.isfinite(), g, torch.nan), inv_scale, clip_value, clip_coef)
    square = _total(item.sums).view(1)
    if not tiles.factored or (x.numel() == 0 and not part.joined):
        return x, None, None, square
    x = x.view(tiles[:3])
    rows, cols = _sums_of_squares(x, tiles)
    rows = rows / torch.full_like(rows, tiles.cols)
    rows = _moment(item, item.row.view_as(rows), rows, eps, weights)
    if part.joined:
        square = torch.cat([square, _sum_of_rows(rows).view(-1), cols.view(-1)])
    return x, rows, cols, square


def _moment(item, before, square, eps, weights):
    weight = weights[item.step.clamp(max=len(weights) - 1).long()]
    return before * (1.0 - weight) + weight * (square + eps[0])


def _updates(item, x, rows, cols, statistics, *, eps, weights, **_):
    """The updates of a part and its new moments, from the statistics of the whole tensor."""
    if rows is None:
        if item.full is None:  # no element at all
            return x, ()
        moment = _moment(item, _flat(item.full), x * x, eps, weights)
        return x * _inverse_root(moment), ((item.full, moment),)
    total = _sum_of_rows(rows)
    if item.part.joined:
        total, cols = statistics[1].view_as(total), statistics[2:].view_as(cols)
    height = item.part.shape[-2]
    a = _inverse_root(rows / (total / torch.full_like(total, height)))
    cols = cols / torch.full_like(cols, height)
    cols = _moment(item, item.col.view_as(cols), cols, eps, weights)
    u = (x * a.unsqueeze(2)) * _inverse_root(cols).unsqueeze(1)
    return u.view(-1), ((item.row, rows), (item.col, cols))


def _update(
    item, u, new, param_square, update_square, *, lr, weight_decay, eps, clip_threshold, seed,
    rounding, found_inf, skip, **_,
):  # fmt: skip
    """Writes a part, from the sums of squares of the whole tensor."""
    numel = update_square.new_full((), max(1, item.part.shape.numel()), dtype=torch.float32)
    rms = _root(update_square / numel)
    divisor = (rms / torch.full_like(rms, clip_threshold)).clamp(min=1.0)
    own_lr = lr * _root(param_square / numel).clamp(min=eps[1])
    size, shrink = own_lr / divisor, own_lr * weight_decay
    good = update_square.isfinite() & own_lr.isfinite()
    if skip is not None:
        good = good & (skip.view(()) == 0)
    if found_inf is not None:
        found_inf.masked_fill_(~good, 1.0)

    tiles, part, p = item.tiles, item.part, _flat(item.param)
    master = _master(p, item.low, rounding)
    master = master - (shrink * master + size * u)
    step = item.step.long()
    _store(master, good, p, item.low, rounding, part.offset, seed, step, item.param_id)
    for moment, value in new:
        moment.copy_(torch.where(good, value.view_as(moment), moment))
    item.sums.copy_(torch.where(good, tiles.sums(p.float() * p.float()), item.sums))
    item.step.add_(good)


@torch.no_grad()
def adalomo_update_(items, **options):
    """See `lomo_kernels.ops.adalomo_update_`; numbers are already rounded to fp32."""
    for item in items:
        *found, statistics = _squares(item, **options)
        u, new = _updates(item, *found, statistics, **options)
        _update(item, u, new, statistics[0], _total(item.tiles.sums(u * u)), **options)


# The calls of `lomo_kernels.ops.AdalomoParts`: the same, but that sums over the ranks take the
# place of the part's own. Nothing is kept from call to call; the sweeps are made anew.


@torch.no_grad()
def adalomo_statistics_(out, items, **options):
    for item in items:
        *_, statistics = _squares(item, **options)
        out[item.part.slot :][: len(statistics)] = statistics


def _again(item, every, **options):
    *found, own = _squares(item, **options)
    statistics = every[item.part.slot :][: len(own)]
    return *_updates(item, *found, statistics, **options), statistics[0]


@torch.no_grad()
def adalomo_squares_(out, items, kept, statistics, **options):
    for item in items:
        u, *_ = _again(item, statistics, **options)
        out[item.part.number] = _total(item.tiles.sums(u * u))


@torch.no_grad()
def adalomo_parts_update_(items, kept, statistics, squares, **options):
    for item in items:
        u, new, param_square = _again(item, statistics, **options)
        _update(item, u, new, param_square, squares[item.part.number], **options)


@torch.no_grad()
def adalomo_sums_(sums, param, tiles):
    """See `lomo_kernels.ops.adalomo_sums_`."""
    p = _flat(param).float()
    sums.copy_(tiles.sums(p * p))
