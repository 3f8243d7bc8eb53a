"""A training step without memory: the model's own code and the optimizer's, on fake tensors.

Fake tensors have shapes and no data. Operators of torch run on them; what the kernels of this
package would do is left out, because they allocate next to nothing.
"""

import contextlib
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .. import ops
from ..optim import linear

_KERNELS = ("lomo_update_", "grad_sumsq_", "decide_")


def _unless_fake(run):
    def call(first, *args, **kwargs):
        tensor = first if isinstance(first, torch.Tensor) else next(iter(first), None)
        if not isinstance(tensor, FakeTensor):
            return run(first, *args, **kwargs)

    return call


def _note_unless_fake(note):
    def call(self, param_id, total, magnitude):
        return isinstance(total, FakeTensor) or note(self, param_id, total, magnitude)

    return call


def _mixes_unless_fake(mixes):
    def call(tensor):
        return tensor.element_size() == 2 if isinstance(tensor, FakeTensor) else mixes(tensor)

    return call


@contextlib.contextmanager
def fake_step(device="cuda"):
    """FakeTensorMode in which this package's optimizers take their steps.

    `device`: where the step would really run. The tensors claim to be on the CPU, because torch
    without CUDA has no autograd for fake CUDA tensors; the difference that matters is that a GPU
    multiplies 16-bit factors without copies of them in fp32.
    """
    patches = [(ops, name, _unless_fake(getattr(ops, name))) for name in _KERNELS]
    # The host would look at a number that there is not.
    patches.append((linear.Cancellation, "note", _note_unless_fake(linear.Cancellation.note)))
    if device == "cuda":
        patches.append((linear, "_mixes", _mixes_unless_fake(linear._mixes)))
    before = [(where, name, getattr(where, name)) for where, name, _ in patches]
    with FakeTensorMode(), warnings.catch_warnings():
        # Addresses are compared to tell tensors apart; those of fake ones are 0.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for where, name, replacement in patches:
            setattr(where, name, replacement)
        try:
            yield
        finally:
            for where, name, original in before:
                setattr(where, name, original)
