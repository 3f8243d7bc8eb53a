"""What was asked for is done, or one sentence says why it cannot be."""

import contextlib
import copy
import gc
import logging
import math
import re
import warnings

import models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import ways
from test_reads import log_lines, silence
from torch import nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import AdaLomo, Lomo, LossScale, ops, optim

# -- 4: weights that are written through .data -----------------------------------------------------


def average_through_data(model, kept):
    """A moving average that is kept beside the weights and put in their place."""
    for p in model.parameters():
        average = kept.setdefault(p, torch.zeros_like(p.data))
        average.mul_(0.2).add_(p.data, alpha=2.0)
        p.data.copy_(average)


def triple_aliases(model, kept):
    for p in model.parameters():
        kept[p].mul_(3.0)


def triple(p):
    p.data = p.data * 3.0


def triple_rows(p):
    if p.numel():
        p.data.view(-1)[: p.numel() // 2].mul_(3.0)


def triple_through_numpy(p):
    array = p.data.numpy()
    array *= 3.0


def triple_through_numpy_and_back(p):
    """The same address, and the same version counter."""
    array = p.detach().numpy()
    array *= 3.0
    p.data = torch.from_numpy(array)


def all_of(write):
    return lambda model, kept: [write(p) for p in model.parameters()]


WRITES = {
    "clamp of a critic": all_of(lambda p: p.data.clamp_(-0.01, 0.01)),
    "in place": all_of(lambda p: p.data.mul_(3.0)),
    "some rows": all_of(triple_rows),
    "assigned": all_of(triple),
    "numpy": all_of(triple_through_numpy),
    "numpy and back": all_of(triple_through_numpy_and_back),
    "moving average": average_through_data,
    "an alias that is kept": triple_aliases,
    "foreach": lambda model, kept: torch._foreach_mul_([p.data for p in model.parameters()], 3.0),
    "vector": lambda model, kept: nn.utils.vector_to_parameters(
        3.0 * nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
}


def writes(case, name, twice):
    """Steps with writes between them, after the sums of squares were cached."""
    ours, theirs = models.build(width=32), models.build(width=32)
    optimizer, other = case.make(ours), case.in_torch(theirs)
    kept = {}
    for model in (ours, theirs):
        kept[model] = {}
        if name == "an alias that is kept":
            kept[model] = {p: p.data for p in model.parameters()}
    for step in range(5):
        case.step(optimizer, models.loss_of(ours, step))
        models.loss_of(theirs, step).backward()
        other.step()
        if step in ((1, 3) if twice else (2,)):
            with torch.no_grad():
                for model in (ours, theirs):
                    WRITES[name](model, kept[model])
    return ours, theirs


@pytest.mark.parametrize("name", WRITES)
@ways.cases("free", "one_backward", "two_backward", kinds=(AdaLomo,))
def test_adalomo_sees_weights_that_others_wrote(case, name):
    """Its step is relative to the size of a weight, which it remembers from its last update."""
    ours, theirs = writes(case, name, twice=False)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert (p - q).abs().max() <= 1e-4 * q.abs().max() + 2e-5


@pytest.mark.parametrize("name", ["in place", "an alias that is kept"])
@ways.cases(kinds=(AdaLomo,))
def test_adalomo_sees_each_of_several_writes(case, name):
    ours, theirs = writes(case, name, twice=True)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert (p - q).abs().max() <= 1e-4 * q.abs().max() + 2e-5


@ways.cases()
def test_a_critic_whose_weights_are_clamped(case):
    """The loop of WGAN: several steps of the critic, a clamp of its weights after each."""

    def critic():
        with torch.random.fork_rng():
            torch.manual_seed(4)
            return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    ours, theirs = critic(), critic()
    optimizer, other = case.make(ours), case.in_torch(theirs)
    draws = torch.Generator().manual_seed(6)
    for _ in range(4):
        real, fake = torch.randn(2, 8, 16, generator=draws)
        for model in (ours, theirs):
            loss = model(fake - 0.5).mean() - model(real + 0.5).mean()
            if model is ours:
                case.step(optimizer, loss)
            else:
                loss.backward()
                other.step()
            for p in model.parameters():
                p.data.clamp_(-0.05, 0.05)
    case.agree(ours, theirs)


def test_a_parameter_that_was_swapped_under_its_sums():
    """Its contents are others, its version is the same."""
    ours, theirs = models.build(), models.build()
    case = ways.Case(AdaLomo, ways.WAYS[0])
    optimizer, other = case.make(ours), case.in_torch(theirs)
    for step in range(2):
        if step:
            for model in (ours, theirs):
                weight = model.head.weight
                swapped = nn.Parameter(3.0 * weight.detach())
                while swapped._version < weight._version:
                    torch.autograd.graph.increment_version(swapped)
                torch.utils.swap_tensors(weight, swapped)
        case.step(optimizer, models.loss_of(ours, step))
        models.loss_of(theirs, step).backward()
        other.step()
    case.agree(ours, theirs)


def test_sums_of_squares_are_kept_where_nobody_writes(monkeypatch):
    """Also after somebody did."""
    model, calls = models.build(), []
    real = ops.adalomo_sums_
    monkeypatch.setattr(ops, "adalomo_sums_", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
    optimizer = AdaLomo(model, clip_grad_norm=1.0)
    count = len(list(model.parameters()))
    for step, expected in enumerate([count, 0, 1, 0]):
        if step == 2:
            model.head.weight.data.mul_(2.0)
        calls.clear()
        optimizer.backward(models.loss_of(model, step))
        assert len(calls) == expected


# -- 5: memory of what accumulates -----------------------------------------------------------------


def bytes_of(tensors):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


SIZES = (64, 40, 128, 200)


def inputs_of(count, width, dtype=torch.float32):
    draws = torch.Generator().manual_seed(8)
    for i in range(count):
        yield torch.randn(SIZES[i % len(SIZES)], width, generator=draws).to(dtype)


class Layers(nn.Module):
    """Square layers, one of them used twice, and an embedding tied to the head."""

    def __init__(self, width=192):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        ids = torch.arange(x.shape[0]) % 256
        x = x + self.embedding(ids)
        for layer in [*self.layers, self.layers[0]]:
            x = torch.tanh(layer(x))
        return F.cross_entropy(self.head(x).float(), ids)


def layers(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return Layers().to(dtype)


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 7, 50])
@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_one_weight_never_waits_in_more_than_its_gradient(case, count, dtype, accumulated):
    weight = nn.Linear(192, 192, bias=False).to(dtype)
    optimizer = case.make(weight)
    for x in inputs_of(count, 192, dtype):
        with optimizer.accumulate() if accumulated else contextlib.nullcontext():
            weight(x).float().square().mean().backward()
        assert bytes_of(optimizer.waiting_tensors()) <= weight.weight.nbytes
    optimizer.step()


def alive_after_each(model, drive):
    """Bytes of every storage that is alive after each micro-batch."""
    alive = []
    with models.LiveBytes() as live:
        for p in model.parameters():
            live.add(p)
        for i, x in enumerate(inputs_of(12, 192)):
            drive(i, model(x) / 12)
            del x
            alive.append(live.now)
    return alive


@pytest.mark.parametrize("accumulated", [lambda i: False, lambda i: True, lambda i: i % 2 == 0],
                         ids=["never", "always", "in turns"])  # fmt: skip
@ways.cases()
def test_micro_batches_take_no_more_memory_than_ordinary_gradients(case, accumulated):
    """After each of them, beside the same loop in plain torch."""
    if not case.way.waits and not (accumulated(0) and accumulated(1)):
        pytest.skip("these gradients are used in backward")
    model = layers()
    optimizer = case.make(model)

    def ours(i, loss):
        with optimizer.accumulate() if accumulated(i) else contextlib.nullcontext():
            loss.backward()

    small = 4096  # scalars of the step
    plain = alive_after_each(layers(), lambda i, loss: loss.backward())
    for got, most in zip(alive_after_each(model, ours), plain, strict=True):
        assert got <= most + small
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [2, 50])
@ways.cases("auto", "one_backward unclipped", "immediate", "two_backward", kinds=(Lomo,))
def test_many_micro_batches_are_one_large_batch(case, count, dtype):
    model, expected = layers(dtype), layers(dtype).float()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    before = models.snapshot(expected)
    for x in inputs_of(count, 192, dtype):
        case.gather(optimizer, model(x) / count)
        (expected(x.float()) / count).backward()
    optimizer.step()
    norm = theirs.step()
    exact = dtype is torch.float32
    if optimizer.last_grad_norm is not None:
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5 if exact else 0.03)
    unit = torch.finfo(dtype).eps
    for p, q, old in zip(model.parameters(), expected.parameters(), before, strict=True):
        moved = (q - old).abs().max()
        error = (p.float() - q).abs().max()
        assert error <= (1e-6 if exact else unit * q.abs().max() + 0.1 * moved)


