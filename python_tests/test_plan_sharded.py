"""Plans of sharded and offloaded steps, against steps of two ranks and sizes counted by hand."""

import time
from collections import Counter
from dataclasses import replace

import models
import pytest
import ranks
import torch
import torch.distributed as dist
from test_plan import LLAMA, agree
from torch.distributed.fsdp import FSDPModule

from lomo_kernels.memory.predict import Job, model_of, predict, record, sharded_as
from lomo_kernels.memory.sharded import fake_devices
from lomo_kernels.memory.timeline import summarise, whole

pytestmark = pytest.mark.slow

WORLD = 2
CLIPPED = {"clip_grad_norm": 1.0}
OPTIONS = {
    "adalomo": CLIPPED,
    "unclipped": {"clip_grad_norm": None},
    "auto": CLIPPED,
    "one_backward": {**CLIPPED, "strategy": "one_backward"},
    "two_backward": {**CLIPPED, "strategy": "two_backward"},
    "partial": {**CLIPPED, "strategy": "partial"},
    "split": {**CLIPPED, "rounding": "split"},
}


def as_job(optimizer="lomo", **more):
    options = tuple(more.pop("options", {}).items())
    fields = {"dtype": "bfloat16", "batch": 2, "sequence": 24, "device": "cpu", "shards": WORLD}
    return Job(optimizer, **{**fields, **more}, options=options)


def measured_on(world, config, job):
    model = sharded_as(job, model_of(config, job), ranks.mesh(world))
    with pytest.MonkeyPatch.context() as patch:
        for name in MESSAGES:
            if hasattr(dist, name):
                patch.setattr(dist, name, and_let_go(getattr(dist, name)))
        return step_of(model, job)


def step_of(model, job):
    return whole(summarise(record(model, job)).values())


# What FSDP2 and the optimizer call, with the names of torch 2.13 and those before.
MESSAGES = (
    "all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor"
)  # fmt: skip


def and_let_go(send):
    """A thread of gloo's lets a message's tensors go some time after the message has come."""

    def call(*args, **kwargs):
        result = send(*args, **kwargs)
        time.sleep(0.002)
        return result

    return call


def measured(config, job):
    first, *_ = ranks.run(WORLD, measured_on, config=config, job=job)
    return first


