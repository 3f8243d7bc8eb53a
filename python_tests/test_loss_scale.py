"""Loss scaling: GradScaler's trajectory, exact composition with clipping, checkpoints, warnings."""

import contextlib
import copy
import math
import random
import re
import warnings

import models
import pytest
import torch
from drivers import by_backward, by_fused_backward, by_held_gradients, by_scaled_loop
from torch import nn

from lomo_kernels import Lomo, LossScale, ops
from lomo_kernels.optim.loss_scale import STUCK
from lomo_kernels.optim.scalars import StepScalars

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LR = 0.3

DRIVERS = {
    "backward": by_backward,
    "grad_norm and fused_backward": by_fused_backward,
    "scaled loop": by_scaled_loop,
    "held gradients": by_held_gradients,
}
CLIPS = {
    "plain": {},
    "value": {"clip_grad_value": 0.003},
    "tensor norm": {"clip_grad_norm": 0.05, "norm": "tensor"},
    "global norm": {"clip_grad_norm": 0.2},
    "global norm, value and decay": {
        "clip_grad_norm": 0.3, "clip_grad_value": 0.02, "weight_decay": 0.1,
    },
    "tensor norm, value and decay": {
        "clip_grad_norm": 0.1, "norm": "tensor", "clip_grad_value": 0.01, "weight_decay": 0.1,
    },
}  # fmt: skip


def combinations():
    for clip, options in CLIPS.items():
        for driver in DRIVERS:
            if driver == "scaled loop" and "global norm" in clip:
                continue  # one backward cannot know it
            yield pytest.param(options, DRIVERS[driver], id=f"{clip}, {driver}")


COMBINATIONS = pytest.mark.parametrize(("options", "drive"), list(combinations()))


@COMBINATIONS
def test_the_trajectory_is_gradscaler_s(options, drive):
    """The same random overflows through torch's GradScaler and through Lomo."""
    generator = random.Random(drive.__name__)
    rule = {"growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 3}
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, **rule)
    twin = models.build()
    sgd = torch.optim.SGD(twin.parameters(), lr=0.0)
    model = models.build()
    optimizer = Lomo(
        model, lr=0.01, loss_scale=LossScale(1000.0, **rule, min_scale=1e-6), **options
    )
    seen = set()
    for step in range(40):
        bad = generator.random() < 0.2
        loss = models.spoiled_loss(model, math.inf, 1) if bad else models.loss_of(model, step)
        assert optimizer.loss_scale == scaler.get_scale()
        drive(optimizer, loss)
        assert optimizer.last_step_skipped == bad
        scaler.scale(
            models.spoiled_loss(twin, math.inf, 1) if bad else models.loss_of(twin)
        ).backward()
        scaler.step(sgd)
        scaler.update()
        sgd.zero_grad()
        state = optimizer.state_dict()["loss_scale"]
        assert state["grad_scale"] == optimizer.loss_scale == scaler.get_scale()
        assert state["growth_tracker"] == scaler._growth_tracker.item()
        seen.add(bad)
    assert seen == {False, True}


@COMBINATIONS
def test_powers_of_two_change_no_bit_of_fp32(options, drive):
    """The scale grows in each step, in a norm pass before the second backward."""
    plain, scaled = models.build(), models.build()
    first = Lomo(plain, lr=LR, loss_scale=None, **options)
    second = Lomo(scaled, lr=LR, loss_scale=LossScale(256.0, growth_interval=1), **options)
    for step in range(5):
        drive(first, models.loss_of(plain, step))
        drive(second, models.loss_of(scaled, step))
        assert second.last_grad_norm == first.last_grad_norm
    assert models.same(scaled, models.snapshot(plain))
    assert first.loss_scale is None
    assert second.loss_scale == 256.0 * 2**5


