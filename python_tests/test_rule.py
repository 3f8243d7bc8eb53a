"""A new rule is one method: momentum, whose state is cut like its parameter, in every strategy."""

import models
import pytest
import torch
from torch import nn

from lomo_kernels.ops import factors
from lomo_kernels.optim.optimizer import FusedOptimizer

LR, BETA, CLIP = 0.05, 0.9, 0.05


class Momentum(FusedOptimizer):
    """m = beta * m + g; p = p - lr * m, with m in fp32 in the state."""

    def __init__(self, params, lr=LR, beta=BETA, whole=False, **options):
        self.whole_gradients = whole
        defaults = {
            "lr": lr, "beta": beta, "weight_decay": 0.0, "clip_grad_value": None,
            "rounding": "nearest", "seed": 0,
        }  # fmt: skip
        options = {"clip_grad_norm": None, "norm": "global", "strategy": "auto"} | options
        super().__init__(
            params, defaults, factor_budget=options.pop("factor_budget", None), loss_scale=None,
            loss_scale_args=None, backend="auto", **options,
        )  # fmt: skip

    @torch.no_grad()
    def update(self, pieces, group, numbers, scalars):
        for piece in pieces:
            state = self.state[piece.param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(piece.param, dtype=torch.float32)
            grad = piece.grad.float()
            if scalars["clip_coef"] is not None:
                grad = grad * scalars["clip_coef"]
            momentum = piece.of(state["momentum"]).mul_(group["beta"]).add_(grad)
            piece.of(piece.param).sub_(group["lr"] * momentum)


WAYS = {
    "free": {},
    "immediate": {"strategy": "immediate"},
    "own norms": {"clip_grad_norm": CLIP, "norm": "tensor"},
    "one_backward": {"clip_grad_norm": CLIP, "strategy": "one_backward"},
    "two_backward": {"clip_grad_norm": CLIP, "strategy": "two_backward"},
    "partial": {"clip_grad_norm": CLIP, "strategy": "partial", "factor_budget": 4000},
    "whole gradients": {"clip_grad_norm": CLIP, "strategy": "one_backward", "whole": True},
}


def clip(params, options):
    if options.get("norm") == "tensor":
        for p in params:
            nn.utils.clip_grad_norm_(p, CLIP)
    elif "clip_grad_norm" in options:
        nn.utils.clip_grad_norm_(params, CLIP)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_momentum_is_the_plain_loop(options, monkeypatch):
    monkeypatch.setattr(factors, "BLOCK", 5 * 32)  # pieces of five rows
    model, expected = models.build(width=32), models.build(width=32)
    optimizer = Momentum(model, **options)
    sgd = torch.optim.SGD(expected.parameters(), lr=LR, momentum=BETA)
    for step in range(4):
        optimizer.backward(models.loss_of(model, step, batch=1))
        models.loss_of(expected, step, batch=1).backward()
        clip(list(expected.parameters()), options)
        sgd.step()
        sgd.zero_grad()
        assert optimizer.is_clean
    assert models.difference(model, expected) < 1e-6
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        wanted = sgd.state[q]["momentum_buffer"]
        torch.testing.assert_close(optimizer.state[p]["momentum"], wanted, rtol=1e-4, atol=1e-6)
