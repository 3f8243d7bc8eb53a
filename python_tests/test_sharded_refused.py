"""What cannot be sharded training is refused in one sentence with the way out, before any write."""

import gc
import weakref

import models
import pytest
import ranks
import shards
import torch
import torch.distributed as dist
from drivers import by_backward, by_fused_backward, by_loop
from shards import CLIP, LR, batch, check_close, check_moved, check_still, whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lomo_kernels import AdaLomo, Lomo

pytestmark = pytest.mark.slow

KINDS = pytest.mark.parametrize("kind", [Lomo, AdaLomo])
OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_grad_norm": CLIP},
        {"clip_grad_norm": CLIP, "strategy": "two_backward"},
        {"clip_grad_norm": 0.1, "norm": "tensor"},
    ],
    ids=["plain", "auto", "two_backward", "tensor norm"],
)


# -- the optimizer came first ----------------------------------------------------------------------


@ranks.on(2)
@OPTIONS
@KINDS
def test_an_optimizer_made_before_the_model_was_sharded(world, kind, options):
    check_made_before(kind, options, by_backward)


@ranks.on(2)
@pytest.mark.parametrize("drive", [by_fused_backward, by_loop])
@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": CLIP}], ids=["plain", "auto"])
def test_other_drivers_of_an_optimizer_made_before(world, options, drive):
    check_made_before(Lomo, options, drive)


def check_made_before(kind, options, drive):
    model = shards.build()
    optimizer = kind(model, LR, loss_scale=None, **options)
    shards.shard(model)
    start = whole(model)
    loss = model(batch(0, dist.get_rank()))
    with pytest.raises(RuntimeError, match="make the optimizer after"):
        drive(optimizer, loss)
    check_still(start, whole(model))


@ranks.on(2)
def test_an_optimizer_made_before_from_a_list_of_parameters(world):
    """The module is not known; the loop finds no gradient."""
    model = shards.build()
    optimizer = Lomo(model.parameters(), lr=LR)
    shards.shard(model)
    start = whole(model)
    with pytest.raises(RuntimeError, match="depends on none of the optimizer's parameters"):
        optimizer.backward(model(batch(0, dist.get_rank())))
    check_still(start, whole(model))


@ranks.on(2)
def test_a_new_optimizer_made_afterwards_trains(world):
    want, _ = shards.in_one_process(world, 1, {})
    model = shards.build()
    early = Lomo(model, lr=LR)
    shards.shard(model)
    start = whole(model)
    optimizer = Lomo(model, lr=LR)
    optimizer.backward(model(batch(0, dist.get_rank())))
    check_moved(start, whole(model))
    check_close(whole(model), want, 1e-7)
    assert all(type(p) is not DTensor for group in early.param_groups for p in group["params"])


# -- other engines ---------------------------------------------------------------------------------


@ranks.on(2)
@KINDS
def test_distributed_data_parallel_names_the_way_out(world, kind):
    model = models.build()
    start = models.snapshot(model)
    wrapped = DistributedDataParallel(model)
    with pytest.raises(TypeError, match=r"DistributedDataParallel .*fully_shard"):
        kind(wrapped, LR)
    optimizer = kind(model, LR, loss_scale=None)
    logits = wrapped(models.tokens())
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel .*fully_shard"):
        optimizer.backward(logits.float().square().mean())
    assert models.same(model, start)


@ranks.on(2)
@KINDS
def test_fsdp1_names_the_way_out(world, kind):
    wrapped = FullyShardedDataParallel(models.build(), device_id=torch.device("cpu"))
    start = models.snapshot(wrapped)
    with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
        kind(wrapped, LR)
    with pytest.raises(TypeError, match=r"FSDP1.*fully_shard"):
        kind(wrapped.parameters(), LR)
    assert models.same(wrapped, start)


@KINDS
def test_deepspeed_s_parameters_name_the_way_out(kind):
    """ZeRO-3 marks its parameters by an id, and leaves nothing of them in their place."""
    model = models.build()
    model.head.weight.ds_id = 7
    start = models.snapshot(model)
    for given in (model, model.parameters()):
        with pytest.raises(TypeError, match=r"DeepSpeed.*fully_shard"):
            kind(given, LR)
    assert models.same(model, start)


# -- parameters that the engine does not know ------------------------------------------------------


def with_ignored():
    model = shards.build()
    ignored = {model.score.weight, model.score.bias}
    for block in model.blocks:
        fully_shard(block, mesh=ranks.mesh(dist.get_world_size()))
    return fully_shard(model, mesh=ranks.mesh(dist.get_world_size()), ignored_params=ignored)


@ranks.on(2)
@KINDS
def test_trainable_parameters_that_the_engine_ignores(world, kind):
    """Nobody reduces their gradients, so that they would become others on every rank."""
    model = with_ignored()
    start = whole(model)
    with pytest.raises((TypeError, RuntimeError, ValueError), match=r"score\.weight") as refused:
        kind(model, LR)
    assert "freeze it" in str(refused.value)
    check_still(start, whole(model))


@ranks.on(2)
def test_ignored_parameters_may_be_frozen(world):
    model = with_ignored()
    model.score.requires_grad_(False)
    start = whole(model)
    optimizer = Lomo(model, lr=LR, clip_grad_norm=CLIP)
    twin = shards.build()
    twin.score.requires_grad_(False)
    twin = shards.InOneProcess(twin, world, clip_grad_norm=CLIP)
    optimizer.backward(model(batch(0, dist.get_rank())))
    twin.step(0)
    check_moved(start, whole(model), but=["score.weight", "score.bias"])
    check_close(whole(model), whole(twin.model), 1e-7)


