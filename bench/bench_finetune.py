"""The main job with LOMO, AdaLomo, SGD and AdamW on the same data, as rows.

    python -m bench.bench_finetune [--definitions FOLDER] [--only adalomo]

FOLDER is what `python examples/wordnet.py` wrote; without it only the default data is
run. Takes about 15 minutes on two CPU cores for each of the two tasks. With --only the rows of
other runs stay as they are.
"""

import argparse
import dataclasses
from pathlib import Path

from lomo_kernels import finetune

from . import record

# Runs, by the name in their rows; lomo_kernels.finetune has their learning rates.
RUNS = {
    "lomo (two_backward)": {"strategy": "two_backward"},
    "lomo": {},
    "adalomo": {"optimizer": "adalomo"},
    "sgd": {"optimizer": "sgd"},
    "adamw": {"optimizer": "adamw"},
}


def rows_of(task, settings, names):
    for name in names:
        # lr=None: each optimizer has a default of its own
        r = finetune.run(dataclasses.replace(settings, lr=None, **RUNS[name]))
        yield {
            "task": task,
            "optimizer": r.optimizer,
            "steps": r.steps,
            "score": r.after.name,
            "before": f"{r.before.value:.4f}",
            "after": f"{r.after.value:.4f}",
            "loss": f"{r.loss:.4f}",
            "seconds": f"{r.seconds:.1f}",
            "gradient_bytes": r.gradient_bytes,
            "state_bytes": r.state_bytes,
        }


def place(row):
    """Where a row stands in the table: by task, then as in RUNS."""
    return row["task"], list(RUNS).index(row["optimizer"].partition(",")[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--definitions", type=Path)
    parser.add_argument("--only", choices=RUNS, help="one run; the others' rows stay")
    options = parser.parse_args()
    names = [options.only] if options.only else list(RUNS)
    rows = list(rows_of("Python's language reference", finetune.Settings(), names))
    if options.definitions:
        settings = finetune.Settings(
            train=str(options.definitions / "train.jsonl"),
            held_out=str(options.definitions / "held_out.jsonl"),
            batch_size=16,
            eval_size=256,
        )
        rows += rows_of("WordNet definitions", settings, names)
    kept = []
    if options.only:
        ran = {(row["task"], row["optimizer"]) for row in rows}
        kept = [r for r in record.read("cpu_finetune") if (r["task"], r["optimizer"]) not in ran]
    rows = sorted([*kept, *rows], key=place)
    print(record.write("cpu_finetune", rows))


if __name__ == "__main__":
    main()
