"""What a run gave, and its record on disk."""

import json
import math
from dataclasses import asdict, dataclass

from .scoring import Score

NAME = "result.json"


@dataclass(frozen=True)
class Report:
    """What a run gave.

    `after` is the score of the weights of `best_step`, the last one where no checkpoint was chosen
    by a score. `trainable` is how many parameters are trained. Bytes are measured: those of all
    parameters, the peaks of gradients (or what waits in their place) and states over the run, and
    the most of activations in the second step.
    """

    optimizer: str
    before: Score
    after: Score
    loss: float
    steps: int
    skipped: int
    seconds: float
    trainable: int
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    activation_bytes: int
    best_step: int

    @property
    def failed(self) -> bool:
        """Whether nothing was learned because of the numbers: most steps were skipped, or what
        came of them is not finite."""
        finite = math.isfinite(self.loss) and math.isfinite(self.after.value)
        return 2 * self.skipped > self.steps or not finite

    def doubt(self) -> str | None:
        """Why this is no success, in one sentence; None where nothing speaks against it."""
        name, before, after = self.after.name, self.before.value, self.after.value
        if 2 * self.skipped > self.steps:
            return (
                f"{self.skipped} of {self.steps} steps were skipped because gradients were not "
                "finite: lower --loss-scale or --lr"
            )
        if self.failed:
            return f"loss {self.loss:g}, {name} {after:g}: the run diverged, lower --lr"
        if self.before.is_better_than(self.after):
            return f"{name} went from {before:.3f} to {after:.3f}, which is worse: lower --lr"
        return None


def write(folder, report, losses):
    """The record is whole or not there."""
    temporary = folder / f"{NAME}.partial"
    temporary.write_text(json.dumps({**asdict(report), "losses": losses}, indent=2) + "\n")
    temporary.rename(folder / NAME)


def read(folder):
    """The Report of the finished run in a folder, or None."""
    if not (folder / NAME).exists():
        return None
    record = json.loads((folder / NAME).read_text())
    record.pop("losses")
    return Report(**record | {key: Score(**record[key]) for key in ("before", "after")})