@COMBINATIONS
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_every_step_is_gradscaler_and_sgd_in_float64(options, drive, dtype):
    """Scaled gradients of the same weights, unscaled, clipped and applied in float64."""
    model, reference = models.build(dtype), models.build(dtype)
    rule = LossScale(512.0, growth_interval=2)
    optimizer = Lomo(model, lr=LR, rounding="nearest", loss_scale=rule, **options)
    for step in range(5):
        reference.load_state_dict(model.state_dict())
        scale = optimizer.loss_scale
        (models.loss_of(reference, step) * scale).backward()
        weights = list(reference.parameters())
        grads = [p.grad.double() / scale for p in weights]
        total = math.sqrt(sum(g.square().sum().item() for g in grads))
        drive(optimizer, models.loss_of(model, step))
        assert not optimizer.last_step_skipped
        for p, q, g in zip(model.parameters(), weights, grads):
            clip = options.get("clip_grad_norm", math.inf)
            norm = g.norm().item() if options.get("norm") == "tensor" else total
            value = options.get("clip_grad_value", math.inf)
            g = g.clamp(-value, value) * min(1.0, clip / (norm + 1e-6))
            want = q.detach().double() * (1 - LR * options.get("weight_decay", 0.0)) - LR * g
            info = torch.finfo(dtype)
            # rounding of the stored value, and of fp32's few operations on what it is made of
            fp32 = 2.0**-22 * (q.detach().double().abs() + LR * g.abs())
            spacing = info.eps * want.abs() + info.tiny * info.eps
            assert ((p.detach().double() - want).abs() <= 0.51 * spacing + fp32).all()
        if "clip_grad_norm" in options:
            assert optimizer.last_grad_norm == pytest.approx(total, rel=1e-5)
        reference.zero_grad()


# -- auto ----------------------------------------------------------------------------------------


def test_auto_is_dynamic_for_float16_alone():
    for dtype in (F32, BF16):
        assert Lomo(models.build(dtype)).loss_scale is None
    model = models.build(F16)
    optimizer = Lomo(model, lr=LR)
    assert optimizer.loss_scale == 65536.0
    loss = models.loss_of(model)
    assert loss.dtype is F32  # as Hugging Face's
    assert optimizer.scale(loss).item() == loss.item() * 65536
    frozen = models.build(F16).requires_grad_(False)
    frozen.head = torch.nn.Linear(16, models.VOCABULARY)
    optimizer = Lomo(frozen)
    assert optimizer.loss_scale is None
    frozen.blocks[0].requires_grad_(True)
    assert optimizer.loss_scale == 65536.0


def test_auto_saves_gradients_that_fp16_loses():
    lost, kept = models.build(F16), models.build(F16)
    for model, scale in ((lost, None), (kept, "auto")):
        optimizer = Lomo(model, lr=1e4, loss_scale=scale)
        optimizer.backward(models.loss_of(model) * 1e-6)
    start = models.build(F16)
    same = sum((p == q).sum().item() for p, q in zip(lost.parameters(), start.parameters()))
    kept = sum((p == q).sum().item() for p, q in zip(kept.parameters(), start.parameters()))
    assert same > 2 * kept


def test_with_auto_a_bare_backward_is_not_scaled_and_not_divided():
    bare, plain = models.build(F16), models.build(F16)
    first, second = Lomo(bare, lr=LR), Lomo(plain, lr=LR, loss_scale=None)
    for step in range(3):
        for optimizer, model in ((first, bare), (second, plain)):
            models.loss_of(model, step).backward()
            optimizer.step()
    assert models.same(bare, models.snapshot(plain))
    models.spoiled_loss(bare, math.inf, 1).backward()
    first.step()
    assert first.last_step_skipped
    assert first.loss_scale == 65536.0  # which that overflow says nothing about


def test_half_a_step_of_each_kind_is_refused():
    model = models.build(F16)
    optimizer = Lomo(model, lr=LR)
    models.loss_of(model).backward()
    with pytest.raises(RuntimeError, match="used gradients of a loss that was not scaled"):
        optimizer.scale(models.loss_of(model))
    optimizer.step()
    by_scaled_loop(optimizer, models.loss_of(model))


