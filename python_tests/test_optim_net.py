"""What a small change in the optimizers would break unseen: groups, options, figures, leftovers."""

import copy
import warnings
import weakref

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lomo_kernels import AdaLomo, Lomo, LossScale
from lomo_kernels.ops import product_sumsq
from lomo_kernels.optim.gradient import Factors
from lomo_kernels.optim.waiting import Waiting

LR = 0.3
FP32 = 1e-6  # see test_lomo.py
BF16 = torch.bfloat16
STRATEGIES = {
    "free": {},
    "one_backward": {"clip_grad_norm": 0.2, "strategy": "one_backward"},
    "two_backward": {"clip_grad_norm": 0.2, "strategy": "two_backward"},
    "partial": {"clip_grad_norm": 0.2, "strategy": "partial", "factor_budget": 3000},
    "tensor": {"clip_grad_norm": 0.2, "norm": "tensor"},
    "immediate": {"strategy": "immediate"},
}
EVERY = pytest.mark.parametrize("options", STRATEGIES.values(), ids=STRATEGIES.keys())

# -- groups ----------------------------------------------------------------------------------------


def three_groups(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    half = len(vectors) // 2
    return [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors[:half], "lr": 0.02, "clip_grad_value": 1e-3},
        {"params": vectors[half:], "lr": 0.05, "weight_decay": 0.3},
    ]


def step_in_torch(groups, options, lr=None):
    """One step from `.grad`: torch's clipping by norm, clipping by value, decay, torch's SGD."""
    params = [p for group in groups for p in group["params"]]
    norms = [p.grad.norm() for p in params]
    total = torch.stack(norms).norm()
    clip = options.get("clip_grad_norm", float("inf"))
    of_each = options.get("norm") == "tensor"
    rates = [{"params": g["params"], "lr": lr or g.get("lr", LR)} for g in groups]
    with torch.no_grad():
        for group, rate in zip(groups, rates):
            for p in group["params"]:
                coefficient = (clip / ((p.grad.norm() if of_each else total) + 1e-6)).clamp(max=1.0)
                if "clip_grad_value" in group:
                    nn.utils.clip_grad_value_([p], group["clip_grad_value"])
                p.grad.mul_(coefficient)
                p.mul_(1 - rate["lr"] * group.get("weight_decay", 0.0))
    sgd = torch.optim.SGD(rates, lr=LR)
    sgd.step()
    sgd.zero_grad()


@EVERY
def test_each_group_has_its_own_options_and_counter(options):
    model, expected = models.build(), models.build()
    optimizer = Lomo(three_groups(model), lr=LR, **options)
    for step in range(3):
        optimizer.backward(models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        step_in_torch(three_groups(expected), options)
    assert models.difference(model, expected) < FP32
    assert [group["step"] for group in optimizer.param_groups] == [3, 3, 3]


@EVERY
def test_lr_of_fused_backward_is_for_each_of_several_groups(options):
    model, expected = models.build(), models.build()
    optimizer = Lomo(three_groups(model), lr=LR, **options)
    for step, lr in enumerate((0.25, 0.1)):
        loss = models.loss_of(model, step)
        if "clip_grad_norm" in options and "norm" not in options:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr)
        assert [group["lr"] for group in optimizer.param_groups] == [lr] * 3
        models.loss_of(expected, step).backward()
        step_in_torch(three_groups(expected), options, lr)
    assert models.difference(model, expected) < FP32


@EVERY
def test_rounding_of_each_group(options):
    """Updates of an eighth of a unit in the last place: nearest drops them, split keeps them."""
    kept, lost, drawn = (nn.Parameter(torch.ones(4, 1024, dtype=BF16)) for _ in range(3))
    optimizer = Lomo(
        [
            {"params": [kept], "rounding": "split"},
            {"params": [lost], "rounding": "nearest"},
            {"params": [drawn]},
        ],
        lr=1e-3,
        **{k: 1e6 if k == "clip_grad_norm" else v for k, v in options.items()},
    )
    for _ in range(20):
        optimizer.backward(0.5 * (kept.sum() + lost.sum() + drawn.sum()))
    expected = 1.0 - 20 * 1e-3 * 0.5
    assert (kept - expected).abs().max() < 2**-8
    assert torch.equal(lost, torch.ones_like(lost))
    assert drawn.double().mean().item() == pytest.approx(expected, abs=1e-3)
    assert len(drawn.unique()) > 1
    assert list(optimizer.state) == [kept]


