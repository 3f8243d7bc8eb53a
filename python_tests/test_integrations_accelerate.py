"""accelerate's loops, as its documentation writes them."""

import models
import pytest
import torch

from lomo_kernels import Lomo
from lomo_kernels.integrations import unwrap

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

# What accelerate itself warns of is not ours to fail on.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LR = 0.1


@pytest.fixture(autouse=True)
def no_state_of_other_tests():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def fit(model, optimizer, backward, max_norm=None, batches=7, **options):
    """`max_norm`: what the loop itself clips by."""
    accelerator = accelerate.Accelerator(cpu=True, **options)
    loader = torch.utils.data.DataLoader(models.tokens(batch=4 * batches), batch_size=4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    prepared = accelerator.prepare(model, optimizer, loader, schedule)
    model, optimizer, loader, schedule = prepared
    for ids in loader:
        with accelerator.accumulate(model):
            logits = model(ids)[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            backward(accelerator, optimizer, loss)
            if max_norm is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def with_accelerator(accelerator, optimizer, loss):
    accelerator.backward(loss)


def with_scaled_loss(accelerator, optimizer, loss):
    accelerator.backward(unwrap(optimizer).scale(loss))


def with_accumulate(accelerator, optimizer, loss):
    with unwrap(optimizer).accumulate():
        accelerator.backward(loss)


def with_backward(accelerator, optimizer, loss):
    unwrap(optimizer).backward(loss)


@pytest.mark.parametrize(
    ("backward", "accumulation", "norm"),
    [
        (with_accelerator, 1, None),
        (with_accelerator, 1, 0.5),
        (with_accelerator, 3, 0.5),
        (with_accumulate, 3, None),
        (with_backward, 1, 0.5),
    ],
)
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_equals_sgd_in_the_same_loop(backward, accumulation, norm, precision):
    """Seven batches: the last step of three has one alone."""
    ours, theirs = models.build(tied=True), models.build(tied=True)
    options = {"gradient_accumulation_steps": accumulation, "mixed_precision": precision}
    optimizer = Lomo(ours, lr=LR, clip_grad_norm=norm)
    fit(ours, optimizer, backward, **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    fit(theirs, sgd, with_accelerator, norm, **options)
    # under autocast torch rounds weight gradients to bfloat16, and ours stay float32
    assert models.difference(ours, theirs) < (1e-6 if precision == "no" else 1e-3)
    assert models.difference(ours, models.build(tied=True)) > 5e-3
    steps = -(-7 // accumulation)
    assert optimizer.param_groups[0]["step"] == steps
    assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"] == LR / (1 + steps)


def test_a_float16_model_whose_loss_is_scaled():
    ours, unscaled = models.build(torch.float16), models.build(torch.float16)
    theirs = models.build(torch.float16).float()  # the same weights
    faint = 1e-6  # most gradients are less than float16's smallest number

    def backward(accelerator, optimizer, loss):
        with_scaled_loss(accelerator, optimizer, loss * faint)

    def plain(accelerator, optimizer, loss):
        accelerator.backward(loss * faint)

    optimizer = Lomo(ours, lr=LR / faint)
    fit(ours, optimizer, backward)
    fit(theirs, torch.optim.SGD(theirs.parameters(), lr=LR / faint), plain)
    fit(unscaled, Lomo(unscaled, lr=LR / faint, loss_scale=None), plain)
    assert optimizer.loss_scale == 65536.0
    assert models.difference(ours, theirs) < 2e-3
    assert models.difference(unscaled, theirs) > 1e-2