@pytest.mark.parametrize(
    "layer", [nn.Linear(64, 64, bias=False), nn.LayerNorm(64)], ids=["factors", "vectors"]
)
def test_half_a_step_of_each_kind_is_refused_where_gradients_wait(layer):
    layer = copy.deepcopy(layer).to(F16)
    optimizer = Lomo(layer, clip_grad_norm=1.0)
    x = torch.randn(8, 64, dtype=F16)
    layer(x).float().square().mean().backward()
    with pytest.raises(RuntimeError, match="used gradients of a loss that was not scaled"):
        optimizer.scale(layer(x).float().square().mean())


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}], ids=str)
def test_a_fixed_scale_stays_after_an_overflow(options):
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR, loss_scale=128.0, **options)
    optimizer.backward(models.loss_of(model) * math.inf)
    optimizer.backward(models.loss_of(model, 1))
    models.loss_of(expected, 1).backward()
    if options:
        nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    torch.optim.SGD(expected.parameters(), lr=LR).step()
    assert models.difference(model, expected) < 1e-6
    assert optimizer.loss_scale == 128.0


def test_a_bare_backward_that_is_refused_can_be_followed_by_a_scaled_one():
    model = models.build(F16)
    optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0, strategy="two_backward")
    with pytest.raises(RuntimeError, match="clip_grad_norm needs the norm of all gradients"):
        models.loss_of(model).backward()
    optimizer.zero_grad()
    optimizer.backward(models.loss_of(model))
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("scale", [128.0, "dynamic", LossScale()], ids=str)
def test_a_scale_that_is_asked_for_must_be_used(scale):
    model = models.build()
    optimizer = Lomo(model, lr=LR, loss_scale=scale)
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match="was asked for, but this gradient comes from a loss"):
        models.loss_of(model).backward()
    assert models.same(model, before)
    optimizer.zero_grad()
    by_scaled_loop(optimizer, models.loss_of(model))


# -- steps that are not as usual -----------------------------------------------------------------


def test_zero_grad_between_scale_and_backward():
    model = models.build()
    optimizer = Lomo(model, lr=LR, loss_scale="dynamic")
    loss = optimizer.scale(models.loss_of(model))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    expected = models.build()
    Lomo(expected, lr=LR).backward(models.loss_of(expected))
    assert models.same(model, models.snapshot(expected))


def test_held_gradients_that_are_dropped_take_their_scale_along():
    model, expected = models.build(F16), models.build(F16)
    optimizer, other = Lomo(model, lr=LR), Lomo(expected, lr=LR)
    with optimizer.accumulate():
        optimizer.scale(models.loss_of(model)).backward()
    optimizer.zero_grad()
    for o, m in ((optimizer, model), (other, expected)):
        models.loss_of(m).backward()  # not scaled, so not divided
        o.step()
    assert models.same(model, models.snapshot(expected))


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}], ids=str)
def test_an_exception_in_backward_leaves_the_scale(options):
    model = models.build()
    optimizer = Lomo(model, lr=LR, loss_scale=LossScale(64.0, growth_interval=1), **options)
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(models.spoiled_loss(model, None, 2))
    # without a norm pass the head was updated: that step counts
    after = 64.0 if options else 128.0
    assert optimizer.loss_scale == after
    optimizer.backward(models.loss_of(model))
    assert optimizer.loss_scale == 2 * after
    assert not optimizer.last_step_skipped


def test_a_norm_pass_that_no_backward_follows():
    """lomo_optim's loops go on to the next batch after an overflow: the scale has to fall."""
    model = models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0, loss_scale=LossScale(64.0))
    optimizer.grad_norm(models.spoiled_loss(model, math.nan, 1))
    loss = models.loss_of(model)
    optimizer.grad_norm(loss)
    optimizer.fused_backward(loss)
    assert not optimizer.last_step_skipped
    assert optimizer.loss_scale == 32.0


def test_micro_batches_have_one_scale():
    model, expected = models.build(), models.build()
    optimizer = Lomo(
        model, lr=LR, clip_grad_norm=0.1, loss_scale=LossScale(64.0, growth_interval=1)
    )
    other = Lomo(expected, lr=LR, clip_grad_norm=0.1)
    for first in (0, 3):
        for m, o in ((model, optimizer), (expected, other)):
            for micro in range(3):
                with o.accumulate():
                    o.scale(models.loss_of(m, first + micro) / 3).backward()
            o.step()
    assert models.same(model, models.snapshot(expected))
    assert optimizer.loss_scale == 256.0


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({}, 1),
        ({"clip_grad_norm": 1.0}, 1),
        ({"clip_grad_norm": 1.0, "norm": "tensor"}, None),  # one a parameter, and one at the end
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [None, "dynamic"])
def test_one_launch_decides(monkeypatch, options, launches, scale):
    calls, real = [], ops.decide_
    monkeypatch.setattr(ops, "decide_", lambda *a, **k: (calls.append(k), real(*a, **k)))
    model = models.build()
    optimizer = Lomo(model, lr=LR, loss_scale=scale, **options)
    optimizer.backward(models.loss_of(model))
    assert len(calls) == (launches or len(list(model.parameters())) + 1)


