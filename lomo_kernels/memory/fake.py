"""A training step without memory: the model's own code and the optimizer's, on fake tensors.

Fake tensors have shapes and no data. Operators of torch run on them, and this package's backend for
them (ops/fake.py).
"""

import contextlib
import functools
import warnings
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from ..ops import adalomo as ops_adalomo
from ..ops import factors
from ..ops.adalomo import LAST_STEP
from ..optim import adalomo as optim_adalomo
from ..optim import gram, sharding
from ..optim.gradient import Ends


class _Table:
    """AdaLomo's table of weights, which is there from the first step on."""

    def __init__(self):
        self._table = None

    def weights(self, device, decay_rate):
        if self._table is None:
            self._table = torch.empty(LAST_STEP, device=device)
        return self._table


def _note_unless_fake(note):
    def call(self, numbers, totals, magnitudes):
        if isinstance(totals, FakeTensor):
            return set(numbers)
        return note(self, numbers, totals, magnitudes)

    return call


def _mixes_unless_fake(mixes):
    def call(tensor):
        return tensor.element_size() == 2 if isinstance(tensor, FakeTensor) else mixes(tensor)

    return call


def _converted(module, convert, recurse=True):
    """As `nn.Module._apply`, which exchanges the insides of a parameter: the mode, which refers to
    it, does not allow that. A parameter that two modules share becomes two."""
    for child in module.children():
        _converted(child, convert)
    for name, param in module._parameters.items():
        if param is not None:
            tensor = convert(param.detach())
            module._parameters[name] = torch.nn.Parameter(tensor, param.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else convert(buffer)
    return module


_EXPERTS = 16


def _evenly_if_fake(to_host):
    """Of fake tensors, where the first experts share the tokens evenly: more of them than these
    would take more time, and what waits does not depend on it."""

    def call(ends):
        ends = list(ends)
        for each in ends:
            if isinstance(each.tensor, FakeTensor):
                every = len(each.tensor)
                count = min(every, _EXPERTS)
                each.read = [each.tokens * min(i + 1, count) // count for i in range(every)]
        to_host(ends)

    return staticmethod(call)


def _on_real_tensors(run):
    @functools.wraps(run)
    def call(*args):
        with unset_fake_temporarily():
            return run(*args)

    return call


@contextlib.contextmanager
def fake_step(device="cuda"):
    """FakeTensorMode in which this package's optimizers take their steps.

    `device`: where the step would really run. The tensors claim to be on the CPU, because torch
    without CUDA has no autograd for fake CUDA tensors; the difference that matters is that a GPU
    multiplies 16-bit factors without copies of them in fp32.
    """
    table = _Table()
    patches = [
        # The host would look at a number that there is not.
        (gram.Cancellation, "note", _note_unless_fake(gram.Cancellation.note)),
        (torch.nn.Module, "_apply", _converted),  # by peft, of its own modules
        (Ends, "to_host", _evenly_if_fake(Ends.to_host)),
        # torch computes with tensors where a part begins, and looks at them.
        (sharding, "_offset", _on_real_tensors(sharding._offset)),
        (optim_adalomo, "adalomo_weights", table.weights),
        (ops_adalomo, "adalomo_weights", table.weights),
    ]
    if device == "cuda":
        patches.append((factors, "mixes", _mixes_unless_fake(factors.mixes)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(warnings.catch_warnings())
        # Addresses are compared to tell tensors apart; those of fake ones are 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for where, name, replacement in patches:
            stack.enter_context(mock.patch.object(where, name, replacement))
        yield
