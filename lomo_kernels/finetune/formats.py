"""What the columns of a data set mean: rows into texts, questions and conversations."""

from dataclasses import dataclass
from typing import NamedTuple

from .sources import DataError


@dataclass(frozen=True)
class Text:
    text: str
    paragraph = None


@dataclass(frozen=True)
class Question:
    """`choices` are the answers to score, of which the completion is one; None: the task's, or
    none. Questions of one `paragraph` stay in one part of the data, answers to one `question` are
    counted together by exact match."""

    prompt: str
    completion: str
    choices: tuple | None = None
    paragraph: object = None
    question: object = None


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them; the loss is that of the assistant's."""

    messages: tuple
    paragraph = None


def converted(source):
    """-> (Texts, Questions or Conversations of a Source; the columns that nothing uses).

    Raises:
        DataError: which row, what was looked for, and what is there.
    """
    number, first = source.rows[0]
    name = next((name for name, form in FORMATS.items() if form.needs <= first.keys()), None)
    if name is None:
        raise DataError(f"{source.place(number)}: {_looked_for(first)}")
    form = FORMATS[name]
    items = []
    for number, row in source.rows:
        if not form.needs <= row.keys():
            here = next((n for n, f in FORMATS.items() if f.needs <= row.keys()), None)
            reason = f"{name} before, {here} here" if here else _looked_for(row)
            raise DataError(f"{source.place(number)}: {reason}")
        try:
            items.append(form.of(row))
        except ValueError as error:
            raise DataError(f"{source.place(number)}: {error}") from error
    return items, sorted(first.keys() - form.needs - form.may)


def _looked_for(row):
    known = [name + (f" (and {', '.join(f.may)})" if f.may else "") for name, f in FORMATS.items()]
    there = ", ".join(str(key) for key in row) or "none"
    return f"looked for the columns {'; or '.join(known)}; found {there}"


def _string(row, key, may_be_empty=False):
    value = row[key]
    if not isinstance(value, str) or not (value or may_be_empty):
        kind = "a text" if may_be_empty else "a text that is not empty"
        raise ValueError(f"{key} must be {kind}, got {str(value)[:40]!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} has half of a surrogate pair, which is no character") from error
    return value


def _text(row):
    return Text(_string(row, "text", may_be_empty=True))


def _question(row):
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    choices = row.get("choices")
    if choices is None:
        return Question(prompt, completion)
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"choices must be a list of answers, got {str(choices)[:40]!r}")
    choices = tuple(_string(dict(enumerate(choices)), i) for i in range(len(choices)))
    if completion not in choices:
        raise ValueError(f"the completion {completion[:40]!r} is none of the choices")
    return Question(prompt, completion, choices)


def _alpaca(row):
    """Stanford Alpaca's prompt, by which models of its kind were trained."""
    task, output = _string(row, "instruction"), _string(row, "output")
    given = _string(row, "input", may_be_empty=True) if row.get("input") else ""
    paired = ", paired with an input that provides further context" if given else ""
    prompt = f"Below is an instruction that describes a task{paired}. "
    prompt += "Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{task}\n\n"
    prompt += f"### Input:\n{given}\n\n" if given else ""
    return Question(f"{prompt}### Response:\n", output)


def _messages(row):
    return _conversation(row["messages"], "messages", "role", "content", {})


def _conversations(row):
    turns = row["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return _conversation(turns, "conversations", "role", "content", {})
    return _conversation(turns, "conversations", "from", "value", SHAREGPT)


SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
ROLES = ("system", "user", "assistant", "tool", "developer")


def _conversation(turns, column, who, what, names):
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and {who, what} <= turn.keys() for turn in turns
    ):
        raise ValueError(f"{column} must be a list of objects with {who} and {what}")
    messages = []
    for turn in turns:
        role = names.get(turn[who], turn[who])
        if role not in ROLES:
            raise ValueError(f"{who} must be one of {', '.join((*names, *ROLES))}, got {role!r}")
        rest = {k: v for k, v in turn.items() if k not in (who, what) and v is not None}
        messages.append({**rest, "role": role, "content": _string(turn, what, may_be_empty=True)})
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{column} must have a turn of the assistant to train on")
    return Conversation(tuple(messages))


class Format(NamedTuple):
    needs: set
    may: set
    of: object  # row -> Text, Question or Conversation; ValueError: what is wrong with it


FORMATS = {  # a row with the columns of several is the first of them
    "messages": Format({"messages"}, set(), _messages),
    "conversations": Format({"conversations"}, set(), _conversations),
    "prompt and completion": Format({"prompt", "completion"}, {"choices"}, _question),
    "instruction and output": Format({"instruction", "output"}, {"input"}, _alpaca),
    "text": Format({"text"}, set(), _text),
}
