"""Lomo against torch.optim.SGD and torch's clipping, and what a torch optimizer has to do."""

import contextlib
import copy
import gc
import math
import pickle
import re
import sys
import weakref

import models
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lomo_kernels import AdaLomo, Lomo, ops

LR = 0.3
# Ours rounds lr * g before the subtraction, torch's SGD fuses the two: one unit in the last place
# of a weight near 1 per step, and what that changes in the gradients of the next.
FP32 = 1e-6


def sgd_step(model, step, lr=LR, **options):
    """The same step in torch's own parts."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    models.loss_of(model, step).backward()
    norm = torch.linalg.vector_norm(
        torch.stack([p.grad.norm() for p in parameters if p.grad is not None])
    )
    clip = options.get("clip_grad_norm")
    coefficients = {}
    if clip is not None and options.get("norm") == "tensor":
        for p in parameters:
            coefficients[p] = min(1.0, clip / (p.grad.norm().item() + 1e-6))
    elif clip is not None:
        coefficients = dict.fromkeys(parameters, min(1.0, clip / (norm.item() + 1e-6)))
    if (value := options.get("clip_grad_value")) is not None:
        nn.utils.clip_grad_value_(parameters, value)
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(coefficients.get(p, 1.0))
                p.mul_(1 - lr * options.get("weight_decay", 0.0))
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


CONFIGURATIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "value": {"clip_grad_value": 0.003},
    "tensor norm": {"clip_grad_norm": 0.05, "norm": "tensor"},
    "global norm": {"clip_grad_norm": 0.2},
    "global norm by two backwards": {"clip_grad_norm": 0.2, "strategy": "two_backward"},
    "global norm that does not clip": {"clip_grad_norm": 1e4},
    "scale": {"loss_scale": 4096.0},
    "everything": {
        "weight_decay": 0.1, "clip_grad_value": 0.02, "clip_grad_norm": 0.3, "loss_scale": 1024.0,
    },
    "everything by two backwards": {
        "weight_decay": 0.1, "clip_grad_value": 0.02, "clip_grad_norm": 0.3, "loss_scale": 1024.0,
        "strategy": "two_backward",
    },
    "everything but the global norm": {
        "weight_decay": 0.1, "clip_grad_value": 0.01, "clip_grad_norm": 0.1, "norm": "tensor",
        "loss_scale": 1024.0,
    },
}  # fmt: skip


def drivers_for(options):
    for name, driver in models.DRIVERS.items():
        one_pass = name in ("loop", "scaled loop")
        if one_pass and options.get("strategy") == "two_backward":
            continue
        if name == "loop" and "loss_scale" in options:
            continue
        yield name, driver


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_to_sgd_whichever_way_it_is_driven(name, tied):
    options = CONFIGURATIONS[name]
    expected = models.build(tied=tied)
    norms = [sgd_step(expected, step, **options) for step in range(4)]
    results = []
    for _, driver in drivers_for(options):
        model = models.build(tied=tied)
        optimizer = Lomo(model, lr=LR, **options)
        for step in range(4):
            driver(optimizer, model, step)
            assert all(p.grad is None for p in model.parameters())
        assert models.difference(model, expected) < FP32
        assert not optimizer.last_step_skipped
        if "clip_grad_norm" in options:
            assert optimizer.last_grad_norm == pytest.approx(norms[-1], rel=1e-4)
        else:
            assert optimizer.last_grad_norm is None
        results.append(models.snapshot(model))
    for other in results[1:]:  # the same numbers, to the bit
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_is_sgd_on_an_exact_copy_then_rounded(dtype, name):
    """One step: the gradients are those of the 16-bit model, the arithmetic is fp32."""
    options = CONFIGURATIONS[name]
    model = models.build(dtype)
    reference = models.build(dtype)
    (models.loss_of(reference) * options.get("loss_scale", 1.0)).backward()
    exact = [p.detach().double() for p in reference.parameters()]
    grads = [p.grad.double() / options.get("loss_scale", 1.0) for p in reference.parameters()]
    total = math.sqrt(sum(g.square().sum().item() for g in grads))

    optimizer = Lomo(model, lr=LR, rounding="nearest", **options)
    optimizer.backward(models.loss_of(model))
    for p, before, g in zip(model.parameters(), exact, grads):
        clip = options.get("clip_grad_norm", math.inf)
        norm = g.norm().item() if options.get("norm") == "tensor" else total
        value = options.get("clip_grad_value", math.inf)
        g = g.clamp(-value, value) * min(1.0, clip / (norm + 1e-6))
        want = before * (1 - LR * options.get("weight_decay", 0.0)) - LR * g
        got = p.detach()
        # Within fp32's rounding of the value that is rounded to 16 bits.
        spacing = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).tiny
        assert ((got.double() - want).abs() <= spacing * 0.5 * (1 + 1e-3)).all()


def test_lr_of_fused_backward_is_for_every_group():
    model = models.build()
    optimizer = Lomo(model, lr=1.0)
    optimizer.fused_backward(models.loss_of(model), 0.25)
    expected = models.build()
    sgd_step(expected, 0, lr=0.25)
    assert models.difference(model, expected) < FP32
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_parameters_instead_of_a_module():
    by_module, by_parameters = models.build(), models.build()
    first, second = Lomo(by_module, lr=LR), Lomo(by_parameters.parameters(), lr=LR)
    models.with_backward(first, by_module, 0)
    models.with_backward(second, by_parameters, 0)
    assert models.same(by_module, models.snapshot(by_parameters))


def groups_of(model):
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]


def test_groups_and_a_scheduler():
    model, expected = models.build(), models.build()
    optimizer = Lomo(groups_of(model), lr=LR)
    sgd = torch.optim.SGD(groups_of(expected), lr=LR)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (optimizer, sgd)
    ]
    for step in range(4):
        optimizer.backward(models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        with torch.no_grad():  # torch's SGD has coupled decay
            for group in sgd.param_groups:
                for p in group["params"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                group["weight_decay"], kept = 0.0, group["weight_decay"]
                group["kept"] = kept
        sgd.step()
        sgd.zero_grad()
        for group in sgd.param_groups:
            group["weight_decay"] = group.pop("kept")
        for schedule in schedules:
            schedule.step()
    assert models.difference(model, expected) < FP32
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in sgd.param_groups]


def test_a_group_added_later():
    model = models.build()
    optimizer = Lomo(model.blocks.parameters(), lr=LR)
    optimizer.add_param_group({"params": model.head.parameters(), "lr": 0.1})
    before = models.snapshot(model)
    models.with_loop(optimizer, model, 0)
    assert not torch.equal(model.head.weight, before[-1])
    assert torch.equal(model.embedding.weight, before[0])
    assert model.embedding.weight.grad is not None  # nobody's but autograd's


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_group_added_in_the_middle_of_a_step(clip):
    """What waits is not lost, and the group's gradients belong to the step, as in torch."""
    model, twin = models.build(), models.build()
    optimizer = Lomo(model.blocks.parameters(), LR, clip, strategy="one_backward")
    sgd = torch.optim.SGD(twin.blocks.parameters(), lr=LR)
    start = models.snapshot(model)
    for each, m in ((optimizer, model), (sgd, twin)):
        models.loss_of(m).backward()
        each.add_param_group({"params": m.head.parameters()})
    if clip is not None:
        torch.nn.utils.clip_grad_norm_([*twin.blocks.parameters(), *twin.head.parameters()], clip)
    optimizer.step()
    sgd.step()
    assert not torch.equal(model.blocks[0].up.weight, start[3])
    assert models.difference(model, twin) < FP32