@pytest.mark.parametrize("clip", [None, 0.2])
def test_options_of_adalomo_s_groups(clip):
    """Against Adafactor, whose groups have the same options."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def groups(model):
        options = [
            {"eps": (1e-4, 1e-2)}, {"clip_threshold": 0.3}, {"decay_rate": -0.3, "lr": 0.05},
            {"weight_decay": 0.3},
        ]  # fmt: skip
        params = list(model.parameters())
        return [{"params": params[i :: len(options)], **o} for i, o in enumerate(options)]

    ours, theirs = models.build(), models.build().double()
    mine = AdaLomo(groups(ours), 0.02, clip_grad_norm=clip)
    other = transformers.Adafactor(groups(theirs), lr=0.02, relative_step=False)
    for step in range(8):
        mine.backward(models.loss_of(ours, step))
        models.loss_of(theirs, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        other.step()
        other.zero_grad()
    assert models.difference(ours, theirs) < 2e-4  # see test_adalomo.py


@pytest.mark.parametrize("order", [1, -1])
def test_vectors_that_wait_together_keep_the_rounding_of_their_type(order):
    """bf16 draws and fp32 does not, although their updates could share a launch."""
    short = nn.Parameter(torch.ones(4096, dtype=BF16))
    exact = nn.Parameter(torch.ones(4096))
    optimizer = Lomo([short, exact][::order], lr=1e-3, clip_grad_norm=1e6)
    for _ in range(20):
        optimizer.backward(0.5 * sum(p.float().sum() for p in (short, exact)[::order]))
    assert short.double().mean().item() == pytest.approx(0.99, abs=1e-3)
    assert len(short.unique()) > 1
    assert (exact - 0.99).abs().max() < FP32


# -- random bits -----------------------------------------------------------------------------------


def draws(kind, options, seed=0, steps=1):
    """What steps from the same weights, with the same gradients, make of two parameters."""
    params = [nn.Parameter(torch.ones(64, 64, dtype=BF16)) for _ in range(2)]
    optimizer = kind([{"params": [p]} for p in params], lr=1e-3, seed=seed, **options)
    results = []
    for _ in range(steps):
        with torch.no_grad():
            for p in params:
                p.fill_(1.0)
        optimizer.backward(sum(p.sum() for p in params))
        results.append([p.detach().clone() for p in params])
    return results


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Lomo, options) for options in STRATEGIES.values()]
    + [(AdaLomo, STRATEGIES[name]) for name in ("free", "one_backward", "two_backward")],
    ids=[f"Lomo {name}" for name in STRATEGIES] + ["AdaLomo free", "AdaLomo one", "AdaLomo two"],
)
def test_random_bits_differ_by_seed_parameter_and_step(kind, options):
    options = {k: 1e6 if k == "clip_grad_norm" else v for k, v in options.items()}
    (first, second), (first_later, second_later) = draws(kind, options, steps=2)
    ((again, _),) = draws(kind, options)
    ((other_seed, _),) = draws(kind, options, seed=1)
    assert len(first.unique()) > 1
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, first_later)
    assert not torch.equal(second, second_later)  # its group has a counter too


# -- norms -----------------------------------------------------------------------------------------


class Cancelling(nn.Module):
    """Inputs with a large common part that the gradients cancel: Gram matrices of them in fp32 have
    no digit left, while the gradient has several."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layer = nn.Linear(128, 128, bias=False)
        x = torch.randn(32, 128, generator=generator)
        y = torch.randn(32, 128, generator=generator)
        self.register_buffer("x", x + 1e4 * torch.randn(1, 128, generator=generator).round())
        self.register_buffer("y", (y - y.mean(0)).mul(1024).round().div(1024))
        self.y[-1] -= self.y.sum(0)  # exactly zero in sum

    def loss(self):
        return (self.layer(self.x) * self.y).sum()


@pytest.mark.parametrize("strategy", ["auto", "one_backward", "two_backward", "partial"])
def test_a_norm_whose_gram_matrices_cancel(strategy, monkeypatch):
    monkeypatch.setattr(product_sumsq, "TILE", 1)  # this weight is smaller than a tile
    model = Cancelling()
    exact = copy.deepcopy(model).double()
    exact.loss().backward()
    norm = exact.layer.weight.grad.norm().item()
    budget = 0 if strategy == "partial" else None
    optimizer = Lomo(model, lr=1e-3, clip_grad_norm=1.0, strategy=strategy, factor_budget=budget)
    before = model.layer.weight.detach().clone()
    for _ in range(3):  # distrust stays
        optimizer.backward(model.loss())
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-3)
    moved = before - 3e-3 * exact.layer.weight.grad / norm
    assert (model.layer.weight - moved).norm() < 1e-5


