"""Texts, questions and conversations as token ids of a limited length.

Note [End token]: what a model is to end by itself is closed by the end token in training, whatever
the data: each text, each completion, and each turn of the assistant, by the chat template's own
mark where it has one. Answers that are a choice are scored without it.

Note [Boundary]: a prompt and what follows are tokenised together, as a tokenizer would meet them,
and divided after the prompt's own tokens. Where a space at the end of the prompt would be the first
letter of the answer's first token, it goes with the answer. Where the two share a token all the
same, they are tokenised one by one.
"""

import jinja2

from .examples import Example
from .sources import DataError


def pieces(texts, tokenizer, length):
    """Texts, each closed by the end token, one after another, cut into pieces of one length.

    -> (Examples, how many tokens at the end fill no piece)
    """
    stream = []
    for ids in _ids(tokenizer, [text.text for text in texts], special=False):
        stream += ids
        stream.append(tokenizer.eos_token_id)
    whole = len(stream) // length * length
    found = [Example((), tuple(stream[i : i + length])) for i in range(0, whole, length)]
    return found, len(stream) - whole


def questions(items, tokenizer, fitting, candidates=None):
    """Examples of Questions.

    Args:
        candidates: the answers of every question that has none of its own, in order to score them;
            (): each has its own; None: the completions alone matter, as in training.
    """
    answers = [(item.completion,) for item in items]
    if candidates is not None:
        answers = [(item.completion, *(item.choices or candidates)) for item in items]
    found = []
    for item, texts, (prompt, ids) in zip(items, answers, _divided(items, answers, tokenizer)):
        completion = (*ids[0], tokenizer.eos_token_id)
        longest = max(len(each) for each in ids) + 1
        if (prompt := fitting.prompt(prompt, longest)) is not None:
            more = {}
            if candidates is not None:
                right = texts[1:].index(item.completion)
                more = {"choices": tuple(ids[1:]), "right": right, "question": item.question}
            found.append(Example(prompt, completion, **more))
    return found


def _divided(items, answers, tokenizer):
    """(prompt, [answer, ...]) of each Question in token ids, by Note [Boundary]."""
    found = [None] * len(items)
    for boundary in (lambda prompt: prompt, lambda prompt: prompt.rstrip() or prompt):
        left = [i for i, pair in enumerate(found) if pair is None]
        heads = _ids(tokenizer, [boundary(items[i].prompt) for i in left])
        texts = [items[i].prompt + answer for i in left for answer in answers[i]]
        joint = iter(_ids(tokenizer, texts))
        for i, head in zip(left, heads):
            wholes = [next(joint) for _ in answers[i]]
            if all(ids[: len(head)] == head and len(ids) > len(head) for ids in wholes):
                found[i] = head, [ids[len(head) :] for ids in wholes]
    for i, pair in enumerate(found):
        if pair is None:
            (head,) = _ids(tokenizer, [items[i].prompt])
            found[i] = head, _ids(tokenizer, answers[i], special=False)
    return found