def test_a_group_that_is_refused_leaves_no_trace():
    model = models.build()
    optimizer = Lomo(model.blocks.parameters(), lr=LR)
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, got -1"):
        optimizer.add_param_group({"params": model.head.parameters(), "lr": -1})
    assert len(optimizer.param_groups) == 1
    models.loss_of(model).backward()
    assert model.head.weight.grad is not None
    optimizer.step()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, dtype, rounding):
    if dtype is torch.float16 and rounding == "split":
        pytest.skip("split is for bfloat16")
    model = models.build(dtype)
    optimizer = Lomo(model, lr=LR, rounding=rounding, clip_grad_norm=1.0, seed=5)
    for step in range(3):
        optimizer.backward(models.loss_of(model, step))
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict()}, tmp_path / "checkpoint")
    for step in range(3, 6):
        optimizer.backward(models.loss_of(model, step))

    other = models.build(dtype)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    resumed = Lomo(other, lr=1.0, rounding=rounding, clip_grad_norm=1.0)
    saved = torch.load(tmp_path / "checkpoint")
    resumed.load_state_dict(saved["o"])
    other.load_state_dict(saved["m"])
    for step in range(3, 6):
        resumed.backward(models.loss_of(other, step))
    assert models.same(other, models.snapshot(model))
    if rounding == "split":
        lows = [resumed.state[p]["low"] for p in other.parameters()]
        assert all(low.dtype is torch.int16 for low in lows)
        assert all(
            torch.equal(low, optimizer.state[p]["low"]) for low, p in zip(lows, model.parameters())
        )
    else:
        assert not optimizer.state_dict()["state"]


