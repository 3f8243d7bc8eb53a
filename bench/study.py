"""Full tuning beside adapters on questions with known answers, as rows with every item's outcome.

    python -m bench.study [--task wordnet|cb|...|all] [--data SuperGLUE] [--hours 3]

For each task: the most frequent answer, the model as it is, then a run for each method and learning
rate, scored on a validation part; then, with the best rate of each, a run for each new seed and
method, scored on the test part. Each run is a process of its own and its row is written when it
ends: the same command goes on where it was stopped. `python -m bench.readme` draws docs/study.md.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lomo_kernels.finetune import Display, Settings
from lomo_kernels.finetune.sources import DataError

from . import paired, record, study_runs
from .study_job import MEMORY
from .study_runs import LENGTH, METHODS, TASKS, UNTRAINED, Run, planned, rates, without_peft

ROOT = Path(__file__).parent.parent
KEY = ("task", "model", "dtype", "method", "lr", "seed", "part", "steps", "batch_size", "data")
FIELDS = (
    *KEY, "count", "right", "items", "loss", "step_cpu_seconds", "cpu_seconds", "seconds",
    *MEMORY, "peak_bytes", "error", "date", "device", "versions", "commit",
)  # fmt: skip


# -- one run ---------------------------------------------------------------------------------------


def started(job, threads):
    """The columns that a process found, or only why it ended without."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="lomo-kernels-") as folder:
        found = Path(folder) / "found.json"
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.study_job", found], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            _, said = process.communicate(json.dumps(job))
        finally:
            process.kill()  # of no consequence to one that has ended
        if process.returncode == 0:
            return json.loads(found.read_text())
    lines = said.strip().splitlines() or [f"it ended with status {process.returncode}"]
    return {"error": lines[-1][:200]}


class Study:
    """The rows of a file, and the runs that are missing in it."""

    def __init__(self, options, folder, display):
        self.options, self.folder, self.display = options, folder, display
        self.data, self.digests, self.letters = {}, {}, {}
        name = Path(options.model).name if Path(options.model).is_dir() else options.model
        on_gpu = options.device != "cpu" and not options.autocast
        self.dtype = "bfloat16" if on_gpu else "float32"
        dtype = self.dtype + (", autocast" if options.autocast else "")
        self.common = {"model": name, "dtype": dtype, "batch_size": options.batch_size}
        self.rows = {_key(row): row for row in record.load(options.rows)}

    def read(self, task):
        """Reads the questions of a task, and writes them where the runs find them."""
        data = self.data[task] = study_runs.read(task, self.options)
        for part, rows in data._asdict().items():
            path = self.folder / f"{task}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            self.digests[task, part] = data.digest(part)
            self.letters[task, part] = sum(len(row["prompt"]) for row in rows)

    def place(self, run):
        """The columns by which the row of a run is found."""
        return self.common | {
            "task": run.task,
            "method": run.method,
            "lr": "" if run.lr is None else f"{run.lr:g}",
            "seed": "" if run.seed is None else run.seed,
            "part": run.part,
            "steps": 0 if run.method in UNTRAINED else self.options.steps,
            "data": self.digests[run.task, run.part],
        }

    def row(self, run):
        """The row of a run that was successful, or None."""
        row = self.rows.get(_key(self.place(run)))
        return None if row is None or row["error"] else row

    def with_rate(self, run):
        """The Run with its learning rate: the one of those that were tried with the most right
        answers on the validation part, the smaller of equals. None while one is missing."""
        if run.method in UNTRAINED or run.lr is not None:
            return run
        tried = [
            run._replace(lr=lr, seed=0, part="validation")
            for lr in rates(run.method, self.options.rates)
        ]
        if any(_key(self.place(each)) not in self.rows for each in tried):
            return None
        rows = {each.lr: row for each in tried if (row := self.row(each)) is not None}
        if not rows:
            return None
        return run._replace(lr=max(rows, key=lambda lr: (int(rows[lr]["right"]), -lr)))

    def carry_out(self, run):
        """Runs it and writes its row, which comes back."""
        data, options = self.data[run.task], self.options
        if run.method == "majority":
            found = study_runs.majority(data, run.part)
        else:
            trains, before = run.method in METHODS, None
            more = METHODS[run.method] | {"lr": run.lr, "seed": run.seed} if trains else {}
            if (known := self.row(Run(run.task, "zero-shot", run.part))) is not None:
                before = paired.bits(known["items"], int(known["count"]))
            settings = {
                "model": options.model, "device": options.device, "dtype": self.dtype,
                "autocast": options.autocast, "checkpointing": options.checkpointing,
                "train": str(self.folder / f"{run.task}-train.jsonl"),
                "held_out": str(self.folder / f"{run.task}-{run.part}.jsonl"),
                "eval_size": len(getattr(data, run.part)), "length": LENGTH,
                "steps": options.steps, "batch_size": options.batch_size, **more,
            }  # fmt: skip
            job = {"settings": settings, "trains": trains, "before": before}
            found = started(job, options.threads)
        row = {"error": "", **self.place(run), **found}
        path = record.merge(options.rows, [row], KEY, FIELDS)
        self.rows = {_key(each): each for each in record.load(path)}
        return self.rows[_key(row)]

    # -- how long it takes -------------------------------------------------------------------------

    def work(self, run):
        """What a run costs, but for a factor: letters that pass through the model, thrice in
        training."""
        scored = self.letters[run.task, run.part]
        if run.method in UNTRAINED:
            return scored if run.method == "zero-shot" else 0
        passes = self.options.steps * self.options.batch_size / len(self.data[run.task].train)
        return scored + 3 * passes * self.letters[run.task, "train"]

    def seconds(self, run, runs):
        """What a run is expected to take, by those that are finished; None before the first."""
        pace = [
            float(row["seconds"]) / self.work(each)
            for each in runs
            if (settled := self.with_rate(each)) is not None
            and (row := self.row(settled)) is not None
            and row["seconds"]
        ]
        return statistics.median(pace) * self.work(run) if pace else None


