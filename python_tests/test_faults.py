"""Random models: what they compute, and what a fault in the middle of a step leaves behind."""

import copy
import math
import re
from typing import NamedTuple

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo, LossScale

VOCABULARY = 20
# Without shrinking, which would take minutes: the case that failed is small enough to read.
REPRODUCIBLE = {
    "derandomize": True, "database": None, "deadline": None,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": [HealthCheck.filter_too_much, HealthCheck.too_slow],
}  # fmt: skip

# -- models ----------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """The weight lies [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class Layer(NamedTuple):
    width: int
    conv1d: bool
    bias: bool
    frozen: bool  # the weight; a bias is trained on
    times: int  # how often it is used, where its width is that of the layer below
    recomputed: bool


class Recipe(NamedTuple):
    seed: int
    width: int
    layers: list
    tied: bool  # where the last width is the first
    frozen_embedding: bool
    shape: tuple  # of the tokens


class Net(nn.Module):
    """tokens -> logits."""

    def __init__(self, recipe):
        super().__init__()
        width = recipe.width
        self.recipe = recipe
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList()
        self.times = []
        for layer in recipe.layers:
            if layer.conv1d:
                module = Conv1D(width, layer.width)
            else:
                module = nn.Linear(width, layer.width, bias=layer.bias)
            module.weight.requires_grad_(not layer.frozen)
            self.layers.append(module)
            self.times.append(layer.times if layer.width == width else 1)
            width = layer.width
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if recipe.tied and width == recipe.width:
            self.head.weight = self.embedding.weight
        elif recipe.frozen_embedding:
            self.embedding.requires_grad_(False)

    def places(self):
        return [self.embedding, *self.layers, self.head]

    def forward(self, ids):
        x = self.embedding(ids)
        for module, times, layer in zip(self.layers, self.times, self.recipe.layers):

            def run(x, module=module, times=times):
                for _ in range(times):
                    x = torch.tanh(module(x))
                return x

            x = checkpoint(run, x, use_reentrant=False) if layer.recomputed else run(x)
        return self.head(x)


def build(recipe, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        return Net(recipe).to(dtype)


def loss_of(model, step=0):
    shape = model.recipe.shape
    generator = torch.Generator().manual_seed(model.recipe.seed + step)
    ids, targets = torch.randint(0, VOCABULARY, (2, *shape), generator=generator)
    logits = model(ids).float().reshape(-1, VOCABULARY)
    return F.cross_entropy(logits, targets.reshape(-1), reduction="sum") / max(1, ids.numel())


def shapes(fewest):
    """Any rank; at most 40 tokens."""
    dims = st.lists(st.integers(0, 40), max_size=4).map(tuple)
    return dims.filter(lambda shape: fewest <= math.prod(shape) <= 40)


@st.composite
def recipes(draw, fewest=0):
    width = st.sampled_from([1, 3, 8, 8, 24, 48])
    flag = st.booleans()
    times = st.integers(1, 2)
    layer = st.builds(Layer, width, flag, flag, flag, times, flag)
    layers = st.lists(layer, max_size=4)
    seeds = st.integers(0, 2**20)
    return draw(st.builds(Recipe, seeds, width, layers, flag, flag, shapes(fewest)))


# -- one backward against torch --------------------------------------------------------------------


@settings(max_examples=60, **REPRODUCIBLE)
@given(recipes(), st.sampled_from([0.01, 0.3, 100.0]))
def test_one_backward_equals_clip_grad_norm_and_sgd(recipe, max_norm):
    model, expected = build(recipe), build(recipe)
    sgd = torch.optim.SGD(expected.parameters(), lr=0.5)
    optimizer = Lomo(model, lr=0.5, clip_grad_norm=max_norm, strategy="one_backward")
    for step in range(2):
        before = models.snapshot(model)
        expected.load_state_dict(model.state_dict())
        loss_of(expected, step).backward()
        got = sum(p.grad is not None for p in expected.parameters())
        norm = nn.utils.clip_grad_norm_(expected.parameters(), max_norm).item()
        sgd.step()
        sgd.zero_grad()
        optimizer.backward(loss_of(model, step))
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)
        for p, q, old in zip(model.parameters(), expected.parameters(), before, strict=True):
            moved, error = (q - old).norm(), (p - q).norm()
            assert error <= 1e-4 * moved + 2.0**-23 * old.norm()  # and the rounding of p itself
        text = optimizer.explain()
        factored, held = map(
            int, re.search(r"(\d+) weights kept.*, (\d+) parameters their", text).groups()
        )
        assert factored + held == got