# -- 6: a backward that nobody announced -----------------------------------------------------------


def recomputed(**options):
    return models.build(width=64, checkpointing="non-reentrant", **options)


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_a_bare_backward_above_the_budget_is_told_once(kind):
    """Both figures, and the way out."""
    model = recomputed()
    optimizer = kind(model, clip_grad_norm=1.0, factor_budget=1024)
    loss = models.loss_of(model)
    with pytest.warns(UserWarning, match="factor_budget") as caught:
        loss.backward()
    (warning,) = caught
    text = str(warning.message)
    assert len(re.findall(r"\d+(?:\.\d+)? (?:B|bytes|KiB|MiB|GiB)", text)) >= 2
    assert "optimizer.backward(loss)" in text
    optimizer.step()
    with silence():
        for step in range(2):
            models.loss_of(model, step).backward()
            optimizer.step()


def test_a_bare_backward_above_the_budget_is_right_all_the_same():
    case = ways.Case(Lomo, ways.Way("auto", {**ways.CLIPPED, "factor_budget": 0}, waits=True))
    model, expected = recomputed(), recomputed()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    with pytest.warns(UserWarning, match="factor_budget"):
        models.loss_of(model).backward()
    optimizer.step()
    models.loss_of(expected).backward()
    theirs.step()
    case.agree(model, expected)