def test_loading_does_not_share_state():
    model = models.build(torch.bfloat16)
    optimizer = Lomo(model, rounding="split")
    optimizer.backward(models.loss_of(model))
    saved = optimizer.state_dict()
    other = models.build(torch.bfloat16)
    resumed = Lomo(other, rounding="split")
    resumed.load_state_dict(saved)
    pairs = zip(optimizer.state.values(), resumed.state.values())
    assert all(a["low"].data_ptr() != b["low"].data_ptr() for a, b in pairs)


def test_a_checkpoint_without_our_keys_gets_the_defaults():
    model = models.build()
    optimizer = Lomo(model, lr=0.5)
    saved = optimizer.state_dict()
    for key in ("step", "seed", "rounding", "clip_grad_value", "weight_decay"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    optimizer.backward(models.loss_of(model))
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("copy_it", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_are_refused(copy_it):
    optimizer = Lomo(models.build())
    with pytest.raises(TypeError, match="Lomo cannot be copied or pickled"):
        copy_it(optimizer)


def test_a_model_with_hooks_can_be_copied_and_saved(tmp_path):
    model = models.build()
    optimizer = Lomo(model, lr=LR)
    twin = copy.deepcopy(model)
    models.loss_of(twin).backward()
    assert all(p.grad is not None for p in twin.parameters())
    torch.save(model, tmp_path / "model")
    assert models.same(torch.load(tmp_path / "model", weights_only=False), models.snapshot(model))
    assert optimizer.param_groups[0]["step"] == 0


# -- which parameters ----------------------------------------------------------------------------


@pytest.mark.parametrize("driver", [models.with_loop, models.with_backward])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_frozen_parameters_stay_and_are_taken_up_later(driver, clip):
    if clip and driver is models.with_loop:
        pytest.skip("backward alone cannot know the global norm")
    model, expected = models.build(), models.build()
    for m in (model, expected):
        m.embedding.weight.requires_grad_(False)
    optimizer = Lomo(model, lr=LR, clip_grad_norm=clip)
    frozen = model.embedding.weight.clone()
    driver(optimizer, model, 0)
    sgd_step(expected, 0, clip_grad_norm=clip)
    assert torch.equal(model.embedding.weight, frozen)
    for m in (model, expected):
        m.embedding.weight.requires_grad_(True)
        m.head.weight.requires_grad_(False)
    for step in range(1, 3):
        driver(optimizer, model, step)
        sgd_step(expected, step, clip_grad_norm=clip)
        assert models.difference(model, expected) < FP32
    assert not torch.equal(model.embedding.weight, frozen)


def test_a_parameter_without_a_gradient_in_a_step():
    model, expected = models.build(), models.build()
    for m in (model, expected):
        m.spare = nn.Parameter(torch.ones(3))
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1, weight_decay=0.1)
    for step in range(2):
        models.with_backward(optimizer, model, step)
        sgd_step(expected, step, clip_grad_norm=0.1, weight_decay=0.1)
    assert torch.equal(model.spare, torch.ones(3))
    assert models.difference(model, expected) < FP32


def test_the_norm_forgets_parameters_that_have_no_gradient_any_more():
    model = models.build()
    optimizer = Lomo(model, lr=0.0, clip_grad_norm=1.0)
    models.with_backward(optimizer, model, 0)
    everything = optimizer.last_grad_norm
    loss = models.loss_of(model, 0).detach() * 0 + model.head.weight.square().sum()
    optimizer.backward(loss)
    assert optimizer.last_grad_norm == pytest.approx((2 * model.head.weight).norm().item())
    assert optimizer.last_grad_norm != everything


def test_scalars_empty_tensors_and_one_element():
    odd = nn.ParameterList(
        [
            nn.Parameter(torch.tensor(2.0)),
            nn.Parameter(torch.zeros(0, 3)),
            nn.Parameter(torch.ones(1)),
            nn.Parameter(torch.ones(3, 5, 7)),
        ]
    )
    optimizer = Lomo(odd, lr=0.5, clip_grad_norm=100.0)
    optimizer.backward(sum(p.square().sum() for p in odd))
    assert odd[0].item() == 0.0  # 2 - 0.5 * 2 * 2
    assert odd[1].shape == (0, 3)
    assert torch.equal(odd[3], torch.zeros(3, 5, 7))


def test_gradients_in_another_memory_layout():
    convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    expected = copy.deepcopy(convolution)
    optimizer = Lomo(convolution, lr=LR)
    sgd = torch.optim.SGD(expected.parameters(), lr=LR)
    x = torch.randn(2, 3, 8, 8)
    optimizer.backward(convolution(x).square().mean())
    expected(x).square().mean().backward()
    sgd.step()
    assert models.difference(convolution, expected) < FP32


@pytest.mark.parametrize("other", ["Lomo", "SGD", "AdamW"])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip_grad_norm": 0.1}, {"clip_grad_norm": 0.1, "strategy": "two_backward"}],
    ids=["free", "one backward", "two backwards"],
)
def test_several_optimizers_on_one_model(other, options):
    """A norm pass of one, which is a backward more, must not show the others their gradients
    twice."""
    clip = options.get("clip_grad_norm")
    model, expected = models.build(), models.build()

    def halves(m):
        return list(m.blocks.parameters()), [*m.embedding.parameters(), *m.head.parameters()]

    mine, theirs = halves(model)
    optimizer = Lomo(mine, lr=LR, **options)
    second = Lomo(theirs, lr=0.01) if other == "Lomo" else getattr(torch.optim, other)(theirs, 0.01)
    same_mine, same_theirs = halves(expected)
    sgd = torch.optim.SGD(same_mine, lr=LR)
    oracle = getattr(torch.optim, "SGD" if other == "Lomo" else other)(same_theirs, lr=0.01)
    for step in range(3):
        optimizer.backward(models.loss_of(model, step))
        second.step()
        second.zero_grad()
        models.loss_of(expected, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(same_mine, clip)
        for o in (sgd, oracle):
            o.step()
            o.zero_grad()
    assert models.difference(model, expected) < 1e-5


def test_a_second_optimizer_takes_over_from_the_first(caplog):
    model, expected = models.build(), models.build()
    first = Lomo(model, lr=LR, clip_grad_norm=0.2)
    models.loss_of(model, 0).backward()  # whose gradients are gone with the optimizer
    assert "takes over" not in caplog.text
    second = Lomo(model, lr=LR)
    assert "takes over" in caplog.text
    for refused in (first.step, lambda: first.backward(models.loss_of(model))):
        with pytest.raises(RuntimeError, match="were taken over by another one"):
            refused()
    models.with_loop(second, model, 1)
    sgd_step(expected, 1)
    assert models.difference(model, expected) < FP32
    caplog.clear()
    del second
    third = Lomo(model)
    third.remove()
    Lomo(model)
    assert not caplog.text


def test_clipping_from_outside_is_noticed():
    model, clip = models.build(), torch.nn.utils.clip_grad_norm_
    optimizer = Lomo(model)
    clip(model.parameters(), 1.0)  # before backward there is nothing to miss
    for expected in (pytest.warns(UserWarning, match="clipped nothing"), contextlib.nullcontext()):
        models.loss_of(model).backward()
        with expected:
            clip(model.parameters(), 1.0)
        optimizer.step()
    with optimizer.accumulate():
        models.loss_of(model).backward()
    clip(model.parameters(), 1e-9)  # here gradients are held, and are clipped
    before = models.snapshot(model)
    optimizer.step()
    moved = [(p - q).abs().max().item() for p, q in zip(model.parameters(), before)]
    assert max(moved) < 1e-9


@pytest.mark.parametrize("norm", [None, 1.0])
def test_an_enabled_grad_scaler_is_refused(norm):
    model = models.build()
    optimizer = Lomo(model, clip_grad_norm=norm)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(models.loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="switch it off and pass loss_scale to the optimizer"):
        scaler.step(optimizer)
    told = pytest.warns(UserWarning, match="taken back")
    with told if norm is None else contextlib.nullcontext():
        optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(models.loss_of(model)).backward()
    scaler.step(optimizer)
    scaler.update()


def test_a_function_without_a_gradient_for_its_weight():
    """torch calls the hook of such a weight too, and there is nothing to use."""

    class Constant(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Lomo([weight], lr=LR)
    x = torch.ones(3, requires_grad=True)
    optimizer.backward(Constant.apply(x, weight).sum())
    optimizer = Lomo([weight], lr=LR)
    optimizer.backward(checkpoint(lambda x: Constant.apply(x, weight), x, use_reentrant=True).sum())
    assert torch.equal(weight, torch.ones(3))


# -- hooks ---------------------------------------------------------------------------------------


def hooks_on(model):
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_hooks_die_with_the_optimizer():
    model = models.build()
    gc.disable()  # reference counts alone must do it
    try:
        optimizer = Lomo(model, lr=LR, clip_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        optimizer.backward(models.loss_of(model))
        alive = weakref.ref(optimizer)
        assert hooks_on(model) == len(list(model.parameters()))
        del optimizer, schedule
        assert alive() is None
    finally:
        gc.enable()
    assert hooks_on(model) == 0
    models.loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_hooks_go_on_request_and_step_still_works():
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1)
    optimizer.remove()
    assert hooks_on(model) == 0
    for step in range(2):
        models.loss_of(model, step).backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())
        sgd_step(expected, step, clip_grad_norm=0.1)
    assert models.difference(model, expected) < FP32
    with pytest.raises(RuntimeError, match="the hooks were removed"):
        optimizer.backward(models.loss_of(model))
    assert hooks_on(model) == 0


def calls_in_backward(count):
    """Python function calls during one backward with `count` parameters."""
    layers = nn.ParameterList(nn.Parameter(torch.ones(2)) for _ in range(count))
    optimizer = Lomo(layers, lr=0.1)
    loss = sum(p.sum() for p in layers)
    calls = 0

    def profile(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(profile)
    try:
        loss.backward()
    finally:
        sys.setprofile(None)
    optimizer.step()
    return calls


def test_the_cost_of_a_hook_does_not_grow_with_the_model():
    """Counted in function calls on 2,000 parameters; a scan per hook would make it 100 times."""
    small, large = calls_in_backward(20), calls_in_backward(2000)
    assert large <= 100 * small


def peak_of(backward, model):
    """Peak bytes of a step: parameters, activations and what `backward(loss)` needs."""
    with models.LiveBytes() as live:
        for p in model.parameters():
            live.add(p)
        backward(models.loss_of(model))
    return live.peak


@pytest.mark.parametrize("norm", [None, "tensor", "global"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gradient_is_gone_when_its_hook_returns(norm, tied):
    """The peak is that of a backward whose gradients are dropped, and a few scalars."""
    shape = {"width": 64, "depth": 4, "tied": tied}
    dropping = models.build(**shape)
    for p in dropping.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def backward(loss):
        if norm == "global":  # the first of two backwards keeps the graph, and its activations
            loss.backward(retain_graph=True)
        loss.backward()

    floor = peak_of(backward, dropping)
    keeping = models.build(**shape)
    kept = peak_of(backward, keeping)

    model = models.build(**shape)
    clip = {} if norm is None else {"clip_grad_norm": 1.0, "norm": norm}
    if norm == "global":  # one backward would keep factors, see test_one_backward.py
        clip["strategy"] = "two_backward"
    optimizer = Lomo(model, lr=LR, **clip)
    peak = peak_of(optimizer.backward, model)
    count = len(list(model.parameters()))
    scalars = 64 * (count + 16)  # one float a parameter and a few for the step, generously
    assert peak <= floor + scalars
    # and the measure can tell: without release the peak would be this much higher
    assert kept > floor + scalars


def test_no_gradient_waits_for_the_next_hook():
    """Seen from inside: at most one gradient's memory is alive whenever a hook starts."""
    model = models.build()
    seen = []

    def before(param):
        seen.append(StorageWeakRef(param.grad.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in seen))

    alive = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(before)
    optimizer = Lomo(model, lr=LR)
    optimizer.backward(models.loss_of(model))
    assert len(alive) == len(list(model.parameters()))
    assert max(alive) == 1


# -- steps that are not as usual -----------------------------------------------------------------


def test_a_second_backward_in_one_step_is_refused():
    model = models.build()
    optimizer = Lomo(model, lr=LR)
    models.loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="received a second gradient in one step"):
        models.loss_of(model, 1).backward()
    with pytest.warns(UserWarning, match="updates made in backward cannot be taken back"):
        optimizer.zero_grad()
    models.with_loop(optimizer, model, 2)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("last_outside", [False, True])
def test_accumulated_gradients_are_one_large_batch(clip, last_outside):
    if clip and last_outside:
        pytest.skip("the global norm needs every gradient before the first update")
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=clip)
    for first in (0, 3):
        for micro in range(3):
            inside = micro < 2 or not last_outside
            with optimizer.accumulate() if inside else contextlib.nullcontext():
                (models.loss_of(model, first + micro) / 3).backward()
        optimizer.step()
        for micro in range(3):
            (models.loss_of(expected, first + micro) / 3).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(expected.parameters(), clip)
        sgd = torch.optim.SGD(expected.parameters(), lr=LR)
        sgd.step()
        sgd.zero_grad()
    assert models.difference(model, expected) < FP32


def test_held_gradients_and_a_global_norm_want_to_be_together():
    model = models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1, strategy="two_backward")
    with optimizer.accumulate():
        models.loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="cannot add to gradients that are held"):
        optimizer.grad_norm(models.loss_of(model, 1))
    with pytest.raises(RuntimeError, match=r"call loss\.backward"), optimizer.accumulate():
        optimizer.backward(models.loss_of(model, 1))
    optimizer.step()