# -- faults ----------------------------------------------------------------------------------------


class Fault(NamedTuple):
    kind: str  # "forward", "backward" (a value), "raise forward", "raise backward", "raise between"
    value: float
    error: type
    place: int
    after: int  # how often the place is passed before an error comes
    step: int


class Injected:
    """The fault in the model for the time of a `with`."""

    def __init__(self, model, fault):
        self.fault = fault
        places = model.places()
        self.module = places[fault.place % len(places)]
        self.left = fault.after

    def __enter__(self):
        self.handle = self.module.register_forward_hook(self._hook)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def fail(self, where):
        if self.fault.kind == f"raise {where}":
            self.left -= 1
            if self.left < 0:
                raise self.fault.error("a fault")

    def _spoil(self, tensor):
        """One element; the same in every call, so that recomputation agrees."""
        spoiled = tensor.clone()
        spoiled.view(-1)[tensor.numel() // 2] = self.fault.value
        return spoiled

    def _hook(self, module, args, output):
        self.fail("forward")
        if self.fault.kind == "forward":
            return self._spoil(output)
        if output.requires_grad and "backward" in self.fault.kind:
            output.register_hook(self._on_gradient)
        return None

    def _on_gradient(self, grad):
        self.fail("backward")
        return self._spoil(grad) if self.fault.kind == "backward" else None


CLIPS = {
    "none": {},
    "value": {"clip_grad_value": 0.01},
    "tensor": {"clip_grad_norm": 0.02, "norm": "tensor"},
    "global": {"clip_grad_norm": 0.05},
}
SCALES = {
    "none": {"loss_scale": None},
    "static": {"loss_scale": 8.0},
    "dynamic": {"loss_scale": LossScale(64.0, growth_interval=2)},
}


class Setup(NamedTuple):
    clip: str
    strategy: str
    budget: int
    scale: str
    dtype: torch.dtype
    rounding: str
    driver: str
    groups: int

    def optimizer(self, model):
        params = list(model.parameters())
        groups = [
            {"params": params[i :: self.groups], "lr": 0.3 / (i + 1), "weight_decay": 0.1 * i}
            for i in range(min(self.groups, len(params)))
        ]
        return Lomo(
            groups, strategy=self.strategy, factor_budget=self.budget, rounding=self.rounding,
            seed=5, **CLIPS[self.clip], **SCALES[self.scale],
        )  # fmt: skip

    def allowed(self):
        unknown = self.driver == "loop" and self.strategy in ("two_backward", "partial")
        if self.clip == "global" and (unknown or self.strategy == "immediate"):
            return False
        return self.rounding != "split" or self.dtype is not torch.float16

    @property
    def all_or_nothing(self):
        """Whether the norm, or what is not finite, is known before the first write."""
        return self.clip == "global" or self.driver == "fused" or self.strategy == "one_backward"

    def drive(self, optimizer, model, step, injected=None):
        loss = loss_of(model, step)
        if self.driver == "loop":
            optimizer.scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        elif self.driver == "fused":
            optimizer.grad_norm(loss)
            if injected is not None:
                injected.fail("between")
            optimizer.fused_backward(loss)
        else:
            optimizer.backward(loss)


def setups():
    return st.builds(
        Setup,
        clip=st.sampled_from([*CLIPS, "global"]),
        strategy=st.sampled_from(["one_backward", "two_backward", "auto", "partial", "immediate"]),
        budget=st.sampled_from([None, 0, 1000]),
        scale=st.sampled_from(list(SCALES)),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        rounding=st.sampled_from(["auto", "nearest", "stochastic", "split"]),
        driver=st.sampled_from(["loop", "backward", "fused"]),
        groups=st.integers(1, 3),
    ).filter(Setup.allowed)


def faults(kinds):
    return st.builds(
        Fault,
        kind=st.sampled_from(kinds),
        value=st.sampled_from([math.inf, -math.inf, math.nan]),
        error=st.sampled_from([RuntimeError, KeyboardInterrupt]),
        place=st.integers(0, 5),
        after=st.integers(0, 1),
        step=st.integers(0, 2),
    )


def gradients(model, fault, step, scale):
    """What autograd alone makes of the fault, on a copy."""
    plain = copy.deepcopy(model)
    with Injected(plain, fault):
        (loss_of(plain, step) * (scale or 1.0)).backward()
    return [p.grad for p in plain.parameters()]


def nothing_waits(optimizer, model):
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.waiting_tensors()


def nothing_is_left(optimizer, model):
    assert optimizer.is_clean
    assert all(p.grad is None for p in model.parameters())
    assert not optimizer.waiting_tensors()


def in_torch(setup, model, optimizer, step):
    """Autograd, torch's clipping and SGD's step on a copy in float64 -> (its parameters, the norm).

    Gradients are those of the model in its own dtype."""
    plain = copy.deepcopy(model)
    scale = optimizer.loss_scale or 1.0
    (loss_of(plain, step) * scale).backward()
    clip, params = CLIPS[setup.clip], list(plain.parameters())
    exact = {id(p): p.detach().double() for p in params}
    for p, low in zip(params, lows_of(optimizer, model)):
        if low is not None:  # the master of "split" is the parameter and 16 more bits
            bits = (p.detach().view(torch.int16).int() << 16) + low.int()
            exact[id(p)] = bits.view(torch.float32).double()
    twins = [torch.nn.Parameter(exact[id(p)], p.requires_grad) for p in params]
    for p, twin in zip(params, twins):
        twin.grad = None if p.grad is None else p.grad.double() / scale
    trained = [twin for twin in twins if twin.grad is not None]
    norm = nn.utils.get_total_norm([twin.grad for twin in trained]).item()
    coefficients = {}
    for twin in trained:
        own = twin.grad.norm().item() if setup.clip == "tensor" else norm
        coefficients[twin] = min(1.0, clip.get("clip_grad_norm", math.inf) / (own + 1e-6))
    rates = [{k: g[k] for k in ("lr", "weight_decay")} for g in optimizer.param_groups]
    with torch.no_grad():
        for i, twin in enumerate(twins):
            if twin in coefficients:
                nn.utils.clip_grad_value_([twin], clip.get("clip_grad_value", math.inf))
                twin.grad.mul_(coefficients[twin])
                rate = rates[i % setup.groups]
                twin.mul_(1 - rate["lr"] * rate["weight_decay"])
                torch.optim.SGD([twin], lr=rate["lr"]).step()
    return [twin.detach() for twin in twins], norm


def lows_of(optimizer, model):
    return [optimizer.state.get(p, {}).get("low") for p in model.parameters()]


@torch.no_grad()
def is_the_step_of_torch(setup, model, before, expected):
    unit = torch.finfo(setup.dtype).eps
    for p, old, q in zip(model.parameters(), before, expected, strict=True):
        if not p.numel():
            continue
        error, moved = ((p.double() - q).abs().max(), (q - old.double()).abs().max())
        if setup.dtype is torch.float32:
            assert error <= 1e-4 * moved + 2.0**-23 * old.abs().max()
        else:  # autograd rounds gradients to 16 bits where factors keep more; tiny ones are lost
            assert error <= unit * q.abs().max() + 0.05 * moved + 1e-6


def makes_the_step_of_torch(setup, optimizer, model, step):
    expected, norm = in_torch(setup, model, optimizer, step)
    before = models.snapshot(model)
    setup.drive(optimizer, model, step)
    assert not optimizer.last_step_skipped
    is_the_step_of_torch(setup, model, before, expected)
    if optimizer.last_grad_norm is not None:
        tolerance = 1e-4 if setup.dtype is torch.float32 else 0.02
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=tolerance, abs=1e-6)


