"""Where the memory goes: measured on a real step, and planned without one."""

from . import report
from .held import HeldBytes, state_bytes
from .measure import Measurement, measure
from .plan import OPTIMIZERS, Plan, plan
from .recorder import CATEGORIES

__all__ = [
    "CATEGORIES",
    "OPTIMIZERS",
    "HeldBytes",
    "Measurement",
    "Plan",
    "measure",
    "plan",
    "report",
    "state_bytes",
]
