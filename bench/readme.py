"""Draws README's tables from the rows in bench/results.

python -m bench.readme            writes README.md
python -m bench.readme --check    fails when it would change it
"""

import re
import sys
from pathlib import Path

from . import record, strategies

README = Path(__file__).parent.parent / "README.md"


def _source(rows, name):
    row = rows[0]
    return (
        f"\n{row['device']}; {row['versions']}; commit {row['commit']}, {row['date']} "
        f"([rows](bench/results/{name}.csv)).\n"
    )


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


def update():
    rows = record.read("cpu_lomo_update")
    eager = {r["dtype"]: float(r["p50_ms"]) for r in rows if r["what"] == "eager, all options"}
    body = [
        [
            r["dtype"],
            r["what"],
            f"{float(r['p50_ms']):.1f}",
            r["gb_per_s"],
            f"{eager[r['dtype']] / float(r['p50_ms']):.1f}x" if "norm" not in r["what"] else "",
        ]
        for r in rows
        if r["what"] != "copy"
    ]
    head = ["dtype", "what", "ms", "GB/s", "eager / this"]
    return (
        f"{int(rows[0]['numel']) / 2**20:.0f} Mi elements, median; GB/s counts the bytes that must "
        "move.\n\n" + _table(head, body) + _source(rows, "cpu_lomo_update")
    )


def drawn(text):
    for name, draw in (
        ("finetune", finetune),
        ("update", update),
        ("strategies", strategies.table),
    ):
        pattern = rf"(<!-- table {name}: begin -->\n).*?(<!-- table {name}: end -->)"
        text, count = re.subn(
            pattern, lambda m, draw=draw: m[1] + draw() + m[2], text, flags=re.DOTALL
        )
        assert count == 1, name
    return text


def main():
    text = README.read_text()
    new = drawn(text)
    if "--check" in sys.argv:
        return 0 if new == text else "README.md is not what bench/results gives: run bench.readme"
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
