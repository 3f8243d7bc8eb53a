"""AdaLomo against transformers' Adafactor and lomo-optim, and what its state has to survive."""

import inspect
import io
import math

import models
import pytest
import torch
from torch import nn

from lomo_kernels import AdaLomo, LossScale, ops
from lomo_kernels.ops import factors

LR = 0.02
BF16, F16 = torch.bfloat16, torch.float16
STRATEGIES = ["one_backward", "two_backward", "partial", "auto"]


class Mixed(nn.Module):
    """Parameters of every rank: scalar, vectors, matrices, experts [E, in, out], a convolution."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 24)
        self.convolution = nn.Conv1d(24, 24, 3, padding=1)
        self.experts = nn.Parameter(torch.randn(3, 24, 24) * 0.2)
        self.norm = nn.LayerNorm(24)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(24, models.VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.convolution(x.mT).mT
        x = x + torch.einsum("bti,eio->bto", self.norm(x), self.experts).tanh()
        return self.head(x * self.scale)


def mixed(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Mixed().to(dtype)


def adafactor(model, **options):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.Adafactor(
        model.parameters(), lr=LR, scale_parameter=True, relative_step=False, warmup_init=False,
        **options,
    )  # fmt: skip


def train(model, optimizer, steps, driver=models.with_backward):
    for step in steps:
        driver(optimizer, model, step)
    return model


# -- against others --------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.05, 1e4], ids=["free", "clipped", "not reached"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_to_adafactor_with_torch_s_clipping(strategy, weight_decay, clip):
    ours, theirs = mixed(), mixed().double()
    mine = AdaLomo(
        ours, LR, clip_grad_norm=clip, weight_decay=weight_decay, strategy=strategy,
        factor_budget=9000 if strategy == "partial" else None,
    )  # fmt: skip
    other = adafactor(theirs, weight_decay=weight_decay)
    for step in range(20):
        mine.backward(models.loss_of(ours, step))
        loss = models.loss_of(theirs, step)
        loss.backward()
        if clip is not None:
            norm = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
            assert mine.last_grad_norm == pytest.approx(norm.item(), rel=1e-3)
        other.step()
        other.zero_grad()
    # u is g over its root mean square: where both are near zero, rounding of g counts
    assert models.difference(ours, theirs) < 2e-4


OPTIONS = {
    "plain": {},
    "norm": {"clip_grad_norm": 0.2},
    "value": {"clip_grad_value": 0.003},
    "decay": {"weight_decay": 0.1},
    "no scale": {"loss_scale": None},
    "rule": {"eps": (1e-12, 1e-2), "clip_threshold": 0.6, "decay_rate": -0.5},
    "everything": {"clip_grad_norm": 0.2, "clip_grad_value": 0.02, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_to_lomo_optim_by_the_same_calls(name, monkeypatch):
    """A drop-in: arguments and loop are lomo-optim's, which puts its state on a GPU unasked."""
    lomo_optim = pytest.importorskip("lomo_optim", reason="lomo-optim is not installed")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    ours, theirs = models.build(width=32), models.build(width=32)
    mine = AdaLomo(ours, LR, **OPTIONS[name])
    other = lomo_optim.AdaLomo(theirs, LR, **OPTIONS[name])
    for step in range(10):
        for model, optimizer in ((ours, mine), (theirs, other)):
            with_fused_backward_of_both(optimizer, models.loss_of(model, step), LR / (1 + step))
    assert models.difference(ours, theirs) < 2e-4


def with_fused_backward_of_both(optimizer, loss, lr):
    if optimizer.clip_grad_norm is not None:
        optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr)


def test_the_reference_s_arguments_in_its_order():
    lomo_optim = pytest.importorskip("lomo_optim", reason="lomo-optim is not installed")
    theirs = inspect.signature(lomo_optim.AdaLomo).parameters.values()
    ours = list(inspect.signature(AdaLomo).parameters.values())
    for a, b in list(zip(theirs, ours))[1:]:
        assert (a.name, a.default, a.kind) == (b.name, b.default, b.kind)
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


