"""Jobs in the order of what they tell, within a budget of time; rows are saved as they are made.

Note [Processes]: on a GPU each job has a process of its own. What one leaves behind (a graph that
was not captured, an error of a kernel, memory that others pin) is gone with it, and one that hangs
is ended.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import fake_gpu, record, timing

KEY = ("bench", "case", "what", "options", "dtype")
FIELDS = (
    *KEY, "tensors", "numel", "bytes", "p20_us", "p50_us", "p80_us", "host_us", "gb_per_s",
    "copy_gb_per_s", "of_copy", "of_sheet", "flops", "tflop_per_s", "timed", "per_tensor_us",
    "launches", "host_reads", "tokens_per_s", "peak_bytes", "parameters_bytes", "gradients_bytes",
    "states_bytes", "activations_bytes", "other_bytes", "note", "date", "device", "versions",
    "commit", "clocks",
)  # fmt: skip


ROOT = Path(__file__).parent.parent
LEAST = 20  # seconds of a process: to start, to compile kernels, to tell something
MOST = 240  # after which it hangs
ENDED = "ended, the rows before are kept"


class Job(NamedTuple):
    """rank: what runs first. run(seconds) yields rows, dicts of some of FIELDS. numel: elements of
    its tensors, to leave out what is larger than asked for. least: seconds without which it is not
    begun on a GPU."""

    rank: int
    name: str
    run: Callable
    numel: int = 0
    least: float = LEAST


def timed(rank, where, bench, case, rivals):
    """The job that times `rivals(case, where)`."""

    def run(seconds):
        return timing.rows(where, bench, case, rivals(case, where), seconds)

    return Job(rank, f"{bench}: {case.name}, {case.dtypes}", run, case.numel)


def chosen(jobs, where, only=("",)):
    """Of functions that take `where` and yield jobs: those that fit, by rank, whose names have one
    of the texts `only`."""
    found = (job for each in jobs for job in each(where) if job.numel <= where.largest)
    named = [job for job in found if any(text in job.name for text in only)]
    return sorted(named, key=lambda job: job.rank)


def run(jobs, where, minutes, path, apart=None, say=print):
    """Runs what fits into the budget; -> lines about the jobs that failed or had no time.

    apart(job, seconds, limit) runs a job in another process, which has failed where it is still
    there after MOST seconds; None: here.
    """
    end = time.monotonic() + 60 * minutes
    left = []
    for i, job in enumerate(jobs):
        remaining = end - time.monotonic()
        if remaining <= (job.least if apart else 0):
            left.append(f"no time: {job.name}")
            continue
        say(f"[{i + 1}/{len(jobs)}, {remaining:.0f} s left] {job.name}")
        # No job takes more than it can of what is left, and none more than it needs.
        seconds = max(0.1, min(6.0, remaining / 20))
        if apart:
            failure = apart(job, seconds, min(MOST, remaining))
        else:
            failure = run_one(job, seconds, path)
        if failure:
            failed = failure != ENDED or remaining > MOST
            left.append(f"{'failed' if failed else 'no time'}: {job.name}: {failure}")
            say(left[-1])
        gc.collect()
    return left


def run_one(job, seconds, path):
    """Saves the rows of a job; -> the failure that ended it, which costs the other jobs nothing."""
    try:
        for row in job.run(seconds):
            record.merge(path, [row], KEY, FIELDS)
    except Exception as error:
        return timing.note(error)
    return None


def process(where, folder, *more):
    """The `apart` of `run`: `python -m bench --job` with the same device and folder."""

    def apart(job, seconds, limit):
        command = [
            sys.executable, "-m", "bench", "--job", job.name, "--minutes", f"{seconds / 60}",
            "--largest", str(where.largest), "--out", str(folder.resolve()), *more,
        ]  # fmt: skip
        sys.stdout.flush()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return ENDED
        return f"exit {status}" if status else None

    return apart


OURS = ("auto", "native", "triton", "Lomo", "AdaLomo")
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
    parser.add_argument("--fake-gpu", action="store_true", help=argparse.SUPPRESS)
    return parser


def apart(options, where, folder):
    """How the jobs of a command line are run."""
    if not where.gpu:
        return None
    return process(where, folder, *(["--fake-gpu"] if options.fake_gpu else []))


def arguments(parser):
    options = parser.parse_args()
    if options.fake_gpu:
        fake_gpu.install()
    return options


def main(jobs, text):
    """The command line of one bench."""
    options = arguments(parser(text.split("\n\n")[0]))
    where = timing.Where.here(options.largest)
    path = options.out / f"{record.device_name()}.csv"
    before = {tuple(row[k] for k in KEY): row for row in record.load(path)}
    found = chosen(jobs, where)
    left = run(found, where, options.minutes, path, apart(options, where, options.out))
    new = [row for row in record.load(path) if before.get(tuple(row[k] for k in KEY)) != row]
    print("\n".join(lines(new)))
    print("\n".join([*left, str(path)]))
    return any(line.startswith("failed") for line in left)
