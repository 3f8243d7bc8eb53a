"""Which backend runs on a device, and why another does not."""

import functools
import importlib
from types import ModuleType

import torch

from .annotations import Backend

BACKENDS = ("native", "triton", "reference")


def unavailable(name: str, device: torch.device | str) -> str | None:
    """Why the backend `name` cannot run on `device`; None: it can."""
    try:
        backend = importlib.import_module(f"{__package__}.{name}")
    except ImportError as error:
        return str(error)
    return backend.unavailable(torch.device(device))


def build_info() -> dict[str, str]:
    """What the extension module was built with: compilers, instruction set, architectures.

    Raises:
        ImportError: it was not built.
    """
    from .native import build_info

    return build_info()


def pick_backend(
    device: torch.device, name: Backend = "auto", dtype: torch.dtype | None = None
) -> ModuleType:
    """The module that runs the operations on `device`; under FakeTensorMode always `fake`.

    Args:
        device: a torch.device.
        name: one of `BACKENDS`, which then runs or raises; "auto" takes the first that can.
        dtype: of the tensors, where it matters: float64 runs on "reference" alone.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the named backend cannot run there; the message says why.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return importlib.import_module(f"{__package__}.fake")
    return _pick(device, name, dtype)


@functools.lru_cache
def _pick(device, name, dtype):
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {BACKENDS}, got {name!r}")
    reasons = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        if dtype is torch.float64 and candidate != "reference":
            reason = "float64 runs on the backend 'reference' alone"
        else:
            reason = unavailable(candidate, device)
        if reason is None:
            return importlib.import_module(f"{__package__}.{candidate}")
        reasons[candidate] = reason
    raise RuntimeError(f"backend {name!r} cannot run on {device}: {reasons}")
