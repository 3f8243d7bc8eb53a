"""What a run gave, and its record on disk."""

import json
from dataclasses import asdict, dataclass

from .scoring import Score

NAME = "result.json"


@dataclass(frozen=True)
class Report:
    """What a run gave; `gradient_bytes` (gradients, or what waits in their place) and `state_bytes`
    are measured peaks."""

    optimizer: str
    before: Score
    after: Score
    loss: float
    steps: int
    skipped: int
    seconds: float
    gradient_bytes: int
    state_bytes: int


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
