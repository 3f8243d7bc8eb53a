"""Full-parameter fine-tuning in the memory of the weights."""

from . import ops
from .optim import AdaLomo, Lomo, LossScale

__all__ = ["AdaLomo", "Lomo", "LossScale", "ops"]
__version__ = "0.1.0"
