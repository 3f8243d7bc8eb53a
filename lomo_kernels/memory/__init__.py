"""Where the memory goes: measured on a real step, and planned without one."""

from .held import HeldBytes, state_bytes
from .measure import Measurement, measure
from .recorder import CATEGORIES

__all__ = ["CATEGORIES", "HeldBytes", "Measurement", "measure", "state_bytes"]