def test_backward_alone_cannot_know_the_global_norm():
    model = models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1, strategy="two_backward")
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match="clip_grad_norm needs the norm of all gradients"):
        models.loss_of(model).backward()
    with pytest.raises(RuntimeError, match="clip_grad_norm needs the norm of all gradients"):
        optimizer.fused_backward(models.loss_of(model), LR)
    assert models.same(model, before)
    optimizer.zero_grad()
    models.with_backward(optimizer, model, 0)


def test_a_norm_is_for_one_step():
    """The coefficient of an abandoned step must not clip the next one."""
    model = models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1, strategy="two_backward")
    optimizer.grad_norm(models.loss_of(model, 0))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="clip_grad_norm needs the norm"):
        models.loss_of(model, 1).backward()


def test_grad_norm_without_clipping_only_measures():
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR)
    loss = models.loss_of(model)
    norm = optimizer.grad_norm(loss)
    optimizer.fused_backward(loss)
    assert norm.item() == pytest.approx(sgd_step(expected, 0), rel=1e-5)
    assert optimizer.last_grad_norm == norm.item()
    assert models.difference(model, expected) < FP32


def test_a_scale_that_is_asked_for_must_be_used():
    model = models.build()
    optimizer = Lomo(model, lr=LR, loss_scale=128.0)
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match=r"loss_scale=128.0 was asked for"):
        models.loss_of(model).backward()
    assert models.same(model, before)
    optimizer.zero_grad()
    models.with_scaled_loop(optimizer, model, 0)


