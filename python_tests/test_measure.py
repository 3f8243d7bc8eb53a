"""What `measure` finds, against counts by hand, torch's MemTracker and the allocators."""

import models
import pytest
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile

from lomo_kernels import Lomo
from lomo_kernels.memory import CATEGORIES, measure

WIDTH = 64


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)


def lomo(**options):
    return lambda model: Lomo(model, lr=0.1, **options)


OPTIMIZERS = {
    "sgd": sgd,
    "momentum": momentum,
    "adamw": adamw,
    "lomo": lomo(),
    "one_backward": lomo(clip_grad_norm=1.0, strategy="one_backward"),
    "two_backward": lomo(clip_grad_norm=1.0, strategy="two_backward"),
    "split": lomo(rounding="split"),
}


def step(model, optimizer, loss_of=models.loss_of, batch=8):
    if isinstance(optimizer, Lomo):
        optimizer.backward(loss_of(model, batch=batch))
    else:
        loss_of(model, batch=batch).backward()
        optimizer.step()
    optimizer.zero_grad()


def measured(model, optimizer, batch=8):
    step(model, optimizer, batch=batch)  # it may make states
    with measure(model, optimizer) as found:
        step(model, optimizer, batch=batch)
    return found


def nbytes(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_categories_that_can_be_counted_by_hand(name, checkpointing):
    model = models.build(width=WIDTH, checkpointing=checkpointing)
    found = measured(model, OPTIMIZERS[name](model))
    parameters = nbytes(model.parameters())
    count = len(list(model.parameters()))
    states = {"sgd": 0, "momentum": parameters, "adamw": 2 * parameters + 4 * count}[name]
    assert found.maxima["parameters"] == found.at_peak["parameters"] == parameters
    assert found.maxima["gradients"] == parameters
    assert found.maxima["states"] == states
    assert found.peak == sum(found.at_peak.values())
    assert all(found.at_peak[c] <= found.maxima[c] for c in CATEGORIES)


def test_gradients_of_lomo_are_one_at_a_time():
    model = models.build(width=WIDTH)
    largest = max(p.nbytes for p in model.parameters())
    assert largest <= measured(model, lomo()(model)).maxima["gradients"] < 2 * largest


def test_what_waits_counts_as_gradients():
    model = models.build(width=WIDTH)
    optimizer = OPTIMIZERS["one_backward"](model)
    found = measured(model, optimizer, batch=1)
    inputs = optimizer.last_waiting_bytes - found.maxima["gradients"]  # forward made them
    assert 0.2 < inputs / optimizer.last_waiting_bytes < 0.5


def test_halves_of_a_split_master_are_states():
    model = models.build(torch.bfloat16, width=WIDTH)
    found = measured(model, OPTIMIZERS["split"](model))
    assert found.maxima["states"] == nbytes(model.parameters())


def test_activations_are_what_forward_keeps():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    batch = torch.randn(32, WIDTH)
    with measure(model) as found:
        model(batch).sum().backward()
    assert found.maxima["activations"] == 2 * batch.nbytes + 4  # of Tanh, of the last, the sum
    assert found.at_peak["other"] >= batch.nbytes


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "non_reentrant"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])  # it stumbles over released ones
def test_totals_are_those_of_mem_tracker(name, checkpointing):
    model = models.build(width=WIDTH, checkpointing=checkpointing)
    optimizer = OPTIMIZERS[name](model)
    step(model, optimizer)
    theirs = MemTracker()
    theirs.track_external(model, optimizer)
    with theirs:
        step(model, optimizer)
    (peak,) = theirs.get_tracker_snapshot("peak").values()
    assert measured(model, optimizer).peak == pytest.approx(peak["Total"], rel=0.002)


ALLOCATOR_TOLERANCE = 0.02


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_peak_is_that_of_the_cpu_allocator(name):
    """torch's profiler is told of every allocation by the allocator itself."""
    model = models.build(width=256)
    optimizer = OPTIMIZERS[name](model)
    found = measured(model, optimizer)
    # acc_events: without it torch 2.11 warns that the events of one cycle are all it has
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        step(model, optimizer)
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    before = found.maxima["parameters"] + found.maxima["states"]
    assert found.peak == pytest.approx(before + peak, rel=ALLOCATOR_TOLERANCE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["sgd", "adamw", "lomo", "one_backward"])
def test_peak_is_that_of_the_cuda_allocator(name):
    model = models.build(torch.bfloat16, width=4096).cuda()
    optimizer = OPTIMIZERS[name](model)

    def loss_of(model, batch):
        logits = model(models.tokens(batch=batch).cuda())
        return logits.float().square().mean()

    for _ in range(2):  # states, and the workspaces that libraries keep
        step(model, optimizer, loss_of)
    with measure(model, optimizer) as found:
        step(model, optimizer, loss_of)
    before = torch.cuda.memory_allocated()
    held = sum(p.nbytes for p in model.parameters()) + found.maxima["states"]
    torch.cuda.reset_peak_memory_stats()
    step(model, optimizer, loss_of)
    peak = torch.cuda.max_memory_allocated() - (before - held)
    assert found.peak == pytest.approx(peak, rel=ALLOCATOR_TOLERANCE)


def test_measuring_leaves_nothing_behind():
    model = models.build()
    optimizer = sgd(model)
    with measure(model, optimizer):
        step(model, optimizer)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("name", ["adamw", "lomo", "one_backward"])
def test_measuring_changes_no_result(name):
    a, b = models.build(), models.build()
    for model, watched in ((a, False), (b, True)):
        optimizer = OPTIMIZERS[name](model)
        for _ in range(2):
            if watched:
                with measure(model, optimizer):
                    step(model, optimizer)
            else:
                step(model, optimizer)
    assert models.same(a, models.snapshot(b))


def test_reports(tmp_path):
    model = models.build()
    optimizer = sgd(model)
    measurement = measure(model, optimizer)
    with pytest.raises(RuntimeError, match="after the `with` block"):
        _ = measurement.peak
    with measurement:
        step(model, optimizer)
    found = measurement.to_dict()
    assert found["peak_bytes"] == sum(found["at_peak_bytes"].values()) == measurement.peak
    assert measurement.place == found["peak_place"]
    assert str(measurement).splitlines()[-1] == f"the peak is in {measurement.place}"
    lines = measurement.timeline()
    assert max(map(sum, zip(*lines.values()))) == measurement.peak
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    measurement.plot(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="cannot write"):
        measurement.plot(tmp_path / "step.nothing")
