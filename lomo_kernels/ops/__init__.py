"""Operations on one tensor, or on a list of tensors, at a time.

An operation is a row and a backend a column: each file here that is named in `OPERATIONS` is the
contract that every backend keeps. It checks the arguments, chooses the backend and tells autograd
what was written. Backends, in order of preference: `native` (C++ and CUDA), `triton`, `reference`
(plain PyTorch).
"""

from .adalomo import (
    adalomo_state,
    adalomo_sums_,
    adalomo_update_,
)
from .adalomo_parts import AdalomoParts
from .backends import BACKENDS, build_info, pick_backend, unavailable
from .checks import DTYPES, ROUNDINGS
from .decide import decide_
from .grad_sumsq import grad_sumsq_
from .lomo_update import lomo_update_
from .product_sumsq import gram_is_cheaper, product_sumsq_
from .product_update import product_update_
from .reference import DECISIONS

__all__ = [
    "BACKENDS",
    "DECISIONS",
    "DTYPES",
    "ROUNDINGS",
    "AdalomoParts",
    "adalomo_state",
    "adalomo_sums_",
    "adalomo_update_",
    "build_info",
    "decide_",
    "grad_sumsq_",
    "gram_is_cheaper",
    "lomo_update_",
    "pick_backend",
    "product_sumsq_",
    "product_update_",
    "unavailable",
]

# The files of an operation have its name: its contract, its kernels in csrc/ (but for products, of
# which Triton alone has kernels) and in triton/, its bench.
OPERATIONS = {
    "lomo_update": lomo_update_,
    "grad_sumsq": grad_sumsq_,
    "decide": decide_,
    "adalomo": adalomo_update_,
    "product_update": product_update_,
    "product_sumsq": product_sumsq_,
}