@pytest.mark.parametrize(
    ("options", "announced"),
    [
        ({"factor_budget": 0}, True),
        ({"factor_budget": 2**20}, False),
        ({"factor_budget": 0, "strategy": "one_backward"}, False),  # asked for
        ({"factor_budget": 0, "clip_grad_norm": None}, False),
        ({"factor_budget": 0, "norm": "tensor"}, False),
    ],
    ids=str,
)
def test_nobody_is_told_of_a_budget_that_is_kept(options, announced):
    model = recomputed()
    optimizer = Lomo(model, **{"clip_grad_norm": 1.0, **options})
    with silence():
        for step in range(2):
            loss = models.loss_of(model, step)
            if announced:
                optimizer.backward(loss)
            else:
                loss.backward()
                optimizer.step()


def test_nobody_is_told_under_accumulate():
    model = recomputed()
    optimizer = Lomo(model, clip_grad_norm=1.0, factor_budget=0)
    with silence():
        with optimizer.accumulate():
            models.loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize("count", [1, 2], ids=["factors", "their sum as a gradient"])
def test_one_weight_above_the_budget_is_told(count):
    layer = nn.Linear(64, 64, bias=False)
    one = 2 * 20 * 64 * 4
    budget = one - 1 if count == 1 else layer.weight.nbytes - 1  # more than `one`
    optimizer = Lomo(layer, clip_grad_norm=1.0, factor_budget=budget)
    x = torch.randn(20, 64, requires_grad=True)
    for last in [False] * (count - 1) + [True]:
        told = pytest.warns(UserWarning, match="factor_budget") if last else silence()
        with told:
            checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    optimizer.step()


def unseen(layer, x):
    return Times.apply(x, layer.weight)


def partly_seen(layer, x):
    return layer(x) + layer.weight.sum()


@pytest.mark.parametrize("forward", [unseen, partly_seen])
def test_one_whole_gradient_above_the_budget_is_told(forward):
    layer = nn.Linear(64, 64, bias=False)
    optimizer = Lomo(layer, clip_grad_norm=1.0, factor_budget=layer.weight.nbytes - 1)
    with pytest.warns(UserWarning, match="factor_budget"):
        forward(layer, torch.randn(8, 64)).square().sum().backward()
    optimizer.step()


def test_matrices_that_the_loss_does_not_reach_do_not_wait():
    model = nn.ParameterDict({name: nn.Parameter(torch.ones(8, 8)) for name in ("used", "spare")})
    optimizer = Lomo(model, clip_grad_norm=1.0, factor_budget=model["used"].nbytes)
    optimizer.backward(model["used"].square().sum())
    assert optimizer.explain().startswith("strategy one_backward: ")


def test_frozen_weights_do_not_wait():
    model = models.build(width=64)
    optimizer = Lomo(model, clip_grad_norm=1.0)
    model.blocks[0].requires_grad_(False)
    loss = models.loss_of(model)
    small, listed, _ = optimizer.would_wait()
    assert not any(each.name.startswith("blocks.0") for each in [*small, *listed])
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("order", [1, -1])
def test_one_recomputed_use_of_two_lies_beside(order):
    layer = nn.Linear(64, 64, bias=False)
    optimizer = Lomo(layer, clip_grad_norm=1.0)
    x = torch.randn(8, 64, requires_grad=True)
    uses = [layer, lambda x: checkpoint(layer, x, use_reentrant=False)]
    loss = sum(use(x).square().sum() for use in uses[::order])
    (waits,) = optimizer.would_wait(loss)[1]
    assert waits.beside
    optimizer.backward(loss)


def test_what_would_wait_is_no_less_than_what_then_waits():
    """A weight whose second input, not the first, is that of the product before."""
    first, twice, once = (nn.Linear(64, 64, bias=False) for _ in range(3))
    optimizer = Lomo([m.weight for m in (first, twice, once)], clip_grad_norm=1.0)
    x, y, z = (torch.randn(8, 64) for _ in range(3))
    loss = first(z).square() + twice(y).square() + once(x).square() + twice(x).square()
    _, listed, others = optimizer.would_wait()
    loss.sum().backward()
    waits = bytes_of(optimizer.waiting_tensors())
    assert waits <= sum(each.nbytes for each in listed) + others <= waits + x.nbytes
    optimizer.step()


