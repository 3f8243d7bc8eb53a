"""Every benchmark within a budget of time, most informative first; rows, plots and a short table.

    python -m bench [--minutes 8] [--only TEXT] [--largest N] [--out FOLDER]
    python -m bench --check [--out FOLDER]

Runs whole on a CPU and on an NVIDIA GPU. Rows go to OUT/<device>.csv after each job, in place of
those of the same measurement, and plots to OUT/<device>/, drawn from that file alone. --check
measures nothing: it holds the rows to the targets.
"""

import functools

import torch

from . import (
    bench_adalomo,
    bench_grad_norm,
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
        bench_lomo_update, bench_grad_norm, bench_adalomo, bench_product_update,
        bench_product_sumsq, bench_host, bench_train_step,
    )
]  # fmt: skip


def check(folder):
    """-> the lines; and whether a target is missed."""

    @functools.cache
    def rows_of(device):
        return record.load(folder / f"{device}.csv")

    found = list(targets.check(rows_of))
    lines = [f"{d:12} {text:66} {wanted:>8} {value:>8}  {v}" for d, text, wanted, value, v in found]
    return lines, any(verdict == "missed" for *_, verdict in found)


def parser():
    parser = suite.parser(__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="jobs whose name has this text")
    parser.add_argument("--check", action="store_true", help="hold the rows to the targets")
    return parser


def main():
    options = parser().parse_args()
    if options.check:
        lines, missed = check(options.out)
        print("\n".join(lines))
        return int(missed)
    where = timing.Where.here(options.largest)
    name = record.device_name()
    path = options.out / f"{name}.csv"
    left = suite.run(JOBS, where, options.minutes, path, options.only)
    rows = record.load(path)
    for drawn in plots.draw(rows, options.out / name):
        print(drawn)
    print("\n".join(suite.table(rows)))
    print("\n".join(left))
    print("\n".join(line for line in check(options.out)[0] if line.startswith(name)))
    print(f"{path}: {len(rows)} rows, torch {torch.__version__}")
    return int(any(line.startswith("failed") for line in left))


if __name__ == "__main__":
    raise SystemExit(main())
