"""The main job with LOMO, SGD and AdamW on the same data, as rows.

    python -m bench.bench_finetune [--definitions FOLDER]

FOLDER is what `python -m lomo_kernels.finetune.wordnet` wrote; without it only the default data is
run. Takes about 12 minutes on two CPU cores for each of the two tasks.
"""

import argparse
import dataclasses
from pathlib import Path

from lomo_kernels import finetune

from . import record


def rows_of(task, settings):
    two_backward = finetune.run(dataclasses.replace(settings, strategy="two_backward"))
    reports = finetune.compare(settings, finetune.run(settings), ["sgd", "adamw"])
    for r in [two_backward, *reports]:
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--definitions", type=Path)
    options = parser.parse_args()
    rows = list(rows_of("Python's language reference", finetune.Settings()))
    if options.definitions:
        settings = finetune.Settings(
            train=str(options.definitions / "train.jsonl"),
            held_out=str(options.definitions / "held_out.jsonl"),
            batch_size=16,
            eval_size=256,
        )
        rows += rows_of("WordNet definitions", settings)
    print(record.write("cpu_finetune", rows))


if __name__ == "__main__":
    main()
