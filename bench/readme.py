"""Draws the tables of README and docs from the rows in bench/results.

python -m bench.readme            writes them
python -m bench.readme --check    fails when it would change one
"""

import re
import sys
from pathlib import Path

from . import bench_compile, memory, performance, record, strategies, study_table, summary
from .tables import origin, table

ROOT = Path(__file__).parent.parent


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
    return table(head, body) + origin(rows, "cpu_finetune")


PAGES = {
    "README.md": {"summary": summary.drawn},
    "docs/adapters.md": {"adapters": memory.adapters},
    "docs/benchmarks.md": {"performance": performance.performance},
    "docs/clipping.md": {"strategies": strategies.drawn},
    "docs/compile.md": {"compile": bench_compile.drawn},
    "docs/experts.md": {"experts": memory.experts},
    "docs/finetune.md": {"finetune": finetune},
    "docs/memory.md": {"cards": memory.cards, "table1": memory.table1},
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
