"""The optimizers: when a gradient is used, and with which coefficients."""

from .adalomo import AdaLomo
from .lomo import Lomo
from .loss_scale import LossScale

__all__ = ["OPTIMIZERS", "AdaLomo", "Lomo", "LossScale"]

OPTIMIZERS = {"lomo": Lomo, "adalomo": AdaLomo}  # by the names that commands and plans take
