"""What a step decides on the device: one formula on every backend, and GradScaler's trajectory."""

import math
import random
import re

import pytest
import torch
from backends import backends

from lomo_kernels import ops

pytestmark = pytest.mark.filterwarnings(  # numpy, under Triton's interpreter
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)
ALL_BACKENDS = pytest.mark.parametrize("backend", backends(), ids=lambda b: b.id)
PLACE = {name: place for place, name in enumerate(ops.DECISIONS)}
DYNAMIC = {"growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 3}


def start(scale=64.0, tracker=0.0, found_inf=0.0, skip=0.0, stuck=0.0):
    return torch.tensor([1 / scale, 1.0, found_inf, skip, 0.0, scale, tracker, stuck])


def run(backend, decisions, sumsq=None, found_inf=None, wants_out=True, **options):
    device = backend.device if backend else "cpu"
    decisions, sumsq, found_inf = (
        None if t is None else t.clone().to(device) for t in (decisions, sumsq, found_inf)
    )
    out = torch.full((len(PLACE),), math.nan, device=device) if wants_out else None
    name = backend.name if backend else "reference"
    ops.decide_(decisions, sumsq, found_inf=found_inf, out=out, backend=name, **options)
    return decisions.cpu(), None if out is None else out.cpu()


def check(backend, *arguments, **options):
    want, want_out = run(None, *arguments, **options)
    with backend.active():
        got, got_out = run(backend, *arguments, **options)
    for a, b in ((want, got), (want_out, got_out)):
        if a is not None:
            assert torch.equal(a.isnan(), b.isnan())
            nan = a.isnan()
            assert torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))
    return want, want_out


@ALL_BACKENDS
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 513, 2000])
@pytest.mark.parametrize("max_norm", [None, 0.1, 1e4])
def test_norm_and_coefficient(backend, count, max_norm):
    # twelve orders of magnitude, so that another order of additions would show
    sumsq = torch.rand(count) * 10.0 ** torch.randint(-6, 6, (count,))
    got, _ = check(backend, start(), sumsq, max_norm=max_norm)
    exact = math.sqrt(math.fsum(sumsq.tolist()))
    assert got[PLACE["total_norm"]].item() == pytest.approx(exact, rel=2**-23)
    want = 1.0 if max_norm is None else min(1.0, max_norm / (exact + 1e-6))
    assert got[PLACE["clip_coef"]].item() == pytest.approx(want, rel=2**-22)


@ALL_BACKENDS
def test_division_and_root_are_rounded_once(backend):
    for _ in range(20):
        scale = torch.rand(()).item() * 1e5 + 1e-3
        check(backend, start(scale), torch.rand(3), max_norm=torch.rand(()).item())


@ALL_BACKENDS
@pytest.mark.parametrize("special", [math.inf, math.nan, 0.0, 1e38])
def test_special_sums(backend, special):
    got, _ = check(backend, start(), torch.full((4,), special), max_norm=1.0)
    if special == math.inf:
        assert got[PLACE["clip_coef"]] == 0.0
    assert got[PLACE["total_norm"]].isnan() == math.isnan(special)


