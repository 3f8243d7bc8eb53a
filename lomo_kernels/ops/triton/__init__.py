"""The kernels in Triton: what runs on AMD, and on NVIDIA where the package was built without CUDA.

One file an operation, with the names and the maths of csrc. No autotuning: trying configurations on
a kernel that works in place would apply the update several times.
"""

import triton

from .adalomo import (
    adalomo_parts_update_,
    adalomo_squares_,
    adalomo_statistics_,
    adalomo_sums_,
    adalomo_update_,
)
from .decide import decide_
from .grad_sumsq import grad_sumsq_
from .lomo_update import lomo_update_
from .product_sumsq import product_sumsq_
from .product_update import product_update_

__all__ = [
    "adalomo_parts_update_",
    "adalomo_squares_",
    "adalomo_statistics_",
    "adalomo_sums_",
    "adalomo_update_",
    "decide_",
    "grad_sumsq_",
    "lomo_update_",
    "product_sumsq_",
    "product_update_",
    "unavailable",
]


def unavailable(device):
    """Why this backend cannot run on `device`; None: it can."""
    if triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda":
        return None
    return f"Triton has no {device.type} compiler here (TRITON_INTERPRET=1 runs it, slowly)"
