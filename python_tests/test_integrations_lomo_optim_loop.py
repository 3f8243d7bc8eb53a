"""A loop written for lomo_optim, of which only the import changes."""

import math

import models
import pytest
import torch

import lomo_kernels

pytestmark = pytest.mark.slow

LR = [0.1, 0.2, 0.05, 0.1]


def train(optimizer, model, factors=(1.0, 1.0, 1.0, 1.0)):
    """The norm first, where it is clipped; no update after an overflow; a second forward, as where
    a graph serves one backward; the learning rate of each step goes to fused_backward."""
    skipped, coefs = [], []
    for step, (lr, factor) in enumerate(zip(LR, factors)):
        loss = models.loss_of(model, step) * factor
        if optimizer.clip_grad_norm is not None and optimizer.clip_grad_norm > 0:
            optimizer.grad_norm(loss)
            if optimizer.loss_scaler and optimizer.loss_scaler.has_overflow_serial:
                skipped.append(step)
                optimizer.zero_grad()
                continue
            assert not optimizer.gather_norm
            coefs.append(float(optimizer.clip_coef))
            loss = models.loss_of(model, step) * factor
        optimizer.fused_backward(loss, lr)
        optimizer.zero_grad()
    return skipped, coefs


def reference(model, max_norm, factors=(1.0, 1.0, 1.0, 1.0), scaler=None):
    """The same with torch's SGD, clipping and GradScaler."""
    sgd, coefs = torch.optim.SGD(model.parameters(), lr=1.0), []
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for step, (lr, factor) in enumerate(zip(LR, factors)):
        sgd.param_groups[0]["lr"] = lr
        scaler.scale(models.loss_of(model, step) * factor).backward()
        scaler.unscale_(sgd)
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            coefs += [min(1.0, max_norm / (norm.item() + 1e-6))] if norm.isfinite() else []
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
    return coefs


@pytest.mark.parametrize("library", ["lomo_kernels", "lomo_optim"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_equals_sgd(library, max_norm):
    reason = "lomo-optim is not installed: pip install --no-deps lomo-optim==0.1.1"
    Lomo = pytest.importorskip(library, reason=reason).Lomo
    ours, theirs = models.build(), models.build()
    optimizer = Lomo(ours, 1e-3, max_norm)
    assert optimizer.loss_scaler is None
    skipped, coefs = train(optimizer, ours)
    assert coefs == pytest.approx(reference(theirs, max_norm), rel=1e-5)
    assert skipped == []
    assert not coefs or min(coefs) < 1.0
    assert models.difference(ours, theirs) < 1e-6
    assert models.difference(ours, models.build()) > 5e-3


@pytest.mark.parametrize("strategy", ["auto", "one_backward", "two_backward", "partial"])
def test_an_overflow_skips_the_step_and_the_loop_goes_on(strategy):
    """The step after it sees the smaller scale, and nothing of the step that was left out."""
    model = models.build(torch.float16)
    theirs = models.build(torch.float16).float()  # the same weights
    optimizer = lomo_kernels.Lomo(
        model, 1e-3, 0.5, strategy=strategy, factor_budget=4000,
        loss_scale_args={"init_scale": 1024.0, "scale_window": 100},
    )  # fmt: skip
    assert optimizer.loss_scaler
    assert optimizer.loss_scaler.loss_scale == 1024.0
    factors = (1.0, math.nan, 1.0, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    skipped, coefs = train(optimizer, model, factors)
    expected = reference(theirs, 0.5, factors, scaler)
    assert skipped == [1]
    assert coefs == pytest.approx(expected, rel=1e-2)
    assert optimizer.loss_scaler.loss_scale == optimizer.loss_scale == scaler.get_scale() == 512.0
    assert not optimizer.loss_scaler.has_overflow_serial
    assert models.difference(model, theirs) < 2e-3
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_overflow_met_in_the_update_is_told():
    model = models.build(torch.float16)
    optimizer = lomo_kernels.Lomo(model, 1e-3, loss_scale_args={"init_scale": 1024.0})
    optimizer.fused_backward(models.loss_of(model) * math.nan, 0.1)
    assert optimizer.loss_scaler.has_overflow_serial
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer.fused_backward(models.loss_of(model), 0.1)
    assert not optimizer.loss_scaler.has_overflow_serial


def test_adalomo_in_the_same_loop():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours, theirs = models.build(), models.build()
    optimizer = lomo_kernels.AdaLomo(ours, clip_grad_norm=0.5)
    assert optimizer.loss_scaler.loss_scale == 2.0**10
    skipped, _ = train(optimizer, ours)
    adafactor = transformers.Adafactor(theirs.parameters(), lr=1.0, relative_step=False,
                                       scale_parameter=True, warmup_init=False)  # fmt: skip
    for step, lr in enumerate(LR):
        adafactor.param_groups[0]["lr"] = lr
        models.loss_of(theirs, step).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adafactor.step()
        adafactor.zero_grad()
    assert skipped == []
    assert models.difference(ours, theirs) < 1e-4
    assert models.difference(ours, models.build()) > 1e-2


def test_loops_that_set_what_they_find():
    """Some gather norms by hand, around a backward of their own."""
    model = models.build()
    optimizer = lomo_kernels.Lomo(model, 1e-3, 0.5)
    assert optimizer.clip_coef is None
    optimizer.gather_norm = True
    optimizer.gather_norm = False
    assert optimizer.gather_norm is False
