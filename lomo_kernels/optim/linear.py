"""Weight gradients that never exist: a matrix keeps the two factors of its gradient instead.

For `y = x @ W.T` the gradient is `dW = G.T @ X`, with G the gradient of y and X the input, one row
per token. The factors are all that a step needs: the norm comes from them (Gram matrices, or blocks
of dW that are squared and dropped) and so does the update (blocks of dW through the fused kernel).
Related: ghost norms and Book-Keeping (arXiv 2210.00038), and the split of backward into an input
and a weight half in zero-bubble pipelines (arXiv 2401.10241).
"""

from collections import defaultdict
from typing import NamedTuple

import torch

BLOCK = 1 << 23  # elements of dW that exist at a time, in fp32
TOKENS = 1024  # rows of a Gram matrix that exist at a time
# Gram matrices add up terms that cancel. Their relative error is about 2**-24 times this ratio of
# the sum of magnitudes to the sum; above it, blocks of dW are squared instead.
MAX_CANCELLATION = 256.0


class Use(NamedTuple):
    """One product with a weight [rows, cols]: its gradient is left.T @ right."""

    left: torch.Tensor  # [tokens, rows], or [tokens] row numbers of an embedding
    right: torch.Tensor  # [tokens, cols]
    versions: tuple

    @property
    def nbytes(self):
        return self.left.nbytes + self.right.nbytes


def use(left, right):
    return Use(left, right, (left._version, right._version))


def tokens_of(uses):
    return sum(u.right.shape[0] for u in uses)


def gram_is_cheaper(tokens, rows, cols):
    """Whether two Gram matrices [tokens, tokens] cost fewer FLOPs than dW [rows, cols]."""
    return tokens * (rows + cols) < rows * cols


def _precise(tensor):
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _mixes(tensor):
    """Whether its products have an fp32 result without a copy of the factors in fp32."""
    return tensor.is_cuda and tensor.element_size() == 2 and _HAS_OUT_DTYPE


