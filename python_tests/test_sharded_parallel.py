"""Lomo under tensor parallelism, alone and together with fully_shard, and sequence parallelism."""

import pytest
import ranks
import shards
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shards import LR, VOCABULARY, WIDTH, batch, check_close, check_moved, whole
from test_sharded import F32, FEW, HOW, ROUNDINGS, local, torch_s
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lomo_kernels import Lomo

pytestmark = pytest.mark.slow

SOME = (*FEW, "tensor norm")


class Mlp(nn.Module):
    """A residual block on which tensor parallelism is usual."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 32), nn.Linear(WIDTH, 32, bias=False)
        self.down = nn.Linear(32, WIDTH)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.tanh(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """`plain` parameters, which the plan does not name, are the same on all ranks."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Mlp() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        x = x.full_tensor() if isinstance(x, DTensor) else x
        logits = self.head(x)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, ids[:, 1:].flatten())


def transformer(dtype=F32):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return Transformer().to(dtype)


def parallel(model, grid, sequence=False):
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        plan = {
            "": PrepareModuleInput(
                input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=False
            ),
            "norm": SequenceParallel(),
            "gate": ColwiseParallel(input_layouts=Shard(1)),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
    for block in model.blocks:
        parallelize_module(block, grid, plan)
    return model


def check_is_sgd_in_parallel(model, how, data_ranks=1, data_rank=0, one_message=True):
    """`data_ranks` batches a step, of which this rank has one."""
    twin = transformer()
    sgd = torch.optim.SGD(twin.parameters(), lr=LR)
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    for step in range(3):
        for rank in range(data_ranks):
            (twin(batch(step, rank)) / data_ranks).backward()
        norm = shards.clip(twin.parameters(), **torch_s(HOW[how]))
        sgd.step()
        sgd.zero_grad()
        with ranks.Messages() as messages:
            optimizer.backward(model(batch(step, data_rank)))
        if "clip_grad_norm" in HOW[how]:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
            ranks.agree(optimizer.last_grad_norm)
        if one_message and how != "tensor norm":
            assert len(messages.ours) == 1, messages.ours
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin), 1e-7)
    check_copies(model)


def check_copies(model):
    """What several ranks have is the same on all of them."""
    for name, p in model.named_parameters():
        if not isinstance(p, DTensor) or all(each.is_replicate() for each in p.placements):
            ranks.agree((name, shards.bits(local(p).detach()).double().square().sum().item()))


@ranks.on(2, 4)
@pytest.mark.parametrize("how", SOME)
def test_tensor_parallel(world, how):
    model = parallel(transformer(), ranks.mesh(world))
    assert {type(p).__name__ for p in model.parameters()} == {"DTensor", "Parameter"}
    check_is_sgd_in_parallel(model, how)


@ranks.on(4)
@pytest.mark.parametrize("how", HOW)
def test_tensor_parallel_under_the_engine(world, how):
    grid = ranks.mesh(2, 2)
    model = parallel(transformer(), grid["shard"])
    for block in model.blocks:
        fully_shard(block, mesh=grid["replicate"])
    fully_shard(model, mesh=grid["replicate"])
    check_is_sgd_in_parallel(model, how, 2, dist.get_rank() // 2)


@ranks.on(2)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_tensor_parallel_in_every_rounding(world, rounding):
    """Copies get the same bits, and sharded rows are those that their numbers draw."""
    dtype, options = ROUNDINGS[rounding]
    model = parallel(transformer(dtype), ranks.mesh(world))
    optimizer, start = Lomo(model, lr=1.0, **options), whole(model)
    for step in range(2):
        optimizer.backward(model(batch(step)))
    check_moved(start, whole(model))
    check_copies(model)


@ranks.on(2, 4)
@pytest.mark.parametrize("how", SOME)
def test_sequence_parallel(world, how):
    """Gradients of the norms arrive as sums that the ranks have not added up yet."""
    model = parallel(transformer(), ranks.mesh(world), sequence=True)
    check_is_sgd_in_parallel(model, how, one_message=False)