def _key(row):
    return tuple(str(row[name]) for name in KEY)


# -- all of them -----------------------------------------------------------------------------------


def parser():
    found = argparse.ArgumentParser(
        prog="python -m bench.study", description=__doc__.split("\n\n")[0]
    )
    add = found.add_argument
    add("--task", default="wordnet,cb,copa",
        help=f"all, or some of {', '.join(TASKS)}; by default wordnet,cb,copa")  # fmt: skip
    add("--data", help="folder of SuperGLUE's release, or a data set of the hub's format")
    add("--wordnet", default="/usr/share/wordnet", help="folder with data.noun")
    add("--model", default=Settings().model, help="as of lomo-kernels finetune")
    add("--methods", default=",".join(METHODS), help=f"by default {','.join(METHODS)}")
    add("--rates", type=int, default=3, help="learning rates that are tried for each method")
    add("--seeds", type=int, default=3, help="runs of each method on the test part")
    add("--steps", type=int, default=32)
    add("--batch-size", type=int, default=8)
    add("--validation-size", type=int, default=200, help="questions to choose the rates by")
    add("--test-size", type=int, default=1000)
    add("--autocast", action="store_true", help="compute in bfloat16 with float32 weights")
    add("--checkpointing", action="store_true", help="recompute activations in backward")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="of each run; by default torch's choice")
    add("--hours", type=float, help="begin no run that would not end within so many")
    add("--rows", type=Path, default=record.RESULTS / "study.csv", help="file with the rows")
    add("--dry-run", action="store_true", help="list the runs, and stop")
    return found


def _named(text, known, option):
    names = list(known) if text == "all" else text.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"{option} takes {', '.join(known)}, got {name!r}")
    return names


def main(arguments=None):
    options = parser().parse_args(arguments)
    tasks = _named(options.task, TASKS, "--task")
    methods, display = _named(options.methods, METHODS, "--methods"), Display()
    if importlib.util.find_spec("peft") is None and methods != (able := without_peft(methods)):
        display.say("methods with adapters are left out: pip install 'lomo_kernels[adapters]'")
        methods = able
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the run in progress ends
    with tempfile.TemporaryDirectory(prefix="lomo-kernels-") as folder:
        study, runs = Study(options, Path(folder), display), []
        for task in tasks:
            try:
                study.read(task)
            except DataError as error:
                display.say(f"{task} is left out: {error}")
                continue
            runs += planned(task, methods, options.rates, options.seeds)
        if options.dry_run:
            return listed(study, runs)
        return carried_out(study, runs)


def listed(study, runs):
    missing = 0
    for run in runs:
        settled = study.with_rate(run)
        done = settled is not None and study.row(settled) is not None
        seconds = study.seconds(run, runs)
        missing += 0 if done or seconds is None else seconds
        expected = "" if seconds is None else f", about {seconds / 60:.1f} min"
        study.display.say(f"{settled or run}: {'there is a row' if done else f'to do{expected}'}")
    estimate = f"about {missing / 3600:.1f} hours are left" if missing else (
        "how long they take is known after the first run"
    )  # fmt: skip
    study.display.say(f"{len(runs)} runs; {estimate}")
    return 0


def carried_out(study, runs):
    """-> exit status: 0 when nothing is missing."""
    say, end, missing = study.display.say, None, 0
    if study.options.hours is not None:
        end = time.monotonic() + 3600 * study.options.hours
    for number, run in enumerate(study.display.track(runs, "runs"), 1):
        settled = study.with_rate(run)
        if settled is None:
            say(f"{run}: left out, because no learning rate could be chosen")
            missing += 1
        elif study.row(settled) is None:
            expected = study.seconds(settled, runs) or 0
            if end is not None and time.monotonic() + expected > end:
                say(f"{settled}: about {expected / 60:.1f} min do not fit into --hours; "
                    "the same command goes on")  # fmt: skip
                return 1
            row = study.carry_out(settled)
            missing += bool(row["error"])
            told = row["error"] or f"{row['right']} of {row['count']} are right"
            say(f"{number} of {len(runs)}: {settled}: {told}")
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
