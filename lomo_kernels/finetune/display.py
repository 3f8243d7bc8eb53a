"""What a run shows: lines, a progress bar on a terminal, and one table."""

import contextlib
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TextIO

import torch

from .report import Report

LINES = 10  # progress lines of a run where there is no terminal


def gib(size):
    return f"{size / 2**30:.3f}" if size >= 2**20 else f"{size:,} B"


def peak_memory():
    """Peak bytes so far: of the GPU's allocator where one is used, else of the process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Display:
    """Of several processes that torchrun has started, the first alone shows anything."""

    def __init__(self, file: TextIO | None = None) -> None:
        from rich.console import Console

        quiet = os.environ.get("RANK", "0") != "0"
        self.console = Console(file=file, highlight=False, soft_wrap=True, quiet=quiet)
        if not self.console.is_terminal:
            self.console.width = 180

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def track(self, steps: Iterable[Any], name: str) -> Iterable[Any]:
        """The steps, with a bar on a terminal."""
        if not self.console.is_terminal:
            return steps
        from rich.progress import track

        return track(steps, name, console=self.console, transient=True)

    @contextlib.contextmanager
    def steps(self, total: int, first: int) -> Iterator[Callable[..., None]]:
        """Gives a function to be called after each step: (step, loss, norm, tokens per second,
        loss scale or None, skipped steps so far)."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("step"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        task = bar.add_task("", total=total, completed=first, text="")

        def show(step, loss, norm, rate, scale, skipped):
            text = f"loss {loss:.3f}"
            if norm is not None:
                text += f", gradient norm {norm:.2f}"
            if scale is not None:
                text += f", loss scale {scale:g}"
            if scale is not None or skipped:
                text += f", {skipped} skipped"
            text += f", {rate:.0f} tokens/s, peak memory {gib(peak_memory())} GiB"
            bar.update(task, completed=step, text=text)
            every = max(1, total // LINES)
            if not self.console.is_terminal and (step % every == 0 or step in (1, total)):
                self.say(f"step {step}/{total}: {text}")

        with bar:
            yield show

    def table(self, reports: Sequence[Report]) -> None:
        """One row a run."""
        from rich.table import Table

        name = reports[0].after.name
        table = Table(title=f"{name} of held-out data, {reports[0].steps} steps; memory in GiB")
        table.add_column("optimizer", no_wrap=True)
        for column in (
            "before", "after, 95 % interval", "loss", "skipped", "seconds", "trainable",
            "parameters", "gradients", "states", "activations",
        ):  # fmt: skip
            table.add_column(column, justify="right")
        for r in reports:
            low, high = r.after.interval
            table.add_row(
                r.optimizer, f"{r.before.value:.3f}",
                f"{r.after.value:.3f} ({low:.3f} to {high:.3f})", f"{r.loss:.3f}", str(r.skipped),
                f"{r.seconds:.0f}", f"{r.trainable:,}", gib(r.parameter_bytes),
                gib(r.gradient_bytes), gib(r.state_bytes), gib(r.activation_bytes),
            )  # fmt: skip
        self.console.print(table)
