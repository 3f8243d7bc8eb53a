"""The optimizers: when a gradient is used, and with which coefficients."""

from .lomo import Lomo

__all__ = ["Lomo"]
