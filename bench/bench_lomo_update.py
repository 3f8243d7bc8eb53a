"""The update of a tensor, or of a list of them, beside what else could make it.

    python -m bench.bench_lomo_update [--minutes 8] [--largest N]

An element moves 6 bytes with 16-bit parameters and gradients: both are read, the parameter is
written; "split" moves 4 more, "with norm" reads the gradient once more. Rivals are told by the
same bytes, whatever they move.
"""

import functools

import torch

from lomo_kernels import ops

from . import peers, shapes, suite, timing
from .timing import Rival

LR, DECAY, SCALE, CLIP_VALUE, CLIP_COEF = 1e-3, 0.1, 1024.0, 1.0, 0.37
PLAIN, ALL, NORM = "plain", "all", "with norm"


def scalars(device):
    values = {"inv_scale": 1 / SCALE, "clip_coef": CLIP_COEF, "found_inf": 0.0, "skip": 0.0}
    return {name: torch.tensor([value], device=device) for name, value in values.items()}


def options_of(device):
    """name -> arguments of `lomo_update_`, one feature at a time and all of them."""
    each = {"weight_decay": DECAY, "clip_value": CLIP_VALUE, **scalars(device)}
    every = {**each, "rounding": "nearest"}
    return {
        PLAIN: {},
        **{name: {name: value} for name, value in each.items()},
        ALL: every,
        "all, stochastic": {**every, "rounding": "stochastic"},
        "all, split": {**every, "rounding": "split"},
    }


def backends(device):
    """Those that run here; Triton's interpreter is not one whose time says anything."""
    return [name for name in ("native", "triton") if ops.unavailable(name, device) is None
            and not (name == "triton" and device.type == "cpu")]  # fmt: skip


def traffic(case, options):
    size, grad = case.sizes
    extra = 4 if "split" in options else grad if options == NORM else 0
    return case.numel * (2 * size + grad + extra)


def lows(each, arguments):
    """The further argument of "split"."""
    if arguments.get("rounding") != "split":
        return {}
    return {"low": [torch.zeros_like(p, dtype=torch.int16) for p in each.params]}


def captured(case, backend):
    """Triton's table of a list lies in memory of the host that a replay would find in other use."""
    return backend != "triton" or len(case.shapes) == 1


def ours(case, where, backend, name):
    arguments = options_of(where.device)[name]

    def make(each):
        extra = {**arguments, **lows(each, arguments)}
        if len(each.params) == 1:  # as an optimizer's hook calls it
            extra = {k: v[0] if k == "low" else v for k, v in extra.items()}
            each = timing.Set(*(tensors[0] for tensors in each))
        return functools.partial(ops.lomo_update_, *each, lr=LR, backend=backend, **extra)

    return Rival(backend, name, traffic(case, name), make, captured(case, backend))


def with_norm(case, where, backend):
    """The norm's pass, its coefficient, and the update with it."""

    def make(each):
        first = [float(name in ("inv_scale", "clip_coef")) for name in ops.DECISIONS]
        decisions = torch.tensor(first, device=where.device)
        known = dict(zip(ops.DECISIONS, decisions.split(1)))
        sumsq = torch.zeros(len(each.params), device=where.device)

        def run():
            ops.grad_sumsq_(
                sumsq, each.grads, inv_scale=known["inv_scale"], found_inf=known["found_inf"],
                backend=backend,
            )  # fmt: skip
            ops.decide_(decisions, sumsq, max_norm=1.0, backend=backend)
            ops.lomo_update_(
                each.params, each.grads, lr=LR, inv_scale=known["inv_scale"],
                clip_coef=known["clip_coef"], skip=known["skip"], backend=backend,
            )  # fmt: skip

        return run

    return Rival(backend, NORM, traffic(case, NORM), make, captured(case, backend))


def rivals(case, where):
    """All who can make this update: the same bits, the same formula, or a part of it."""
    found = []
    for backend in backends(where.device):
        found += [ours(case, where, backend, name) for name in (PLAIN, ALL)]
        if case.dtype.itemsize == 2:
            found.append(ours(case, where, backend, "all, stochastic"))
        if case.dtype is torch.bfloat16:
            found.append(ours(case, where, backend, "all, split"))
        found.append(with_norm(case, where, backend))
    full = traffic(case, ALL)
    arguments = options_of(where.device)[ALL]
    for what, sequence in (
        ("eager, reference's", peers.sequence),
        ("eager, fewest passes", peers.shortest),
    ):
        run = functools.partial(sequence, lr=LR, **arguments)
        found.append(Rival(what, ALL, full, run, captured=True))
    if case.dtype is not case.grad_dtype:
        return found
    of_torch = {"p.add_": peers.add, "foreach": peers.foreach, "_fused_sgd_": peers.fused_sgd}
    alike = {
        **of_torch, "optimi": peers.optimi_sgd, "pytorch_optimizer": peers.pytorch_optimizer_lomo,
        "lomo-optim": peers.lomo_optim_update,
    }  # fmt: skip
    found += [
        Rival(what, PLAIN, full, functools.partial(f, lr=LR), captured=what in of_torch)
        for what, f in alike.items()
    ]
    # A scale of 1: it writes the unscaled gradient back, which would be smaller in each round.
    scaled = functools.partial(
        peers.fused_sgd,
        lr=LR,
        grad_scale=torch.ones_like(arguments["skip"]),
        found_inf=arguments["skip"],
    )
    found.append(Rival("_fused_sgd_", "grad_scale, skip", full, scaled, captured=True))
    norm = functools.partial(peers.lomo_optim_update, lr=LR, norm=True)
    return [*found, Rival("lomo-optim", NORM, traffic(case, NORM), norm)]


def features(case, where):
    """What each option costs."""
    return [
        ours(case, where, backend, name)
        for backend in backends(where.device)
        for name in options_of(where.device)
    ]


def jobs(where):
    """Most informative first."""
    square, large, others = shapes.chosen(where.largest)
    half, single = torch.float16, torch.float32

    def job(rank, case, of=rivals):
        return suite.timed(rank, where, "lomo_update", case, of)

    yield job(0, square)
    yield job(0, large)
    yield job(2, shapes.experts(where.largest))
    for case in (square, large):
        yield job(3, case._replace(name=f"{case.name}, options"), features)
        for dtype, grad in (
            (half, half), (single, single), (torch.bfloat16, single), (single, half)
        ):  # fmt: skip
            rank = 2 if dtype is grad else 6
            yield job(rank, case._replace(dtype=dtype, grad_dtype=grad))
    for case in others:
        yield job(5, case)
    for case in shapes.sweep():
        yield job(7, case)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
