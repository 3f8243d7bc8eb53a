"""Jobs in the order of what they tell, within a budget of time; rows are saved after each."""

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import record, timing

KEY = ("bench", "case", "what", "options", "dtype")
FIELDS = (
    *KEY, "tensors", "numel", "bytes", "p20_us", "p50_us", "p80_us", "host_us", "gb_per_s",
    "copy_gb_per_s", "of_copy", "of_sheet", "flops", "tflop_per_s", "timed", "per_tensor_us",
    "launches", "host_reads", "tokens_per_s", "peak_bytes", "parameters_bytes", "gradients_bytes",
    "states_bytes", "activations_bytes", "other_bytes", "note", "date", "device", "versions",
    "commit", "clocks",
)  # fmt: skip


class Job(NamedTuple):
    """rank: what runs first. run(seconds) yields rows, dicts of some of FIELDS. numel: elements of
    its tensors, to leave out what is larger than asked for."""

    rank: int
    name: str
    run: Callable
    numel: int = 0


def timed(rank, where, bench, case, rivals):
    """The job that times `rivals(case, where)`."""

    def run(seconds):
        return timing.rows(where, bench, case, rivals(case, where), seconds)

    return Job(rank, f"{bench}: {case.name}, {case.dtypes}", run, case.numel)


def run(jobs, where, minutes, path, only="", say=print):
    """Runs what fits into the budget; -> lines about the jobs that failed or had no time.

    jobs: functions that take `where` and yield jobs. only: a text that their names have to have.
    """
    end = time.monotonic() + 60 * minutes
    jobs = sorted(
        (
            job
            for each in jobs
            for job in each(where)
            if job.numel <= where.largest and only in job.name
        ),
        key=lambda job: job.rank,
    )
    left = []
    for i, job in enumerate(jobs):
        remaining = end - time.monotonic()
        if remaining <= 0:
            left.append(f"no time for {job.name}")
            continue
        say(f"[{i + 1}/{len(jobs)}, {remaining:.0f} s left] {job.name}")
        # No job takes more than it can of what is left, and none more than it needs.
        seconds = max(0.1, min(6.0, remaining / 20))
        rows = []
        try:
            for row in job.run(seconds):
                rows.append(row)  # those before a failure are kept
        except Exception as error:  # the other jobs' time is not lost for it
            left.append(f"failed: {job.name}: {timing.note(error)}")
            say(left[-1])
        record.merge(path, rows, KEY, FIELDS)
        gc.collect()
        if where.gpu:
            torch.cuda.empty_cache()
    return left


OURS = ("native", "triton", "Lomo", "AdaLomo")
FLOORS = ("copy", "floor", "backward alone", "dW alone")


def table(rows):
    """A line for each case: our time with nothing asked for, and the fastest other's beside it."""
    cases = {}
    for row in rows:
        if row["p50_us"] and row["what"] not in FLOORS:
            cases.setdefault((row["bench"], row["case"], row["dtype"]), []).append(row)
    yield f"{'bench':12}{'case':40}{'dtype':10}{'ours':>12}{'of copy':>9}  fastest other, its time"
    for (bench, case, dtype), found in cases.items():
        ours = next((r for r in found if r["what"] in OURS), None)
        others = [r for r in found if r["what"] not in OURS]
        if ours is None or not others:
            continue
        other = min(others, key=lambda r: float(r["p50_us"]))
        name = ", ".join(filter(None, (other["what"], other["options"])))
        ratio = float(other["p50_us"]) / float(ours["p50_us"])
        share = f"{float(ours['of_copy']):.2f}" if ours["of_copy"] else ""
        yield (
            f"{bench:12}{case[:39]:40}{dtype[:9]:10}{duration(ours['p50_us']):>12}{share:>9}"
            f"  {name} {ratio:.2f}x"
        )


def lines(rows):
    """A line for each row: median, and from the 20th to the 80th percentile."""
    for r in rows:
        name = ", ".join(filter(None, (r["case"], r["dtype"], r["what"], r["options"])))
        if not r["p50_us"]:
            yield f"{name:80} {r['note']}"
            continue
        times = f"{duration(r['p50_us'])} ({duration(r['p20_us'])} to {duration(r['p80_us'])})"
        shares = (
            ("GB/s", "gb_per_s"), ("of copy", "of_copy"), ("of sheet", "of_sheet"),
            ("TFLOP/s", "tflop_per_s"),
        )  # fmt: skip
        rates = [f"{float(r[column]):.2f} {unit}" for unit, column in shares if r.get(column)]
        yield f"{name:80} {times:36} {', '.join(rates)}"


def duration(microseconds):
    us = float(microseconds)
    return f"{us:.1f} us" if us < 1e4 else f"{us / 1e3:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


SMALLEST = 4096  # elements of the smallest tensor of the models


def _elements(text):
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < SMALLEST:
        raise argparse.ArgumentTypeError(
            f"wanted a whole number of at least {SMALLEST}, got {text!r}"
        )
    return number


def parser(text):
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--minutes", type=float, default=8.0, help="budget of time")
    parser.add_argument("--largest", type=_elements, help="elements of a case, at most")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the rows")
    return parser


def main(jobs, text):
    """The command line of one bench."""
    options = parser(text.split("\n\n")[0]).parse_args()
    where = timing.Where.here(options.largest)
    path = options.out / f"{record.device_name()}.csv"
    before = {tuple(row[k] for k in KEY): row for row in record.load(path)}
    left = run(jobs, where, options.minutes, path)
    new = [row for row in record.load(path) if before.get(tuple(row[k] for k in KEY)) != row]
    print("\n".join(lines(new)))
    print("\n".join([*left, str(path)]))
    return any(line.startswith("failed") for line in left)
