"""Checkpoints of sharded training go on with the same bits, on any number of ranks."""

import pytest
import ranks
import shards
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shards import LR, batch, check_close, check_moved, check_same, check_still, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from lomo_kernels import AdaLomo, Lomo, LossScale

pytestmark = pytest.mark.slow

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLIP = {"clip_grad_norm": 0.5}
SCALE = LossScale(1024.0, growth_interval=4)
JOBS = {
    "Lomo": (Lomo, F32, {}),
    "Lomo, stochastic": (Lomo, BF16, {}),
    "Lomo, split": (Lomo, BF16, {"rounding": "split", "weight_decay": 0.1}),
    "Lomo, loss scale": (Lomo, F32, {"loss_scale": SCALE}),
    "Lomo, fp16": (Lomo, F16, {}),
    "AdaLomo": (AdaLomo, F32, {"loss_scale": None}),
    "AdaLomo, split": (AdaLomo, BF16, {"loss_scale": None, "rounding": "split"}),
    "AdaLomo, loss scale": (AdaLomo, F32, {"loss_scale": SCALE}),
}
STATELESS = ("Lomo", "Lomo, stochastic", "Lomo, loss scale", "Lomo, fp16")
EXACT = [name for name, (cls, *_) in JOBS.items() if cls is Lomo]  # on any number of ranks


def start(job, **options):
    cls, dtype, own = JOBS[job]
    model = shards.sharded(dtype)
    return model, cls(model, LR if cls is Lomo else 1e-2, **own, **options)


def train(model, optimizer, steps, alike=True):
    for step in steps:
        optimizer.backward(model(batch(step, 0 if alike else dist.get_rank())))


def counters(optimizer):
    """What a step goes on from, beside tensors."""
    not_ours = ("params", "differentiable")  # which torch adds when it loads
    groups = [
        {k: list(v) if isinstance(v, tuple) else v for k, v in g.items() if k not in not_ours}
        for g in optimizer.param_groups
    ]
    return groups, optimizer.loss_scale


def states(optimizer):
    """This rank's part of the state of every parameter, copied."""
    found = {}
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state.get(p, {}).items():  # which makes nothing
            if isinstance(value, torch.Tensor):
                value = value.to_local() if isinstance(value, DTensor) else value
                found[f"{index}.{name}"] = value.clone()
    return found


# -- from one number of ranks to another -----------------------------------------------------------


def save(world, folder, job, options):
    """Three steps, a checkpoint, two more."""
    model, optimizer = start(job, **options)
    before = whole(model)
    train(model, optimizer, range(3))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/saved")
    train(model, optimizer, range(3, 5))
    after = whole(model)
    check_moved(before, after)
    if dist.get_rank() == 0:
        torch.save((after, counters(optimizer)), f"{folder}/end.pt")


