"""The arguments of an optimizer and of a group: which one, what was wanted, what came."""

import math

import torch

from .. import ops

NORMS = ("global", "tensor")
STRATEGIES = ("auto", "one_backward", "two_backward", "partial", "immediate")


def check_strategy(name, norm, strategy, factor_budget, clip_grad_norm, whole):
    """`name`: of the optimizer; `whole`: whether it needs the whole of each gradient."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if factor_budget is not None:
        if isinstance(factor_budget, bool) or not isinstance(factor_budget, int):
            got = type(factor_budget).__name__
            raise TypeError(f"factor_budget must be a number of bytes or None, got {got}")
        if factor_budget < 0:
            raise ValueError(f"factor_budget must be at least 0 bytes, got {factor_budget}")
    if strategy == "immediate" and whole:
        raise ValueError(
            f"strategy 'immediate' forms gradients in blocks alone, and {name} "
            "needs the whole of each: take another strategy"
        )
    if strategy == "immediate" and norm == "global" and clip_grad_norm is not None:
        raise ValueError(
            "strategy 'immediate' updates before a global norm can be known: take another "
            "strategy, norm='tensor', or no clip_grad_norm"
        )


def check_group(group):
    """The options of a parameter group, and whether its parameters can have them."""
    for key in ("lr", "weight_decay"):
        value = group[key]
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{key} must be a finite number of at least 0, got {value!r}")
    positive_or_none("clip_grad_value", group["clip_grad_value"])
    rounding, seed = group["rounding"], group["seed"]
    if rounding != "auto" and rounding not in ops.ROUNDINGS:
        raise ValueError(f"rounding must be 'auto' or one of {ops.ROUNDINGS}, got {rounding!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    if rounding == "split" and any(p.dtype is torch.float16 for p in group["params"]):
        raise ValueError("rounding 'split' is for bfloat16 parameters, got float16 ones")


def positive_or_none(name, value):
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number greater than 0, or None, got {value!r}")
    return float(value)
