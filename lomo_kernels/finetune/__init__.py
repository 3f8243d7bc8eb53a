"""The main job: fine-tune every parameter of a pretrained causal language model."""

from .checkpoint import OutputError
from .display import Display
from .dry import dry_run
from .job import compare, run, variants
from .report import Report
from .settings import OPTIMIZERS, SCHEDULES, Output, Settings
from .signals import StoppedError
from .sources import DataError

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "DataError",
    "Display",
    "Output",
    "OutputError",
    "Report",
    "Settings",
    "StoppedError",
    "compare",
    "dry_run",
    "run",
    "variants",
]