def test_step_without_backward_does_nothing():
    model = models.build()
    optimizer = Lomo(model, lr=LR)
    before = models.snapshot(model)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.param_groups[0]["step"] == 0
    models.with_backward(optimizer, model, 0)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 1
    assert not models.same(model, before)


def test_steps_after_training_are_silent():
    model = models.build()
    for options in ({}, {"clip_grad_norm": 1.0}):
        optimizer = Lomo(model, lr=LR, **options)
        models.with_backward(optimizer, model, 0)
        before = models.snapshot(model)
        for _ in range(3):
            optimizer.step()
        assert models.same(model, before)
        optimizer.remove()


def test_closure():
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR)

    def closure():
        optimizer.zero_grad()
        loss = models.loss_of(model)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    sgd_step(expected, 0)
    assert loss.item() == pytest.approx(models.loss_of(models.build()).item())
    assert models.difference(model, expected) < FP32


@pytest.mark.parametrize(
    "options", [{}, {"clip_grad_value": 0.1}, {"clip_grad_norm": 1.0, "norm": "tensor"}]
)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_overflow_in_one_backward_stops_the_rest(value, options):
    """What backward reached before is updated; the rest and what is not finite are not."""
    model, clean = models.build(), models.build()
    optimizer, other = Lomo(model, lr=LR, **options), Lomo(clean, lr=LR, **options)
    before = models.snapshot(model)
    optimizer.backward(models.spoiled_loss(model, value, 1))
    other.backward(models.loss_of(clean))
    assert optimizer.last_step_skipped
    assert not other.last_step_skipped
    changed = {
        name: not torch.equal(p, old)
        for (name, p), old in zip(model.named_parameters(), before, strict=True)
    }
    assert changed["head.weight"]
    assert changed["blocks.2.up.weight"]
    assert torch.equal(model.head.weight, clean.head.weight)
    assert not changed["blocks.0.up.weight"]
    assert not changed["embedding.weight"]
    assert all(p.isfinite().all() for p in model.parameters())
    models.with_backward(optimizer, model, 1)
    assert not optimizer.last_step_skipped


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 1.0}, {"loss_scale": 8.0}])
def test_an_exception_in_backward_leaves_the_optimizer_usable(options):
    model = models.build()
    optimizer = Lomo(model, lr=LR, **options)
    with pytest.raises(ZeroDivisionError):
        optimizer.backward(models.spoiled_loss(model, None, 1))
    assert all(p.grad is None for p in model.parameters())
    expected = models.build()
    expected.load_state_dict(model.state_dict())
    models.with_backward(optimizer, model, 1)
    sgd_step(expected, 1, **options)
    assert models.difference(model, expected) < FP32


