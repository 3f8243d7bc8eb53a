"""Texts and questions into batches of tokens."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

MAX_CANDIDATES = 32  # a task with more distinct completions than this is not a choice among them
IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


class DataError(Exception):
    """The data cannot be used; the message says why in one sentence."""


@dataclass(frozen=True)
class Example:
    """Token ids; the loss is that of the completion alone."""

    prompt: tuple
    completion: tuple


@dataclass(frozen=True)
class Data:
    """Examples to train on and held-out ones; `candidates` where completions are a choice."""

    train: list
    held_out: list
    candidates: list | None
    description: str


def load(train, held_out, tokenizer, *, length, seed):
    """Reads the data of a run.

    Args:
        train: a .jsonl file (objects with `prompt` and `completion`, or with `text`), any other
            file as plain text, or None: the topics of Python's language reference, which every
            CPython carries.
        held_out: another file of the same kind; None: a tenth of train is held out (whole topics,
            texts or questions; of a plain text its end).
        tokenizer: transformers'.
        length: tokens of an example at most; texts are cut into pieces of this length.
        seed: of the choice of what is held out.
    """
    if train is None:
        texts, name = _language_reference(), "Python's language reference"
    else:
        texts, name = _read(Path(train)), Path(train).name
    if held_out is not None:
        other = _read(Path(held_out))
        if _is_questions(other) != _is_questions(texts):
            raise DataError(f"{held_out} and {train} must be of one kind, questions or texts")
    elif len(texts) == 1 and not _is_questions(texts):
        text = texts[0]
        cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
        texts, other = [text[:cut]], [text[cut:]]
    else:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
        count = max(1, len(texts) // 10)
        other = [texts[i] for i in order[:count]]
        texts = [texts[i] for i in order[count:]]
    if not texts:
        raise DataError(f"{name} has too few examples: one is held out, none is left to train on")

    if not _is_questions(texts):
        examples = _pieces(texts, tokenizer, length)
        held = _pieces(other, tokenizer, length)
        candidates = None
        kind = f"{len(examples)} pieces of {length} tokens, perplexity of {len(held)} held out"
    else:
        completions = sorted({completion for _, completion in texts + other})
        candidates = None
        if 2 <= len(completions) <= MAX_CANDIDATES and len(texts) > 4 * len(completions):
            candidates = [_tokens(tokenizer, completion) for completion in completions]
        end = () if candidates else (tokenizer.eos_token_id,)
        examples = [_question(tokenizer, *pair, end, length) for pair in texts]
        held = [_question(tokenizer, *pair, end, length) for pair in other]
        score = f"accuracy among {len(completions)} answers" if candidates else "perplexity"
        kind = f"{len(examples)} questions, {score} of {len(held)} held out"
    if not examples or not held:
        raise DataError(f"{name} is too short: it fills no piece of {length} tokens to hold out")
    return Data(examples, held, candidates, f"{name}: {kind}")


def batch_of(examples, pad, device):
    """input_ids, attention_mask and labels, padded on the right."""
    width = max(len(e.prompt) + len(e.completion) for e in examples)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), IGNORE)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, e in enumerate(examples):
        end = len(e.prompt) + len(e.completion)
        ids[row, :end] = torch.tensor(e.prompt + e.completion)
        labels[row, len(e.prompt) : end] = ids[row, len(e.prompt) : end]
        mask[row, :end] = 1
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def counted(batch):
    """Tokens of a batch that its loss is the mean over: the first of a row follows nothing."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def batches(count, size, seed, epoch):
    """The index lists of an epoch, the same for the same seed; the last may be short."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    return [order[i : i + size] for i in range(0, count, size)]


def _language_reference():
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _read(path):
    """A list of texts, or of (prompt, completion)."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.suffix not in (".jsonl", ".json"):
        text = path.read_text(encoding="utf-8", errors="replace")
        if not text.strip():
            raise DataError(f"{path} is empty")
        return [text]
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg})") from error
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            rows.append(row["text"])
        elif isinstance(row, dict) and all(
            isinstance(row.get(key), str) and row[key] for key in ("prompt", "completion")
        ):
            rows.append((row["prompt"], row["completion"]))
        else:
            raise DataError(
                f"{path}, line {number}: wanted an object with prompt and completion, or with text"
            )
        if isinstance(rows[-1], str) != isinstance(rows[0], str):
            raise DataError(f"{path}, line {number}: questions and texts in one file")
    if not rows:
        raise DataError(f"{path} is empty")
    return rows


def _is_questions(rows):
    return isinstance(rows[0], tuple)


def _tokens(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _pieces(texts, tokenizer, length):
    """Texts, each closed by the end token, one after another, cut into pieces of one length."""
    stream = []
    for text in texts:
        stream.extend(_tokens(tokenizer, text))
        stream.append(tokenizer.eos_token_id)
    return [Example((), tuple(stream[i : i + length])) for i in range(0, len(stream), length)
            if i + length <= len(stream)]  # fmt: skip


def _question(tokenizer, prompt, completion, end, length):
    completion = (*_tokens(tokenizer, completion), *end)[: length - 1]
    prompt = tuple(tokenizer(prompt).input_ids)
    return Example(prompt[-(length - len(completion)) :], completion)  # keeps the prompt's end
