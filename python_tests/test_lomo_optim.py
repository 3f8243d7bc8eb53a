"""Side by side with lomo-optim 0.1.1, the paper's implementation: equal where it is right, and
right where it is not."""

import math

import models
import pytest
import torch
from torch import nn

from lomo_kernels import Lomo

lomo_optim = pytest.importorskip("lomo_optim", reason="lomo-optim is not installed")
LR = 0.3


def reference_step(optimizer, loss, lr=LR):
    if optimizer.clip_grad_norm is not None:
        optimizer.grad_norm(loss)
    optimizer.fused_backward(loss, lr)


OPTIONS = {
    "plain": {},
    "norm": {"clip_grad_norm": 0.2},
    "value": {"clip_grad_value": 0.003},
    "decay": {"weight_decay": 0.1},
    "norm, value and decay": {
        "clip_grad_norm": 0.2, "clip_grad_value": 0.02, "weight_decay": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("strategy", ["auto", "two_backward"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_equal_in_fp32_by_the_same_calls(name, tied, strategy):
    """A drop-in: the constructor's arguments and the loop are lomo-optim's."""
    options = OPTIONS[name]
    # With a norm wide enough for weights to keep factors; without one such steps would be too long.
    shape = {"tied": tied, "width": 64 if "clip_grad_norm" in options else 16}
    ours, theirs = models.build(**shape), models.build(**shape)
    arguments = (LR, options.get("clip_grad_norm"), options.get("clip_grad_value"),
                 options.get("weight_decay", 0.0))  # fmt: skip
    mine, reference = Lomo(ours, *arguments, strategy=strategy), lomo_optim.Lomo(theirs, *arguments)
    for step in range(5):
        lr = LR / (1 + step)
        reference_step(mine, models.loss_of(ours, step), lr)
        reference_step(reference, models.loss_of(theirs, step), lr)
    assert models.difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_in_bf16_with_nearest_rounding(name):
    """Both round an fp32 result once; a last bit may differ where fp32 itself was rounded apart."""
    ours, theirs = models.build(torch.bfloat16), models.build(torch.bfloat16)
    mine = Lomo(ours, lr=LR, rounding="nearest", **OPTIONS[name])
    reference = lomo_optim.Lomo(theirs, lr=LR, **OPTIONS[name])
    reference_step(mine, models.loss_of(ours))
    reference_step(reference, models.loss_of(theirs))
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    different = sum((p != q).sum().item() for p, q in pairs)
    assert different <= 0.001 * sum(p.numel() for p, _ in pairs)
    for p, q in pairs:
        assert ((p - q).abs() <= 2**-7 * q.abs()).all()


class Constant(nn.Module):
    """A parameter whose gradient is the same in every step."""

    def __init__(self, value, grad):
        super().__init__()
        self.weight = nn.Parameter(torch.full((20_000,), value, dtype=torch.bfloat16))
        self.grad = torch.tensor(grad, dtype=torch.bfloat16)

    def loss(self):
        return (self.weight * self.grad).sum()


def mean_after(optimizer, model, steps):
    for _ in range(steps):
        optimizer.fused_backward(model.loss(), 1e-3)
    return model.weight.detach().double().mean().item()


def test_bf16_keeps_small_updates():
    """1e-3 * 0.5 is an eighth of the spacing of bf16 below 1: nearest drops every step."""
    steps, expected = 200, 1.0 - 200 * 1e-3 * 0.5
    theirs = Constant(1.0, 0.5)
    assert mean_after(lomo_optim.Lomo(theirs, lr=1e-3), theirs, steps) == 1.0
    for rounding in ("auto", "stochastic", "split"):
        ours = Constant(1.0, 0.5)
        got = mean_after(Lomo(ours, lr=1e-3, rounding=rounding), ours, steps)
        # split shows its fp32 master rounded to nearest: 0.9 lies between two values 2^-8 apart
        assert got == pytest.approx(expected, abs=2**-9 if rounding == "split" else 1e-3)


def test_bf16_keeps_weight_decay():
    steps, expected = 500, (1 - 1e-3 * 0.1) ** 500
    theirs = Constant(1.0, 0.0)
    reference = lomo_optim.Lomo(theirs, lr=1e-3, weight_decay=0.1)
    assert mean_after(reference, theirs, steps) == 1.0
    ours = Constant(1.0, 0.0)
    got = mean_after(Lomo(ours, lr=1e-3, weight_decay=0.1), ours, steps)
    assert got == pytest.approx(expected, abs=1e-3)


def test_hooks_do_not_outlive_the_optimizer():
    """Theirs stay on the model and take the gradients of whoever comes next."""
    model = models.build()
    optimizer = lomo_optim.Lomo(model, lr=LR)
    del optimizer
    models.loss_of(model).backward()
    assert not all(p.grad is not None for p in model.parameters())

    model = models.build()
    optimizer = Lomo(model, lr=LR)
    del optimizer
    models.loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_two_thousand_parameters():
    """Theirs looks at every parameter in every hook: counted, 2,000 * 2,000 looks against 2,000."""
    count, looks = 2000, 0

    class Counting(nn.ParameterList):
        def named_parameters(self, *args, **kwargs):
            nonlocal looks
            for item in super().named_parameters(*args, **kwargs):
                looks += 1
                yield item

    theirs = Counting(nn.Parameter(torch.ones(2)) for _ in range(count))
    reference = lomo_optim.Lomo(theirs, lr=0.1)
    looks = 0
    reference.fused_backward(sum(p.sum() for p in theirs), 0.1)
    assert looks > count * count

    ours = Counting(nn.Parameter(torch.ones(2)) for _ in range(count))
    optimizer = Lomo(ours, lr=0.1)
    looks = 0
    optimizer.fused_backward(sum(p.sum() for p in ours), 0.1)
    assert looks == 0
    assert models.difference(ours, theirs) == 0.0


def test_a_weight_shared_by_reentrant_segments():
    """Theirs uses the first part of the gradient, then the second with weights already changed."""

    def shared(checkpointing):
        model = models.build(checkpointing=checkpointing)
        model.blocks[2] = model.blocks[0]
        return model

    expected = shared(None)
    sgd = torch.optim.SGD(expected.parameters(), lr=LR)
    models.loss_of(expected).backward()
    sgd.step()

    theirs = shared("reentrant")
    lomo_optim.Lomo(theirs, lr=LR).fused_backward(models.loss_of(theirs), LR)
    assert models.difference(theirs, expected) > 1e-3

    ours = shared("reentrant")
    with pytest.raises(RuntimeError, match="received a second gradient in one step"):
        Lomo(ours, lr=LR).fused_backward(models.loss_of(ours), LR)
    ours = shared("non-reentrant")
    Lomo(ours, lr=LR).fused_backward(models.loss_of(ours), LR)
    assert models.difference(ours, expected) < 1e-6


def test_one_bad_batch():
    """Theirs makes every weight NaN for good; ours skips."""
    theirs, ours = models.build(), models.build()
    lomo_optim.Lomo(theirs, lr=LR).fused_backward(models.loss_of(theirs) * math.nan, LR)
    assert any(p.isnan().any() for p in theirs.parameters())
    optimizer = Lomo(ours, lr=LR)
    optimizer.fused_backward(models.loss_of(ours) * math.nan, LR)
    assert optimizer.last_step_skipped
    assert all(p.isfinite().all() for p in ours.parameters())
