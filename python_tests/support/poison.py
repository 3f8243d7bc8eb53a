"""Memory that nobody wrote reads as NaN, so that a missing write cannot pass by luck."""

import torch
from torch.utils._device import _device_constructors


def poisoned(tensor):
    if tensor.dtype.is_floating_point:
        tensor.detach().fill_(float("nan"))  # checkpointing of torch 2.11 makes a leaf
    return tensor


def poison(monkeypatch):
    # `with torch.device("meta")` notes at its first use which functions it is for, and these have
    # to be torch's own: otherwise models that should take no memory take all of it.
    _device_constructors()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        _replace(monkeypatch, owner, name)


def _replace(monkeypatch, owner, name):
    real = getattr(owner, name)

    def empty(*args, **kwargs):
        return poisoned(real(*args, **kwargs))

    monkeypatch.setattr(owner, name, empty)