def test_vectors_and_what_lies_in_activations_are_within_any_budget():
    layer = nn.Linear(64, 64)
    optimizer = Lomo(layer, clip_grad_norm=1.0, factor_budget=0)
    with silence():
        layer(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()


def test_reentrant_checkpointing_above_the_budget_has_one_backward_all_the_same():
    """It was announced, and there is no other way."""
    case = ways.Case(Lomo, ways.Way("auto", {**ways.CLIPPED, "factor_budget": 0}))
    model, expected = (models.build(width=64, checkpointing="reentrant") for _ in range(2))
    optimizer, theirs = case.make(model), case.in_torch(expected)
    with silence():
        optimizer.backward(models.loss_of(model))
    models.loss_of(expected).backward()
    theirs.step()
    case.agree(model, expected)
    assert "strategy one_backward: " in optimizer.explain()
    assert "reentrant checkpointing lets a backward run once only" in optimizer.explain()


def test_a_quarter_of_the_parameters_is_the_budget():
    for tokens, picked in ((8, True), (9, False)):
        layer = nn.Linear(64, 64, bias=False)
        optimizer = Lomo(layer, clip_grad_norm=1.0)
        x = torch.randn(tokens, 64, requires_grad=True)
        optimizer.backward(checkpoint(layer, x, use_reentrant=False).square().sum())
        assert optimizer.explain().startswith("strategy one_backward: ") == picked


@pytest.mark.parametrize("recompute", [False, True])
def test_recomputation_is_no_second_use(recompute):
    """What a layer keeps counts once, where its activations are recomputed."""
    for budget, picked in ((2 * 8 * 64 * 4 - 1, not recompute), (2 * 8 * 64 * 4, True)):
        layer = nn.Linear(64, 64, bias=False)
        optimizer = Lomo(layer, clip_grad_norm=1.0, factor_budget=budget)
        x = torch.randn(8, 64, requires_grad=True)
        loss = (checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)).sum()
        optimizer.backward(loss)
        assert optimizer.explain().startswith("strategy one_backward: ") == picked


class Times(torch.autograd.Function):
    """x @ weight.T, which no watched operation sees."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2)


def times(x, weight):
    return x @ weight.T


def compiled(weight):
    return torch.compile(times, backend="aot_eager")


def scripted(weight):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that TorchScript is old
        return torch.jit.script(times)


# Of torch itself, when what it compiles is given an activation.
READS_OF_DYNAMO = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")
UNSEEN = {
    "custom function": lambda weight: Times.apply,
    "compiled": compiled,
    "scripted": scripted,
}


class Unseen(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.seen = nn.Linear(64, 64, bias=False)
        self.weight = nn.Parameter(torch.randn(128, 64) * 0.1)
        self.function = function(self.weight)

    def loss(self, x):
        return self.function(torch.tanh(self.seen(x)), self.weight).square().mean()


@READS_OF_DYNAMO
@pytest.mark.parametrize("function", UNSEEN.values(), ids=UNSEEN.keys())
@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_matrices_that_are_not_seen_count_as_whole_gradients(kind, function):
    for budget, picked in ((128 * 64 * 4 - 1, False), (128 * 64 * 4, True)):
        model = Unseen(function)
        optimizer = kind(model, clip_grad_norm=1.0, factor_budget=budget)
        x = torch.randn(8, 64)
        loss = model.loss(x)
        optimizer.backward(loss)
        assert optimizer.explain().startswith("strategy one_backward: ") == picked, budget


@READS_OF_DYNAMO
@pytest.mark.parametrize("function", UNSEEN.values(), ids=UNSEEN.keys())
@ways.cases(kinds=(Lomo,))
def test_a_step_with_matrices_that_are_not_seen(case, function):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Unseen(function)
    expected = Unseen(function)
    expected.load_state_dict(model.state_dict())
    optimizer, theirs = case.make(model), case.in_torch(expected)
    x = torch.randn(8, 64)
    for _ in range(2):
        case.step(optimizer, model.loss(x))
        expected.loss(x).backward()
        theirs.step()
    case.agree(model, expected)


# -- 7: a weight that is seen in one place and not in another --------------------------------------


class FusedCrossEntropy(torch.autograd.Function):
    """Of x @ weight.T, as fused kernels have it: gradients are made in forward."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        with torch.enable_grad():
            inner_x, inner = x.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = F.cross_entropy(inner_x @ inner.T, targets)
            ctx.save_for_backward(*torch.autograd.grad(loss, (inner_x, inner)))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None


class HalfSeen(nn.Module):
    """A tied embedding whose head is in the loss; a layer that is also used by a custom function
    before (`first`) or after its own product."""

    def __init__(self, fused, order):
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, 64)
        self.layer = nn.Linear(64, 64, bias=False)
        self.fused, self.order = fused, order

    def loss(self, step):
        ids = models.tokens(step)
        x = self.embedding(ids)
        product = Times.apply if self.fused else F.linear
        if self.order == "first":
            x = x + torch.tanh(product(x, self.layer.weight))
        x = x + torch.tanh(self.layer(x))
        if self.order == "last":
            x = x + torch.tanh(product(x, self.layer.weight))
        x, targets = x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        if self.fused:
            return FusedCrossEntropy.apply(x, self.embedding.weight, targets)
        return F.cross_entropy(F.linear(x, self.embedding.weight), targets)


def right_or_refused(case, optimizer, model, loss, expected, theirs):
    """-> whether it was right. A refusal comes before anything is written."""
    before = models.snapshot(model)
    try:
        case.step(optimizer, loss)
    except RuntimeError:
        assert models.same(model, before)
        return False
    norm = theirs.step()
    case.agree(model, expected)
    if optimizer.last_grad_norm is not None:
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)
    return True


