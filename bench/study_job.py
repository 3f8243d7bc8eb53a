"""One run of bench.study, in a process of its own: what to do comes as json on the standard input,
what was found goes as json to a file.

    echo '{"settings": {...}, "trains": true, "before": null}' | python -m bench.study_job FILE
"""

import contextlib
import json
import resource
import sys
import time
from dataclasses import fields
from pathlib import Path

from lomo_kernels.finetune import Display, Report, Settings, job
from lomo_kernels.finetune.display import peak_memory
from lomo_kernels.finetune.scoring import accuracy

from . import paired, record

# What a run reports of its memory, by kind.
MEMORY = [each.name for each in fields(Report) if each.name.endswith("_bytes")]


class Clock(Display):
    """Notes the processor's time of the steps, of all threads."""

    cpu_seconds = 0.0

    @contextlib.contextmanager
    def steps(self, total, first):
        started = time.process_time()
        with super().steps(total, first) as show:
            yield show
        self.cpu_seconds = time.process_time() - started


def found_by(settings, trains, before):
    """The columns of a row that a run finds.

    Args:
        trains: else the model is scored as it is.
        before: the items of that score, None where they are not known.
    """
    if not trains:
        return scored(job.evaluate(settings))
    clock = Clock()
    report = job.run(settings, display=clock, before=before and accuracy(before))
    return scored(report.after) | {
        "loss": f"{report.loss:.4f}",
        "step_cpu_seconds": f"{clock.cpu_seconds / report.steps:.3f}",
        **{name: getattr(report, name) for name in MEMORY},
    }


def scored(score):
    right = score.items.count("1")
    return {"count": score.count, "right": right, "items": paired.packed(score.items)}


def main():
    task = json.load(sys.stdin)
    started = time.perf_counter()
    row = found_by(Settings(**task["settings"]), task["trains"], task["before"])
    used = resource.getrusage(resource.RUSAGE_SELF)
    row |= {
        "cpu_seconds": f"{used.ru_utime + used.ru_stime:.1f}",
        "seconds": f"{time.perf_counter() - started:.1f}",
        "peak_bytes": peak_memory(),
    }
    Path(sys.argv[1]).write_text(json.dumps(row | record.context()))


if __name__ == "__main__":
    main()
