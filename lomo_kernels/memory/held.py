"""Bytes of gradients and of optimizer states, counted on the tensors themselves."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from ..optim import sharding
from ..optim.watching import observes, unwatched


class HeldBytes:
    """Counts the bytes of parameter gradients alive, and their peak; of sharded ones this rank's.

    A gradient counts from the moment backward has put it into `param.grad` until its tensor is
    freed. Make it before the optimizer: hooks run in the order in which they were made.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.alive = self.peak = 0
        self._counted = set()
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._appeared)
            for param in params
            if param.requires_grad
        ]

    @observes
    @unwatched
    def _appeared(self, param):
        grad = sharding.local(param.grad)
        if grad is None:  # torch also calls when nothing flowed into the parameter
            return
        key = id(grad)
        if key in self._counted:  # a later micro-batch was added to it
            return
        size = grad.nelement() * grad.element_size()
        self._counted.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(grad, self._freed, key, size).atexit = False

    def _freed(self, key, size):
        self._counted.discard(key)
        self.alive -= size

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in `optimizer.state`; of sharded ones this rank's."""
    return sum(
        sharding.local(value).nelement() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
