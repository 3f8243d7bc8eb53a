"""Every benchmark within a budget of time, most informative first; rows, plots and a short table.

    python -m bench [--minutes 8] [--only TEXT ...] [--largest N] [--out FOLDER]
    python -m bench --check [--out FOLDER]
    python -m bench --take FILE ... [--out FOLDER]

Runs whole on a CPU and on an NVIDIA GPU. Rows go to OUT/<device>.csv as they are made, in place of
those of the same measurement, and plots to OUT/<device>/, drawn from that file alone. --check and
--take measure nothing: they hold the rows to the targets, and bring rows of other folders.
"""

import argparse
import functools
from pathlib import Path

from . import (
    bench_adalomo,
    bench_grad_sumsq,
    bench_host,
    bench_lomo_update,
    bench_product_sumsq,
    bench_product_update,
    bench_train_step,
    plots,
    record,
    suite,
    targets,
    timing,
)

JOBS = [
    each.jobs
    for each in (
        bench_lomo_update, bench_grad_sumsq, bench_adalomo, bench_product_update,
        bench_product_sumsq, bench_host, bench_train_step,
    )
]  # fmt: skip


def check(folder, *gpus):
    """-> the lines; and whether a target is missed. gpus: those with rows, unless named."""

    @functools.cache
    def rows_of(device):
        return record.load(folder / f"{device}.csv")

    gpus = gpus or sorted(path.stem for path in folder.glob("nvidia_*.csv"))
    found = list(targets.check(rows_of, gpus))
    lines = [f"{d:12} {text:74} {wanted:>8} {value:>8}  {v}" for d, text, wanted, value, v in found]
    return lines, any(verdict == "missed" for *_, verdict in found)


def parser():
    parser = suite.parser(__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="jobs whose name has such a text")
    parser.add_argument("--check", action="store_true", help="hold the rows to the targets")
    parser.add_argument("--take", type=Path, nargs="+", help="bring the rows of these files")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # suite.py, Note [Processes]
    return parser


def take(files, folder):
    for file in files:
        path = folder / file.name
        record.merge(path, record.load(file), suite.KEY, suite.FIELDS)
        show(path, plots.draw(record.load(path), folder / path.stem))


def show(path, drawn):
    for each in drawn:
        print(each)
    rows = record.load(path)
    print("\n".join(suite.table(rows)))
    lines, _ = check(path.parent, path.stem)
    print("\n".join(line for line in lines if line.startswith(path.stem)))
    print(f"{path}: {len(rows)} rows")


def main():
    options = suite.arguments(parser())
    if options.take:
        take(options.take, options.out)
        return 0
    if options.check:
        lines, missed = check(options.out)
        print("\n".join(lines))
        return int(missed)
    where = timing.Where.here(options.largest)
    name = record.device_name()
    path = options.out / f"{name}.csv"
    if options.job:
        named = [job for job in suite.chosen(JOBS, where) if job.name == options.job]
        if not named:
            return f"no job {options.job!r}"
        return suite.run_one(named[0], 60 * options.minutes, path)
    jobs = suite.chosen(JOBS, where, options.only)
    apart = suite.apart(options, where, options.out)
    left = suite.run(jobs, where, options.minutes, path, apart)
    show(path, plots.draw(record.load(path), options.out / name))
    print("\n".join(left))
    return int(any(line.startswith("failed") for line in left))


if __name__ == "__main__":
    raise SystemExit(main())