# -- driving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_grad_norm": 0.2}, {"clip_grad_norm": 0.1, "norm": "tensor"},
     {"clip_grad_value": 0.01, "weight_decay": 0.1}],
    ids=str,
)  # fmt: skip
def test_every_way_to_drive_gives_the_same_bits(dtype, options):
    """Scaling by 1024 and back is exact, so even the scaled ways do. Held gradients are of the
    parameter's dtype, as are those formed from factors."""
    results = {}
    for name, driver in models.DRIVERS.items():
        model = models.build(dtype)
        results[name] = train(model, AdaLomo(model, LR, **options), range(4), driver)
    if options.get("norm") != "tensor" and "clip_grad_norm" in options:
        del results["held gradients"]  # its norm comes from gradients, not from factors
    want = models.snapshot(results["backward"])
    assert not models.same(models.build(dtype), want)
    for name, model in results.items():
        assert models.same(model, want), name


def test_a_bare_loop_scales_nothing_and_divides_nothing():
    a, b = models.build(), models.build()
    train(a, AdaLomo(a, LR, loss_scale=3.0), range(3), models.with_loop)
    train(b, AdaLomo(b, LR, loss_scale=None), range(3), models.with_loop)
    assert models.same(a, models.snapshot(b))


def test_fp16_with_dynamic_scale():
    model = models.build(F16, width=32)
    optimizer = AdaLomo(model, LR, loss_scale=LossScale(init_scale=2.0**30), clip_grad_norm=1.0)
    before = models.snapshot(model)
    optimizer.backward(models.loss_of(model))
    assert optimizer.last_step_skipped
    assert models.same(model, before)
    losses = []
    for step in range(40):
        loss = models.loss_of(model, step % 4)
        optimizer.backward(loss)
        losses.append(loss.item())
    assert not optimizer.last_step_skipped
    assert optimizer.loss_scale < 2.0**30
    assert losses[-1] < losses[0] - 0.5
    steps = {state["step"].item() for state in optimizer.state.values()}
    assert max(steps) < 41  # skipped steps do not count


