"""docs/study.md's tables and what they allow to be said, from the rows of bench.study."""

import itertools
from typing import NamedTuple

import torch

from . import paired, record, tables
from .study_job import MEMORY
from .study_runs import METHODS, TASKS, UNTRAINED

BESIDE = "lomo"  # the method that the others' differences are to


class Group(NamedTuple):
    """What rows must have in common for their items to be the same ones."""

    task: str
    model: str
    dtype: str
    steps: str
    batch_size: str


def group_of(row):
    return Group(*(row[name] for name in Group._fields))


def outcomes(rows):
    """{method: [seeds, items] of 0 and 1} of the seeds that every method has, on the test part."""
    found = {}
    for row in rows:
        if row["part"] == "test" and row["method"] in METHODS:
            values = paired.unpacked(row["items"], int(row["count"]))
            found.setdefault(row["method"], {})[int(row["seed"])] = values
    common = sorted(set.intersection(*map(set, found.values()))) if found else []
    names = [name for name in METHODS if name in found]
    return {name: torch.stack([found[name][s] for s in common]) for name in names if common}


def told_apart(values):
    """-> (pairs of methods of which the first is better, the other pairs). All of these statements
    together are to hold with 95 %, so each interval is that much wider (Bonferroni)."""
    pairs = list(itertools.combinations(values, 2))
    better, open_ = [], []
    for one, other in pairs:
        low, high = paired.interval(values[one] - values[other], 1 - 0.05 / len(pairs))
        if low > 0:
            better.append((one, other))
        elif high < 0:
            better.append((other, one))
        else:
            open_.append((one, other))
    return better, open_


def section(group, rows, untrained):
    """The table of one group, and what it says in words."""
    values = outcomes(rows)
    body = [_fixed(row) for name in UNTRAINED for row in untrained if row["method"] == name]
    body += [_cells(name, values, rows) for name in values]
    head = ["method", "learning rate", "validation", "test", "lowest to highest seed", "95 %",
            f"beside {BESIDE}, 95 %", "CPU s a step",
            *(f"{_kind(name)}, GiB" for name in MEMORY)]  # fmt: skip
    seeds, items = next(iter(values.values())).shape
    title = (
        f"**{group.task}**: {group.model}, {group.dtype}, {group.steps} steps of "
        f"{group.batch_size} questions; {items} questions in the test part, {seeds} seeds."
    )
    return f"{title}\n\n{tables.table(head, body)}\n{_said(values)}"


def _fixed(row):
    right, count = int(row["right"]), int(row["count"])
    low, high = paired.interval(paired.unpacked(row["items"], count)[None])
    return [row["method"], "", "", f"{right / count:.3f}", "", f"{low:.3f} to {high:.3f}",
            *[""] * (2 + len(MEMORY))]  # fmt: skip


def _cells(name, values, rows):
    mine, beside = values[name], values.get(BESIDE)
    means = mine.mean(1)
    low, high = paired.interval(mine)
    difference = ""
    if beside is not None and name != BESIDE:
        edges = paired.interval(mine - beside)
        difference = (
            f"{(mine - beside).mean():+.3f} ({' to '.join(f'{edge:+.3f}' for edge in edges)})"
        )
    rows = [row for row in rows if row["method"] == name]
    tests = [row for row in rows if row["part"] == "test"]
    tried = {float(row["lr"]): row for row in rows if row["part"] == "validation"}
    lr = float(tests[0]["lr"])
    chosen = tried[lr]
    seconds = sum(float(row["step_cpu_seconds"]) for row in tests) / len(tests)
    return [
        name,
        f"{lr:g} of {', '.join(f'{each:g}' for each in sorted(tried))}",
        f"{int(chosen['right']) / int(chosen['count']):.3f}",
        f"{mine.mean():.3f}",
        f"{means.min():.3f} to {means.max():.3f}",
        f"{low:.3f} to {high:.3f}",
        difference,
        f"{seconds:.1f}",
        *(_most(rows, name) for name in MEMORY),
    ]


def _kind(name):
    return f"{name.removesuffix('_bytes')}s"


def _most(rows, name):
    """GiB of the run with most; rows of versions that did not measure it have none."""
    sizes = [int(row[name]) for row in rows if row.get(name)]
    return f"{max(sizes) / 2**30:.3f}" if sizes else ""


def _said(values):
    better, open_ = told_apart(values)
    lines = [f"- {one} is better than {other} here." for one, other in better]
    if open_:
        pairs = "; ".join(f"{one} and {other}" for one, other in open_)
        lines.append(f"- No difference is shown between {pairs}.")
    return "\n".join(lines) + "\n"


def table():
    """All groups, then what has no rows."""
    rows = [row for row in record.read("study") if not row["error"]]
    groups = {}
    for row in rows:
        if row["method"] in METHODS:
            groups.setdefault(group_of(row), []).append(row)
    parts, shown = [], set()
    for group, members in groups.items():
        values = outcomes(members)
        if not values:
            continue
        tests = {row["data"] for row in members if row["part"] == "test"}
        untrained = [
            row for row in rows
            if row["method"] in UNTRAINED and row["part"] == "test" and row["data"] in tests
            and (row["model"], row["dtype"]) == (group.model, group.dtype)
        ]  # fmt: skip
        parts.append(("\n" if parts else "") + section(group, members, untrained))
        shown.add(group.task)
        if missing := [name for name in METHODS if name not in values]:
            parts.append(f"- Not run: {', '.join(missing)}.\n")
    missing = [task for task in TASKS if task not in shown]
    parts.append(f"\nTasks without rows: {', '.join(missing)}.\n" if missing else "")
    return "".join(parts) + _origin(rows)


def _origin(rows):
    """Machines and versions, each with its commits: a study of hours may see several."""
    commits = {}
    for row in rows:
        origin = f"{row['device']}; {row['versions']}; {row['date']}"
        commits.setdefault(origin, {})[row["commit"]] = None
    return "".join(
        f"\n{origin}; commits {', '.join(some)}. Rows: `bench/results/study.csv`.\n"
        for origin, some in commits.items()
    )
