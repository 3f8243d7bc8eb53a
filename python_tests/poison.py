"""Memory that nobody wrote reads as NaN, so that a missing write cannot pass by luck."""

import torch


def poisoned(tensor):
    if tensor.dtype.is_floating_point:
        tensor.detach().fill_(float("nan"))  # checkpointing of torch 2.11 makes a leaf
    return tensor


def poison(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        _replace(monkeypatch, owner, name)


def _replace(monkeypatch, owner, name):
    real = getattr(owner, name)

    def empty(*args, **kwargs):
        return poisoned(real(*args, **kwargs))

    monkeypatch.setattr(owner, name, empty)
