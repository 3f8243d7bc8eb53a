"""The data of a run: what is trained on, what a checkpoint is chosen by, what is held out."""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import formats, sources, superglue, tokens
from .formats import Conversation, Text
from .sources import DataError

MAX_CANDIDATES = 32  # a task with more distinct completions than this is not a choice among them


@dataclass(frozen=True)
class Parts:
    """Texts, Questions or Conversations, before they are tokens."""

    name: str
    train: list
    validation: list
    held_out: list
    lines: list  # what the user is told
    measures: tuple = ()  # beside accuracy


@dataclass(frozen=True)
class Data:
    """Examples; `measures` are "perplexity", or "accuracy" where they have choices, and more."""

    train: list
    validation: list
    held_out: list
    measures: tuple
    lines: list


def read(settings):
    """The Parts of a run: no tokenizer is needed to find what is wrong with its files.

    Without `held_out` a tenth of train is held out (whole topics, texts, questions or paragraphs;
    of a plain text its end). Where checkpoints are chosen by a score, a tenth of the rest, up to
    `eval_size`, is put aside for that: what is held out is not looked at before the end.

    Raises:
        DataError: which file, and what is wrong with it.
    """
    lines, is_text, held_out, measures = [], False, None, ()
    if settings.task is not None:
        name, measures = settings.task, superglue.TASKS[settings.task].measures
        train, held_out = superglue.read(name, settings.data, settings.prompt_file)
    elif settings.train is None:
        name, train = "Python's language reference", [Text(text) for text in _topics()]
    else:
        source = sources.read(settings.train)
        name, is_text = Path(settings.train).name, source.is_text
        train, unused = formats.converted(source)
        if unused:
            lines.append(f"{name}: the columns {', '.join(map(str, unused))} are not used")
    if settings.held_out is not None:
        held_out, _ = formats.converted(sources.read(settings.held_out, "validation"))
        if type(held_out[0]) is not type(train[0]):
            raise DataError(
                f"{settings.held_out} and {settings.train} must be of one kind: texts, questions "
                "or conversations"
            )
    divide = _cut if is_text else _split
    if held_out is None:
        train, held_out = divide(train, max(1, len(train) // 10), settings.seed)
    validation = []
    if settings.eval_every is not None and train:
        count = min(max(1, len(train) // 10), settings.eval_size)
        train, validation = divide(train, count, settings.seed + 1)
    if not train:
        raise DataError(f"{name} has too few examples: one is held out, none is left to train on")
    if settings.train_size is not None:
        if is_text:
            raise DataError(f"{name} is one text, of which train_size can take no examples")
        train = superglue.sampled(train, settings.train_size, settings.seed)
    if settings.task is not None:
        held_out = superglue.sampled(held_out, settings.eval_size, settings.seed)
    return Parts(name, train, validation, held_out, lines, measures)


def load(settings, tokenizer):
    """The Data of a run.

    Raises:
        DataError: what is wrong with its files, or what `truncate="error"` refuses.
    """
    return tokenised(read(settings), settings, tokenizer)


def tokenised(parts, settings, tokenizer):
    """The Data of `parts`."""
    items = {
        "to train on": parts.train,
        "for validation": parts.validation,
        "held out": parts.held_out,
    }
    kind, measures, make = _maker(parts, settings, tokenizer)
    found, lines = {}, list(parts.lines)
    for part, some in items.items():
        found[part], line = make(some, part)
        if line is not None:
            lines.append(line)
    for part, some in items.items():
        if some and not found[part]:
            raise DataError(
                f"{parts.name} is too short, or its examples too long: none {part} is left; "
                f"{'; '.join(lines)}"
            )
    train, validation, held_out = found.values()
    aside = f", {len(validation)} for validation" if validation else ""
    lines.insert(
        0,
        f"{parts.name}: {len(train)} {kind} to train on{aside}, {measures[0]} of "
        f"{len(held_out)} held out",
    )
    return Data(train, validation, held_out, measures, lines)


def _maker(parts, settings, tokenizer):
    """-> (what examples are called, the measures of their score, a function that makes those of a
    part and says what is left out)."""
    size, length, first = settings.eval_size, settings.length, parts.train[0]

    def pieces(texts, part):
        found, left = tokens.pieces(texts, tokenizer, length)
        line = f"the last {left} tokens {part} fill no piece and are left out" if left else None
        return (found if part == "to train on" else found[:size]), line

    if isinstance(first, Text):
        return f"pieces of {length} tokens", ("perplexity",), pieces
    is_conversation = isinstance(first, Conversation)
    choices = None if is_conversation else _choices(parts)

    def fitted(items, part):
        trains = part == "to train on"
        items = items if trains else items[:size]
        fitting = tokens.Fitting(length, settings.truncate, tokenizer.bos_token_id)
        if is_conversation:
            found = tokens.conversations(items, tokenizer, fitting)
        else:
            found = tokens.questions(items, tokenizer, fitting, None if trains else choices)
        return found, fitting.line(part)

    kind = "conversations" if is_conversation else "questions"
    return kind, ("perplexity",) if choices is None else ("accuracy", *parts.measures), fitted


def _choices(parts):
    """None where completions are free; () where each question has its own choices; else the few
    different completions that there are."""
    every = [*parts.train, *parts.validation, *parts.held_out]
    own = sum(question.choices is not None for question in every)
    if own:
        if own < len(every):
            raise DataError(f"{parts.name}: {own} of {len(every)} questions have choices")
        return ()
    completions = sorted({question.completion for question in every})
    few = 2 <= len(completions) <= MAX_CANDIDATES and len(parts.train) > 4 * len(completions)
    return tuple(completions) if few else None


def _cut(texts, count, seed):
    """A plain text: (all but its last tenth, the last tenth), cut at a line."""
    (text,) = (each.text for each in texts)
    place = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
    return [Text(text[:place])], [Text(text[place:])]


def _split(items, count, seed):
    """(the rest, about `count` items by the seed); items of one paragraph stay together."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    taken = {}
    for i in order:
        if len(taken) >= count:
            break
        paragraph = items[i].paragraph
        together = [i] if paragraph is None else [
            k for k, item in enumerate(items) if item.paragraph == paragraph
        ]  # fmt: skip
        taken.update(dict.fromkeys(together))
    return [items[i] for i in order if i not in taken], [items[i] for i in taken]


def _topics():
    """Of the language reference that every CPython carries."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]
