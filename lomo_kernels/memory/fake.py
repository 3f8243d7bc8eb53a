"""A training step without memory: the model's own code and the optimizer's, on fake tensors.

Fake tensors have shapes and no data. Operators of torch run on them; in place of this package's
kernels only what they allocate is.
"""

import contextlib
import functools
import warnings
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from .. import ops
from ..ops import factors
from ..ops.adalomo import LAST_STEP, Tiles
from ..optim import adalomo, gram, sharding


def _nothing(*args, **kwargs):
    pass


def _sums(param, out=None, backend="auto"):
    return torch.empty(Tiles.of(param.shape).count) if out is None else out


class _AdaLomo:
    """Of AdaLomo: the table of weights, which is there from the first step on, and scratch."""

    def __init__(self):
        self._table = None

    def weights(self, device, decay_rate):
        if self._table is None:
            self._table = torch.empty(LAST_STEP)
        return self._table

    def update_(self, params, *args, **kwargs):
        try:
            from ..ops.native import adalomo_scratch
        except ImportError:  # nothing was built
            return
        _, shared, own = adalomo_scratch([Tiles.of(param.shape) for param in params])
        self._table.new_empty(shared + own)


_KERNELS = {
    "lomo_update_": _nothing,
    "grad_sumsq_": _nothing,
    "decide_": _nothing,
    "adalomo_sums_": _sums,
}


def _unless_fake(run, instead):
    def call(first, *args, **kwargs):
        tensor = first if isinstance(first, torch.Tensor) else next(iter(first), None)
        return (instead if isinstance(tensor, FakeTensor) else run)(first, *args, **kwargs)

    return call


def _note_unless_fake(note):
    def call(self, param_id, total, magnitude):
        return isinstance(total, FakeTensor) or note(self, param_id, total, magnitude)

    return call


def _mixes_unless_fake(mixes):
    def call(tensor):
        return tensor.element_size() == 2 if isinstance(tensor, FakeTensor) else mixes(tensor)

    return call


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
    patches = [
        (ops, name, _unless_fake(getattr(ops, name), instead)) for name, instead in _KERNELS.items()
    ]
    # The host would look at a number that there is not.
    patches.append((gram.Cancellation, "note", _note_unless_fake(gram.Cancellation.note)))
    # torch computes with tensors where a part begins, and looks at them.
    patches.append((sharding, "_offset", _on_real_tensors(sharding._offset)))
    table = _AdaLomo()
    patches.append((adalomo, "adalomo_weights", table.weights))
    patches.append((ops, "adalomo_update_", _unless_fake(ops.adalomo_update_, table.update_)))
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