@pytest.mark.parametrize("order", [None, "first", "last"])
@ways.cases()
def test_a_weight_that_is_only_seen_in_part(case, order):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = HalfSeen(True, order)
    expected = HalfSeen(False, order)
    expected.load_state_dict(model.state_dict())
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        loss = model.loss(step)
        expected.loss(step).backward()
        if not right_or_refused(case, optimizer, model, loss, expected, theirs):
            assert case.way.name in ("immediate", "two_backward", "partial")
            break


SHARED = {
    "from_numpy": torch.from_numpy,
    "as_tensor": torch.as_tensor,
    "a slice": lambda array: torch.from_numpy(np.stack([array, array]))[1],
    "a view": lambda array: torch.from_numpy(array).view(-1).view(array.shape),
    "from_dlpack": torch.from_dlpack,
}


@pytest.mark.parametrize("share", SHARED.values(), ids=SHARED.keys())
@ways.cases(where=lambda way: not way.announced)
def test_inputs_that_lie_in_an_array_which_is_filled_again(case, share):
    """As loaders do that reuse a buffer: between backward and step() torch needs it no more."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(200, 64)
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 1)

        def loss(self, ids, x):
            return self.second(torch.tanh(self.first(x) + self.embedding(ids))).square().mean()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Net()
    expected = copy.deepcopy(model)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    random = np.random.default_rng(0)
    ids, x = np.zeros(12, dtype=np.int64), np.zeros((12, 64), dtype=np.float32)
    shared = share(ids), share(x)
    arrays = [tensor.numpy() for tensor in shared]
    for _ in range(3):
        arrays[0][...] = random.integers(0, 200, 12)
        arrays[1][...] = random.standard_normal((12, 64))
        expected.loss(*(tensor.clone() for tensor in shared)).backward()
        optimizer.scale(model.loss(*shared)).backward()
        for array in arrays:
            array[...] = 7
        optimizer.step()
        theirs.step()
        case.agree(model, expected)


@ways.cases(where=lambda way: not way.announced)
def test_inputs_that_torch_fills_again_are_right_or_refused(case):
    """A static buffer for the next batch."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    ids = models.tokens(0)
    logits = model(ids)
    optimizer.scale(logits.square().mean()).backward()
    expected(ids.clone()).square().mean().backward()
    ids.copy_(models.tokens(1))
    before = models.snapshot(model)
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "changed in place" in str(error)  # noqa: PT017
        assert models.same(model, before)
        return
    theirs.step()
    case.agree(model, expected)


class Between(nn.Module):
    """A layer whose weight is used as well by a function that is not seen."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False)
        self.function = function(self.layer.weight)

    def loss(self, x):
        return (torch.tanh(self.layer(x)) + self.function(x, self.layer.weight)).square().mean()


class TimesData(torch.autograd.Function):
    """Uses the weight through `.data` alone."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.data.T

    backward = Times.backward


def through_data(weight):
    return TimesData.apply


class Merged(Between):
    """Two weights, one of them also the input of the other."""

    def __init__(self, function):
        super().__init__(function)
        self.other = nn.Linear(64, 64, bias=False)

    def loss(self, x):
        merged = self.function(self.layer.weight, self.other.weight)
        return (torch.tanh(self.layer(x)) + F.linear(x, merged)).square().mean()


@pytest.mark.parametrize(
    "make",
    [lambda: Between(through_data), lambda: Merged(lambda weight: F.linear)],
    ids=["data", "merged"],
)
@ways.cases()
def test_a_weight_whose_second_use_is_no_product_with_it(case, make):
    model, expected = make(), make()
    expected.load_state_dict(model.state_dict())
    optimizer, theirs = case.make(model), case.in_torch(expected)
    x = torch.randn(8, 64)
    for _ in range(2):
        case.step(optimizer, model.loss(x))
        expected.loss(x).backward()
        theirs.step()
    case.agree(model, expected)


# "immediate" has updated the weight when its second gradient comes, and refuses too late.
@ways.cases(where=lambda way: way.name != "immediate")
def test_a_weight_that_a_script_uses_too(case):
    model, expected = Between(scripted), Between(scripted)
    expected.load_state_dict(model.state_dict())
    optimizer, theirs = case.make(model), case.in_torch(expected)
    x = torch.randn(8, 64)
    expected.loss(x).backward()
    right_or_refused(case, optimizer, model, model.loss(x), expected, theirs)


@ways.cases(where=lambda way: way.name != "immediate", kinds=(Lomo,))
def test_a_weight_whose_first_use_was_forgotten(case):
    """step() forgets what forwards did, and the loss has a part from before."""
    model, expected = nn.Linear(64, 64), nn.Linear(64, 64)
    expected.load_state_dict(model.state_dict())
    optimizer, theirs = case.make(model), case.in_torch(expected)
    x, y = torch.randn(2, 8, 64)
    early = model(x).square().mean()
    optimizer.step()
    (expected(x).square().mean() + expected(y).square().mean()).backward()
    loss = early + model(y).square().mean()
    right_or_refused(case, optimizer, model, loss, expected, theirs)


