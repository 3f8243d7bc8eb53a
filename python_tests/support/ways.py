"""Every way of a gradient through the optimizers, and the same step in torch's own parts."""

import math
from typing import NamedTuple

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lomo_kernels import AdaLomo, Lomo

CLIP = 0.2


class Way(NamedTuple):
    """`waits`: after a bare loss.backward() gradients wait for step(). `announced`: such a backward
    cannot be used at all, unless it is under accumulate()."""

    name: str
    options: dict
    waits: bool = False
    announced: bool = False


CLIPPED = {"clip_grad_norm": CLIP}
WAYS = [
    Way("free", {}),
    Way("immediate", {"strategy": "immediate"}),
    Way("tensor", {**CLIPPED, "norm": "tensor"}),
    # A bare backward above the budget is warned of, see test_never_silent.py.
    Way("auto", {**CLIPPED, "factor_budget": 2**30}, waits=True),
    Way("one_backward", {**CLIPPED, "strategy": "one_backward"}, waits=True),
    Way("one_backward unclipped", {"strategy": "one_backward"}, waits=True),
    Way("two_backward", {**CLIPPED, "strategy": "two_backward"}, announced=True),
    Way("partial", {**CLIPPED, "strategy": "partial", "factor_budget": 12_500}, announced=True),
]


class Case(NamedTuple):
    """An optimizer, and how it is told to treat gradients."""

    kind: type
    way: Way

    def __str__(self):
        return f"{self.kind.__name__} {self.way.name}"

    @property
    def lr(self):
        return 0.3 if self.kind is Lomo else 0.02

    def make(self, params, **options):
        return self.kind(params, lr=self.lr, **self.way.options, **options)

    def in_torch(self, params, **options):
        return InTorch(self.kind, params, self.lr, {**self.way.options, **options})

    def step(self, optimizer, loss):
        """One whole step, announced or by a torch loop."""
        if self.way.announced:
            optimizer.backward(loss)
        else:
            optimizer.scale(loss).backward()
            optimizer.step()

    def gather(self, optimizer, loss):
        """A backward after which gradients are still there for who looks."""
        if self.way.waits:
            loss.backward()
        else:
            with optimizer.accumulate():
                loss.backward()

    def agree(self, model, expected):
        # As in test_lomo.py and test_adalomo.py.
        assert models.difference(model, expected) < (1e-6 if self.kind is Lomo else 2e-5)


class InTorch:
    """torch.optim.SGD or transformers' Adafactor after torch's clipping, in the formula's order."""

    def __init__(self, kind, params, lr, options):
        self.params = list(params.parameters() if isinstance(params, nn.Module) else params)
        self.options = options
        if kind is Lomo:
            self.optimizer = torch.optim.SGD(self.params, lr=lr)
        else:
            transformers = pytest.importorskip(
                "transformers", reason="transformers is not installed"
            )
            self.optimizer = transformers.Adafactor(self.params, lr=lr, relative_step=False)

    def clip(self):
        """-> the total norm before clipping"""
        params = [p for p in self.params if p.grad is not None]
        clip = self.options.get("clip_grad_norm", math.inf)
        together = [[p] for p in params] if self.options.get("norm") == "tensor" else [params]
        norms = [nn.utils.get_total_norm([p.grad for p in each]) for each in together]
        if "clip_grad_value" in self.options:
            nn.utils.clip_grad_value_(params, self.options["clip_grad_value"])
        for each, norm in zip(together, norms):
            nn.utils.clip_grads_with_norm_(each, clip, norm)
        return torch.stack(norms).norm().item() if norms else 0.0

    def step(self):
        norm = self.clip()
        with torch.no_grad():  # torch's SGD has coupled decay
            for p in self.params:
                if p.grad is not None:
                    lr = self.optimizer.param_groups[0]["lr"]
                    p.mul_(1 - lr * self.options.get("weight_decay", 0.0))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def cases(*names, kinds=(Lomo, AdaLomo), where=lambda way: True):
    """The cases of these ways (without names: of all), as a parametrization."""
    chosen = [
        Case(kind, way)
        for kind in kinds
        for way in WAYS
        if (not names or way.name in names) and where(way)
        if kind is Lomo or way.name != "immediate"
    ]
    return pytest.mark.parametrize("case", chosen, ids=str)


def waiting(way):
    return way.waits


def at_once(way):
    """A bare backward uses its gradients."""
    return not way.waits and not way.announced


# -- a model of everything -------------------------------------------------------------------------


class Everything(nn.Module):
    """A parameter of every kind: tied, frozen, of every rank, empty, used twice, without gradient.

    Widths at which factors are smaller than gradients for 24 tokens.
    """

    def __init__(self, width=64, checkpointing=None):
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.twice = nn.Linear(width, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.experts = nn.Parameter(torch.randn(2, width, width) * 0.1)
        self.convolution = nn.Conv1d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.tensor(0.7))
        self.one = nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.zeros(0, width))
        self.spare = nn.Parameter(torch.ones(3, 3))
        self.head = nn.Linear(width, models.VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.checkpointing = checkpointing

    def middle(self, x):
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        x = self.twice(torch.tanh(self.twice(x))) + self.frozen(x) * self.gate
        x = x + torch.einsum("bti,eio->bto", torch.tanh(x), self.experts) * self.one
        return x + self.convolution(x.mT).mT + self.empty.sum()

    def forward(self, ids):
        x = self.embedding(ids)
        if self.checkpointing is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.checkpointing == "reentrant")
        return 0.1 * self.head(F.layer_norm(x, x.shape[-1:]))


def everything(dtype=torch.float32, **options):
    """The same model, to the bit, for the same options."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Everything(**options).to(dtype)
