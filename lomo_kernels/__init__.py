"""Full-parameter fine-tuning in the memory of the weights."""

from . import ops

__all__ = ["ops"]
__version__ = "0.1.0"
