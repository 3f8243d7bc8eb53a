"""The gradient of one parameter: a tensor, the factors of one, or both; and the pieces of it.

For `y = x @ W.T` the gradient is `dW = G.T @ X`, with G the gradient of y and X the input, one row
per token. A step needs no more than these factors: the norm comes from them (gram.py), and the
update comes from blocks of dW that are formed one after the other.
Related: Book-Keeping (arXiv 2210.00038); zero-bubble pipelines (arXiv 2401.10241).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..ops import factors as products
from .sharding import local


class Factors(NamedTuple):
    """One product with a weight [rows, cols]: its gradient is left.T @ right."""

    left: torch.Tensor  # [tokens, rows], or [tokens] row numbers of an embedding
    right: torch.Tensor  # [tokens, cols]
    versions: tuple = ()
    copies: Callable | None = None  # () -> copies: the memory of left and right is written again

    @classmethod
    def of(cls, left, right):
        left, right = _kept(left), _kept(right)
        return cls(left, right, (left._version, right._version))

    @property
    def nbytes(self):
        return self.left.nbytes + self.right.nbytes

    @property
    def tokens(self):
        return self.right.shape[0]


def _kept(tensor):
    """The tensor, or a copy where its memory belongs to something else (a NumPy array): a write
    from there changes no version counter."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


class Piece(NamedTuple):
    """Consecutive elements of a parameter with their gradient: what one update works on.

    Of a sharded parameter it is this rank's part, and `first` the number of that part's first
    element in the whole parameter.
    """

    param: torch.Tensor
    grad: torch.Tensor
    rows: slice | None = None  # None: the whole parameter
    first: int = 0

    @property
    def tensor(self):
        """The elements of the parameter."""
        return self.of(local(self.param))

    def of(self, tensor):
        """The same elements of a tensor that has the parameter's shape; None of None."""
        return tensor if self.rows is None or tensor is None else tensor[self.rows]

    @property
    def offset(self):
        """Index of the first element in the parameter."""
        return self.first if self.rows is None else self.rows.start * self.param.shape[1]


class Gradient:
    """The part of one parameter's gradient that a step has: factors, a tensor, or both."""

    def __init__(self, param, dense=None, factors=()):
        self.param, self.dense, self.factors = param, dense, list(factors)

    def add(self, dense):
        """Adds a tensor, in place as autograd does."""
        if self.dense is None:
            self.dense = dense
        elif self.dense.layout is torch.strided and self.dense.dtype is dense.dtype:
            self.dense.add_(dense)
        else:
            self.dense = self.dense + dense

    @property
    def tensors(self):
        dense = [] if self.dense is None else [self.dense]
        return dense + [tensor for f in self.factors for tensor in (f.left, f.right)]

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def device(self):
        return (self.factors[0].right if self.dense is None else self.dense).device

    def check(self):
        """Raises RuntimeError if a factor was written after backward had handed it over."""
        for f in self.factors:
            if (f.left._version, f.right._version) != f.versions:
                raise RuntimeError(
                    "an activation or its gradient was changed in place after backward had used "
                    "it, and before step(): the weight's gradient can no longer be formed; use "
                    "strategy='two_backward'"
                )

    @property
    def pairs(self):
        """The factors as the operations of products take them."""
        return [(f.left, f.right) for f in self.factors]

    @torch.no_grad()
    def whole(self, dtype):
        """The gradient as one tensor; `dtype` is that of a tensor made from factors."""
        if not self.factors:
            return self.dense
        grad = torch.empty(self.param.shape, dtype=dtype, device=self.device)
        if self.dense is None:
            return products.form_(grad, self.pairs)
        for block in self._blocks():
            grad[block.rows] = block.grad
        return grad

    def pieces(self, whole=False):
        """The gradient in pieces, one after the other in one workspace. `whole`: as one piece in
        the parameter's dtype, float32 in place of float16, which may overflow."""
        if not self.factors:
            yield Piece(self.param, self.dense)
        elif whole:
            dtype = self.param.dtype
            dtype = torch.float32 if dtype is torch.float16 else dtype
            yield Piece(self.param, self.whole(dtype))
        else:
            yield from self._blocks()

    def _blocks(self):
        dtype = products.wide(self.factors[0].right.dtype)
        for first, block in products.blocks(self.pairs, 0, self.param.shape[0], dtype):
            rows = slice(first, first + len(block))
            if self.dense is not None:
                block += self.dense[rows]
            yield Piece(self.param, block, rows)
