"""What bench.study runs: methods and their learning rates, in which order, and the questions."""

import hashlib
import json
import runpy
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lomo_kernels.finetune import Settings, superglue
from lomo_kernels.finetune.sources import DataError

from . import paired

WORDNET = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "wordnet.py"))
TASKS = ("wordnet", *superglue.TASKS)
TRAIN = 1000  # questions to train on, as in the LOMO paper
LENGTH = 512  # tokens of a question at most
METHODS = {  # settings of each
    **{name: {"optimizer": name} for name in ("lomo", "adalomo", "adamw")},
    **{name: {"adapter": name} for name in ("lora", "lora+lomo", "prefix")},
}
UNTRAINED = ("majority", "zero-shot")


class Run(NamedTuple):
    task: str
    method: str
    part: str  # "validation" or "test"
    lr: float | None = None  # None with a seed: the one that was best on the validation part
    seed: int | None = None

    def __str__(self):
        lr = "the best rate" if self.lr is None else f"lr {self.lr:g}"
        how = "" if self.seed is None else f", {lr}, seed {self.seed}"
        return f"{self.task}, {self.method}{how}, {self.part} part"


def rates(method, count):
    """Learning rates around the default one, half a power of ten apart, with one digit: 0.03, 0.1,
    0.3."""
    first, middle = -((count - 1) // 2), Settings(**METHODS[method]).lr
    return [float(f"{middle * 10 ** (k / 2):.0e}") for k in range(first, first + count)]


def planned(task, methods, count, seeds):
    """The Runs of a task, so that what is finished at any moment says the most."""
    for name in UNTRAINED:
        yield from (Run(task, name, part) for part in ("validation", "test"))
    for name in methods:
        yield from (Run(task, name, "validation", lr, 0) for lr in rates(name, count))
    for seed in range(1, seeds + 1):
        yield from (Run(task, name, "test", None, seed) for name in methods)


def without_peft(methods):
    """Those of the methods that can run where peft is not installed."""
    return [name for name in methods if "adapter" not in METHODS[name]]


# -- their questions -------------------------------------------------------------------------------


class Data(NamedTuple):
    """The questions of a task, as rows of --train."""

    train: list
    validation: list
    test: list

    def digest(self, part):
        text = json.dumps([self.train, getattr(self, part)])
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def read(task, options):
    """The Data of a task. The rates are chosen on a part that was to be trained on; the test part
    is SuperGLUE's validation part, as in the LOMO paper, and the same for every seed.

    Raises:
        DataError: there is none.
    """
    if task == "wordnet":
        path = Path(options.wordnet) / "data.noun"
        if not path.is_file():
            raise DataError(f"there is no file {path}: apt-get install wordnet-base")
        apart = options.validation_size + options.test_size
        try:
            train, held_out = WORDNET["questions"](path, TRAIN, apart, seed=0)
        except ValueError as error:
            raise DataError(str(error)) from error
        return Data(train, held_out[: options.validation_size], held_out[options.validation_size :])
    if options.data is None:
        raise DataError("--data names no folder with it")
    train, test = superglue.read(task, options.data)
    if test is None:
        raise DataError(f"{options.data} has no validation part of it")
    validation = superglue.sampled(train, min(options.validation_size, len(train) // 4), 0)
    apart = set(validation)  # a question that is there twice is not trained on either
    train = [question for question in train if question not in apart]
    train, test = (
        superglue.sampled(part, size, 0)
        for part, size in ((train, TRAIN), (test, options.test_size))
    )
    return Data(*([_row(question) for question in part] for part in (train, validation, test)))


def _row(question):
    return {"prompt": question.prompt, "completion": question.completion,
            "choices": list(question.choices)}  # fmt: skip


def majority(data, part):
    """The columns of the answer that is most frequent in training: the same text, or the same place
    among the choices."""

    def label(row):
        return row["choices"].index(row["completion"]) if "choices" in row else row["completion"]

    ((most, _),) = Counter(map(label, data.train)).most_common(1)
    items = "".join(str(int(label(row) == most)) for row in getattr(data, part))
    return {"count": len(items), "right": items.count("1"), "items": paired.packed(items)}