def conversations(items, tokenizer, fitting):
    """Examples of Conversations; the loss is that of the assistant's turns."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("messages need a chat template, which the model's tokenizer does not have")
    found = []
    for number, item in enumerate(items, 1):
        try:
            ids, trained = _turns(item.messages, tokenizer)
        except DataError as error:
            raise DataError(f"conversation {number}: {error}") from error
        if (fitted := fitting.conversation(ids, trained)) is not None:
            ids, trained = fitted
            start = trained.index(True)
            found.append(Example(ids[:start], ids[start:], trained[start:]))
    return found


def _turns(messages, tokenizer):
    """-> (token ids, whether each is trained)."""
    messages = list(messages)
    while messages[-1]["role"] != "assistant":  # nobody answers it
        messages.pop()
    template = tokenizer.chat_template
    if isinstance(template, str) and "generation %}" in template.replace("-%}", " %}"):
        found = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, trained = found["input_ids"], [bool(mark) for mark in found["assistant_masks"]]
    else:
        ids, trained = _by_prefixes(messages, tokenizer)
    last = max(i for i, mark in enumerate(trained) if mark)
    if ids[last] not in tokenizer.all_special_ids:  # Note [End token]
        ids, trained = [*ids[: last + 1], tokenizer.eos_token_id], [*trained[: last + 1], True]
    return tuple(ids), tuple(trained)


def _by_prefixes(messages, tokenizer):
    """A turn of the assistant is what the conversation up to it has more than the one before it
    with the prompt to generate."""
    whole = _rendered(tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:i], add_generation_prompt=True) if i else ""
        after = _rendered(tokenizer, messages[: i + 1])
        if not after.startswith(before) or not whole.startswith(after):
            raise DataError(
                "the chat template writes a turn otherwise once others follow, so that the "
                "assistant's cannot be told: mark them in it with {% generation %}, or give "
                "conversations of one turn"
            )
        spans.append((len(before), len(after.rstrip())))
    found = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    trained = [
        any(start <= a < b <= end for start, end in spans) for a, b in found["offset_mapping"]
    ]
    return found["input_ids"], trained


def _rendered(tokenizer, messages, **options):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template refuses a conversation: {error}") from error


def _ids(tokenizer, texts, special=True):
    """Token ids of each text, without an end token that the tokenizer may add."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=special).input_ids
    end = (tokenizer.eos_token_id,)
    cut = special and tuple(tokenizer("").input_ids[-1:]) == end != (tokenizer.bos_token_id,)
    return [tuple(ids[:-1] if cut else ids) for ids in found]


class Fitting:
    """Holds examples to a length by a rule, and counts what that did to them."""

    def __init__(self, length, rule, bos):
        self.length, self.rule, self.bos = length, rule, bos
        self.total = self.longer = self.left_out = self.longest = 0

    def _counted(self, size):
        """Whether an example of this size is used at all, as it is or cut."""
        self.total += 1
        self.longest = max(self.longest, size)
        self.longer += size > self.length
        skipped = size > self.length and self.rule == "skip"
        self.left_out += skipped
        return not skipped

    def _cut(self, ids, room):
        """The end of the tokens, with the mark of a beginning where there was one."""
        if len(ids) <= room:
            return ids
        head = ids[:1] if ids[:1] == (self.bos,) else ()
        room -= len(head)
        return head + ids[len(ids) - room :] if room > 0 else ()

    def prompt(self, prompt, answer):
        """The prompt before an answer of so many tokens; None: the example is left out."""
        if not self._counted(len(prompt) + answer):
            return None
        cut = self._cut(prompt, self.length - answer)
        self.left_out += not cut
        return cut or None

    def conversation(self, ids, trained):
        """-> (ids, trained), or None: left out. A turn whose beginning is cut is not trained."""
        if not self._counted(len(ids)):
            return None
        if len(ids) > self.length:
            ids, before = self._cut(ids, self.length), ids
            head = int(ids[0] == self.bos == before[0])
            trained = trained[len(before) - len(ids) + head :]
            known = trained.index(False) if False in trained else len(trained)
            trained = (False,) * (head + known) + trained[known:]
        if True not in trained:
            self.left_out += 1
            return None
        return ids, trained

    def line(self, part):
        """What the user is told of the examples `part`, or None.

        Raises:
            DataError: the rule is to refuse them.
        """
        if not self.longer:
            return None
        text = (
            f"{self.longer} of {self.total} examples {part} are longer than --length "
            f"{self.length} (the longest has {self.longest} tokens: --length {self.longest} would "
            "do)"
        )
        if self.rule == "error":
            raise DataError(f"{text}; --truncate prompt-left or skip would go on without it")
        cut, out = self.longer - self.left_out, self.left_out
        what = [f"in {cut} the beginning of the prompt is cut"] if cut else []
        if out:
            why = "" if self.rule == "skip" else ", whose answers leave no room for a prompt"
            what.append(f"{out} are left out{why}")
        return f"{text}: {', '.join(what)}"