# -- what forward does with a weight ---------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [-1, -3, 5, None])
@EVERY
def test_padding_of_an_embedding_counted_from_its_end(options, padding_idx):
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 8, generator=torch.manual_seed(4)))

        def loss(self):
            ids = torch.tensor([[19, 17, 5], [0, 19, 17]])
            return F.embedding(ids, self.weight, padding_idx=padding_idx).square().mean()

    model, expected = Padded(), Padded()
    optimizer = Lomo(model, lr=LR, **options)
    for _ in range(2):
        optimizer.backward(model.loss())
        expected.loss().backward()
        step_in_torch([{"params": [expected.weight]}], options)
    assert models.difference(model, expected) < FP32


class Known(nn.Module):
    """Every way in which a gradient can wait, of sizes that are whole numbers of 64 KiB."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(512, 512)  # 1 MiB; 384 tokens of factors: 0.75 MiB and ids
        self.first = nn.Linear(512, 512, bias=False)  # 1 MiB; 128 tokens of factors: 0.5 MiB
        self.beside = nn.Linear(512, 512, bias=False)  # shares its input with the first
        self.last = nn.Linear(512, 512, bias=False)
        self.table = nn.Parameter(torch.ones(1024, 512))  # 2 MiB, in no product

    def loss(self):
        x = self.embedding(torch.arange(384).view(128, 3)).mean(1)
        x = self.last(torch.tanh(self.first(x)) * self.beside(x))
        return x.square().mean() + self.table.square().mean()


def test_every_figure_of_explain():
    model = Known()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0, factor_budget=3 * 2**20)
    optimizer.backward(model.loss())
    assert optimizer.explain().splitlines() == [
        "strategy one_backward: 2.0 MiB would wait beside the room of activations, within the "
        "budget of 3.0 MiB",
        "until the norm was known 4 weights kept factors in place of 4.0 MiB of gradients, "
        "1 parameters their gradients, 2.0 MiB; 4.0 MiB in all",
        "largest gradients held: table",
        "norms of what waited: 3 by Gram matrices, 1 by blocks of the gradient, 1 of gradients",
    ]
    assert optimizer.last_waiting_bytes == 4 * 2**20 + 384 * 8


@pytest.mark.parametrize("way", ["pairs", "groups"])
def test_names_that_came_with_the_parameters(way):
    """As torch's optimizers take them: `model.named_parameters()`."""
    model = Known()
    named = list(model.named_parameters())
    given = named if way == "pairs" else [{"params": named[:1]}, {"params": named[1:], "lr": 0.5}]
    optimizer = Lomo(given, lr=LR, clip_grad_norm=1.0, strategy="one_backward")
    optimizer.backward(model.loss())
    assert "largest gradients held: table\n" in optimizer.explain()
    assert [optimizer.name_of(p) for p in model.parameters()] == [name for name, _ in named]
    with pytest.raises(TypeError, match="halves must be one of"):
        optimizer.add_param_group({"params": [("halves", nn.Parameter(torch.ones(2).cfloat()))]})
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.name_of(named[0][1]) == named[0][0]


def test_the_three_largest_gradients_and_whole_storages():
    vectors = [nn.Parameter(torch.ones(n)) for n in (1, 3, 2, 5)]
    optimizer = Lomo(nn.ParameterList(vectors), lr=LR, clip_grad_norm=1.0)
    optimizer.backward(sum(p.sum() for p in vectors))
    assert "largest gradients held: 3, 1, 2\n" in optimizer.explain()
    layer = nn.Linear(64, 64, bias=False)
    optimizer = Lomo(layer, lr=LR, clip_grad_norm=1.0)
    x = torch.randn(100, 64)
    optimizer.backward(layer(x[:8]).square().sum())  # all of x stays
    assert optimizer.last_waiting_bytes == x.nbytes + 8 * 64 * 4


def test_the_bytes_that_wait_are_counted_through_every_change():
    """By which a budget is kept: factors, the gradient that takes their place, and what is gone."""
    waiting, (weight, other) = Waiting(), (nn.Parameter(torch.ones(8, 6)) for _ in range(2))
    product = Factors.of(torch.ones(1, 8), torch.ones(1, 6))
    for count in (1, 2, 3):  # of 56 bytes each; the gradient has 192
        assert waiting.add_factors(weight, product)
        assert waiting.nbytes == waiting[id(weight)].nbytes == 56 * count
    assert not waiting.add_factors(weight, product)  # not smaller any more
    assert waiting[id(weight)].dense.tolist() == [[3.0] * 6] * 8
    assert waiting.nbytes == waiting[id(weight)].nbytes == 192
    waiting.add(weight, torch.ones(8, 6))
    waiting.add(other, torch.ones(8, 6))
    assert waiting.nbytes == 2 * 192
    assert waiting.add_factors(other, product) is False
    waiting.drop(weight)
    assert waiting.drop(weight) is None
    assert waiting.nbytes == 192


