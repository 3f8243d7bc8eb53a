"""Parameters of others in the same graph, adapters or a head trained by AdamW: they get exactly
what a plain backward gives."""

import contextlib

import models
import pytest
import torch
import torch.nn.functional as F
import ways
from torch import nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import AdaLomo, Lomo

CHECKPOINTING = [None, "non-reentrant", "reentrant"]


class Adapted(nn.Module):
    """A linear layer with an adapter beside it, as peft's LoRA has it."""

    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs)
        self.lora_A = nn.Linear(inputs, rank, bias=False)
        self.lora_B = nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))


class Net(nn.Module):
    """Parameters of others below, beside and above: a prompt, adapters, an own bias in a foreign
    product and the other way round, a head."""

    def __init__(self, width=64, checkpointing=None):
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, width)
        self.prompt = nn.Parameter(torch.randn(width) * 0.1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), Adapted(width, width), nn.Tanh()) for _ in range(3)
        )
        self.weight = nn.Parameter(torch.randn(width, width) * 0.1)
        self.bias = nn.Parameter(torch.zeros(width))
        self.inner, self.other_bias = nn.Linear(width, width), nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, models.VOCABULARY, bias=False)
        self.checkpointing = checkpointing

    def middle(self, x):
        x = x + F.linear(x, self.weight, self.bias)
        return x + torch.tanh(F.linear(x, self.inner.weight, self.other_bias))

    def forward(self, ids, inputs=None):
        x = self.embedding(ids) if inputs is None else inputs
        x = x + self.prompt
        for layer in [*self.layers, self.middle]:
            if self.checkpointing is None:
                x = layer(x)
            else:
                x = checkpoint(layer, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


def build(**options):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return Net(**options)


SPLITS = {
    "adapters": lambda name: "lora" in name,
    "head": lambda name: name.startswith("head"),
    "embedding": lambda name: name.startswith("embedding"),
    "everything of others": lambda name: (
        "lora" in name or name in ("prompt", "weight", "other_bias", "head.weight")
    ),
    "vectors": lambda name: name.endswith(("bias", "prompt")),
    "all but one layer": lambda name: not name.startswith("layers.1"),
}


def split(model, foreign):
    """-> (the optimizer's parameters, those of others)"""
    named = list(model.named_parameters())
    return [p for n, p in named if not foreign(n)], [p for n, p in named if foreign(n)]


def possible(case, checkpointing):
    """Two backwards need non-reentrant checkpointing, which test_lomo.py sees refused."""
    if checkpointing == "reentrant" and case.way.announced:
        pytest.skip("two backwards need non-reentrant checkpointing")


def assert_same_gradients(params, expected):
    for p, q in zip(params, expected, strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            scale = q.grad.abs().max().item()
            assert (p.grad - q.grad).abs().max().item() <= 1e-6 * max(scale, 1.0)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("foreign", SPLITS.values(), ids=SPLITS.keys())
@ways.cases(kinds=(Lomo,))
def test_others_get_what_a_plain_backward_gives(case, foreign, checkpointing):
    gradients_of_others(case, foreign, checkpointing)


@pytest.mark.parametrize("foreign", ["adapters", "everything of others"])
@ways.cases(kinds=(AdaLomo,))
def test_others_beside_adalomo(case, foreign):
    gradients_of_others(case, SPLITS[foreign], "non-reentrant")


def gradients_of_others(case, foreign, checkpointing):
    possible(case, checkpointing)
    model, expected = build(checkpointing=checkpointing), build(checkpointing=checkpointing)
    own, theirs = split(model, foreign)
    optimizer = case.make(own, loss_scale=None)
    case.step(optimizer, models.loss_of(model))
    models.loss_of(expected).backward()
    assert_same_gradients(theirs, split(expected, foreign)[1])
    assert all(p.grad is None for p in own)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("foreign", SPLITS.values(), ids=SPLITS.keys())
@ways.cases(kinds=(Lomo,))
def test_three_steps_of_both(case, foreign, checkpointing):
    """SGD, clipped by the norm of its own parameters, beside AdamW."""
    possible(case, checkpointing)
    model, expected = build(checkpointing=checkpointing), build(checkpointing=checkpointing)
    own, others = split(model, foreign)
    optimizer, adamw = case.make(own), torch.optim.AdamW(others, lr=1e-4)
    own, others = split(expected, foreign)
    sgd, other = case.in_torch(own), torch.optim.AdamW(others, lr=1e-4)
    for step in range(3):
        case.step(optimizer, models.loss_of(model, step))
        adamw.step()
        adamw.zero_grad()
        models.loss_of(expected, step).backward()
        norm = sgd.step()
        other.step()
        other.zero_grad()
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)
    case.agree(model, expected)


@pytest.mark.parametrize("how", ["fused", "loop"])
@ways.cases(kinds=(Lomo,))
def test_other_ways_to_drive(case, how):
    if how == "loop" and case.way.announced:
        pytest.skip("a bare backward cannot be used")
    model, expected = build(), build()
    foreign = SPLITS["everything of others"]
    own, theirs = split(model, foreign)
    optimizer = case.make(own)
    loss = models.loss_of(model)
    if how == "loop":
        loss.backward()
        optimizer.step()
    else:
        if case.way.options.get("norm") != "tensor" and "clip_grad_norm" in case.way.options:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss)
    models.loss_of(expected).backward()
    assert_same_gradients(theirs, split(expected, foreign)[1])


