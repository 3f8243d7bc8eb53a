"""SuperGLUE's tasks as questions, with the prompts of the LOMO authors' code.

The official release's rows (nested, labels as names) and the hub's (flat, labels as numbers) give
the same questions. docs/downstream.md has where the prompts differ from the paper's.
"""

import random
from pathlib import Path
from typing import NamedTuple

from . import sources
from .formats import Question
from .sources import DataError

NO_YES, YES_NO = (" No", " Yes"), (" Yes", " No")


class Task(NamedTuple):
    """`prompt` and `choices` are filled in from the columns of a flat row; a label is a place among
    the choices, or among `labels`, which names them in that order."""

    folder: str  # in the official release
    columns: tuple
    prompt: str
    choices: tuple
    labels: tuple = ()
    measures: tuple = ()  # beside accuracy


TASKS = {
    "boolq": Task(
        "BoolQ", ("passage", "question"), "{passage} {question}\nAnswer:", NO_YES
    ),
    "cb": Task(
        "CB", ("premise", "hypothesis"),
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\nAnswer:',
        (" Yes", " No", " Maybe"), ("entailment", "contradiction", "neutral"), ("macro F1",),
    ),
    "copa": Task(
        "COPA", ("premise", "choice1", "choice2", "question", "connective"),
        "{premise} {connective}", (" {choice1}", " {choice2}"),
    ),
    "multirc": Task(
        "MultiRC", ("paragraph", "question", "answer"),
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? '
        "Yes or No?\nAnswer:",
        NO_YES, (), ("exact match", "F1a"),
    ),
    "rte": Task(
        "RTE", ("premise", "hypothesis"),
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\nAnswer:',
        YES_NO, ("entailment", "not_entailment"),
    ),
    "wic": Task(
        "WiC", ("word", "sentence1", "sentence2"),
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\nAnswer:",
        NO_YES,
    ),
    "wsc": Task(
        "WSC", ("text", "span1_text", "span2_text"),
        # "pronuon" is how the authors' code has it.
        '{text}\nIn the previous sentence, does the pronuon "{span2_text}" refer to '
        '"{span1_text}"? Yes or No?\nAnswer:',
        NO_YES,
    ),
}  # fmt: skip


def read(name, data, prompt_file=None):
    """-> (Questions of the training part, of the validation part or None).

    Args:
        name: one of `TASKS`.
        data: the folder of the release or of the task, or a data set that `datasets` loads.
        prompt_file: YAML with `prompt`, and `choices` where they are others.
    """
    task = TASKS[name]
    if prompt_file is not None:
        task = task._replace(**_own_prompt(prompt_file, task))
    train, validation = (_source(name, task, data, part) for part in ("train", "validation"))
    if train is None:
        raise DataError(f"{data} has no training part of {name}: looked for {task.folder}/train.*")
    return tuple(
        None if part is None else [q for source in part for q in _questions(name, task, source)]
        for part in (train, validation)
    )


def sampled(questions, size, seed):
    """At most `size` of them, as the authors' code takes them by its seed; whole paragraphs, where
    there are some, because answers to one question are counted together."""
    order = random.Random(seed)
    if len(questions) <= size:
        return questions
    if questions[0].paragraph is None:
        return order.sample(questions, size)
    together = {}
    for question in questions:
        together.setdefault(question.paragraph, []).append(question)
    groups, found = list(together.values()), []
    order.shuffle(groups)
    for group in groups:
        if len(found) + len(group) <= size:
            found += group
    return found or groups[0]


def _source(name, task, data, part):
    """The Sources of a part, or None where there is none."""
    folder = next(
        (
            path
            for path in (Path(data) / task.folder, Path(data) / name, Path(data))
            if _files(path, part)
        ),
        None,
    )
    if folder is not None:
        return [sources.read(str(path)) for path in _files(folder, part)]
    if Path(data).is_dir() and not sources.is_data_set(data):
        return None
    return [sources.read(data, part, name)]


def _files(folder, part):
    """train.jsonl and val.jsonl, as in the release; or the hub's pieces, such as
    train-00000-of-00001.parquet."""
    for stem in ("train",) if part == "train" else ("val", "validation"):
        for suffix in sources.READERS:
            if (path := folder / f"{stem}{suffix}").is_file():
                return [path]
            if pieces := sorted(folder.glob(f"{stem}-*{suffix}")):
                return pieces
    return []


def _questions(name, task, source):
    for number, row in source.rows:
        try:
            for flat in _flat(name, row):
                yield _question(name, task, flat)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else error
            raise DataError(
                f"{source.place(number)}: no row of {name}, whose columns are "
                f"{', '.join(task.columns)} and label ({reason})"
            ) from error


def _flat(name, row):
    """A row of the release as rows of the hub, with COPA's connective."""
    if name == "multirc" and "passage" in row:
        for question in row["passage"]["questions"]:
            for answer in question["answers"]:
                yield {
                    "paragraph": row["passage"]["text"], "question": question["question"],
                    "answer": answer["text"], "label": answer["label"],
                }  # fmt: skip
    elif name == "wsc" and "target" in row:
        yield {**row, **row["target"]}
    elif name == "copa":
        yield {**row, "connective": {"effect": "so", "cause": "because"}[row["question"]]}
    else:
        yield row


def _question(name, task, row):
    label = row["label"]
    label = task.labels.index(label) if label in task.labels else int(label)
    choices = tuple(choice.format_map(row) for choice in task.choices)
    if not 0 <= label < len(choices):
        raise ValueError(f"its label is {label}")
    more = {}
    if name == "multirc":
        paragraph = row["paragraph"]
        more = {"paragraph": paragraph, "question": (paragraph, row["question"])}
    return Question(task.prompt.format_map(row), choices[label], choices, **more)


def _own_prompt(path, task):
    own = sources.read_yaml(path)
    if not isinstance(own, dict) or not {"prompt"} <= own.keys() <= {"prompt", "choices"}:
        raise DataError(f"{path}: wanted prompt, and choices where they are others, in YAML")
    own["choices"] = tuple(own.get("choices", task.choices))
    if len(own["choices"]) != len(task.choices):
        raise DataError(f"{path}: wanted {len(task.choices)} choices, in the order of the labels")
    for text in (own["prompt"], *own["choices"]):
        try:
            text.format_map(dict.fromkeys(task.columns, ""))
        except (AttributeError, KeyError, ValueError, IndexError) as error:
            raise DataError(
                f"{path}: {str(text)[:60]!r} is no text with the columns "
                f"{', '.join(task.columns)} in braces ({error})"
            ) from error
    return own
