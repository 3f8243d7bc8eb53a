"""What a step decides; csrc/decide.h."""

import triton
import triton.language as tl

from .. import reference
from .common import EXACT, columns, is_finite, on_current
from .grad_sumsq import add_neighbours

INV_SCALE, CLIP_COEF, FOUND_INF, SKIP, TOTAL_NORM, GRAD_SCALE, GROWTH_TRACKER, STUCK, _ = columns(
    len(reference.DECISIONS)
)
LEVELS = reference.DECIDE_LANES.bit_length() - 1


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
        tl.store(d_ptr + TOTAL_NORM, norm)
        if CLIP:
            coef = tl.div_rn(max_norm, norm + 1e-6)
            tl.store(d_ptr + CLIP_COEF, tl.where(coef > 1.0, 1.0, coef))
    found = (tl.load(d_ptr + FOUND_INF) != 0.0) | (tl.load(d_ptr + SKIP) != 0.0)
    if found_ptr is not None:
        k = 0
        while k < flags:
            found = found | (tl.load(found_ptr + k) != 0.0)
            k += 1
    flag = tl.where(found, 1.0, 0.0)
    tl.store(d_ptr + FOUND_INF, flag)
    tl.store(d_ptr + SKIP, flag)
    if out_ptr is not None:
        scale = tl.load(d_ptr + GRAD_SCALE)
        tracker = tl.load(d_ptr + GROWTH_TRACKER)
        stuck = tl.load(d_ptr + STUCK)
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
        tl.store(out_ptr + INV_SCALE, tl.div_rn(1.0, scale))
        tl.store(out_ptr + CLIP_COEF, 1.0)
        tl.store(out_ptr + FOUND_INF, 0.0)
        tl.store(out_ptr + SKIP, 0.0)
        tl.store(out_ptr + TOTAL_NORM, 0.0)
        tl.store(out_ptr + GRAD_SCALE, scale)
        tl.store(out_ptr + GROWTH_TRACKER, tracker)
        tl.store(out_ptr + STUCK, stuck)


def decide_(
    decisions, sumsq, found_inf, out, *, max_norm, min_scale, growth_factor, backoff_factor,
    growth_interval,
):  # fmt: skip
    with on_current(decisions.device):
        decide_kernel[(1,)](
            decisions, out, sumsq, 0 if sumsq is None else sumsq.numel(),
            found_inf, 0 if found_inf is None else found_inf.numel(), max_norm, min_scale,
            CLIP=max_norm > 0, GROWTH=growth_factor, BACKOFF=backoff_factor,
            INTERVAL=growth_interval, LEVELS=LEVELS,
            num_warps=4, **EXACT,
        )  # fmt: skip
