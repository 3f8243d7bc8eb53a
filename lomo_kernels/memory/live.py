"""Bytes of every storage alive: the truth about a peak, on any device, also on meta."""

import functools
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations take or return, while it is entered.

    `now` and `peak` are in bytes. Workspaces inside an operation, an allocator's rounding and
    what no operation touched are not seen. torch keeps one Python object for a storage's life, so
    a weak reference to it tells when the memory is given back.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def add(self, tensor):
        """Counts the storage of a tensor from here on, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self.now += size
            self._alive[key] = weakref.ref(storage, functools.partial(self._freed, key, size))

    def _freed(self, key, size, reference):
        self.now -= size
        del self._alive[key]