def test_autocast_sees_the_new_weights():
    """Autocast caches 16-bit copies of fp32 weights for the length of its block."""
    model, expected = models.build(), models.build()
    optimizer = Lomo(model, lr=LR)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.backward(models.loss_of(model, 0))
        second = models.loss_of(model, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = models.loss_of(expected, 0)
    loss.backward()
    sgd = torch.optim.SGD(expected.parameters(), lr=LR)
    sgd.step()
    with torch.autocast("cpu", torch.bfloat16):
        third = models.loss_of(expected, 1)
    assert second.item() == pytest.approx(third.item(), abs=1e-4)
    assert abs(second.item() - models.loss_of(models.build(), 1).item()) > 1e-3


@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
@pytest.mark.parametrize("tied", [False, True])
def test_activation_checkpointing(kind, tied):
    model, expected = models.build(checkpointing=kind, tied=tied), models.build(tied=tied)
    optimizer = Lomo(model, lr=LR)
    for step in range(3):
        models.with_backward(optimizer, model, step)
        sgd_step(expected, step)
    assert models.difference(model, expected) < FP32


@pytest.mark.parametrize("strategy", ["two_backward", "partial"])
def test_the_norm_pass_wants_non_reentrant_checkpointing(strategy):
    model, expected = models.build(checkpointing="non-reentrant"), models.build()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1, strategy=strategy)
    models.with_backward(optimizer, model, 0)
    sgd_step(expected, 0, clip_grad_norm=0.1)
    assert models.difference(model, expected) < FP32
    model = models.build(checkpointing="reentrant")
    optimizer = Lomo(model, lr=LR, clip_grad_norm=0.1, strategy=strategy)
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match="needs non-reentrant checkpointing"):
        models.with_backward(optimizer, model, 0)
    assert models.same(model, before)