@ways.cases(kinds=(Lomo,))
def test_others_accumulate_as_they_wish(case):
    """Over two steps of ours, and on top of what was there; with ours under accumulate() too."""
    model, expected = build(), build()
    foreign = SPLITS["everything of others"]
    own, theirs = split(model, foreign)
    own_expected, wanted = split(expected, foreign)
    optimizer, sgd = case.make(own), case.in_torch(own_expected)
    for p in [*theirs, *wanted]:
        p.grad = torch.full_like(p, 0.125)
    for step in range(2):
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        sgd.step()
    for step in (2, 3):
        with optimizer.accumulate():
            models.loss_of(model, step).backward()
        models.loss_of(expected, step).backward()
    optimizer.step()
    sgd.step()
    case.agree(model, expected)
    assert_same_gradients(theirs, wanted)


@ways.cases(kinds=(Lomo,))
def test_a_hook_of_others_is_called_once_a_step(case):
    """As in a plain backward, and with its gradient."""
    model, expected = build(), build()
    foreign = SPLITS["everything of others"]
    own, theirs = split(model, foreign)
    seen = {}
    for i, p in enumerate(theirs):
        p.register_hook(lambda grad, i=i: seen.setdefault(i, []).append(grad.clone()))
    counts = dict.fromkeys(range(len(theirs)), 0)
    for i, p in enumerate(theirs):

        def count(p, i=i):
            counts[i] += 1

        p.register_post_accumulate_grad_hook(count)
    optimizer = case.make(own)
    case.step(optimizer, models.loss_of(model))
    models.loss_of(expected).backward()
    assert set(counts.values()) == {1}
    for i, q in enumerate(split(expected, foreign)[1]):
        (grad,) = seen[i]
        torch.testing.assert_close(grad, q.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@ways.cases(kinds=(Lomo,))
def test_inputs_that_want_a_gradient(case, checkpointing):
    """A leaf that is no parameter: soft prompts, adversarial examples, saliency."""
    possible(case, checkpointing)
    model, expected = build(checkpointing=checkpointing), build(checkpointing=checkpointing)
    optimizer = case.make(model)
    results = []
    for m in (model, expected):
        x = torch.randn(4, 6, 64, generator=torch.Generator().manual_seed(2)).requires_grad_()
        loss = m(models.tokens(), x).square().mean()
        if m is model:
            case.step(optimizer, loss)
        else:
            loss.backward()
        results.append(x)
    assert_same_gradients(results[:1], results[1:])


@ways.cases(kinds=(Lomo,), where=lambda way: not way.announced)
def test_gradients_that_others_retain(case):
    """Of an activation, by retain_grad(); torch itself adds up those of two backwards."""
    model, expected = build(), build()
    optimizer = case.make(model)
    results = []
    for m in (model, expected):
        kept = []
        handle = m.layers[1].register_forward_hook(
            lambda module, args, out, kept=kept: (out.retain_grad(), kept.append(out))[0]
        )
        loss = models.loss_of(m)
        handle.remove()
        if m is model:
            case.step(optimizer, loss)
        else:
            loss.backward()
        results.extend(kept)
    assert_same_gradients(results[:1], results[1:])


@ways.cases(kinds=(Lomo,))
def test_two_of_ours_and_one_of_others(case):
    model, expected = build(), build()

    def thirds(m):
        named = list(m.named_parameters())
        return (
            [p for n, p in named if n.startswith("layers") and "lora" not in n],
            [p for n, p in named if "lora" in n],
            [p for n, p in named if not n.startswith("layers")],
        )

    one, two, three = thirds(model)
    first, second = case.make(one), Lomo(two, lr=0.01)
    adamw = torch.optim.AdamW(three, lr=1e-4)
    a, b, c = thirds(expected)
    references = case.in_torch(a), torch.optim.SGD(b, lr=0.01), torch.optim.AdamW(c, lr=1e-4)
    for step in range(3):
        case.step(first, models.loss_of(model, step))
        second.step()
        adamw.step()
        models.loss_of(expected, step).backward()
        for reference in references:
            reference.step()
        for m in (model, expected):
            m.zero_grad()
    case.agree(model, expected)


@pytest.mark.parametrize("scale", [64.0, "dynamic"])
@ways.cases(kinds=(Lomo,))
def test_a_loss_scale_reaches_others_too(case, scale):
    """As torch.amp's would: their gradients are multiplied by it, and they know it."""
    model, expected = build(), build()
    foreign = SPLITS["adapters"]
    own, theirs = split(model, foreign)
    optimizer = case.make(own, loss_scale=scale)
    factor = optimizer.loss_scale
    case.step(optimizer, models.loss_of(model))
    models.loss_of(expected).backward()
    for p in theirs:
        p.grad.div_(factor)
    assert_same_gradients(theirs, split(expected, foreign)[1])


@ways.cases(kinds=(Lomo,))
def test_others_that_have_no_part_in_the_loss(case):
    """Their gradient stays what it was: None, or what they had."""
    model = build()
    foreign = SPLITS["head"]
    own, (head,) = split(model, foreign)
    optimizer = case.make(own)
    loss = model.middle(model.embedding(models.tokens())).square().mean()
    case.step(optimizer, loss)
    assert head.grad is None
    head.grad = torch.ones_like(head)
    case.step(optimizer, model.middle(model.embedding(models.tokens())).square().mean())
    assert torch.equal(head.grad, torch.ones_like(head))


@ways.cases(kinds=(Lomo,))
def test_after_an_error_others_can_begin_again(case):
    """A backward that raised, everybody's zero_grad(), and a step as if nothing had been."""
    model, expected = build(), build()
    foreign = SPLITS["everything of others"]
    own, theirs = split(model, foreign)
    optimizer = case.make(own)
    before = models.snapshot(model)

    def fail(grad):
        raise ZeroDivisionError

    handle = model.prompt.register_hook(fail)
    with pytest.raises(ZeroDivisionError):
        case.step(optimizer, models.loss_of(model, 0))
    handle.remove()
    written = not models.same(model, before)
    with (
        pytest.warns(UserWarning, match="cannot be taken back")
        if (written and not case.way.announced)
        else contextlib.nullcontext()
    ):
        optimizer.zero_grad()
    for p in theirs:
        p.grad = None
    expected.load_state_dict(model.state_dict())
    case.step(optimizer, models.loss_of(model, 1))
    models.loss_of(expected, 1).backward()
    assert_same_gradients(theirs, split(expected, foreign)[1])
