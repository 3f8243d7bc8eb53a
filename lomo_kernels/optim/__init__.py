"""The optimizers: when a gradient is used, and with which coefficients."""

from .adalomo import AdaLomo
from .lomo import Lomo
from .loss_scale import LossScale

__all__ = ["AdaLomo", "Lomo", "LossScale"]