def load(folder, job, options):
    model, optimizer = start(job, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().fill_(torch.nan)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/saved")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return model, optimizer


def resume(world, folder, job, options, exact):
    model, optimizer = load(folder, job, options)
    assert optimizer.param_groups[0]["step"] == 3
    before = whole(model)
    train(model, optimizer, range(3, 5))
    end, counted = torch.load(f"{folder}/end.pt", weights_only=False)
    after = whole(model)
    check_moved(before, after)
    assert counters(optimizer) == counted, (counters(optimizer), counted)
    if exact:
        check_same(after, end)
    else:
        check_close(after, end, 1e-6)


WAYS = [
    *[(job, 2, 4) for job in JOBS if job != "AdaLomo, split"],
    # its sums have another last bit on four ranks, by which bf16 weights round
    ("AdaLomo, split", 2, 2),
    *[(job, 2, 2) for job in ("Lomo", "AdaLomo", "AdaLomo, loss scale")],
    *[(job, 4, 2) for job in ("Lomo, split", "Lomo, loss scale", "AdaLomo")],
]


@ranks.needed
@pytest.mark.parametrize(("job", "of", "to"), WAYS)
def test_training_goes_on_with_the_same_bits(tmp_path, job, of, to):
    """The batch is the same on every rank, so that their number changes nothing."""
    arguments = {"folder": str(tmp_path), "job": job, "options": {}}
    ranks.run(of, save, **arguments)
    ranks.run(to, resume, **arguments, exact=job in EXACT or of == to)


@ranks.needed
@pytest.mark.parametrize("strategy", ["one_backward", "two_backward"])
def test_training_with_a_global_norm_goes_on(tmp_path, strategy):
    options = {**CLIP, "strategy": strategy}
    arguments = {"folder": str(tmp_path), "job": "Lomo, loss scale", "options": options}
    ranks.run(2, save, **arguments)
    ranks.run(2, resume, **arguments, exact=True)


@ranks.needed
def test_the_low_halves_are_those_that_were_saved(tmp_path):
    """Loaded on another number of ranks, and put together again."""
    arguments = {"folder": str(tmp_path), "job": "Lomo, split", "options": {}}
    ranks.run(2, save, **arguments)
    (two, *_), (four, *_) = ranks.run(2, lows, **arguments), ranks.run(4, lows, **arguments)
    assert two.keys() == four.keys()
    assert two
    for name, low in two.items():
        assert torch.equal(low, four[name]), name
        assert low.count_nonzero() > low.numel() / 2, name


def lows(world, folder, job, options):
    model, optimizer = load(folder, job, options)
    found = {}
    for name, p in model.named_parameters():
        low = optimizer.state[p]["low"]
        low = low.to_local() if isinstance(low, DTensor) else low
        assert low.dtype is torch.int16
        assert low.shape == p.to_local().shape
        wide = DTensor.from_local(
            low.int(), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
        )
        found[name] = wide.full_tensor()
    return found


# -- what is in it ---------------------------------------------------------------------------------


@ranks.on(2)
@pytest.mark.parametrize("job", JOBS)
def test_saving_changes_nothing(world, job):
    model, optimizer = start(job)
    twin, other = start(job)
    for step in range(4):
        before, state, counted = whole(model), states(optimizer), counters(optimizer)
        get_optimizer_state_dict(model, optimizer)
        get_state_dict(model, optimizer)
        check_still(before, whole(model))
        assert counters(optimizer) == counted, (counters(optimizer), counted)
        after = states(optimizer)
        assert all(torch.equal(after[name], state[name]) for name in state)
        train(model, optimizer, [step], alike=False)
        train(twin, other, [step], alike=False)
    assert optimizer.param_groups[0]["step"] == 4
    check_moved(before, whole(model))
    check_same(whole(model), whole(twin))


@ranks.on(2)
@pytest.mark.parametrize(
    ("job", "how"),
    [
        *[(job, "sharded") for job in JOBS],
        # torch wants a tensor in the state here, as of SGD, to know the device by
        *[(job, "full") for job in JOBS if job not in STATELESS],
        *[(job, "flat") for job in ("Lomo, split", "Lomo, loss scale", "AdaLomo")],
    ],
)
def test_every_form_of_the_state_dict_goes_into_a_new_optimizer(world, how, job):
    options = {
        "sharded": StateDictOptions(),
        "full": StateDictOptions(full_state_dict=True, broadcast_from_rank0=False),
        "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    }[how]
    model, optimizer = start(job)
    train(model, optimizer, range(3), alike=False)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    twin, other = start(job)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, other, state, options=options)
    assert counters(other) == counters(optimizer), (counters(other), counters(optimizer))
    before, got, want = whole(model), states(other), states(optimizer)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    train(model, optimizer, range(3, 5), alike=False)
    train(twin, other, range(3, 5), alike=False)
    check_moved(before, whole(model))
    check_same(whole(twin), whole(model))


@ranks.on(2)
@pytest.mark.parametrize("job", ["Lomo, split", "AdaLomo", "AdaLomo, split"])
def test_state_is_placed_as_the_parameters_are(world, job):
    """So that a checkpoint holds every element once."""
    model, optimizer = start(job)
    train(model, optimizer, range(1))
    params = list(model.parameters())
    seen = set()
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if name == "step":
                continue
            seen.add(name)
            assert value.dtype is not torch.int16, name  # which no collective knows
            if name == "exp_avg_sq_col" and params[index].ndim == 2:  # of all rows, on every rank
                assert value.shape == params[index].shape[1:]
                assert not isinstance(value, DTensor) or value.placements[0].is_replicate()
            else:
                assert value.placements == params[index].placements, name
    assert (
        seen
        == {
            "Lomo, split": {"low"},
            "AdaLomo": {"exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
            "AdaLomo, split": {"low", "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"},
        }[job]
    )


@ranks.on(2)
@pytest.mark.parametrize("job", ["Lomo, loss scale", "AdaLomo, loss scale", "Lomo, fp16"])
def test_the_loss_scale_and_its_count_are_kept(world, job):
    """Four good steps make it grow: two before the checkpoint, and two after it."""
    options = {"loss_scale": LossScale(1024.0, growth_interval=4)} if job == "Lomo, fp16" else {}
    cls, dtype, own = JOBS[job]
    model, twin = shards.sharded(dtype), shards.sharded(dtype)
    optimizer, other = (cls(m, 1e-3, **{**own, **options}) for m in (model, twin))
    train(model, optimizer, range(2))
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    twin.load_state_dict(model.state_dict())
    assert other.loss_scale == 1024.0
    train(twin, other, range(2, 3))
    assert other.loss_scale == 1024.0
    train(twin, other, range(3, 4))
    assert other.loss_scale == 2048.0
    ranks.agree(other.loss_scale)


@ranks.on(2)
def test_plain_state_dicts_of_the_optimizer_load_on_the_same_ranks(world):
    """Without torch.distributed.checkpoint: each rank's own, as torch.save would write it."""
    for job in JOBS:
        model, optimizer = start(job)
        train(model, optimizer, range(2), alike=False)
        twin, other = start(job)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(optimizer.state_dict())
        assert counters(other) == counters(optimizer), (counters(other), counters(optimizer))
        before = whole(model)
        train(model, optimizer, range(2, 4), alike=False)
        train(twin, other, range(2, 4), alike=False)
        check_moved(before, whole(model))
        check_same(whole(twin), whole(model))
