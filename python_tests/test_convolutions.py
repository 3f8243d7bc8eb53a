"""Convolutions: factors that are patches of the input, against torch's convolutions and SGD."""

import models
import pytest
import torch
import torch.nn.functional as F
import ways
from torch import nn

from lomo_kernels import Lomo

LR = 0.1
WIDTH = 24  # at a batch of 2 with few positions patches are smaller than gradients


class Layers(nn.Module):
    """Of every kind that keeps factors; positions get fewer on the way."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, WIDTH, 3, stride=3, padding=1)
        self.second = nn.Conv2d(
            WIDTH, WIDTH, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 1)
        )
        self.third = nn.Conv2d(WIDTH, WIDTH, 1, bias=False)
        self.line = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, stride=2, dilation=2)
        self.last = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x = torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x))))))
        return self.last(torch.tanh(self.line(x.flatten(2))).mean(-1))


def build(dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Layers().to(dtype)


def images(step=0, batch=2):
    return torch.randn(batch, 8, 9, 9, generator=torch.Generator().manual_seed(step))


def loss_of(model, step=0, batch=2):
    x = images(step, batch).to(model.last.weight.dtype)
    return model(x).float().square().mean()


@ways.cases()
def test_every_way_to_step(case):
    model, expected = build(), build()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(3):
        case.step(optimizer, loss_of(model, step))
        loss_of(expected, step).backward()
        norm = theirs.step()
        if optimizer.needs_norm and "clip_grad_norm" in case.way.options:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    case.agree(model, expected)


def test_factors_wait():
    model = build()
    optimizer = Lomo(model, LR, strategy="one_backward")
    loss_of(model).backward()
    optimizer.step()
    # Those of `third` would be larger than its gradient.
    assert "4 weights kept factors" in optimizer.explain()
    assert optimizer.last_waiting_bytes < 0.55 * sum(p.nbytes for p in model.parameters())
    model = build()
    optimizer = Lomo([model.first.weight], LR, strategy="one_backward")
    loss = loss_of(model, batch=1)
    ((_, _, nbytes, beside),) = optimizer.would_wait()[1]
    assert beside  # unlike other inputs, patches are kept for this alone
    loss.backward()
    optimizer.step()
    assert nbytes == optimizer.last_waiting_bytes
    assert optimizer.last_waiting_bytes == 3 * 3 * (WIDTH + 8 * 9) * 4  # of 3 x 3 positions


def test_patches_are_not_made_where_they_are_larger_than_the_gradient():
    model = build()
    seen = []

    class Unfolds(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.im2col.default:
                seen.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    optimizer = Lomo(model, LR, strategy="one_backward")
    for batch, count in ((2, 3), (64, 0)):
        seen.clear()
        with Unfolds():
            loss_of(model, batch=batch).backward()
        assert len(seen) == count
        optimizer.step()


def test_autocast():
    model, expected = build(), build()
    optimizer = Lomo(model, LR, strategy="one_backward")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = loss_of(model), loss_of(expected)
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    optimizer.step()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        # torch rounds the gradient to bfloat16 before it is used
        torch.testing.assert_close(p.detach(), q.detach() - LR * q.grad, rtol=0, atol=2e-4)


C = nn.Parameter  # of the weight of each use
USES = {
    "groups": (C(torch.zeros(8, 4, 3)), lambda x, w: F.conv1d(x, w, groups=2)),
    "by name": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x, w, padding="same")),
    "one input": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x[0], w)),
    "twice": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(F.conv1d(x, w), w)),
    "numbers": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x, w, None, 2, 1, 2)),
    "names": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(input=x, weight=w, padding=(1,))),
    "scaled": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x, 2 * w)),
    "plane": (C(torch.zeros(8, 8, 2, 2)), lambda x, w: F.conv2d(x[..., None], w, padding=(0, 1))),
    "nothing": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x[:0], w).sum() + w.sum() + x),
    "no gradient of x": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x.detach(), w) + x.sum()),
    "also a grid": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv1d(x, w) + w[0].sum()),
    "and experts": (C(torch.zeros(8, 8, 4)), lambda x, w: (x[0].T @ w[1]).sum() + F.conv1d(x, w)),
    "transposed": (C(torch.zeros(8, 8, 3)), lambda x, w: F.conv_transpose1d(x, w)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.parametrize("strategy", ["one_backward", "immediate", "two_backward"])
def test_uses(strategy, use):
    weight, run = use
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(weight.shape))
    plain = nn.Parameter(weight.detach().clone())
    x = torch.randn(1, 8, 5, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    clip = 1e9 if strategy == "two_backward" else None
    optimizer = Lomo([weight], LR, clip, strategy=strategy)
    run(theirs, plain).square().sum().backward()
    loss = run(x, weight).square().sum()
    if strategy == "two_backward":
        optimizer.backward(loss)
        norm = plain.grad.double().norm().item()
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    else:
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-5, atol=1e-4)
    want = plain.detach() - LR * plain.grad
    torch.testing.assert_close(weight.detach(), want, rtol=1e-5, atol=1e-5)


def test_second_derivatives():
    model, plain = build(), build()
    optimizer = Lomo(model, LR, strategy="one_backward")
    for m in (model, plain):
        x = images().requires_grad_()
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    optimizer.zero_grad()


def test_micro_batches():
    model, expected = build(), build()
    optimizer = Lomo(model, LR, strategy="one_backward")
    sgd = torch.optim.SGD(expected.parameters(), LR)
    for step in range(6):
        loss_of(model, step).backward()
        loss_of(expected, step).backward()
    optimizer.step()
    sgd.step()
    assert models.difference(model, expected) < 1e-6
    assert optimizer.last_waiting_bytes <= sum(p.nbytes for p in model.parameters())
