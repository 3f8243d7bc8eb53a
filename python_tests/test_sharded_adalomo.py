"""AdaLomo on sharded parameters: several ranks against one process."""

import pytest
import ranks
import shards
import torch
import torch.distributed as dist
from drivers import by_backward
from shards import batch, check_close, check_moved, whole
from test_sharded import (
    BF16,
    DRIVERS,
    F32,
    GLOBAL,
    GLOBAL_STRATEGIES,
    STRATEGIES,
    local,
)

from lomo_kernels import AdaLomo, LossScale

pytestmark = pytest.mark.slow

ADA_LR = 1e-2
ADAPTIVE = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "value": {"clip_grad_value": 1e-3},
    "tensor norm": {"clip_grad_norm": 0.05, "norm": "tensor"},
    "held without a clip": {"strategy": "one_backward"},
    "loss scale": {"loss_scale": LossScale(1024.0, growth_interval=2)},
    **{name: {**GLOBAL, **STRATEGIES[name]} for name in GLOBAL_STRATEGIES},
}


def check_adaptive(options, dtype=F32, drive=by_backward, model=None, steps=4):
    """One process and several ranks, the same batch."""
    options = {"loss_scale": None, **options}
    one, many = shards.build(dtype, **(model or {})), shards.sharded(dtype, **(model or {}))
    start = whole(one)
    first, second = AdaLomo(one, lr=ADA_LR, **options), AdaLomo(many, lr=ADA_LR, **options)
    for step in range(steps):
        drive(first, one(batch(step)))
        drive(second, many(batch(step)))
        if first.last_grad_norm is not None:
            assert second.last_grad_norm == pytest.approx(first.last_grad_norm, rel=1e-5)
            ranks.agree(second.last_grad_norm)
    check_moved(start, whole(many))
    check_columns(first, second, one, many)
    return whole(one), whole(many)


def check_columns(first, second, one, many):
    """The state that every rank has whole is the same on all of them, and that of one process."""
    columns = 0
    for p, q in zip(one.parameters(), many.parameters(), strict=True):
        if p.ndim == 2:
            want, got = first.state[p]["exp_avg_sq_col"], local(second.state[q]["exp_avg_sq_col"])
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
            ranks.agree(shards.bits(got).tolist())
            columns += 1
    assert columns


@ranks.on(2)
@pytest.mark.parametrize("how", ADAPTIVE)
def test_adalomo_is_one_process(world, how):
    want, got = check_adaptive(ADAPTIVE[how])
    check_close(got, want, 1e-6)


@ranks.on(4)
@pytest.mark.parametrize("how", ["plain", "tensor norm", "one_backward", "two_backward"])
def test_adalomo_is_one_process_of_four(world, how):
    want, got = check_adaptive(ADAPTIVE[how])
    check_close(got, want, 1e-6)


@ranks.on(2)
@pytest.mark.parametrize("drive", DRIVERS[1:])
@pytest.mark.parametrize("how", ["plain", "auto", "one_backward"])
def test_adalomo_by_other_drivers(world, how, drive):
    want, got = check_adaptive(ADAPTIVE[how], drive=drive)
    check_close(got, want, 1e-6)


@ranks.on(2)
@pytest.mark.parametrize("model", [{"tied": True}, {"checkpointing": "non-reentrant"}], ids=str)
@pytest.mark.parametrize("how", ["plain", "auto"])
def test_adalomo_of_other_models(world, how, model):
    want, got = check_adaptive(ADAPTIVE[how], model=model)
    check_close(got, want, 1e-6)


@ranks.on(2)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
@pytest.mark.parametrize("how", ["plain", "one_backward"])
def test_adalomo_in_bf16(world, how, rounding):
    """A sum whose last bit differs rounds a few elements the other way."""
    want, got = check_adaptive({**ADAPTIVE[how], "rounding": rounding}, dtype=BF16, steps=1)
    for name, p in want.items():
        far = (got[name].double() - p.double()).abs() > 2.0**-8 * p.double().abs() + 1e-6
        assert not far.any(), name
        assert (got[name] != p).sum() <= 1 + p.numel() // 100, name


@ranks.on(2)
def test_adalomo_of_batches_of_their_own(world):
    """The mean over the ranks is one gradient, as for one process that accumulates."""
    one, many = shards.build(), shards.sharded()
    start = whole(one)
    first, second = (AdaLomo(m, lr=ADA_LR, loss_scale=None) for m in (one, many))
    for step in range(3):
        with first.accumulate():
            for rank in range(world):
                (one(batch(step, rank)) / world).backward()
        first.step()
        second.backward(many(batch(step, dist.get_rank())))
    check_moved(start, whole(many))
    check_close(whole(many), whole(one), 1e-6)


@ranks.on(4)
@pytest.mark.parametrize("how", ["plain", "one_backward", "two_backward"])
def test_adalomo_on_copies_of_shards(world, how):
    """HSDP: what two ranks have counts once."""
    one, many = shards.build(), shards.sharded(mesh=(2, 2))
    start = whole(one)
    first, second = (AdaLomo(m, lr=ADA_LR, loss_scale=None, **ADAPTIVE[how]) for m in (one, many))
    for step in range(3):
        first.backward(one(batch(step)))
        second.backward(many(batch(step)))
    check_moved(start, whole(many))
    check_columns(first, second, one, many)
    check_close(whole(many), whole(one), 1e-6)


@ranks.on(2, 4)
@pytest.mark.parametrize("how", ["one_backward", "held without a clip"])
def test_adalomo_needs_two_messages_where_gradients_wait(world, how):
    """And one for the norm that decides."""
    model = shards.sharded()
    optimizer = AdaLomo(model, lr=ADA_LR, loss_scale=None, **ADAPTIVE[how])
    for step in range(2):
        with ranks.Messages() as messages:
            optimizer.backward(model(batch(step, dist.get_rank())))
        assert len(messages.ours) == 3, messages.ours
