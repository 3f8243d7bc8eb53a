"""The main job: fine-tune every parameter of a pretrained causal language model."""

from .display import Display
from .job import compare, run
from .ranks import LostError, Watch
from .report import Report
from .settings import OPTIMIZERS, SCHEDULES, Settings
from .signals import StoppedError

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Display",
    "LostError",
    "Report",
    "Settings",
    "StoppedError",
    "Watch",
    "compare",
    "run",
]
