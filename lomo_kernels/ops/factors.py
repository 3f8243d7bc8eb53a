"""Gradients as products: left.T @ right of pairs of factors, formed by torch's matrix product.

A pair is what backward has of one use of a weight [rows, cols]: left [tokens, rows], the gradient
of the use's result, or left [tokens] of row numbers, where the weight is an embedding; and right
[tokens, cols]. A weight that was used several times has several pairs, whose products add up.
"""

import contextlib

import torch

from . import checks

BLOCK = 1 << 22  # elements of a gradient that exist at a time, in fp32: 16 MiB, a part of an L2
_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
# torch.mm(out_dtype=torch.float32) of 16-bit factors; ROCm has it later than CUDA.
_HAS_OUT_DTYPE = not torch.version.hip or _VERSION >= (2, 10)


def check_products(products, rows, cols, device):
    """-> a list of pairs, detached."""
    if isinstance(products, torch.Tensor) or not hasattr(products, "__len__"):
        raise TypeError(
            f"products must be a sequence of pairs (left, right), got {type(products).__name__}"
        )
    if len(products) == 0:
        raise ValueError("products must have at least one pair (left, right), got none")
    return [_check_pair(pair, rows, cols, device) for pair in products]


def _check_pair(pair, rows, cols, device):
    if isinstance(pair, torch.Tensor) or not hasattr(pair, "__len__") or len(pair) != 2:
        raise TypeError(f"products must hold pairs (left, right), got {type(pair).__name__}")
    left, right = pair
    checks.check_tensor("right", right, checks.WITH_FLOAT64)
    if not isinstance(left, torch.Tensor):
        raise TypeError(f"left must be a tensor, got {type(left).__name__}")
    if right.ndim != 2 or right.shape[1] != cols:
        raise ValueError(f"right must have shape [tokens, {cols}], got {tuple(right.shape)}")
    tokens = right.shape[0]
    if left.ndim == 1:
        if left.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"left of one dimension must be int64 or int32, got {left.dtype}")
        wanted = (tokens,)
    else:
        if left.dtype is not right.dtype:
            raise TypeError(f"left must have right's dtype {right.dtype}, got {left.dtype}")
        checks.check_tensor("left", left, checks.WITH_FLOAT64)
        wanted = (tokens, rows)
    if left.shape != wanted:
        raise ValueError(f"left must have shape {wanted}, got {tuple(left.shape)}")
    for name, tensor in (("left", left), ("right", right)):
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    return left.detach(), right.detach()


def tokens_of(pairs):
    return sum(right.shape[0] for _, right in pairs)


def wide(dtype):
    """In which the sums of a gradient in `dtype` are formed."""
    return torch.promote_types(dtype, torch.float32)


def mixes(tensor):
    """Whether its products have an fp32 result without a copy of the factors in fp32."""
    return tensor.is_cuda and tensor.element_size() == 2 and _HAS_OUT_DTYPE


@contextlib.contextmanager
def _ieee(device):
    """What must be fp32 is fp32, whatever the process allows its own products (TF32, bf16)."""
    if _VERSION >= (2, 9):
        where = (torch.backends.mkldnn if device.type == "cpu" else torch.backends.cuda).matmul
        before = where.fp32_precision
        if before in ("ieee", "none"):
            yield
            return
        try:
            where.fp32_precision = "ieee"
            yield
        finally:
            where.fp32_precision = before
        return
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def precise(tensor):
    """In fp32 or fp64, where its products are formed."""
    return tensor.to(wide(tensor.dtype))


def matmul(a, b):
    """a @ b with an fp32 sum and result (fp64 of fp64); on a CPU of copies in fp32, where products
    of 16-bit factors are slow."""
    if mixes(a) and a.dtype is b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    dtype = torch.promote_types(wide(a.dtype), wide(b.dtype))
    with _ieee(a.device):
        return a.to(dtype) @ b.to(dtype)


def _add_rows(out, left, right, first):
    """An embedding's gradient: rows of right, to where left says, in the same order each time."""
    inside = (left >= first) & (left < first + out.shape[0])
    rows = torch.where(inside, left - first, 0).long()
    out.index_put_((rows,), right.masked_fill(~inside[:, None], 0.0).to(out.dtype), accumulate=True)


def _add_product(out, left, right, fresh):
    """out += left.T @ right; `fresh`: out has nothing in it yet."""
    if mixes(right) and out.dtype is torch.float32:
        if fresh:
            torch.mm(left.T, right, out_dtype=torch.float32, out=out)
        else:  # addmm of both out_dtype and out is odd: pytorch#154086
            out.add_(torch.mm(left.T, right, out_dtype=torch.float32))
        return
    with _ieee(out.device):
        torch.addmm(out, left.T.to(out.dtype), right.to(out.dtype), beta=int(not fresh), out=out)


@torch.no_grad()
def form_(out, pairs, first=0):
    """out = rows [first, first + len(out)) of the sum of left.T @ right.

    out: float32, float64, or 16 bits, which is rounded to once from fp32.
    """
    if out.dtype.itemsize == 2:
        (left, right), *more = pairs
        last = first + out.shape[0]
        if not more and left.dtype is out.dtype and out.is_cuda:
            return torch.mm(left[:, first:last].T, right, out=out)
        for at, block in blocks(pairs, first, last):
            out[at - first : at - first + len(block)] = block
        return out
    fresh = True
    for left, right in pairs:
        if left.ndim == 2:
            _add_product(out, left[:, first : first + out.shape[0]], right, fresh)
        else:
            _add_rows(out.zero_() if fresh else out, left, right, first)
        fresh = False
    return out


def blocks(pairs, first, last, dtype=torch.float32):
    """(first row, rows of the sum) one after the other, in one workspace; one block of an empty
    range."""
    right = pairs[0][1]
    cols = right.shape[1]
    size = max(1, min(last - first, BLOCK // max(1, cols)))
    workspace = right.new_empty(size, cols, dtype=dtype)
    for at in range(first, max(last, first + 1), size):
        yield at, form_(workspace[: min(size, last - at)], pairs, at)