def test_a_weight_shared_by_reentrant_segments_is_refused():
    """Its gradient comes in parts there; using the first part alone would be silently wrong."""
    model = models.build(checkpointing="reentrant")
    model.blocks[2] = model.blocks[0]
    optimizer = Lomo(model, lr=LR)
    with pytest.raises(RuntimeError, match=r"blocks.0.* received a second gradient"):
        models.with_backward(optimizer, model, 0)


# -- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": "fast"}, ValueError, "lr must be a finite number of at least 0, got 'fast'"),
        ({"weight_decay": math.inf}, ValueError, "weight_decay must be a finite number"),
        ({"clip_grad_norm": 0.0}, ValueError, "clip_grad_norm must be a finite number greater"),
        ({"clip_grad_value": -2}, ValueError, "clip_grad_value must be a finite number greater"),
        ({"loss_scale": 0}, ValueError, "loss_scale must be a finite number greater than 0"),
        ({"norm": "layer"}, ValueError, "norm must be one of ('global', 'tensor'), got 'layer'"),
        ({"strategy": "x"}, ValueError, "strategy must be one of ('auto', 'one_backward', 'two_"),
        ({"factor_budget": -1}, ValueError, "factor_budget must be at least 0 bytes, got -1"),
        ({"factor_budget": 1.5}, TypeError, "factor_budget must be a number of bytes or None, got"),
        ({"rounding": "up"}, ValueError, "rounding must be 'auto' or one of"),
        ({"seed": -1}, ValueError, "seed must be an integer in [0, 2**64), got -1"),
        ({"seed": 2**64}, ValueError, "seed must be an integer in [0, 2**64), got 184467440737"),
        ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    model = models.build()
    with pytest.raises(error, match=re.escape(message)):
        Lomo(model, **arguments)
    assert hooks_on(model) == 0


