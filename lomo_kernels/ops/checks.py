"""Checks of arguments: which one, what was wanted, what came."""

import ctypes
import math
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ROUNDINGS = ("nearest", "stochastic", "split")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64)
WITH_FLOAT64 = (*DTYPES, torch.float64)  # float64 runs on the backend "reference" alone


def check_floats(name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS or not value.is_contiguous():
        raise TypeError(
            f"{name} must be contiguous float32, got {value.dtype} with strides {value.stride()}"
        )


def as_list(name, value, length, default=None) -> list[Any]:
    if value is None and default is not None:
        return default
    usual = type(value) is list  # or it is looked at more closely
    if not usual and (isinstance(value, torch.Tensor) or not hasattr(value, "__len__")):
        raise TypeError(f"{name} must be a sequence where param is, got {type(value).__name__}")
    if len(value) != length:
        raise ValueError(f"{name} must have param's length {length}, got {len(value)}")
    return value


def check_number(name, value, minimum):
    if not isinstance(value, (float, int)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not minimum <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least {minimum}, got {value}")


def check_integer(name, value, end):
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not 0 <= value < end:
        raise ValueError(f"{name} must be in [0, {end}), got {value}")


def float32(value):
    return ctypes.c_float(value).value


def check_scalar(name, value, device):
    if value is None:
        return
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name} must be a one-element float32 tensor or None, got {type(value).__name__}"
        )
    if value.dtype not in FLOATS or value.numel() != 1:
        raise TypeError(
            f"{name} must be a one-element float32 tensor, got {tuple(value.shape)} {value.dtype}"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on param's device {device}, got {value.device}")


def check_scalars(device, inv_scale, clip_coef, found_inf, skip):
    """The scalars of a step that updates read and write."""
    for name, value in (
        ("inv_scale", inv_scale), ("clip_coef", clip_coef), ("found_inf", found_inf), ("skip", skip)
    ):  # fmt: skip
        if value is not None:
            check_scalar(name, value, device)
    if skip is not None and found_inf is not None and is_same(skip, found_inf):
        raise ValueError("skip and found_inf must be two tensors, got the same one twice")


def is_same(a, b):
    """Whether two tensors begin at one address; those of fake tensors are 0."""
    return a.data_ptr() == b.data_ptr() != 0


def widest(*tensors):
    """float64 if one of the tensors is (None does not count), else float32."""
    for tensor in tensors:  # any() with a generator takes three times as long
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32


def check_options(lr, weight_decay, clip_value, rounding, seed):
    """What all updates take as Python values; returns clip_value, infinite for None."""
    check_number("lr", lr, 0)
    check_number("weight_decay", weight_decay, 0)
    check_integer("seed", seed, 2**64)
    if clip_value is None:
        clip_value = math.inf
    elif not (isinstance(clip_value, (float, int)) and clip_value > 0):
        raise ValueError(f"clip_value must be a number greater than 0, got {clip_value!r}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    return clip_value


# Class of a tensor -> whether it wraps others; asking torch takes a microsecond.
_WRAPS: dict[type, bool] = {}


def check_tensor(name, tensor, dtypes=DTYPES):
    if (  # what is usual, first
        _WRAPS.get(type(tensor)) is False
        and tensor.layout is torch.strided
        and tensor.dtype in dtypes
    ):
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got layout {tensor.layout}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    kind = type(tensor)
    if kind not in _WRAPS:
        _WRAPS[kind] = is_traceable_wrapper_subclass(tensor)
    if _WRAPS[kind]:
        raise TypeError(
            f"{name} must be a plain tensor, got {type(tensor).__name__}; "
            "a DTensor's own part is its to_local()"
        )


def check_pair(param, grad, device, dtypes=DTYPES):
    check_tensor("param", param, dtypes)
    check_tensor("grad", grad, dtypes)
    if param.device != device:
        raise ValueError(f"param must all be on one device {device}, got {param.device}")
    if grad.device != device:
        raise ValueError(f"grad must be on param's device {device}, got {grad.device}")
    if grad.shape != param.shape:
        raise ValueError(
            f"grad must have param's shape {tuple(param.shape)}, got {tuple(grad.shape)}"
        )
    if grad.dtype is not param.dtype and (
        torch.float32 not in (grad.dtype, param.dtype) or grad.dtype is torch.float64
    ):
        raise TypeError(f"grad must be {param.dtype} as param is, or float32, got {grad.dtype}")
    if param.is_inference():
        raise ValueError("param must not be an inference tensor: autograd cannot see it change")


def check_low(low, param):
    if param.dtype is not torch.bfloat16:
        raise TypeError(f"rounding 'split' needs a bfloat16 or float32 param, got {param.dtype}")
    if not isinstance(low, torch.Tensor) or low.dtype is not torch.int16:
        got = low.dtype if isinstance(low, torch.Tensor) else type(low).__name__
        raise TypeError(f"low must be an int16 tensor for rounding 'split', got {got}")
    if low.shape != param.shape or low.device != param.device:
        raise ValueError(
            f"low must have param's shape {tuple(param.shape)} on {param.device}, "
            f"got {tuple(low.shape)} on {low.device}"
        )
    if not same_layout(low, param):
        raise ValueError(f"low must have param's strides {param.stride()}, got {low.stride()}")


def rounding_of(param, low, rounding):
    """The rounding of a parameter, and `low` checked; "nearest" where it is wider than 16 bits."""
    if param.dtype.itemsize > 2:
        return "nearest"
    if rounding == "split":
        check_low(low, param)
    return rounding


def same_layout(a, b):
    """Whether two tensors of one shape keep their elements in one memory order."""
    return (a.is_contiguous() and b.is_contiguous()) or all(
        x == y for x, y, size in zip(a.stride(), b.stride(), a.shape) if size > 1
    )


def is_dense(tensor):
    """Whether the elements fill a piece of memory without gaps, in whichever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def in_layout_of(param, grad):
    if not is_dense(param):
        raise ValueError(
            f"param must fill its memory without gaps, got shape {tuple(param.shape)} "
            f"with strides {param.stride()}"
        )
    if same_layout(param, grad):
        return grad
    return torch.empty_like(param, dtype=grad.dtype).copy_(grad)
