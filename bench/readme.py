"""Draws the tables of README and docs from the rows in bench/results.

python -m bench.readme            writes them
python -m bench.readme --check    fails when it would change one
"""

import re
import sys
from pathlib import Path

from . import memory, performance, record, strategies, study_table

ROOT = Path(__file__).parent.parent


def _source(rows, name):
    origins = dict.fromkeys(
        f"{r['device']}; {r['versions']}; commit {r['commit']}, {r['date']}" for r in rows
    )
    return f"\n{'; and '.join(origins)} ([rows]({ROWS}/{name}.csv)).\n"


ROWS = "/bench/results"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def finetune():
    rows = record.read("cpu_finetune")
    body = [
        [
            r["task"],
            r["optimizer"],
            f"{r['score']} {float(r['before']):.3f}",
            f"{float(r['after']):.3f}",
            f"{float(r['seconds']):.0f}",
            f"{int(r['gradient_bytes']) / 2**30:.3f}",
            f"{int(r['state_bytes']) / 2**30:.3f}",
        ]
        for r in rows
    ]
    head = ["task", "optimizer", "before", "after", "s", "gradients held, GiB", "states, GiB"]
    return _table(head, body) + _source(rows, "cpu_finetune")


PAGES = {
    "README.md": {
        "finetune": finetune,
        "performance": performance.performance,
        "strategies": strategies.table,
        "cards": memory.cards,
    },
    "docs/adapters.md": {"adapters": memory.adapters},
    "docs/memory.md": {"table1": memory.table1},
    "docs/strategies.md": {"strategies": strategies.whole_table},
    "docs/study.md": {"study": study_table.table},
}


def drawn(text, tables):
    for name, draw in tables.items():
        pattern = rf"(<!-- table {name}: begin -->\n).*?(<!-- table {name}: end -->)"
        text, count = re.subn(
            pattern, lambda m, draw=draw: m[1] + draw() + m[2], text, flags=re.DOTALL
        )
        assert count == 1, name
    return text


def main():
    for name, tables in PAGES.items():
        page = ROOT / name
        text = page.read_text()
        new = drawn(text, tables)
        if "--check" in sys.argv and new != text:
            return f"{name} is not what bench/results gives: run python -m bench.readme"
        page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