def test_param_groups_and_a_scheduler():
    ours, theirs = models.build(), models.build().double()
    groups = [
        [{"params": m.embedding.parameters(), "lr": 0.1 * LR},
         {"params": [*m.blocks.parameters(), *m.head.parameters()]}]
        for m in (ours, theirs)
    ]  # fmt: skip
    mine = AdaLomo(groups[0], LR)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    other = transformers.Adafactor(groups[1], lr=LR, relative_step=False, scale_parameter=True)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 8) for o in (mine, other)]
    for step in range(8):
        mine.backward(models.loss_of(ours, step))
        models.loss_of(theirs, step).backward()
        other.step()
        other.zero_grad()
        for schedule in schedules:
            schedule.step()
    assert models.difference(ours, theirs) < 2e-4


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_and_tied_weights(tied):
    ours, theirs = models.build(tied=tied), models.build(tied=tied).double()
    for model in (ours, theirs):
        model.blocks[1].requires_grad_(False)
    frozen = [p.clone() for p in ours.blocks[1].parameters()]
    mine, other = AdaLomo(ours, LR, clip_grad_norm=0.5), adafactor(theirs)
    for step in range(6):
        mine.backward(models.loss_of(ours, step))
        models.loss_of(theirs, step).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        other.step()
        other.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(ours.blocks[1].parameters(), frozen))
    assert not any(p in mine.state for p in ours.blocks[1].parameters())
    assert models.difference(ours, theirs) < 2e-4


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["one_backward", "two_backward"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
def test_a_resumed_run_equals_an_uninterrupted_one(rounding, strategy):
    options = {
        "clip_grad_norm": 0.5, "rounding": rounding, "seed": 5, "weight_decay": 0.1,
        "strategy": strategy,
    }  # fmt: skip
    whole = mixed(BF16)
    train(whole, AdaLomo(whole, LR, **options), range(8))

    first = mixed(BF16)
    optimizer = train_and_keep(first, options, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second = Mixed().to(BF16)
    second.load_state_dict(saved["model"])
    resumed = AdaLomo(second, LR, **options)
    resumed.load_state_dict(saved["optimizer"])
    for state in resumed.state.values():
        moments = {k: v for k, v in state.items() if k.startswith("exp_avg_sq")}
        assert moments
        assert all(v.dtype is torch.float32 for v in moments.values())  # torch would cast it
        assert state["step"].dtype is torch.int32
    resumed.load_state_dict(resumed.state_dict())  # as accelerate does when it wraps an optimizer
    train(second, resumed, range(4, 8))
    assert models.same(second, models.snapshot(whole))


def train_and_keep(model, options, steps):
    optimizer = AdaLomo(model, LR, **options)
    train(model, optimizer, steps)
    return optimizer


def test_state_is_rows_and_columns():
    model = mixed(BF16)
    optimizer = train_and_keep(model, {}, range(1))
    shapes = {
        name: {k: tuple(v.shape) for k, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    assert shapes["experts"] == {
        "step": (), "exp_avg_sq_row": (3, 24), "exp_avg_sq_col": (3, 24)
    }  # fmt: skip
    assert shapes["convolution.weight"] == {
        "step": (), "exp_avg_sq_row": (24, 24), "exp_avg_sq_col": (24, 3)
    }  # fmt: skip
    assert shapes["scale"] == {"step": (), "exp_avg_sq": ()}
    assert shapes["norm.weight"] == {"step": (), "exp_avg_sq": (24,)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_overflows_leaves_no_trace(bad):
    """Not in parameters, not in state, not in the random bits of the steps that follow."""
    with_bad, without = mixed(BF16), mixed(BF16)
    options = {"clip_grad_norm": 1.0, "loss_scale": None}
    a, b = AdaLomo(with_bad, LR, **options), AdaLomo(without, LR, **options)
    for step in range(4):
        train(with_bad, a, [step])
        train(without, b, [step])
        a.backward(models.loss_of(with_bad, step) * bad)
        assert a.last_step_skipped
        assert models.same(with_bad, models.snapshot(without))
    for p, q in zip(with_bad.parameters(), without.parameters()):
        assert all(torch.equal(a.state[p][k], v) for k, v in b.state[q].items())


def test_without_a_norm_pass_what_met_the_overflow_is_left_alone():
    model = models.build()
    optimizer = AdaLomo(model, LR)
    train(model, optimizer, [0])
    weight = model.blocks[1].down.weight
    weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), math.inf))
    before = models.snapshot(model)
    state = {k: v.clone() for k, v in optimizer.state[weight].items()}
    train(model, optimizer, [1])
    assert optimizer.last_step_skipped
    changed = [n for (n, p), q in zip(model.named_parameters(), before) if not torch.equal(p, q)]
    assert "head.weight" in changed  # backward had passed it
    assert "blocks.1.down.weight" not in changed
    assert "blocks.0.up.weight" not in changed
    assert all(torch.equal(optimizer.state[weight][k], v) for k, v in state.items())


def test_a_parameter_that_somebody_else_wrote_is_measured_anew():
    """rms(param) comes from the last update, unless the parameter changed since."""
    a, b = models.build(), models.build()
    first, second = AdaLomo(a, LR), AdaLomo(b, LR)
    train(a, first, range(2))
    train(b, second, range(2))
    for model in (a, b):
        with torch.no_grad():
            model.head.weight.mul_(3.0)
    saved = second.state_dict()
    second = AdaLomo(b, LR)  # which measures everything
    second.load_state_dict(saved)
    train(a, first, [2])
    train(b, second, [2])
    assert models.same(a, models.snapshot(b))
    calls = []
    real = ops.adalomo_sums_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "adalomo_sums_", lambda *a, **k: (calls.append(a[0]), real(*a, **k))[1])
        train(a, first, [3])
        assert not calls
        a.head.weight.data = a.head.weight.data.clone()
        train(a, first, [4])
        assert [c is a.head.weight for c in calls] == [True]


def test_small_gradients_that_waited_share_a_launch(monkeypatch):
    calls = []
    real = ops.adalomo_update_
    monkeypatch.setattr(
        ops, "adalomo_update_", lambda ps, *a, **k: (calls.append(len(ps)), real(ps, *a, **k))[1]
    )
    model = models.build(width=64)
    train(model, AdaLomo(model, LR, clip_grad_norm=1.0), [0])
    vectors = sum(p.ndim < 2 for p in model.parameters())
    assert sorted(calls)[-1] == vectors
    assert len(calls) == 1 + sum(p.ndim > 1 for p in model.parameters())


def test_a_gradient_that_waited_as_factors_is_used_whole(monkeypatch):
    """Also where Lomo would form it in blocks."""
    ours, whole = models.build(width=64), models.build(width=64)
    train(whole, AdaLomo(whole, LR, clip_grad_norm=1.0), [0, 1])
    monkeypatch.setattr(factors, "BLOCK", 64 * 7)
    train(ours, AdaLomo(ours, LR, clip_grad_norm=1.0), [0, 1])
    assert models.difference(ours, whole) < 1e-6


def test_a_gradient_that_float16_cannot_hold():
    """Its factors can, and it is formed in float32."""
    ours = nn.Linear(64, 64, bias=False).to(F16)
    exact = nn.Linear(64, 64, bias=False)
    exact.load_state_dict(ours.state_dict())
    for layer in (ours, exact):
        x = torch.full((8, 64), 200.0, dtype=layer.weight.dtype)
        optimizer = AdaLomo(layer, LR, None, clip_grad_norm=1.0, rounding="nearest")
        optimizer.backward(200.0 * layer(x).float().sum())  # 320000 in each place
        assert not optimizer.last_step_skipped
    assert (ours.weight - exact.weight).abs().max() < 1e-3 * exact.weight.abs().max()


def test_one_gradient_at_a_time_exists():
    """With factors waiting, the gradient of one weight at a time is formed for its update."""
    model = models.build(width=256, depth=4)
    optimizer = AdaLomo(model, LR, clip_grad_norm=1.0, strategy="one_backward")
    train(model, optimizer, [0])  # makes the state
    loss = models.loss_of(model)
    loss.backward()
    sizes = [p.nbytes for p in model.parameters()]
    with models.LiveBytes() as live:
        optimizer.step()
    assert optimizer.last_waiting_bytes > 0
    table = ops.adalomo.adalomo_weights(torch.device("cpu"), -0.8).nbytes
    # Seen beside the parameters: a gradient, its fp32 workspace, and small change.
    assert max(sizes) < live.peak - sum(sizes) - table < 2.6 * max(sizes)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "immediate"}, ValueError, "AdaLomo needs the whole of each"),
        ({"eps": 1e-30}, TypeError, "eps must be two numbers"),
        ({"clip_threshold": -1.0}, ValueError, "clip_threshold must be finite and at least"),
        ({"decay_rate": 0.5}, ValueError, "decay_rate must be a finite number less than 0"),
        ({"loss_scale": -2.0}, ValueError, "loss_scale must be a finite number greater than 0"),
        ({"rounding": "down"}, ValueError, "rounding must be 'auto' or one of"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number"),
    ],
)
def test_wrong_arguments(options, error, message):
    model = models.build()
    with pytest.raises(error, match=message):
        AdaLomo(model, **options)
    AdaLomo(model)  # nothing was left on it


def test_a_checkpoint_of_another_model_is_told():
    a, b = models.build(width=16), models.build(width=24)
    optimizer = train_and_keep(a, {}, range(1))
    other = AdaLomo(b, LR)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"has the shape .* its state 'exp_avg_sq\w*' was made"):
        train(b, other, [0])