def _matmul(a, b):
    """a @ b with fp32 accumulation and result; exact fp32 inputs on a CPU, where 16-bit is slow."""
    if _mixes(a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return _precise(a) @ _precise(b)


_HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def _left_gram(a, b):
    if a.left.ndim == 2 and b.left.ndim == 2:
        return _matmul(a.left, b.left.T)
    if a.left.ndim == 2:
        return _precise(a.left.index_select(1, b.left))
    if b.left.ndim == 2:
        return _precise(b.left.index_select(1, a.left)).T
    return a.left[:, None] == b.left[None, :]


@torch.no_grad()
def gram_sumsq(uses):
    """||sum of left.T @ right||^2 without the product -> (the sum, the sum of magnitudes).

    ||G.T X||^2 = sum((G G.T) * (X X.T)), in tiles of at most TOKENS rows and half of the symmetric
    matrix; embeddings, whose G is one-hot, and their cross terms with a tied head included. Matrix
    products in fp32 (fp64 for fp64 factors), sums in fp64.
    """
    parts = [
        Use(u.left[i : i + TOKENS], u.right[i : i + TOKENS], ())
        for u in uses
        for i in range(0, u.right.shape[0], TOKENS)
    ]
    total = torch.zeros(2, dtype=torch.float64, device=uses[0].right.device)
    for i, a in enumerate(parts):
        for b in parts[i:]:
            terms = _matmul(a.right, b.right.T).mul_(_left_gram(a, b))
            sums = (terms.sum(dtype=torch.float64), terms.abs_().sum(dtype=torch.float64))
            total.add_(torch.stack(sums), alpha=1.0 if a is b else 2.0)
    return total[0].clamp(min=0.0), total[1]


@torch.no_grad()
def product(uses, first, last, cols, out=None):
    """Rows [first, last) of the sum of left.T @ right, in fp32 (fp64 for fp64 factors)."""
    size = last - first
    if out is None:
        dtype = torch.promote_types(uses[0].right.dtype, torch.float32)
        out = uses[0].right.new_empty(size, cols, dtype=dtype)
    for k, u in enumerate(uses):
        beta = 1 if k else 0  # out has nothing in it yet
        if u.left.ndim == 1:
            if not beta:
                out.zero_()
            inside = (u.left >= first) & (u.left < last)
            rows = torch.where(inside, u.left - first, 0)
            right = _precise(u.right.masked_fill(~inside[:, None], 0.0))
            out.index_put_((rows,), right, accumulate=True)  # the same order in every run
        elif _mixes(u.right):
            part = _matmul(u.left[:, first:last].T, u.right)
            out.add_(part) if beta else out.copy_(part)
        else:
            out.addmm_(_precise(u.left[:, first:last]).T, _precise(u.right), beta=beta)
    return out


class Pending:
    """What a step has so far of one weight's gradient: products, and a held gradient or none."""

    def __init__(self, param):
        self.param = param
        self.uses = []
        self.grad = None

    @property
    def tensors(self):
        grad = [] if self.grad is None else [self.grad]
        return grad + [tensor for u in self.uses for tensor in (u.left, u.right)]

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors)

    def hold(self, grad):
        self.grad = grad if self.grad is None else self.grad + grad

    def check(self):
        for u in self.uses:
            if (u.left._version, u.right._version) != u.versions:
                raise RuntimeError(
                    "an activation or its gradient was changed in place after backward had used "
                    "it, and before step(): the weight's gradient can no longer be formed; use "
                    "strategy='two_backward'"
                )

    def whole(self):
        """The gradient, formed in fp32 and kept in the weight's dtype (fp16, which may overflow,
        excepted): one weight's at a time, for updates that read it more than once."""
        if not self.uses:
            return self.grad
        dtype = self.param.dtype
        whole = torch.empty(
            self.param.shape,
            dtype=torch.float32 if dtype is torch.float16 else dtype,
            device=self.uses[0].right.device,
        )
        for first_row, block in self.blocks():
            whole[first_row : first_row + len(block)] = block
        return whole

    def blocks(self):
        """(first row, rows of the gradient) one after the other, in one workspace."""
        if not self.uses:
            yield 0, self.grad
            return
        rows, cols = self.param.shape
        size = max(1, min(rows, BLOCK // max(1, cols)))
        workspace = self.uses[0].right.new_empty(size, cols, dtype=torch.float32)
        for first in range(0, rows, size):
            last = min(first + size, rows)
            block = product(self.uses, first, last, cols, workspace[: last - first])
            if self.grad is not None:
                block += self.grad[first:last]
            yield first, block


class Cancellation:
    """Which weights' Gram matrices cannot be trusted, found out without making the host wait.

    On a CPU at once; on a GPU from the last step whose figures have arrived, so that a weight which
    begins to cancel is measured by blocks one or two steps later.
    """

    def __init__(self):
        self._heavy = set()
        self._found = defaultdict(list)  # device -> [(param_id, ratio)]
        self._arriving = []

    def trusts(self, param_id):
        return param_id not in self._heavy

    def note(self, param_id, total, magnitude):
        """-> whether to use `total` now."""
        ratio = magnitude / total
        if ratio.device.type == "cpu":
            if ratio > MAX_CANCELLATION:  # not for NaN
                self._heavy.add(param_id)
            return self.trusts(param_id)
        self._found[ratio.device].append((param_id, ratio))
        return True

    def close(self):
        if self._found and torch.cuda.is_current_stream_capturing():
            self._found.clear()  # a replayed step has nobody who would look
            return
        for device, found in self._found.items():
            ids, ratios = zip(*found)
            host = torch.empty(len(ids), dtype=torch.float64, pin_memory=True)
            host.copy_(torch.stack(ratios), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._arriving.append((event, ids, host))
        self._found.clear()
        waiting = []
        for event, ids, host in self._arriving:
            if event.query():
                self._heavy.update(i for i, r in zip(ids, host.tolist()) if r > MAX_CANCELLATION)
            else:
                waiting.append((event, ids, host))
        self._arriving = waiting