# -- 8: a loss, a model or a parameter that is not what the optimizer was made for -----------------


@pytest.mark.parametrize("call", ["backward", "grad_norm"])
@ways.cases()
def test_a_loss_of_another_model_is_refused(case, call):
    model, other = models.build(), models.build()
    optimizer = case.make(model)
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match="none of the optimizer's parameters"):
        getattr(optimizer, call)(models.loss_of(other))
    assert models.same(model, before)
    case.step(optimizer, models.loss_of(model))
    assert not models.same(model, before)


@pytest.mark.parametrize("call", ["backward", "grad_norm"])
@ways.cases(kinds=(Lomo,))
def test_a_loss_that_was_detached_on_its_way_is_refused(case, call):
    """Only the head of another is left in its graph."""
    model = models.build()
    optimizer = case.make([*model.embedding.parameters(), *model.blocks.parameters()])
    hidden = model.embedding(models.tokens())
    for block in model.blocks:
        hidden = block(hidden)
    loss = model.head(hidden.detach()).square().mean()
    with pytest.raises(RuntimeError, match="none of the optimizer's parameters"):
        getattr(optimizer, call)(loss)


@pytest.mark.parametrize("call", ["backward", "grad_norm"])
@ways.cases()
def test_an_optimizer_whose_parameters_are_all_frozen_says_so(case, call):
    model = models.build()
    optimizer = case.make(model.blocks.parameters())
    model.blocks.requires_grad_(False)
    with pytest.raises(RuntimeError, match="frozen"):
        getattr(optimizer, call)(models.loss_of(model))
    model.blocks.requires_grad_(True)
    case.step(optimizer, models.loss_of(model))
    assert optimizer.param_groups[0]["step"] == 1


@ways.cases()
def test_a_step_of_frozen_parameters_is_told_once(case):
    model = models.build()
    optimizer = case.make(model.blocks.parameters())
    model.blocks.requires_grad_(False)
    models.loss_of(model).backward()
    with pytest.warns(UserWarning, match="frozen") as caught:
        optimizer.step()
    assert len(caught) == 1
    with silence():
        models.loss_of(model).backward()
        optimizer.step()


@ways.cases(kinds=(Lomo,))
def test_frozen_parameters_beside_trained_ones_are_no_matter(case):
    model = models.build()
    optimizer = case.make(model)
    model.blocks.requires_grad_(False)
    with silence():
        for step in range(2):
            case.step(optimizer, models.loss_of(model, step))