@ranks.needed
@pytest.mark.parametrize(
    ("units", "checkpointing"), [("layer", None), ("fine", None), ("fine", "non_reentrant")]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_need_what_is_planned(name, checkpointing, units):
    optimizer = "adalomo" if name == "adalomo" else "lomo"
    job = as_job(optimizer, options=OPTIONS[name], checkpointing=checkpointing, units=units)
    agree(predict(LLAMA, job), measured(LLAMA, job))


# -- host memory -----------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["one device", "two devices"])
def world(request):
    return request.param


def part_of(model, world):
    """Bytes of a rank's part of each parameter, by name: rows are padded to equal parts."""
    return {
        name: -(-param.shape[0] // world) * param[0].numel() * param.element_size()
        for name, param in model.named_parameters()
    }


def largest_unit(parts):
    """A layer, or what is outside of them."""
    sums = Counter()
    for name, size in parts.items():
        sums[next((part for part in name.split(".") if part.isdigit()), "")] += size
    return max(sums.values())


NEITHER_HOLDS = ("unclipped", "two_backward")


@pytest.mark.parametrize("units", ["layer", "fine"])
@pytest.mark.parametrize("name", NEITHER_HOLDS)
def test_a_plan_with_offload_has_parameters_and_one_unit_on_the_host(world, name, units):
    job = as_job(options=OPTIONS[name], units=units, shards=world, device="cuda")
    planned = predict(LLAMA, replace(job, offload="cpu"))
    parts = part_of(model_of(LLAMA, job), world)
    host = planned.host
    assert host.maxima["parameters"] == sum(parts.values())
    assert 0 < host.maxima["gradients"] <= largest_unit(parts)
    assert host.peak.total <= sum(parts.values()) + largest_unit(parts) + SMALL
    assert host.maxima["states"] == host.maxima["activations"] == 0
    for category in ("parameters", "gradients", "states"):
        assert planned.maxima[category] == 0
    here = predict(LLAMA, job)
    assert planned.maxima["activations"] == here.maxima["activations"]
    if world > 1:  # else nothing is sharded without offload
        # Beside the units, the parts on their way from the host.
        more = planned.maxima["other"] - here.maxima["other"]
        assert -SMALL <= more <= largest_unit(parts)


def test_what_comes_from_the_host_is_no_activation():
    job = as_job(options=OPTIONS["unclipped"], units="fine", shards=1, batch=1, sequence=4)
    offloaded = predict(LLAMA, replace(job, offload="cpu"))
    assert offloaded.maxima["activations"] == predict(LLAMA, job).maxima["activations"]


SMALL = 8192  # bytes of scalars, flags and messages


def test_states_and_gradients_that_wait_are_on_the_host():
    job = as_job(options=OPTIONS["split"], shards=1, offload="cpu")
    host = predict(LLAMA, job).host
    assert host.maxima["states"] == host.maxima["parameters"]
    job = as_job(options=OPTIONS["one_backward"], shards=1, offload="cpu")
    host = predict(LLAMA, job).host
    assert host.maxima["gradients"] == host.maxima["parameters"]


@pytest.mark.parametrize("name", NEITHER_HOLDS)
def test_an_offloaded_step_holds_parameters_and_one_unit(world, name):
    """On CPUs, where the device's memory is the host's, by what is the optimizer's and the model's:
    their parts of parameters, of gradients and of states."""
    job = as_job(options=OPTIONS[name], shards=world, offload="cpu")
    if world > 1 and not ranks.available:
        pytest.skip("this build of torch has no gloo")
    if world > 1:
        found = measured(LLAMA, job)
    else:
        with fake_devices(1) as mesh:  # one device sends no messages
            found = step_of(sharded_as(job, model_of(LLAMA, job), mesh), job)
    parts = part_of(model_of(LLAMA, job), world)
    assert found.maxima["parameters"] == sum(parts.values())
    assert 0 < found.maxima["gradients"] <= largest_unit(parts)
    assert found.maxima["states"] == 0


def test_an_offloaded_step_is_the_step_of_one_device():
    options = {**OPTIONS["two_backward"], "lr": 1.0}
    job = as_job(options=options, dtype="float32", shards=1, offload="cpu")
    torch.manual_seed(1)
    plain = model_of(LLAMA, job)
    before = models.snapshot(plain)
    step_of(plain, job)
    torch.manual_seed(1)
    with fake_devices(1) as mesh:
        sharded = sharded_as(job, model_of(LLAMA, job), mesh)
        step_of(sharded, job)
        parts = {name: param.to_local() for name, param in sharded.named_parameters()}
    assert all(map(torch.equal, plain.parameters(), parts.values()))
    for (name, part), start in zip(parts.items(), before):
        # Where all tokens are alike it hardly matters which one is attended to.
        needed = part.ndim > 1 and ".q_proj" not in name and ".k_proj" not in name
        assert not needed or not torch.equal(part, start), name


def test_what_waits_is_within_the_budget_and_a_unit():
    """A vector's gradient is a view of its unit's buffer, and would keep it."""
    budget = 60_000
    options = {**OPTIONS["partial"], "factor_budget": budget}
    job = as_job(options=options)
    parts = part_of(model_of(LLAMA, job), WORLD)
    with fake_devices(WORLD) as mesh:
        found = step_of(sharded_as(job, model_of(LLAMA, job), mesh), job)
    assert found.maxima["gradients"] <= budget + 2 * largest_unit(parts)
    assert found.maxima["gradients"] < sum(parts.values()) / 2


def test_fine_units_gather_nothing_ahead():
    job = as_job(options=OPTIONS["unclipped"], units="fine")
    with fake_devices(WORLD) as mesh:
        model = sharded_as(job, model_of(LLAMA, job), mesh)
        ours = step_of(model, job)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_modules_to_backward_prefetch([])  # what FSDP2 does by itself
        ahead = step_of(model, job)
    smaller = min(size for name, size in units_of(model).items() if "layers" in name)
    assert ours.maxima["other"] + smaller <= ahead.maxima["other"]


def units_of(model):
    """Name -> bytes of the whole parameters of each module that is a unit."""
    return {
        name: sum(param.nbytes for param in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule)
    }