def test_what_the_last_step_was_does_not_change_under_the_next():
    model = models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0, loss_scale="dynamic")
    norm = optimizer.grad_norm(models.loss_of(model, 0))
    kept = norm.item()
    optimizer.fused_backward(models.loss_of(model, 0))
    optimizer.grad_norm(models.loss_of(model, 1) * 3)
    assert norm.item() == kept == optimizer.last_grad_norm
    assert not optimizer.last_step_skipped


def test_two_devices():
    """The norm is over both, the flag of one is everyone's. (To torch cpu:0 is another place.)"""
    first, second = torch.device("cpu"), torch.device("cpu", 0)
    for bad in (False, True):
        scalars = StepScalars(64.0, LossScale(64.0, growth_interval=1), "auto", torch.zeros(1))
        scalars.scaled = True
        scalars.open()
        one, two = scalars.on(first), scalars.on(second)
        assert one.values.data_ptr() != two.values.data_ptr()
        assert torch.equal(one.values, two.values)
        two.skip.fill_(float(bad))
        norm = scalars.decide([torch.tensor([4.0, 0.0]), torch.tensor([5.0])], 1.0)
        assert norm.item() == 3.0
        for device in (one, two):
            assert device.clip_coef.item() == pytest.approx(1 / 3)
            assert device.flags.tolist() == [bad, bad]
            assert device.inv_scale.item() == 1 / 64
        assert scalars.on(torch.device("meta")).clip_coef is not None  # a later one too
        del scalars._devices[torch.device("meta")]
        assert len(scalars.close()) == 2
        assert scalars.state()["grad_scale"] == (32.0 if bad else 128.0)

    scalars = StepScalars(1.0, None, "auto", torch.zeros(1))
    scalars.open()
    scalars.on(second).skip.fill_(1.0)  # no norm pass: found at the end
    assert scalars.close()[0].flags.tolist() == [1.0, 1.0]