def assign(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def set_one(model):
    model.blocks[1].up.weight = nn.Parameter(model.blocks[1].up.weight.detach().clone())


def set_module(model):
    model.head = nn.Linear(model.head.in_features, models.VOCABULARY, bias=False)


REPLACE = {"assign": assign, "setattr": set_one, "module": set_module}


@pytest.mark.parametrize("replace", REPLACE.values(), ids=REPLACE.keys())
@ways.cases()
def test_a_parameter_that_was_replaced_in_the_model_is_noticed(case, replace):
    model = models.build()
    optimizer = case.make(model)
    case.step(optimizer, models.loss_of(model, 0))
    replace(model)
    if case.way.announced:
        with pytest.raises(RuntimeError, match=r"replaced|none of the optimizer's parameters"):
            optimizer.backward(models.loss_of(model, 1))
    else:
        optimizer.scale(models.loss_of(model, 1)).backward()
        with pytest.raises(RuntimeError, match="replaced"):
            optimizer.step()


@ways.cases(kinds=(Lomo,))
def test_the_name_of_what_was_replaced_is_said(case):
    model = models.build()
    optimizer = case.make(model)
    set_one(model)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.up\.weight.*replaced|replaced.*blocks\.1"):
        case.step(optimizer, models.loss_of(model))


def test_a_graph_of_many_paths_is_read_once():
    """2**64 of them; a node is looked at once."""
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = Lomo([weight], clip_grad_norm=1.0)
    x = weight
    for _ in range(64):
        x = 0.5 * x + 0.5 * x.detach() + 0.0 * x
    optimizer.backward(x.sum())


@ways.cases(kinds=(Lomo,))
def test_all_parameters_were_replaced_before_the_first_step(case):
    model = models.build()
    optimizer = case.make(model)
    assign(model)
    with pytest.raises(RuntimeError, match="replaced"):
        optimizer.backward(models.loss_of(model))


def test_a_parameter_that_was_replaced_in_two_places():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = Lomo(model)
    model[0].weight = model[1].weight = nn.Parameter(torch.ones(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight, 1\.weight of the model was replaced"):
        optimizer.step()


def test_parameters_without_their_module_are_not_looked_up():
    """Nobody said what they belong to."""
    model = models.build()
    optimizer = Lomo(model.parameters(), lr=0.1)
    set_one(model)
    with silence():
        optimizer.backward(models.loss_of(model))


def longer(p, rows=8):
    """As resize_token_embeddings() does it."""
    extra = torch.full((rows, *p.shape[1:]), 0.01, dtype=p.dtype)
    p.data = torch.cat([p.data, extra])


@pytest.mark.parametrize("rounding", ["auto", "split"])
@ways.cases()
def test_a_parameter_whose_shape_changed_under_its_state_is_refused(case, rounding):
    """The state of AdaLomo has its rows, and that of "split" its elements."""
    if case.kind is Lomo and rounding == "auto":
        pytest.skip("no state")
    dtype = torch.bfloat16 if rounding == "split" else torch.float32
    model = models.build(dtype)
    optimizer = case.make(model, rounding=rounding)
    case.step(optimizer, models.loss_of(model, 0))
    longer(model.embedding.weight)
    before = model.embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="shape"):
        case.step(optimizer, models.loss_of(model, 1))
    assert torch.equal(model.embedding.weight, before)


@ways.cases(kinds=(Lomo,))
def test_a_parameter_whose_shape_changed_without_state_is_trained_on(case):
    """As by torch's SGD."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(3):
        if step == 1:
            longer(model.embedding.weight)
            longer(expected.embedding.weight)
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        theirs.step()
    case.agree(model, expected)


# -- 9: nothing but skipped steps ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 8.0])
@ways.cases()
def test_one_warning_when_fifteen_steps_in_a_row_are_skipped(case, scale):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    optimizer = case.make(model, loss_scale=scale)

    def steps(count, factor):
        for _ in range(count):
            case.step(optimizer, model(torch.ones(2, 8)).square().sum() * factor)

    with silence():
        steps(14, math.nan)
        steps(1, 1.0)  # and they were not in a row
        steps(14, math.nan)
    with pytest.warns(UserWarning, match="15 steps in a row") as caught:
        steps(1, math.nan)
    assert len(caught) == 1
    with silence():
        steps(20, math.nan)


def test_a_dynamic_scale_has_a_warning_of_its_own():
    model = models.build()
    optimizer = Lomo(model, loss_scale=LossScale(2.0**40))
    with silence():
        for _ in range(30):  # the scale is on its way down
            optimizer.backward(models.spoiled_loss(model, math.inf, 1))


# -- 11: a second optimizer over the same parameters -----------------------------------------------


@pytest.mark.parametrize("other", [Lomo, AdaLomo])
@ways.cases()
def test_a_second_optimizer_takes_over(case, other, caplog):
    """A cell of a notebook that is run again; the first is still there."""
    model, expected = models.build(), models.build()
    first = other(model, lr=0.1)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    assert len(log_lines(caplog, logging.WARNING, "takes over")) == 1
    before = models.snapshot(model)
    for call in (first.step, lambda: first.backward(models.loss_of(model))):
        with pytest.raises(RuntimeError, match="taken over"):
            call()
    assert models.same(model, before)
    for step in range(2):
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        theirs.step()
    case.agree(model, expected)
    assert len(log_lines(caplog, logging.WARNING)) == 1


@ways.cases(kinds=(Lomo,))
def test_the_first_optimizer_dies_after_it_was_taken_over(case):
    """Its hooks are off already, and the second one's stay."""
    model, expected = models.build(), models.build()
    optimizer = case.make(model)
    optimizer = case.make(model)  # the name keeps the first until the second is made
    gc.collect()
    theirs = case.in_torch(expected)
    for step in range(2):
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        theirs.step()
    case.agree(model, expected)
    assert all(p.grad is None for p in model.parameters())


@ways.cases(where=ways.at_once, kinds=(Lomo,))
def test_a_bare_backward_right_after_taking_over(case):
    """Gradients are used in it already."""
    model = models.build()
    first = Lomo(model)
    optimizer = case.make(model)
    before = models.snapshot(model)
    models.loss_of(model).backward()
    assert not models.same(model, before)
    optimizer.step()
    with pytest.raises(RuntimeError, match="taken over"):
        first.step()


@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_what_waits_for_the_first_is_not_used_by_the_second(case):
    model, expected = models.build(width=64), models.build(width=64)
    first = case.make(model)
    models.loss_of(model, 0).backward()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    assert not first.waiting_tensors()
    case.step(optimizer, models.loss_of(model, 1))
    models.loss_of(expected, 1).backward()
    theirs.step()
    case.agree(model, expected)


@ways.cases(kinds=(Lomo,))
def test_some_parameters_are_taken_over(case):
    """Those of the new one; the old one would make half of its steps, and is refused as a whole."""
    model = models.build()
    first = Lomo(model, lr=0.1)
    optimizer = case.make(model.head.parameters())
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match="taken over"):
        first.backward(models.loss_of(model))
    model.zero_grad()
    case.step(optimizer, models.loss_of(model))
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before)]
    assert changed == [False] * (len(before) - 1) + [True]


def test_nobody_is_taken_over_after_remove_or_death(caplog):
    model = models.build()
    first = Lomo(model)
    first.remove()
    second = Lomo(model)
    del second
    third = Lomo(model)
    third.backward(models.loss_of(model))
    torch.optim.AdamW(model.parameters())
    assert not log_lines(caplog, logging.WARNING)


# -- is_clean --------------------------------------------------------------------------------------