@ranks.on(2)
def test_ranks_with_other_parameters(world):
    model = shards.sharded()
    params = list(model.parameters())
    if dist.get_rank() == 1:
        params.pop()
    with pytest.raises(ValueError, match="the same parameters on every rank"):
        Lomo(params, lr=LR)


# -- placements ------------------------------------------------------------------------------------


@ranks.on(2)
@KINDS
@pytest.mark.parametrize("operation", ["sum", "max"])
def test_a_parameter_that_is_a_sum_of_ranks(world, kind, operation):
    part = nn.Parameter(
        DTensor.from_local(torch.ones(4, 4), ranks.mesh(world), [Partial(operation)])
    )
    with pytest.raises(TypeError, match="redistribute it to Shard or Replicate"):
        kind([part], LR)
    assert torch.equal(part.to_local(), torch.ones(4, 4))


@ranks.on(2)
@OPTIONS
def test_a_gradient_that_is_no_sum_of_ranks(world, options):
    """Of an operation over ranks that no redistribution turns into this rank's part."""
    grid = ranks.mesh(world)
    layer = nn.Linear(4, 4, bias=False)
    parallelize_module(layer, grid, ColwiseParallel())
    start = whole(layer)
    optimizer = Lomo(layer, lr=LR, **options)
    wrong = DTensor.from_local(torch.ones(4, 4), grid, [Partial("max")])
    with optimizer.accumulate():
        layer.weight.grad = wrong
    with pytest.raises(TypeError, match=r"weight.*redistribute it to Shard or Replicate"):
        optimizer.step()
    check_still(start, whole(layer))


@ranks.on(2)
@pytest.mark.parametrize("engine", ["fully_shard", "tensor parallel"])
def test_adalomo_needs_whole_rows(world, engine):
    model = shards.build()
    if engine == "fully_shard":
        shards.shard(
            model, shard_placement_fn=lambda p: Shard(1 if tuple(p.shape) == (30, 16) else 0)
        )
    else:
        parallelize_module(model.blocks[0], ranks.mesh(world), {"down": RowwiseParallel()})
    start = whole(model)
    with pytest.raises(TypeError, match=r"blocks\.0\..*rows.*Lomo") as refused:
        AdaLomo(model, LR)
    assert "\n" not in str(refused.value)
    check_still(start, whole(model))
    Lomo(model, LR)


# -- offload and older versions --------------------------------------------------------------------


def offloaded():
    return shards.sharded(engine={"offload_policy": CPUOffloadPolicy(pin_memory=False)})


@ranks.on(2)
def test_offload_with_an_older_torch(world):
    """Before 2.13 a hook gets gradients that are still on their way to the host."""
    model = offloaded()
    start = whole(model)
    grid = model.head.weight.device_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.12.1"))
        Lomo(model, lr=LR)  # from the CPU to the CPU nothing is on its way
        patch.setattr(grid, "_device_type", "cuda")
        with pytest.raises(RuntimeError, match=r"2\.13"):
            Lomo(model, lr=LR)
    check_still(start, whole(model))


# -- accelerate ------------------------------------------------------------------------------------


def accelerator():
    """accelerate shards on accelerators alone: on the CPU it is told that it does."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
        state._reset_state()
    accelerate.state.GradientState._reset_state()
    plugin = accelerate.utils.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )
    made = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    made.state.distributed_type = accelerate.utils.DistributedType.FSDP
    made.state.fsdp_plugin = plugin
    assert made.is_fsdp2
    return made


@ranks.on(2)
@pytest.mark.parametrize("kind", ["Lomo", "AdaLomo"])
@OPTIONS
def test_accelerate_prepares_model_and_optimizer(world, kind, options):
    """It replaces the parameters in the groups; hooks and names follow them."""
    model = shards.build()
    kind = {"Lomo": Lomo, "AdaLomo": AdaLomo}[kind]
    inner = kind(model, LR, loss_scale=None, **options)
    made = accelerator()
    start = whole(model)
    whole_ones = [weakref.ref(p) for p in model.parameters()]
    model, optimizer = made.prepare(model, inner)
    twin = shards.build()
    reference = kind(twin, LR, loss_scale=None, **options)
    for step in range(2):
        loss = model(batch(step, dist.get_rank()))
        inner.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert all(ref() is None for ref in whole_ones)  # the parts are all that is left
        with reference.accumulate():
            for rank in range(world):
                (twin(batch(step, rank)) / world).backward()
        reference.step()
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin), 1e-7 if kind is Lomo else 1e-6)


@ranks.on(2)
@pytest.mark.parametrize("drive", [by_backward, by_loop])
def test_accelerate_given_the_model_alone(world, drive):
    """Its own refusal, or, where it has none, ours."""
    model = shards.build()
    optimizer = Lomo(model, lr=LR)
    start = whole(model)
    made = accelerator()
    with pytest.raises(  # noqa: PT012
        (ValueError, RuntimeError),
        match=r"optimizer must be passed together|make the optimizer after",
    ):
        model = made.prepare(model)
        drive(optimizer, model(batch(0, dist.get_rank())))
    check_still(start, whole(model))