@ALL_BACKENDS
@pytest.mark.parametrize("options", [{}, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("flags", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("others", [None, [], [0.0], [0.0] * 6 + [1.0]], ids=str)
def test_flags(backend, options, flags, others):
    found_inf = None if others is None else torch.tensor(others)
    decisions = start(64.0, 1.0, *flags)
    got, out = check(backend, decisions, None, found_inf, **options)
    found = max(*flags, *(others or []))
    assert got[2:4].tolist() == [found, found]
    # the step is not over: what scales its gradients stays
    for name in ("inv_scale", "clip_coef", "total_norm", "grad_scale", "growth_tracker", "stuck"):
        assert got[PLACE[name]] == decisions[PLACE[name]]
    scale = 64.0 if not options or not found else torch.tensor(64 * 0.3).item()
    tracker = 1.0 if not options else 0.0 if found else 2.0
    assert out[1:].tolist() == [1.0, 0.0, 0.0, 0.0, scale, tracker, 0.0]
    assert out[0].item() == pytest.approx(1 / scale, rel=2**-24)


@ALL_BACKENDS
def test_without_out_nothing_of_the_next_step_is_decided(backend):
    got, out = check(backend, start(), torch.ones(5), wants_out=False, max_norm=2.0, **DYNAMIC)
    assert out is None
    assert got[5:].tolist() == start()[5:].tolist()


@ALL_BACKENDS
@pytest.mark.parametrize("min_scale", [1.0, 10.0])
def test_floor(backend, min_scale):
    decisions = start(100.0)
    options = {"backoff_factor": 0.25, "growth_interval": 5, "min_scale": min_scale}
    scales, stuck = [], []
    for _ in range(7):
        decisions[PLACE["found_inf"]] = 1.0
        _, decisions = check(backend, decisions, **options)
        scales.append(decisions[PLACE["grad_scale"]].item())
        stuck.append(decisions[PLACE["stuck"]].item())
    want = [max(100 / 4**k, min_scale) for k in range(1, 8)]
    assert scales == want
    first = want.index(min_scale)
    assert stuck == [max(0, k - first) for k in range(7)]
    _, decisions = check(backend, decisions, **options)  # a good step
    assert decisions[PLACE["stuck"]] == 0.0


@ALL_BACKENDS
def test_a_growth_that_would_be_infinite_is_not_taken(backend):
    decisions = start(3e38, 2.0)
    _, out = check(backend, decisions, **DYNAMIC)
    assert out[5:].tolist() == [decisions[5].item(), 0.0, 0.0]


@ALL_BACKENDS
@pytest.mark.parametrize("seed", range(4))
def test_the_trajectory_is_gradscaler_s(backend, seed):
    """Random overflows, factors whose products need rounding, growth and backoff."""
    generator = random.Random(seed)
    options = {
        "growth_factor": generator.choice([2.0, 1.7, 1.1]),
        "backoff_factor": generator.choice([0.5, 0.3, 0.9]),
        "growth_interval": generator.choice([1, 2, 5]),
    }
    scale = generator.choice([65536.0, 2.0**125, 1234.5])
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, **options)
    parameter = torch.nn.Parameter(torch.ones(1))
    sgd = torch.optim.SGD([parameter], lr=0.0)
    scaler.scale(torch.ones(1))  # creates its tensors
    decisions = start(scale)
    with backend.active():
        for _ in range(60 if backend.id == "triton-interpreter" else 200):
            found = float(generator.random() < 0.3)
            parameter.grad = torch.full((1,), math.inf if found else 1.0)
            scaler.step(sgd)
            scaler.update()
            decisions[PLACE["found_inf"]] = found
            _, decisions = run(backend, decisions, min_scale=1e-30, **options)
            assert decisions[PLACE["grad_scale"]].item() == scaler.get_scale()
            assert decisions[PLACE["growth_tracker"]].item() == scaler._growth_tracker.item()


def floats(count, **options):
    return torch.ones(count, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decisions": 3}, TypeError, "decisions must be a tensor, got int"),
        ({"decisions": floats(7)}, ValueError, "decisions must have 8 elements, got 7"),
        ({"decisions": floats(8).half()}, TypeError, "decisions must be contiguous float32, got"),
        ({"out": floats(8).double()}, TypeError, "out must be torch.float32 as decisions is, got"),
        ({"decisions": floats(16)[::2]}, TypeError, "decisions must be contiguous float32, got"),
        ({"sumsq": 1.0}, TypeError, "sumsq must be a tensor, got float"),
        ({"sumsq": floats(0)}, ValueError, "sumsq must have at least one element, got none"),
        ({"sumsq": floats(2, device="meta")}, ValueError, "sumsq must be on decisions' device cpu"),
        ({"found_inf": floats(2).half()}, TypeError, "found_inf must be contiguous float32, got"),
        ({"out": floats(9)}, ValueError, "out must have 8 elements, got 9"),
        ({"max_norm": 0.0}, ValueError, "max_norm must be a finite number greater than 0, got 0.0"),
        ({"growth_factor": 1.0}, ValueError, "growth_factor must be a number between 1 and inf"),
        ({"backoff_factor": 1.0}, ValueError, "backoff_factor must be a number between 0 and 1"),
        ({"min_scale": 0}, ValueError, "min_scale must be a number between 0 and inf, got 0"),
        ({"growth_interval": 2.5}, TypeError, "growth_interval must be an integer, got float"),
        ({"growth_interval": -1}, ValueError, "growth_interval must be in [0, 16777217), got -1"),
        ({"backend": "none"}, ValueError, "backend must be 'auto' or one of"),
    ],
    ids=lambda value: None,
)
def test_decide_refuses(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.decide_(**{"decisions": start(), **arguments})


def test_out_must_be_another_tensor():
    decisions = start()
    with pytest.raises(ValueError, match="out and decisions must be two tensors"):
        ops.decide_(decisions, out=decisions)