def goes_on(setup, optimizer, model):
    for step in range(10, 12):
        makes_the_step_of_torch(setup, optimizer, model, step)
    nothing_is_left(optimizer, model)


def goes_on_like_a_new_one(setup, optimizer, model):
    """As torch, and to the bit as an optimizer that never met the fault, from the same weights and
    counters."""
    other = copy.deepcopy(model)
    fresh = setup.optimizer(other)
    fresh.load_state_dict(optimizer.state_dict())
    for step in range(10, 12):
        makes_the_step_of_torch(setup, optimizer, model, step)
        setup.drive(fresh, other, step)
        assert models.same(model, models.snapshot(other))
        assert optimizer.last_grad_norm == fresh.last_grad_norm
        assert optimizer.explain() == fresh.explain()
        saved, expected = optimizer.state_dict(), fresh.state_dict()
        for a, b in zip(saved["param_groups"], expected["param_groups"], strict=True):
            assert a["step"] == b["step"]
        assert saved.get("loss_scale") == expected.get("loss_scale")
    nothing_is_left(optimizer, model)


def until_the_fault(recipe, setup, fault):
    model = build(recipe, setup.dtype)
    assume(loss_of(model).requires_grad)
    optimizer = setup.optimizer(model)
    for step in range(fault.step):
        setup.drive(optimizer, model, step)
    return model, optimizer, models.snapshot(model)


