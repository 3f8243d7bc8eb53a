"""The contract of the update whose gradient is a product; see the package's docstring."""

import torch
from torch import Tensor

from . import checks, crossings, factors
from .annotations import Backend, Method, Products, Rounding
from .backends import pick_backend, unavailable

METHODS = ("auto", "blocks", "epilogue")
# An element's sum over tokens has the order of its matrix product. Whatever that is, it differs
# from the exact sum by at most this share of the sum of magnitudes for each token.
ERROR_PER_TOKEN = 2.0**-23


@torch.no_grad()
def product_update_(
    param: Tensor,
    products: Products,
    *,
    lr: float,
    weight_decay: float = 0.0,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    clip_value: float | None = None,
    rounding: Rounding = "nearest",
    low: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    param_id: int = 0,
    offset: int = 0,
    found_inf: Tensor | None = None,
    skip: Tensor | None = None,
    backend: Backend = "auto",
    method: Method = "auto",
) -> None:
    """`lomo_update_` of a weight whose gradient is a product that is never stored.

    With the maths, the roundings and the flags of `lomo_update_`, for each element::

        grad  = sum over products of left.T @ right, in fp32
        g     = clamp(grad * inv_scale, -clip_value, clip_value) * clip_coef
        param = round(param * decay - lr * g),   decay = 1 - lr * weight_decay

    What follows grad agrees in every bit with `lomo_update_`. The sum has the order of its matrix
    product: an element is within `ERROR_PER_TOKEN` of the exact sum, as a share of the sum of
    magnitudes and for each token. fp32 factors are multiplied in fp32, never in TF32.

    Args:
        param: a contiguous matrix [rows, cols] in fp32, bf16 or fp16, written in place: a weight, a
            block of its rows, or an expert of a batch of matrices.
        products: a sequence of one or more pairs (left, right): left [tokens, rows] and right
            [tokens, cols] of one dtype, in fp32, bf16 or fp16; or left [tokens] of row numbers
            (int64 or int32), where param is an embedding and right the gradient of its result. Row
            numbers outside of param are left out. Any number of tokens, also none.
        lr, weight_decay, inv_scale, clip_coef, clip_value, rounding, low, seed, step, param_id,
            found_inf, skip: as for `lomo_update_`.
        offset: global index of param's first element.
        backend: "auto", "native", "triton" or "reference": who makes the update.
        method: "blocks": blocks of `factors.BLOCK` elements of the gradient through torch's matrix
            product, then the update. "epilogue": one Triton kernel whose tiles of the gradient stay
            in registers; of products of two matrices of one dtype alone. "auto": by the table in
            crossings.py.

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend or the method cannot run on param's device, or a kernel failed.
    """
    clip_value = checks.check_options(lr, weight_decay, clip_value, rounding, seed)
    checks.check_integer("step", step, 2**32)
    checks.check_integer("offset", offset, 2**63)
    checks.check_integer("param_id", param_id, 2**32)
    checks.check_tensor("param", param, checks.WITH_FLOAT64)
    if param.ndim != 2 or not param.is_contiguous():
        raise ValueError(
            f"param must be a contiguous matrix, got shape {tuple(param.shape)} "
            f"with strides {param.stride()}"
        )
    if param.is_inference():
        raise ValueError("param must not be an inference tensor: autograd cannot see it change")
    checks.check_scalars(param.device, inv_scale, clip_coef, found_inf, skip)
    rounding = checks.rounding_of(param, low, rounding)
    rows, cols = param.shape
    pairs = factors.check_products(products, rows, cols, param.device)
    rights = [right for _, right in pairs]
    wide = checks.widest(param, *rights, inv_scale, clip_coef, found_inf, skip)
    once = float if param.dtype is torch.float64 else checks.float32
    numbers = {
        "lr": once(lr),
        "decay": once(1.0 - lr * weight_decay),
        "clip_value": once(clip_value),
        "step": step,
        "seed": seed,
        "rounding": rounding,
    }
    scalars = {
        "inv_scale": inv_scale, "clip_coef": clip_coef, "found_inf": found_inf, "skip": skip,
    }  # fmt: skip
    if _method(method, param, pairs, backend) == "epilogue":
        run = pick_backend(param.device, "triton").product_update_
        run(param, pairs, low, offset, param_id, **numbers, **scalars)
    else:
        run = pick_backend(param.device, backend, wide).lomo_update_
        for first, block in factors.blocks(pairs, 0, rows, factors.wide(param.dtype)):
            mine = slice(first, first + len(block))
            run(
                (param[mine],), (block,), (None if low is None else low[mine],),
                (offset + first * cols,), (param_id,), **numbers, **scalars,
            )  # fmt: skip
    torch.autograd.graph.increment_version(param)


def _method(method, param, pairs, backend):
    """The method to run; raises where one was named that cannot."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if method == "blocks" or param.numel() == 0:
        return "blocks"
    reason = _not_in_epilogue(param, pairs, backend)
    if method == "epilogue":
        if reason is not None:
            raise ValueError(f"method 'epilogue' {reason}")
        return method
    right, tokens = pairs[0][1], factors.tokens_of(pairs)
    chosen = crossings.method_for(right, *param.shape, tokens)
    return "blocks" if reason is not None else chosen


def _not_in_epilogue(param, pairs, backend):
    """Why it cannot be asked for; None: it can."""
    if backend not in ("auto", "triton"):
        return f"is Triton's: backend must be 'auto' or 'triton', got {backend!r}"
    if any(left.ndim == 1 for left, _ in pairs):
        return "takes products of two matrices, got row numbers of an embedding"
    dtypes = {right.dtype for _, right in pairs}
    if len(dtypes) > 1:
        return f"takes factors of one dtype, got {sorted(map(str, dtypes))}"
    if torch.float64 in (*dtypes, param.dtype):
        return "takes float32, bfloat16 or float16, got torch.float64"
    missing = unavailable("triton", param.device)
    return None if missing is None else f"cannot run on {param.device}: {missing}"
