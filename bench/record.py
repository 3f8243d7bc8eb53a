"""Rows of results with what is needed to read them: machine, versions, commit, date."""

import contextlib
import csv
import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

import lomo_kernels

RESULTS = Path(__file__).parent / "results"


def processor():
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*: (.*)", cpuinfo)[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def commit():
    """Of the code that is measured; a tree with changes is marked, it is nobody's commit."""
    root = Path(__file__).parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    changed = git("status", "--porcelain", "--", "csrc", "lomo_kernels", "bench/*.py")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


COMMIT = commit()  # when the code is loaded, not when the rows are written


def context():
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    versions = {"lomo_kernels": lomo_kernels.__version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["transformers"] = importlib.metadata.version("transformers")
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": COMMIT,
    }


def write(name, rows):
    """Replaces bench/results/NAME.csv; rows that were read from there keep their context."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    rows = [row if "commit" in row else {**row, **context()} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(name):
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
