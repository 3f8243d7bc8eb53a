"""Full-parameter fine-tuning in the memory of the weights."""

from . import ops
from .optim import Lomo, LossScale

__all__ = ["Lomo", "LossScale", "ops"]
__version__ = "0.1.0"
