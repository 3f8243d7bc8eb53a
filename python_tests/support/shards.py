"""A model whose parts are uneven, and on four ranks partly empty, and the same training in one
process in torch's own parts."""

import functools
import math

import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH = 41, 16
LR = 0.1
CLIP = 0.5  # below every norm that the model's gradients have here


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 30), nn.Linear(30, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Of `score` and the experts two ranks have two rows and one; of four the last has nothing."""

    def __init__(self, depth=2, tied=False, checkpointing=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 4)
        self.gain = nn.Parameter(torch.ones(1))
        self.score = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.checkpointing = checkpointing

    def forward(self, ids):
        """The loss."""
        x = self.embedding(ids)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        x = x + torch.einsum("bti,eio->bto", torch.tanh(x), self.experts) * self.gain
        logits, score = self.head(x)[:, :-1].float(), self.score(x).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return loss + F.cross_entropy(score.flatten(0, 1), ids.flatten() % 3)


def build(dtype=torch.float32, **options):
    """The same model, to the bit, for the same options."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net(**options).to(dtype)


def shard(model, *shape, **options):
    """Every block is a unit, and the rest one. `shape`: of the mesh, without it all ranks."""
    grid = ranks.mesh(*(shape or (torch.distributed.get_world_size(),)))
    for block in model.blocks:
        fully_shard(block, mesh=grid, **options)
    return fully_shard(model, mesh=grid, **options)


def sharded(dtype=torch.float32, mesh=(), engine=None, **options):
    return shard(build(dtype, **options), *mesh, **(engine or {}))


def batch(step, rank=0):
    """Every token occurs in it, so that every row of the embedding moves."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    more = torch.randint(0, VOCABULARY, (55,), generator=generator)
    ids = torch.cat([torch.arange(VOCABULARY), more])
    return ids[torch.randperm(96, generator=generator)].view(4, 24)


# -- comparisons -----------------------------------------------------------------------------------


@torch.no_grad()
def whole(model):
    """Name -> the whole parameter, copied."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def check_moved(before, after, but=()):
    still = [n for n in before if torch.equal(bits(before[n]), bits(after[n]))]
    assert sorted(still) == sorted(but), f"did not move: {still}; expected: {list(but)}"


def check_still(before, after):
    check_moved(before, after, but=list(before))


def check_same(got, want):
    other = [n for n in want if not torch.equal(bits(got[n]), bits(want[n]))]
    assert not other, f"other bits: {other}, by {difference(got, want)}"


def difference(got, want):
    return max(float((got[n].double() - want[n].double()).abs().max()) for n in want)


def check_close(got, want, atol):
    """Up to `atol` and a last bit of fp32."""
    assert got.keys() == want.keys()
    far = {}
    for name, value in want.items():
        distance = (got[name].double() - value.double()).abs()
        if not (distance <= atol + 2.0**-23 * value.double().abs()).all():
            far[name] = float(distance.max())
    assert not far, f"farther than {atol}: {far}"


# -- the same in one process -----------------------------------------------------------------------


def clip(params, clip_grad_norm=None, norm="global", clip_grad_value=None, **others):
    """torch's clipping in the order of the formula; -> the total norm before it."""
    params = [p for p in params if p.grad is not None]
    together = [[p] for p in params] if norm == "tensor" else [params]
    norms = [nn.utils.get_total_norm([p.grad for p in each]) for each in together]
    if clip_grad_value is not None:
        nn.utils.clip_grad_value_(params, clip_grad_value)
    for each, own in zip(together, norms):
        nn.utils.clip_grads_with_norm_(each, clip_grad_norm or math.inf, own)
    return torch.stack(norms).norm().item()


class InOneProcess:
    """torch's SGD after torch's clipping, of the mean over the ranks' batches."""

    def __init__(self, model, world, **options):
        self.model, self.world, self.options = model, world, options
        self.params = list(model.parameters())
        self.sgd = torch.optim.SGD(self.params, lr=LR)

    def step(self, *steps):
        """One step of the mean over these batches of every rank; -> the total norm."""
        for step in steps:
            for rank in range(self.world):
                (self.model(batch(step, rank)) / (self.world * len(steps))).backward()
        norm = clip(self.params, **self.options)
        with torch.no_grad():  # torch's SGD has coupled decay
            for p in self.params:
                if p.grad is not None:
                    p.mul_(1 - LR * self.options.get("weight_decay", 0.0))
        self.sgd.step()
        self.sgd.zero_grad()
        return norm


@functools.lru_cache(maxsize=8)
def _in_one_process(world, steps, model, options):
    twin = InOneProcess(build(**dict(model)), world, **dict(options))
    norms = [twin.step(step) for step in range(steps)]
    return whole(twin.model), norms


def in_one_process(world, steps, options, **model):
    """Weights after these steps, and the norms."""
    return _in_one_process(world, steps, tuple(model.items()), tuple(options.items()))