def test_bad_models():
    with pytest.raises(ValueError, match="rounding 'split' is for bfloat16 parameters"):
        Lomo(models.build(torch.float16), rounding="split")
    with pytest.raises(RuntimeError, match="float64 runs on the backend 'reference' alone"):
        Lomo(models.build(torch.float64), backend="native")
    with pytest.raises(TypeError, match=r"weight must be one of float32.* got torch.float64"):
        AdaLomo(models.build(torch.float64))
    with pytest.raises(TypeError, match=r"a parameter must be one of .* got torch.complex64"):
        Lomo([nn.Parameter(torch.zeros(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"empty parameter list"):
        Lomo([])
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = Lomo(embedding)
    with pytest.raises(TypeError, match="grad must be dense"):
        optimizer.backward(embedding(torch.tensor([1])).sum())


@pytest.fixture
def process_group():
    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("norm", [None, 1.0])
def test_ddp_is_refused(process_group, norm):
    """As the model, and when the optimizer has the parameters of a model that is wrapped."""
    model = models.build()
    Lomo(model, lr=LR).backward(models.loss_of(model))  # a process group alone is no reason
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(TypeError, match="DistributedDataParallel cannot release gradients"):
        Lomo(wrapped)
    optimizer = Lomo(wrapped.parameters(), lr=LR, clip_grad_norm=norm)
    before = models.snapshot(model)
    with pytest.raises(RuntimeError, match="DistributedDataParallel cannot release gradients"):
        models.loss_of(wrapped).backward()
    assert models.same(model, before)
    del optimizer


@pytest.mark.filterwarnings("ignore")  # of FSDP1 itself, which torch deprecates
def test_fsdp1_is_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(models.build(), device_id=torch.device("cpu"))
    for given in (model, nn.Sequential(model), model.parameters()):
        with pytest.raises(TypeError, match=r"\(FSDP1\) cannot release gradients in backward"):
            Lomo(given)


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_backend_is_named(backend):
    model = models.build()
    if (reason := ops.unavailable(backend, "cpu")) is not None:
        pytest.skip(reason)
    optimizer = Lomo(model, lr=LR, backend=backend)
    models.with_backward(optimizer, model, 0)
    assert optimizer.backend == backend
    expected = models.build()
    models.with_backward(Lomo(expected, lr=LR, backend="reference"), expected, 0)
    assert models.same(model, models.snapshot(expected))


def test_auto_takes_the_fastest():
    assert Lomo(models.build()).backend == "native"
