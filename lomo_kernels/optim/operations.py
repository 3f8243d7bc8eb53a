"""The table of watched operations.

A row names the function, where its weight is among the arguments, and what runs in its place when
the weight is watched: for the parameter itself (`whole`), for the matrix of one expert of it
(`expert`), and for the matrices of all experts, transposed (`transposed`). None: the operation runs
as always, and the weight is known to be used elsewhere too.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import convolutions, experts, products


class Operation(NamedTuple):
    place: int  # of the weight among the arguments
    name: str  # of that argument
    whole: Callable | None = None  # (watch, *arguments of the operation)
    expert: Callable | None = None
    transposed: Callable | None = None
    is_compiled: bool = False  # `whole` knows torch.compile (compiled.py)

    def weight(self, args, kwargs):
        return args[self.place] if len(args) > self.place else kwargs.get(self.name)


def _grouped(run, name):
    return Operation(1, name, experts.grouped(run, False), transposed=experts.grouped(run, True))


_MATMUL = Operation(1, "other", expert=experts.matmul)
OPERATIONS = {
    F.linear: Operation(1, "weight", products.linear, expert=experts.linear, is_compiled=True),
    torch.addmm: Operation(2, "mat2", products.addmm, is_compiled=True),  # Conv1D of GPT-2
    F.embedding: Operation(1, "weight", products.embedding, is_compiled=True),
    F.conv1d: Operation(1, "weight", convolutions.convolution(1)),
    F.conv2d: Operation(1, "weight", convolutions.convolution(2)),
    torch.matmul: _MATMUL,
    torch.Tensor.matmul: _MATMUL,
    torch.Tensor.__matmul__: _MATMUL,
}
if experts.GROUPED_MM is not None:
    OPERATIONS[experts.GROUPED_MM] = _grouped(experts.GROUPED_MM, "mat2")
# Operators that other libraries define when they are imported.
_GROUPED = {"transformers.grouped_mm_fallback": "weight"}


def operation_of(function):
    """The row of a function, or None."""
    found = OPERATIONS.get(function)
    is_operator = found is None and isinstance(function, torch._ops.OpOverloadPacket)
    if is_operator and (name := _GROUPED.get(str(function))) is not None:
        found = OPERATIONS[function] = _grouped(function, name)
    return found
