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
    """Of the code that is measured; a tree with changes is marked, it is nobody's commit; one that
    git does not know is "unknown"."""
    root = Path(__file__).parent.parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "lomo_kernels", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


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


def device_name():
    """Of the file with its rows: the GPU's, or "cpu"."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


ASK = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]


def clocks_while(work):
    """Of processor or of GPU and its memory, in MHz, while `work` runs again and again;
    measurements leave them as they are."""
    try:
        if torch.cuda.is_available():
            with subprocess.Popen(ASK, stdout=subprocess.PIPE, text=True) as asked:
                while asked.poll() is None:  # an idle GPU would slow down until it answers
                    work()
                return asked.stdout.read().splitlines()[0]
        cores = re.findall(r"cpu MHz\s*: (\S+)", Path("/proc/cpuinfo").read_text())
        return f"{sum(map(float, cores)) / len(cores):.0f} MHz"
    except (OSError, IndexError, ZeroDivisionError):
        return "unknown"


def write(name, rows):
    """Replaces bench/results/NAME.csv; rows that were read from there keep their context."""
    rows = [row if "commit" in row else {**row, **context()} for row in rows]
    return _save(RESULTS / f"{name}.csv", rows, list(rows[0]))


def merge(path, rows, key, fields):
    """Adds rows to a file, in place of those with the same values of `key`; those that were read
    from a file keep their context."""
    kept = {tuple(row[k] for k in key): row for row in load(path)}
    for row in rows:
        place = tuple(str(row.get(k, "")) for k in key)
        kept[place] = row if "commit" in row else {**row, **context()}
    return _save(path, list(kept.values()), fields)


def _save(path, rows, fields):
    """The file is whole or as before: rows of hours are in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.rename(path)
    return path


def read(name):
    return load(RESULTS / f"{name}.csv")


def load(path):
    """Rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
