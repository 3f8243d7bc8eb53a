"""The contract of the norm of gradients that are products; see the package's docstring."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, factors
from .annotations import Backend, Products
from .backends import pick_backend, unavailable
from .lists import grouped, scatter_

TILE = 128  # tokens of a tile of a Gram matrix
# Through torch a tile costs several launches; on a GPU only embeddings go there, few of them.
_TORCH_TILE = {"cpu": TILE, "cuda": 1024}


def gram_is_cheaper(tokens: int, rows: int, cols: int) -> bool:
    """Whether the norm of dW [rows, cols] costs fewer FLOPs from Gram matrices than from dW.

    Of two symmetric matrices [tokens, tokens] the tiles of one half are formed, those on the
    diagonal whole: tokens * (tokens + TILE) * (rows + cols), against 2 * tokens * rows * cols.
    """
    return (tokens + TILE) * (rows + cols) < 2 * rows * cols


@torch.no_grad()
def product_sumsq_(
    sumsq: Tensor,
    magnitude: Tensor,
    products: Sequence[Products],
    *,
    inv_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Squared norms of gradients that are products, from the Gram matrices of their factors.

    For a weight whose gradient is the sum of left.T @ right over its pairs, with L and R all the
    pairs' rows one below the other::

        terms     = (L @ L.T) * (R @ R.T)          in fp32 (fp64 of fp64 factors)
        sumsq     = sum(terms) * inv_scale**2      the squared norm; not below 0
        magnitude = sum(|terms|) * inv_scale**2    at least as large: what cancels in the sum

    No product and no matrix [tokens, tokens] is stored: tiles of half of the symmetric matrices,
    whose sums are added in fp64 in a fixed order, so that a run repeats in every bit. A squared
    norm is wrong by about 2**-24 * magnitude / sumsq of itself: where that is too much, form the
    product. Weights with the same `right` tensors (queries, keys and values) share its products.

    Args:
        sumsq, magnitude: contiguous float32 tensors of one element per weight, overwritten.
        products: for each weight a sequence of pairs (left, right) as `product_update_` takes them,
            embeddings and their cross terms with products included.
        inv_scale: 1 / grad_scale, a one-element float32 tensor on sumsq's device. None: 1.
        found_inf: likewise; set to 1 when a squared norm is not finite, else left alone: NaN or
            infinity in a factor, or sums beyond fp32.
        backend: "auto", "native", "triton" or "reference". "triton": one launch for all weights of
            a dtype and one that adds up the tiles; what it leaves out (embeddings, pairs of two
            dtypes, fp64) and the other backends: torch's matrix products.

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend cannot run on sumsq's device, or its kernel failed.
    """
    checks.check_floats("sumsq", sumsq)
    checks.check_floats("magnitude", magnitude)
    if isinstance(products, torch.Tensor) or not hasattr(products, "__len__"):
        raise TypeError(
            "products must be a sequence with a sequence of pairs for each weight, "
            f"got {type(products).__name__}"
        )
    for name, tensor in (("sumsq", sumsq), ("magnitude", magnitude)):
        if tensor.numel() != len(products):
            raise ValueError(
                f"{name} must have one element per weight ({len(products)}), got {tensor.numel()}"
            )
        if tensor.device != sumsq.device:
            raise ValueError(
                f"{name} must be on sumsq's device {sumsq.device}, got {tensor.device}"
            )
    checks.check_scalar("inv_scale", inv_scale, sumsq.device)
    checks.check_scalar("found_inf", found_inf, sumsq.device)
    weights = [_checked(each, sumsq.device) for each in products]
    kernels = _kernels(sumsq.device, backend)

    launches: dict[torch.dtype, list] = {}
    for places in grouped(map(_key, weights)).values():
        group = [weights[place] for place in places]
        if kernels is not None and _fits_kernel(group[0]):
            launches.setdefault(group[0][0][1].dtype, []).append((places, group))
            continue
        totals = _gram_sums(group)
        if inv_scale is not None:
            totals *= inv_scale.double().square()
        scatter_(sumsq.view(-1), places, totals[:, 0])
        scatter_(magnitude.view(-1), places, totals[:, 1])
        if found_inf is not None:
            found_inf.masked_fill_(~totals[:, 0].isfinite().all(), 1.0)
    for each in launches.values():
        kernels.product_sumsq_(sumsq, magnitude, each, inv_scale=inv_scale, found_inf=found_inf)
    torch.autograd.graph.increment_version([sumsq, magnitude])


def _checked(pairs, device):
    """Of one weight; its rows and columns are those of the first pair that has them."""
    rows = cols = 0
    if not isinstance(pairs, torch.Tensor) and hasattr(pairs, "__len__"):
        matrices = [pair for pair in pairs if _is_matrix(pair, 1)]
        cols = matrices[0][1].shape[1] if matrices else 0
        rows = next((pair[0].shape[1] for pair in matrices if _is_matrix(pair, 0)), 0)
    return factors.check_products(pairs, rows, cols, device)


def _is_matrix(pair, side):
    return (
        isinstance(pair, (tuple, list))
        and len(pair) == 2
        and isinstance(pair[side], torch.Tensor)
        and pair[side].ndim == 2
    )


def _kernels(device, backend):
    """The backend that has a kernel of its own; None: torch's matrix products."""
    if backend == "auto":
        own = device.type == "cuda" and unavailable("triton", device) is None
        return pick_backend(device, "triton") if own else None
    chosen = pick_backend(device, backend)
    return chosen if backend == "triton" else None


def _key(pairs):
    """Equal for weights that were used with the same inputs."""
    return tuple(
        (right.data_ptr(), right.shape, right.stride(), right.dtype, left.ndim)
        for left, right in pairs
    )


def _fits_kernel(pairs):
    dtypes = {right.dtype for _, right in pairs}
    matrices = all(left.ndim == 2 for left, _ in pairs)
    return matrices and len(dtypes) == 1 and torch.float64 not in dtypes


def _left_gram(a, b):
    """Of gradients; those of an embedding are one-hot."""
    if a.ndim == 2 and b.ndim == 2:
        return factors.matmul(a, b.T)
    if a.ndim == 2:
        return factors.precise(a.index_select(1, b))
    if b.ndim == 2:
        return factors.precise(b.index_select(1, a)).T
    return a[:, None] == b[None, :]


def _gram_sums(group):
    """Of weights with the same inputs -> [weights, 2]: sum and sum of magnitudes of the terms."""
    right = group[0][0][1]
    size = _TORCH_TILE.get(right.device.type, 1024)
    parts = [  # (the inputs' rows, the gradients' rows of each weight)
        (use[0][1][i : i + size], [left[i : i + size] for left, _ in use])
        for use in zip(*group)
        for i in range(0, use[0][1].shape[0], size)
    ]
    totals = torch.zeros(len(group), 2, dtype=torch.float64, device=right.device)
    for i, (input_a, grads_a) in enumerate(parts):
        for j, (input_b, grads_b) in enumerate(parts[i:]):
            inputs = factors.matmul(input_a, input_b.T)
            for total, a, b in zip(totals, grads_a, grads_b):
                terms = inputs * _left_gram(a, b)
                sums = (terms.sum(dtype=torch.float64), terms.abs_().sum(dtype=torch.float64))
                total.add_(torch.stack(sums), alpha=2.0 if j else 1.0)
    totals[:, 0].clamp_(min=0.0)  # what cancels may leave less than nothing
    return totals
