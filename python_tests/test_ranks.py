"""The processes that run the tests of several ranks: what fails there fails here."""

import os
import time

import pytest
import ranks
import torch
import torch.distributed as dist


def whoami(world):
    return os.getpid(), dist.get_rank(), dist.get_world_size()


def one_fails(world):
    if dist.get_rank() == 1:
        raise ArithmeticError("of rank one")
    dist.barrier()  # for ever


def one_ends(world):
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def one_aborts(world):
    if dist.get_rank() == 1:
        os.abort()


def all_wait(world):
    time.sleep(60)


def one_warns(world):
    if dist.get_rank() == 0:
        torch.arange(3).float().requires_grad_().sum().backward(create_graph=True)


@ranks.needed
def test_processes_stay_alive_and_are_as_many_as_asked_for():
    first, again = ranks.run(2, whoami), ranks.run(2, whoami)
    assert first == again
    assert len({pid for pid, *_ in first}) == 2
    assert [each[1:] for each in first] == [(0, 2), (1, 2)]


@ranks.needed
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (one_fails, r"rank 1 of 2:[^$]*ArithmeticError: of rank one"),
        (one_ends, r"rank [01] of 2:"),
        (one_aborts, r"rank 1 of 2:\nits process has ended, exit code -6"),
        (all_wait, r"ranks \[0, 1\] did not end within"),
        (one_warns, r"rank 0 of 2:[^$]*UserWarning"),
    ],
    ids=["one fails", "one ends", "one aborts", "all wait", "one warns"],
)
def test_a_failure_is_told_and_the_next_test_has_other_processes(monkeypatch, function, told):
    before = ranks.run(2, whoami)
    with monkeypatch.context() as patched:
        patched.setattr(ranks, "LIMIT", 2 if function is all_wait else 60)
        patched.setattr(ranks, "GRACE", 0.5)
        with pytest.raises(pytest.fail.Exception, match=told):
            ranks.run(2, function)
    after = ranks.run(2, whoami)
    assert not {pid for pid, *_ in before} & {pid for pid, *_ in after}


@ranks.on(2)
@pytest.mark.parametrize("value", [0.1, 3])
def test_the_body_of_a_test_runs_on_every_rank(world, value):
    ranks.agree((world, value))
    assert dist.get_world_size() == world
    with pytest.raises(AssertionError):
        ranks.agree(dist.get_rank())
    assert torch.empty(3).isnan().all()  # memory is poisoned here too


@ranks.on(2)
def test_messages_of_others_are_told_from_ours(world):
    with ranks.Messages() as messages:
        dist.all_reduce(torch.ones(3))
        dist.all_gather_object([None] * world, "text")
    assert messages.ours == []
    assert len(messages.others) == 3
