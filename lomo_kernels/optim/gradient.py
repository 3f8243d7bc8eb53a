"""The gradient of one parameter: a tensor, the factors of one, or both; and the pieces of it.

For `y = x @ W.T` the gradient is `dW = G.T @ X`, with G the gradient of y and X the input, one row
per token. A step needs no more than these factors: the norm comes from them (gram.py), and the
update comes from blocks of dW that are formed one after the other.

Note [Experts]
A weight [experts, rows, cols] is a matrix [experts * rows, cols] whose gradient has a product of
its own for the rows of each expert: G and X of the tokens that the expert was given. Products of
different experts have no rows in common, so their squared norms add up. A convolution's weight
[out, in, ...] is a matrix as well, [out, in * ...]; its X are the patches of the input.
Related: Book-Keeping (arXiv 2210.00038); zero-bubble pipelines (arXiv 2401.10241).
"""

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops import factors as products
from .sharding import local


class Ends:
    """Where the tokens of each expert end among all; the host reads that once."""

    def __init__(self, tensor, tokens):
        self.tensor = _kept(tensor)  # [experts], on the device
        self.tokens = tokens
        self.read = None

    @property
    def spans(self):
        """(first token, the one behind the last) of each expert."""
        self.to_host([self])
        return itertools.pairwise([0, *self.read])

    @staticmethod
    def to_host(ends):
        """Reads those of which that was not done, in one copy from each device."""
        devices = defaultdict(list)
        for each in ends:
            if each.read is None:
                devices[each.tensor.device].append(each)
        for group in devices.values():
            host = torch.cat([each.tensor.long() for each in group]).tolist()
            for each in group:
                each.read, host = host[: len(each.tensor)], host[len(each.tensor) :]


class Factors(NamedTuple):
    """One product with a weight [rows, cols]: its gradient is left.T @ right."""

    left: torch.Tensor  # [tokens, rows], or [tokens] row numbers of an embedding
    right: torch.Tensor  # [tokens, cols]
    experts: int | Ends | None = None  # of a weight with experts: the one; which tokens are whose
    versions: tuple = ()
    copies: Callable | None = None  # () -> copies: the memory of left and right is written again

    @classmethod
    def of(cls, left, right, experts=None):
        factors = cls(_kept(left), _kept(right), experts)
        return factors._replace(versions=factors.current_versions)

    @property
    def tensors(self):
        ends = [self.experts.tensor] if isinstance(self.experts, Ends) else []
        return [self.left, self.right, *ends]

    @property
    def current_versions(self):
        return tuple(tensor._version for tensor in self.tensors)

    @property
    def is_part(self):
        """Whether other products bring the rest of the gradient: those of other experts."""
        return isinstance(self.experts, int)

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors)


def _kept(tensor):
    """The tensor, or a copy where its memory belongs to something else (a NumPy array): a write
    from there changes no version counter."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


class Piece(NamedTuple):
    """Consecutive elements of a parameter with their gradient: what one update works on.

    Of a sharded parameter it is this rank's part, and `first` the number of that part's first
    element in the whole parameter. `update_product` gets `pairs` in place of `grad`.
    """

    param: torch.Tensor
    grad: Any  # a tensor; None for `update_product`
    rows: slice | None = None  # of the parameter as a matrix [., cols]; None: the whole parameter
    cols: int = 0
    first: int = 0
    pairs: tuple = ()

    @property
    def tensor(self):
        """The elements of the parameter."""
        return self.of(local(self.param))

    def of(self, tensor):
        """The same elements of a tensor that has the parameter's shape; None of None."""
        if self.rows is None or tensor is None:
            return tensor
        return tensor.view(-1, self.cols)[self.rows]

    @property
    def offset(self):
        """Index of the first element in the parameter."""
        return self.first if self.rows is None else self.rows.start * self.cols


class Gradient:
    """The part of one parameter's gradient that a step has: factors, a tensor, or both."""

    def __init__(self, param, dense=None, factors=()):
        self.param, self.dense, self.factors = param, dense, list(factors)
        self._factor_bytes = sum(f.nbytes for f in factors)  # a loop over experts adds one by one

    def keep(self, factors):
        """Adds a product."""
        self.factors.append(factors)
        self._factor_bytes += factors.nbytes

    def form(self):
        """Makes a tensor of the factors."""
        self.dense, self.factors, self._factor_bytes = self.whole(self.param.dtype), [], 0

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
        return dense + [tensor for f in self.factors for tensor in f.tensors]

    @property
    def nbytes(self):
        return self._factor_bytes + (0 if self.dense is None else self.dense.nbytes)

    @property
    def device(self):
        return (self.factors[0].right if self.dense is None else self.dense).device

    def check(self):
        """Raises RuntimeError if a factor was written after backward had handed it over."""
        for f in self.factors:
            if f.current_versions != f.versions:
                raise RuntimeError(
                    "an activation or its gradient was changed in place after backward had used "
                    "it, and before step(): the weight's gradient can no longer be formed; use "
                    "strategy='two_backward'"
                )

    @property
    def ends(self):
        """Those that have to be on the host before `products` are known."""
        return [f.experts for f in self.factors if isinstance(f.experts, Ends)]

    @property
    def has_experts(self):
        return self.factors[0].experts is not None

    @property
    def shape(self):
        """[rows, cols] of a product."""
        cols = self.factors[0].right.shape[1]
        if self.has_experts:
            return self.param.shape[1], cols
        return self.param.numel() // cols, cols

    def products(self):
        """For the weight, or for each of its experts, the factors as pairs (left, right), at least
        one."""
        if not self.has_experts:
            return [[(f.left, f.right) for f in self.factors]]
        products = [[] for _ in range(self.param.shape[0])]
        for left, right, experts, *_ in self.factors:
            if isinstance(experts, int):
                products[experts].append((left, right))
                continue
            for pairs, (start, end) in zip(products, experts.spans):
                if start < end:
                    pairs.append((left[start:end], right[start:end]))
        none = [(left[:0], right[:0])]
        return [pairs or none for pairs in products]

    @torch.no_grad()
    def whole(self, dtype):
        """The gradient as one tensor; `dtype` is that of a tensor made from factors."""
        if not self.factors:
            return self.dense
        grad = torch.empty(self.param.shape, dtype=dtype, device=self.device)
        rows, cols = self.shape
        matrix = grad.view(-1, cols)
        if self.dense is None:
            for block, pairs in zip(matrix.split(rows), self.products()):
                products.form_(block, pairs)
        else:
            for piece in self.blocks():
                matrix[piece.rows] = piece.grad
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
            yield from self.blocks()

    def blocks(self, zeros=True):
        """`zeros`: also those of experts without tokens."""
        (rows, cols), dense = self.shape, self.dense
        if dense is not None and dense.ndim > 2:
            dense = dense.reshape(-1, cols)
        dtype = products.wide(self.factors[0].right.dtype)
        for number, pairs in enumerate(self.products()):
            if not (zeros or dense is not None or products.tokens_of(pairs)):
                continue
            for at, block in products.blocks(pairs, 0, rows, dtype):
                first = number * rows + at
                part = slice(first, first + len(block))
                if dense is not None:
                    block += dense[part]
                yield Piece(self.param, block, part, cols)

    def by_product(self):
        """A piece for each product, with the factors in place of the gradient."""
        if self.param.ndim == 2:
            return [Piece(self.param, None, pairs=pairs) for pairs in self.products()]
        rows, cols = self.shape
        return [
            Piece(self.param, None, slice(i * rows, (i + 1) * rows), cols, pairs=pairs)
            for i, pairs in enumerate(self.products())
        ]