@ways.cases()
def test_is_clean(case):
    """No gradient waits, is accumulated or was used in a step that is still open."""
    model = ways.everything()
    optimizer = case.make(model)
    assert optimizer.is_clean is True
    with optimizer.accumulate():
        assert optimizer.is_clean is False
        models.loss_of(model).backward()
    assert optimizer.is_clean is False
    optimizer.zero_grad()
    assert optimizer.is_clean is True
    with optimizer.accumulate():
        models.loss_of(model).backward()
    optimizer.step()
    assert optimizer.is_clean is True
    loss = models.loss_of(model)
    assert optimizer.is_clean is True  # a forward holds nothing
    if not case.way.announced:
        loss.backward()
        assert optimizer.is_clean is False
        optimizer.step()
        assert optimizer.is_clean is True
        loss = models.loss_of(model)
    if case.way.options.get("norm") != "tensor" and "clip_grad_norm" in case.way.options:
        optimizer.grad_norm(loss)
        assert optimizer.is_clean is False
    optimizer.fused_backward(loss)
    assert optimizer.is_clean is True
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(fails(models.loss_of(model)))
    assert optimizer.is_clean is True


@ways.cases(where=ways.at_once, kinds=(Lomo,))
def test_what_was_written_and_then_dropped_is_not_clean(case):
    model = models.build()
    optimizer = case.make(model)
    models.loss_of(model).backward()
    with optimizer.accumulate(), pytest.warns(UserWarning, match="cannot be taken back"):
        model.zero_grad()
    assert optimizer.is_clean is False
    optimizer.step()
    assert optimizer.is_clean is True
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("scale", ["dynamic", LossScale()], ids=str)
def test_a_scaled_loss_that_waits_for_its_backward_is_not_clean(scale):
    model = models.build()
    optimizer = Lomo(model, loss_scale=scale)
    loss = optimizer.scale(models.loss_of(model))
    assert optimizer.is_clean is False
    loss.backward()
    optimizer.step()
    assert optimizer.is_clean is True


def fails(loss):
    def fail(grad):
        raise ZeroDivisionError

    loss = loss * 1.0
    loss.register_hook(fail)
    return loss


# -- lomo_optim's own loops ------------------------------------------------------------------------


def test_optimizers_by_name():
    assert {"lomo": Lomo, "adalomo": AdaLomo} == optim.OPTIMIZERS


def lomo_optim_s_loop(optimizer, model, losses, lr):
    """Of the trainer of the LOMO repository; -> which steps it skipped."""
    skipped = []
    for step, loss_of in enumerate(losses):
        loss = loss_of(model)
        if optimizer.clip_grad_norm is not None and optimizer.clip_grad_norm > 0:
            optimizer.grad_norm(loss)
            if optimizer.loss_scaler and optimizer.loss_scaler.has_overflow_serial:
                skipped.append(step)
                continue
            loss = loss_of(model)
        optimizer.fused_backward(loss, lr)
    return skipped


@ways.cases("auto", "one_backward", "two_backward", "partial", kinds=(Lomo,))
def test_the_loop_of_lomo_optim_s_trainer(case):
    def loss_of(step):
        if step == 1:
            return lambda model: models.spoiled_loss(model, math.inf, 1)
        return lambda model: models.loss_of(model, step)

    model, expected = models.build(), models.build()
    optimizer, theirs = case.make(model, loss_scale=LossScale(64.0)), case.in_torch(expected)
    losses = [loss_of(step) for step in range(4)]
    assert lomo_optim_s_loop(optimizer, model, losses, case.lr) == [1]
    assert optimizer.loss_scale == 32.0
    for step in (0, 2, 3):
        losses[step](expected).backward()
        theirs.step()
    case.agree(model, expected)


@ways.cases(kinds=(Lomo,))
def test_what_lomo_optim_s_loops_look_at(case):
    model = models.build()
    plain = case.make(model)
    assert plain.loss_scaler is None
    assert plain.gather_norm is False
    plain.gather_norm = False
    assert plain.clip_coef is None
    plain.remove()
    optimizer = case.make(model, loss_scale="dynamic")
    assert optimizer.loss_scaler
    assert optimizer.loss_scaler.loss_scale == optimizer.loss_scale == 65536.0
    assert optimizer.loss_scaler.has_overflow_serial is False
    case.step(optimizer, models.spoiled_loss(model, math.nan, 1))
    assert optimizer.loss_scaler
    assert optimizer.loss_scaler.has_overflow_serial is True
    assert optimizer.loss_scaler.loss_scale == optimizer.loss_scale == 32768.0
    case.step(optimizer, models.loss_of(model))
    assert optimizer.loss_scaler.has_overflow_serial is False


@ways.cases("auto", "one_backward", "two_backward", "partial", kinds=(Lomo,))
def test_clip_coef_is_known_with_the_norm(case):
    model = models.build()
    optimizer = case.make(model)
    loss = models.loss_of(model)
    norm = optimizer.grad_norm(loss).item()
    assert optimizer.clip_coef == pytest.approx(min(1.0, ways.CLIP / (norm + 1e-6)), rel=1e-5)
    optimizer.fused_backward(loss)
