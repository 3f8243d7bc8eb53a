"""A real training step: what it held, by category, and when."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import report
from .recorder import CATEGORIES, Recorder
from .timeline import Summary, moments, summarise, whole


def measure(module: torch.nn.Module, *optimizers: torch.optim.Optimizer | None) -> "Measurement":
    """Records the memory of a training step, in bytes, by following tensor storages.

    ::

        with measure(model, optimizer) as measured:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(measured)

    Categories are parameters, gradients, states, activations and other (recorder.py, Note
    [Categories]). Record a step after the first one: optimizers make their states in that. What
    operators allocate inside themselves, and what the allocator rounds up or keeps, is not seen;
    storages on other devices than the module's first parameter are not counted.

    Args:
        module: any torch module.
        optimizers: torch optimizers of its parameters; without one, or None, there are no states.

    Returns:
        A context manager that gives a `Measurement`, to be read after the block.

    Raises:
        RuntimeError: a figure is asked for inside the block.
    """
    return Measurement(module, [each for each in optimizers if each is not None])


class Measurement:
    """What `measure` recorded; `print` shows a table.

    peak: bytes alive at the worst moment. place: where in the step that was. at_peak: bytes of each
    category at that moment. maxima: the most bytes of each category at any moment.
    """

    def __init__(
        self, module: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        self._recorder = Recorder(module, optimizers)
        self._found: Summary | None = None

    def __enter__(self):
        self._recorder.__enter__()
        return self

    def __exit__(self, *error):
        self._recorder.__exit__(*error)
        self._found = whole(summarise(self._recorder).values())

    @property
    def summary(self) -> Summary:
        if self._found is None:
            raise RuntimeError("memory is still being measured: ask after the `with` block")
        return self._found

    @property
    def peak(self) -> int:
        return self.summary.peak.total

    @property
    def place(self) -> str:
        return str(self.summary.peak.place)

    @property
    def at_peak(self) -> dict[str, int]:
        return dict(self.summary.peak.parts)

    @property
    def maxima(self) -> dict[str, int]:
        return dict(self.summary.maxima)

    def to_dict(self) -> dict[str, Any]:
        """`peak_bytes`, `peak_place`, `at_peak_bytes` and `maxima_bytes`, for json."""
        return self.summary.to_dict()

    def __str__(self):
        return report.text(self.summary)

    def timeline(self) -> dict[str, list[int]]:
        """Lists of bytes over the step, one for each category: a value after every allocation."""
        self.summary  # noqa: B018 - refuses inside the block
        lines = {category: [] for category in CATEGORIES}
        for _, alive in moments(self._recorder):
            for category, size in alive.items():
                lines[category].append(size)
        return lines

    def plot(self, path: str | Path) -> None:
        """Draws the categories over the step, stacked, into an image file; needs matplotlib."""
        report.plot_timeline(self.timeline(), self.summary.peak, path)
