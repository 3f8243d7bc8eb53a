"""Full tuning beside adapters on questions with known answers, as rows with every item's outcome.

    python -m bench.study [--task wordnet|cb|...|all] [--data SuperGLUE] [--hours 3]

For each task: the most frequent answer, the model as it is, then a run for each method and learning
rate, scored on a validation part; then, with the best rate of each, a run for each new seed and
method, scored on the test part. Each run is a process of its own and its row is written when it
ends: the same command goes on where it was stopped. `python -m bench.readme` draws docs/study.md.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from lomo_kernels.finetune import OPTIMIZERS, Display, Settings, superglue, wordnet
from lomo_kernels.finetune.sources import DataError

from . import paired, record

ROOT = Path(__file__).parent.parent
TASKS = ("wordnet", *superglue.TASKS)
TRAIN = 1000  # questions to train on, as in the LOMO paper
LENGTH = 512  # tokens of a question at most
KEY = ("task", "model", "dtype", "method", "lr", "seed", "part", "steps", "batch_size", "data")
FIELDS = (
    *KEY, "count", "right", "items", "loss", "step_cpu_seconds", "cpu_seconds", "seconds",
    "gradient_bytes", "state_bytes", "peak_bytes", "error", "date", "device", "versions", "commit",
)  # fmt: skip


class Method(NamedTuple):
    """`lr` is the middle of the rates that are tried."""

    settings: dict
    lr: float


METHODS = {
    **{
        name: Method({"optimizer": name}, OPTIMIZERS[name]) for name in ("lomo", "adalomo", "adamw")
    },
    "lora": Method({"adapter": "lora"}, 2e-3),
    "lora+lomo": Method({"adapter": "lora+lomo"}, 0.1),
    "prefix": Method({"adapter": "prefix"}, 1e-2),
}
UNTRAINED = ("majority", "zero-shot")


class Run(NamedTuple):
    task: str
    method: str
    part: str  # "validation" or "test"
    lr: float | None = None  # None with a seed: the one that was best on the validation part
    seed: int | None = None

    def __str__(self):
        lr = "the best rate" if self.lr is None else f"lr {self.lr:g}"
        how = "" if self.seed is None else f", {lr}, seed {self.seed}"
        return f"{self.task}, {self.method}{how}, {self.part} part"


class Data(NamedTuple):
    """The questions of a task, as rows of --train."""

    train: list
    validation: list
    test: list

    def digest(self, part):
        text = json.dumps([self.train, getattr(self, part)])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


# -- what is run -----------------------------------------------------------------------------------


def rates(middle, count):
    """Learning rates half a power of ten apart, with one digit: 0.03, 0.1, 0.3."""
    first = -((count - 1) // 2)
    return [float(f"{middle * 10 ** (k / 2):.0e}") for k in range(first, first + count)]


def planned(task, methods, count, seeds):
    """The Runs of a task, so that what is finished at any moment says the most."""
    for name in UNTRAINED:
        yield from (Run(task, name, part) for part in ("validation", "test"))
    for name in methods:
        yield from (Run(task, name, "validation", lr, 0) for lr in rates(METHODS[name].lr, count))
    for seed in range(1, seeds + 1):
        yield from (Run(task, name, "test", None, seed) for name in methods)


def available(names):
    """-> (the methods that can be run here, why each of the others cannot)."""
    can, cannot = [], {}
    for name in names:
        try:
            Settings(**METHODS[name].settings)
        except (TypeError, ValueError):
            cannot[name] = "this version of lomo_kernels does not have it"
            continue
        if "adapter" in METHODS[name].settings and importlib.util.find_spec("peft") is None:
            cannot[name] = "peft is not installed"
        else:
            can.append(name)
    return can, cannot


def read(task, options):
    """The Data of a task. The rates are chosen on a part that was to be trained on; the test part
    is SuperGLUE's validation part, as in the LOMO paper, and the same for every seed.

    Raises:
        DataError: there is none.
    """
    if task == "wordnet":
        path = Path(options.wordnet) / "data.noun"
        if not path.is_file():
            raise DataError(f"there is no file {path}: apt-get install wordnet-base")
        apart = options.validation_size + options.test_size
        try:
            train, held_out = wordnet.questions(path, TRAIN, apart, seed=0)
        except ValueError as error:
            raise DataError(str(error)) from error
        return Data(train, held_out[: options.validation_size], held_out[options.validation_size :])
    if options.data is None:
        raise DataError("--data names no folder with it")
    train, test = superglue.read(task, options.data)
    if test is None:
        raise DataError(f"{options.data} has no validation part of it")
    validation = superglue.sampled(train, min(options.validation_size, len(train) // 4), 0)
    apart = set(validation)  # a question that is there twice is not trained on either
    train = [question for question in train if question not in apart]
    train, test = (
        superglue.sampled(part, size, 0)
        for part, size in ((train, TRAIN), (test, options.test_size))
    )
    return Data(*([_row(question) for question in part] for part in (train, validation, test)))


def _row(question):
    return {"prompt": question.prompt, "completion": question.completion,
            "choices": list(question.choices)}  # fmt: skip


# -- one run ---------------------------------------------------------------------------------------


def majority(data, part):
    """The columns of the answer that is most frequent in training: the same text, or the same place
    among the choices."""

    def label(row):
        return row["choices"].index(row["completion"]) if "choices" in row else row["completion"]

    ((most, _),) = Counter(map(label, data.train)).most_common(1)
    items = "".join(str(int(label(row) == most)) for row in getattr(data, part))
    return {"count": len(items), "right": items.count("1"), "items": paired.packed(items)}


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
        self.data = {}
        name = Path(options.model).name if Path(options.model).is_dir() else options.model
        on_gpu = options.device != "cpu" and not options.autocast
        self.dtype = "bfloat16" if on_gpu else "float32"
        dtype = self.dtype + (", autocast" if options.autocast else "")
        self.common = {"model": name, "dtype": dtype, "batch_size": options.batch_size}
        self.rows = {_key(row): row for row in record.load(options.rows)}

    def read(self, task):
        """Reads the questions of a task, and writes them where the runs find them."""
        data = self.data[task] = read(task, self.options)
        for part, rows in data._asdict().items():
            path = self.folder / f"{task}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def place(self, run):
        """The columns by which the row of a run is found."""
        return self.common | {
            "task": run.task,
            "method": run.method,
            "lr": "" if run.lr is None else f"{run.lr:g}",
            "seed": "" if run.seed is None else run.seed,
            "part": run.part,
            "steps": 0 if run.method in UNTRAINED else self.options.steps,
            "data": self.data[run.task].digest(run.part),
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
            for lr in rates(METHODS[run.method].lr, self.options.rates)
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
            found = majority(data, run.part)
        else:
            trains, before = run.method in METHODS, None
            more = METHODS[run.method].settings | {"lr": run.lr, "seed": run.seed} if trains else {}
            if (known := self.row(Run(run.task, "zero-shot", run.part))) is not None:
                right, count = int(known["right"]), int(known["count"])
                before = {"name": "accuracy", "value": right / count, "count": count}
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
        data = self.data[run.task]
        letters = {
            part: sum(len(row["prompt"]) for row in rows) for part, rows in data._asdict().items()
        }
        if run.method == "majority":
            return 0
        if run.method == "zero-shot":
            return letters[run.part]
        trained = self.options.steps * self.options.batch_size / len(data.train)
        return letters[run.part] + 3 * trained * letters["train"]

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
    methods, cannot = available(_named(options.methods, METHODS, "--methods"))
    display = Display()
    for name, reason in cannot.items():
        display.say(f"{name} is left out: {reason}")
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
