"""What is measured: the tensors of known models, a sweep of sizes, a list of many small experts."""

import math
from typing import NamedTuple

import torch

from .strategies import MODELS, layer

LARGE = 180_000_000  # elements from which the targets for large tensors hold


class Case(NamedTuple):
    """Tensors that one call updates. dtype: of the parameters; grad_dtype: of their gradients."""

    name: str
    shapes: tuple
    dtype: torch.dtype = torch.bfloat16
    grad_dtype: torch.dtype = torch.bfloat16

    @property
    def numel(self):
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def sizes(self):
        """Bytes of an element of a parameter and of a gradient."""
        return self.dtype.itemsize, self.grad_dtype.itemsize

    @property
    def dtypes(self):
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.grad_dtype)]
        return names[0] if names[0] == names[1] else f"{names[0]}, gradient {names[1]}"


def of_models():
    """A case for each shape of a tensor in the models, named by the first that has it."""
    found = {}
    for model, shape in MODELS.items():
        vocabulary = (shape.vocabulary, shape.hidden)
        tensors = [("norm", (shape.hidden,)), ("embedding", vocabulary)]
        tensors += [(m.name, (m.rows, m.cols)) for m in layer(shape)]
        for name, size in tensors:
            found.setdefault(size, f"{model} {name} {'x'.join(map(str, size))}")
    return {size: Case(name, (size,)) for size, name in found.items()}


def chosen(largest):
    """-> a square matrix; the large one, or what comes nearest to it; the other cases that fit."""
    known = of_models()
    square, large = known[(4096, 4096)], known[(22016, 8192)]
    fitting = [case for case in known.values() if case.numel <= largest]
    if large not in fitting:
        large = max(fitting, key=lambda case: case.numel)
    return square, large, [case for case in fitting if case not in (square, large)]


def sweep():
    """From 1 KB to 1 GB of parameters."""
    for power in range(10, 31, 2):
        prefix, exponent = " KMG"[power // 10], power % 10
        yield Case(f"sweep {2**exponent} {prefix}iB", ((2 ** (power - 1),),))


def experts(largest):
    """18,000 matrices, which is what 48 layers of 125 experts of 3 have; smaller ones, so that they
    and their gradients have room."""
    side = 128 if largest >= 18_000 * 256 * 128 else 32
    count = min(18_000, max(1, largest // (side * side * 2)))
    return Case(f"{count} experts", ((2 * side, side),) * count)