@pytest.mark.filterwarnings("ignore:a bare loss")
@settings(max_examples=60, **REPRODUCIBLE)
@given(recipes(fewest=1), setups(), faults(["forward", "backward"]))
def test_a_value_that_is_not_finite(recipe, setup, fault):
    model, optimizer, before = until_the_fault(recipe, setup, fault)
    grads = gradients(model, fault, fault.step, optimizer.loss_scale)
    with Injected(model, fault) as injected:
        setup.drive(optimizer, model, fault.step, injected)
    bad = any(g is not None and not g.isfinite().all() for g in grads)
    assert optimizer.last_step_skipped == bad
    if bad and setup.all_or_nothing:
        assert models.same(model, before)
    for p, g, old in zip(models.snapshot(model), grads, before, strict=True):
        assert p.isfinite().all()
        kept = torch.ones_like(p, dtype=torch.bool) if g is None else ~g.isfinite()
        assert torch.equal(p[kept], old[kept])
    nothing_waits(optimizer, model)
    goes_on_like_a_new_one(setup, optimizer, model)


# Of bare backwards above the budget, and of updates that were made before the error.
@pytest.mark.filterwarnings("ignore:a bare loss", "ignore:zero_grad.* came after")
@settings(max_examples=200, **REPRODUCIBLE)
@given(recipes(fewest=1), setups(), faults(["raise forward", "raise backward", "raise between"]))
def test_an_error_in_the_middle(recipe, setup, fault):
    model, optimizer, before = until_the_fault(recipe, setup, fault)
    raised = None
    with Injected(model, fault) as injected:
        try:
            setup.drive(optimizer, model, fault.step, injected)
        except (RuntimeError, KeyboardInterrupt) as error:
            raised = str(error)
    assume(raised)
    assert raised == "a fault"
    if fault.kind in ("raise forward", "raise between") and not any(
        layer.recomputed for layer in recipe.layers
    ):
        assert models.same(model, before)  # no update is made before backward
    if setup.driver == "loop" or fault.kind == "raise between":
        optimizer.zero_grad()
    nothing_waits(optimizer, model)
    if fault.kind == "raise backward" and setup.driver != "loop":
        goes_on_like_a_new_one(setup, optimizer, model)
    else:  # the optimizer saw a forward, and not its end: another strategy may be picked once
        goes_on(setup, optimizer, model)