# -- warning at the floor ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}], ids=str)
def test_one_warning_when_no_scale_helps(options):
    model = models.build()
    optimizer = Lomo(model, lr=LR, loss_scale=LossScale(4.0), **options)

    def skip():
        optimizer.backward(models.spoiled_loss(model, math.nan, 1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2 + STUCK - 1):  # 4 -> 2 -> 1, then at the floor
            skip()
    assert optimizer.loss_scale == 1.0
    with pytest.warns(UserWarning, match=r"10 steps in a row .* minimum of 1: .* bfloat16"):
        skip()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        skip()


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3, 5])
@pytest.mark.parametrize("scale", ["auto", LossScale(2.0**20, 1.7, 0.3, 2)], ids=["auto", "own"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, at, scale):
    def steps(optimizer, model, first, last):
        for step in range(first, last):
            bad = step in (1, 4)
            loss = models.spoiled_loss(model, math.inf, 1) if bad else models.loss_of(model, step)
            optimizer.backward(loss)

    def make():
        model = models.build(F16)
        return model, Lomo(
            model, lr=LR, clip_grad_norm=1.0, loss_scale=scale, rounding="stochastic"
        )

    whole, optimizer = make()
    steps(optimizer, whole, 0, at)
    saved = {"model": whole.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "checkpoint")
    steps(optimizer, whole, at, 8)

    model, resumed = make()
    steps(resumed, model, 0, 2)  # something to be overwritten
    saved = torch.load(tmp_path / "checkpoint")
    model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    steps(resumed, model, at, 8)
    assert models.same(model, models.snapshot(whole))
    assert resumed.state_dict()["loss_scale"] == optimizer.state_dict()["loss_scale"]


def test_old_checkpoints_and_other_configurations():
    model = models.build(F16)
    optimizer = Lomo(model, lr=LR, loss_scale=LossScale(1024.0))
    optimizer.backward(models.spoiled_loss(model, math.inf, 1))
    saved = optimizer.state_dict()
    assert saved["loss_scale"] == {"grad_scale": 512.0, "growth_tracker": 0.0, "stuck": 0.0}
    fixed = Lomo(models.build(F16), loss_scale=64.0)
    fixed.load_state_dict(saved)  # what the constructor was told stays
    assert fixed.loss_scale == 64.0
    assert "loss_scale" not in fixed.state_dict()
    del saved["loss_scale"]
    optimizer.load_state_dict(saved)
    assert optimizer.loss_scale == 512.0
    for _ in range(2):  # as accelerate does
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.backward(models.loss_of(model))
    assert optimizer.state_dict()["loss_scale"]["growth_tracker"] == 2.0


# -- arguments -----------------------------------------------------------------------------------


def test_a_scale_may_begin_at_its_minimum():
    assert LossScale(init_scale=4.0, min_scale=4.0).init_scale == 4.0


def test_defaults_are_gradscaler_s():
    scaler, ours = torch.amp.GradScaler("cpu"), LossScale()
    assert ours.init_scale == scaler.get_scale()
    assert ours.growth_factor == scaler.get_growth_factor()
    assert ours.backoff_factor == scaler.get_backoff_factor()
    assert ours.growth_interval == scaler.get_growth_interval()


def test_lomo_optim_s_arguments():
    arguments = {
        "init_scale": 4096, "scale_factor": 4.0, "scale_window": 5, "min_scale": 2,
        "delayed_shift": 1, "consecutive_hysteresis": True, "raise_error_at_min_scale": False,
    }  # fmt: skip
    model = models.build()
    optimizer = Lomo(model, 1e-3, None, None, 0.0, arguments)

    def scale_after(steps, factor):
        for _ in range(steps):
            optimizer.backward(models.loss_of(model) * factor)
        return optimizer.loss_scale

    assert optimizer.loss_scale == 4096
    assert scale_after(1, math.inf) == 1024
    assert scale_after(4, 1.0) == 1024
    assert scale_after(1, 1.0) == 4096
    assert scale_after(7, math.inf) == 2
    assert arguments["scale_window"] == 5
    assert Lomo(models.build(), 1e-3, None, None, 0.0, {}).loss_scale is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_scale": "static"}, "loss_scale must be a finite number greater than 0, 'auto', 'd"),
        ({"loss_scale": math.nan}, "loss_scale must be a finite number greater than 0, 'auto', 'd"),
        ({"loss_scale_args": {"delayed_shift": 2}}, "loss_scale_args cannot take delayed_shift=2"),
        (
            {"loss_scale_args": {"raise_error_at_min_scale": True}},
            "loss_scale_args cannot take raise_error_at_min_scale=True",
        ),
        ({"loss_scale_args": {"speed": 1}}, "loss_scale_args cannot take speed=1"),
        (
            {"loss_scale_args": {"init_scale": 8}, "loss_scale": 8.0},
            "give loss_scale or loss_scale_args, not both",
        ),
        (
            {"loss_scale_args": {"init_scale": 8}, "loss_scale": None},
            "give loss_scale or loss_scale_args, not both",
        ),
    ],
    ids=lambda value: None,
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Lomo(models.build(), **arguments)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("init_scale", 0.5, "init_scale must be a float32 number of at least min_scale=1.0"),
        ("init_scale", math.inf, "init_scale must be a float32 number of at least min_scale=1.0"),
        ("init_scale", "big", "init_scale must be a float32 number"),
        ("growth_factor", 1.0, "growth_factor must be greater than 1 and less than inf, got 1.0"),
        ("backoff_factor", 1, "backoff_factor must be greater than 0 and less than 1, got 1"),
        ("min_scale", 0, "min_scale must be greater than 0 and less than"),
        ("growth_interval", 0, "growth_interval must be an integer in [1, 2**24], got 0"),
        ("growth_interval", 2.0, "growth_interval must be an integer in [1, 2**24], got 2.0"),
    ],
)
def test_bad_fields(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LossScale(**{field: value})
    with contextlib.suppress(AttributeError):  # frozen
        LossScale().init_scale = 1.0
        raise AssertionError("a LossScale can be changed")
