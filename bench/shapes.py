"""What is measured: the tensors of known models, a sweep of sizes, a list of many small experts."""

import math
from typing import NamedTuple

import torch

from .llama import MODELS, layer

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
    def grad_shapes(self):
        return self.shapes

    @property
    def sizes(self):
        """Bytes of an element of a parameter and of a gradient."""
        return self.dtype.itemsize, self.grad_dtype.itemsize

    @property
    def dtypes(self):
        names = [str(d).removeprefix("torch.") for d in (self.dtype, self.grad_dtype)]
        return names[0] if names[0] == names[1] else f"{names[0]}, gradient {names[1]}"


class Products(NamedTuple):
    """Weights whose gradients are products. A set of it holds the weights (`updated`) and, in place
    of gradients, first the left factor of each weight, then the inputs.

    matrices: (rows, columns, number of its input) of each; weights may share an input.
    """

    name: str
    matrices: tuple
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    updated: bool = False

    @property
    def shapes(self):
        return tuple((rows, cols) for rows, cols, _ in self.matrices) if self.updated else ()

    @property
    def grad_shapes(self):
        inputs = {place: cols for _, cols, place in self.matrices}
        widths = [rows for rows, _, _ in self.matrices] + [inputs[k] for k in sorted(inputs)]
        return tuple((self.tokens, width) for width in widths)

    @property
    def grad_dtype(self):
        return self.dtype

    @property
    def numel(self):
        return sum(rows * cols for rows, cols, _ in self.matrices)

    @property
    def factors_nbytes(self):
        return self.dtype.itemsize * sum(map(math.prod, self.grad_shapes))

    @property
    def dtypes(self):
        return str(self.dtype).removeprefix("torch.")

    def pairs(self, each):
        """[(left, right)] of each weight, from a set."""
        lefts, inputs = each.grads[: len(self.matrices)], each.grads[len(self.matrices) :]
        return [(left, inputs[place]) for left, (_, _, place) in zip(lefts, self.matrices)]


def products_of(name, shape, tokens, layers):
    """All matrices of decoder layers with the inputs that they share."""
    matrices, place = [], -1
    for _ in range(layers):
        for m in layer(shape):
            place += not m.shares
            matrices.append((m.rows, m.cols, place))
    return Products(f"{name}, {layers} layers, {tokens} tokens", tuple(matrices), tokens)


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
        large = max((case for case in fitting if case != square), key=lambda case: case.numel)
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
