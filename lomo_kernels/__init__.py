"""Full-parameter fine-tuning in the memory of the weights."""

from . import ops
from .optim import Lomo

__all__ = ["Lomo", "ops"]
__version__ = "0.1.0"
