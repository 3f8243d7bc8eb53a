"""A run's numbers, step by step, for programs."""

import json
import math

from .checkpoint import writing

NAME = "log.jsonl"


class Log:
    """Appends an object a step, and one a score, to log.jsonl in a folder; writes TensorBoard's
    events too where it is asked for and installed. A run that goes on after step `first` drops what
    was written of later ones.

    Without a folder nothing is written.
    """

    def __init__(self, folder, first=0, board=False):
        self._folder, self._file, self._board = folder, None, None
        if folder is None:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / NAME
            lines = path.read_text().split("\n") if first and path.exists() else []
            kept = [line for line in lines if line.endswith("}") and _step_of(line) <= first]
            path.write_text("".join(f"{line}\n" for line in kept))
            self._file = path.open("a")
            if board:
                self._board = _board(folder, first)

    def add(self, step, **values):
        """Values that are None are left out, those that are not finite are null."""
        if self._file is None:
            return
        values = {key: value for key, value in values.items() if value is not None}
        row = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        with writing(self._folder):
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in values.items():
                if not isinstance(value, str):
                    self._board.add_scalar(key, value, step)

    def close(self):
        for each in (self._file, self._board):
            if each is not None:
                each.close()


def _step_of(line):
    return json.loads(line)["step"]


def _board(folder, first):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder, purge_step=first + 1)