def test_figures_of_a_strategy_that_does_not_fit():
    """The budget is just what the embedding and the two layers on it keep."""
    model = Known()
    waits = 3 * 2**19 + 384 * 8
    optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0, factor_budget=waits)
    optimizer.backward(model.loss())
    assert optimizer.explain().startswith(
        "strategy partial: 2.0 MiB would wait beside the room of activations, above the budget of "
        "1.5 MiB"
    )
    assert optimizer.last_waiting_bytes == waits


def test_a_forward_whose_step_failed_does_not_count_for_the_next():
    """Twice the factors would be above the budget, and the strategy another one."""

    def make():
        model = models.build(width=64, checkpointing="non-reentrant")
        return model, Lomo(model, lr=LR, clip_grad_norm=0.1, factor_budget=2**17)

    (model, optimizer), (other, fresh) = make(), make()
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(models.spoiled_loss(model, None, 1))
    optimizer.backward(models.loss_of(model))
    fresh.backward(models.loss_of(other))
    assert optimizer.explain() == fresh.explain()
    assert "strategy one_backward" in fresh.explain()
    assert models.same(model, models.snapshot(other))


@EVERY
@pytest.mark.parametrize("how", ["loop", "backward"])
def test_activations_die_with_their_step(options, how):
    if how == "loop" and options.get("strategy") in ("two_backward", "partial"):
        pytest.skip("backward alone cannot know the global norm")
    model = models.build(width=64)
    optimizer = Lomo(model, lr=LR, **options)
    inputs = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda m, args: inputs.append(weakref.ref(args[0])))
    models.DRIVERS[how](optimizer, model, 0)
    assert len(inputs) == 7
    assert not any(reference() is not None for reference in inputs)


# -- accumulating ----------------------------------------------------------------------------------


@EVERY
def test_a_nested_accumulate_leaves_the_outer_one_on(options):
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR, **options)
    before = models.snapshot(model)
    with optimizer.accumulate():
        with optimizer.accumulate():
            models.loss_of(model, 0).backward()
        for step in (1, 2):
            models.loss_of(model, step).backward()
        assert models.same(model, before)
    assert models.same(model, before)
    optimizer.step()
    for step in range(3):
        models.loss_of(expected, step).backward()
    step_in_torch([{"params": list(expected.parameters())}], options)
    assert models.difference(model, expected) < FP32


# -- loss scale ------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [3, 9])
def test_a_checkpoint_at_the_floor_knows_how_long_it_was_there(skipped):
    """The warning comes with the tenth step that is skipped at the smallest scale."""

    def make():
        model = models.build()
        return model, Lomo(model, lr=LR, loss_scale=LossScale(1.0))

    def skip(optimizer, model, count):
        for _ in range(count):
            optimizer.backward(models.loss_of(model) * float("nan"))

    model, optimizer = make()
    skip(optimizer, model, skipped)
    other, resumed = make()
    resumed.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skip(resumed, other, 10 - skipped - 1)
    with pytest.warns(UserWarning, match="10 steps in a row"):
        skip(resumed, other, 1)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_adalomo_takes_a_scale_of_zero_as_none(clip):
    """As lomo-optim does."""
    model, other = models.build(), models.build()
    optimizer = AdaLomo(model, LR, loss_scale=0, clip_grad_norm=clip)
    without = AdaLomo(other, LR, loss_scale=None, clip_grad_norm=clip)
    assert optimizer.loss_scale is None
    loss = models.loss_of(model)
    assert optimizer.scale(loss) is loss
    optimizer.backward(loss)
    without.backward(models.loss_of(other))
    assert models.same(model, models.snapshot(other))
    assert not models.same(model, models.snapshot(models.build()))


@pytest.mark.parametrize("option", [{"scale_grad_by_freq": True}, {"max_norm": 0.5}], ids=str)
@pytest.mark.parametrize("strategy", ["one_backward", "two_backward"])
def test_an_embedding_whose_gradient_is_no_product(option, strategy):
    tables = [nn.Embedding(40, 64, **option) for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    optimizer = Lomo(tables[0], lr=0.3, clip_grad_norm=0.2, strategy=strategy)
    sgd = torch.optim.SGD(tables[1].parameters(), lr=0.3)
    ids = torch.tensor([3, 3, 7, 1])  # one of them twice
    for step in range(2):
        losses = [table(ids).pow(2 + step).sum() for table in tables]
        optimizer.backward(losses[0])
        losses[1].backward()
        nn.utils.clip_grad_norm_(tables[1].parameters(), 0.2)
        sgd.step()
        sgd.zero_grad()
    assert models.difference(*tables) < 1e-6
