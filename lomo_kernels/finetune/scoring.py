"""Held-out scores: perplexity, or accuracy by the likeliest answer."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from ..integrations import peft
from .examples import IGNORE, batch_of

RULES = ("mean", "sum")
Z = 1.959964  # 95 % of a normal distribution are within so many deviations


@dataclass(frozen=True)
class Score:
    """`interval` is that of 95 % for other held-out examples of the same kind; `more` are other
    measures of the same answers. `items` has a "1" for each question that is answered right and a
    "0" for each other, in the order of the data."""

    name: str  # "perplexity" (lower is better) or "accuracy" (higher is better)
    value: float
    count: int  # tokens or questions
    interval: tuple
    more: dict = field(default_factory=dict)
    items: str = ""

    def __post_init__(self):
        object.__setattr__(self, "interval", tuple(self.interval))  # json knows lists alone

    def __str__(self):
        measures = {self.name: self.value, **self.more}
        return ", ".join(f"{name} {value:.3f}" for name, value in measures.items())

    def is_better_than(self, other):
        """A value that is no number is better than none."""
        if math.isnan(self.value) or math.isnan(other.value):
            return math.isnan(other.value) and not math.isnan(self.value)
        return self.value < other.value if self.name == "perplexity" else self.value > other.value


@torch.no_grad()
def score(model, examples, *, measures, rule, batch_size, pad, team, progress):
    """The score of `examples` under the model, which is in evaluation mode meanwhile.
    Each rank takes a part of each batch, and all get the same score.

    Args:
        measures: "perplexity" or "accuracy", then names of `MEASURES`.
        rule: by which an answer is chosen: the highest "mean" of its tokens' log-likelihoods, as
            the LOMO paper says, or the highest "sum", as the authors' code ranks them.
        team: the Ranks of the run.
        progress: called with the starts of the batches, gives them back one by one.
    """
    training = model.training
    model.eval()
    try:
        if measures[0] == "perplexity":
            return _perplexity(model, examples, batch_size, pad, team, progress)
        chosen = _chosen(model, examples, rule, batch_size, pad, team, progress)
    finally:
        model.train(training)
    items = "".join(str(int(c == e.right)) for c, e in zip(chosen, examples))
    more = {name: MEASURES[name](examples, chosen) for name in measures[1:]}
    return accuracy(items, more)


def accuracy(items, more=()):
    """The Score of questions of which those with a "1" are answered right."""
    right, count = items.count("1"), len(items)
    return Score("accuracy", right / count, count, wilson(right, count), dict(more), items)


def _perplexity(model, examples, batch_size, pad, team, progress):
    sums = torch.zeros(6, dtype=torch.float64)
    for start in progress(range(0, len(examples), batch_size)):
        mine, tokens, _ = team.of_batch(examples[start : start + batch_size])
        batch = batch_of(mine, pad, team.device)
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1].float()
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        if tokens:
            loss, n = each.view_as(labels).double().sum(1), (labels != IGNORE).double().sum(1)
            sums += torch.stack(
                [torch.ones_like(n), n, loss, n * n, n * loss, loss * loss]
            ).sum(1).cpu()  # fmt: skip
    count, mean, half = _mean(*team.sum(*sums.tolist()))
    interval = _exp(mean - half), _exp(mean + half)
    return Score("perplexity", _exp(mean), int(count), interval)


def _mean(examples, n, loss, nn, n_loss, loss_loss):
    """-> (tokens, their mean loss, half of its interval): a ratio of two sums over examples, which
    are what is drawn (Cochran, Sampling Techniques, chapter 6)."""
    mean = loss / n
    if examples < 2:
        return n, mean, math.inf
    square = max(0.0, loss_loss - 2 * mean * n_loss + mean**2 * nn)
    return n, mean, Z * math.sqrt(square * examples / (examples - 1)) / n


def _exp(value):
    return math.exp(value) if value < 700 else math.inf


def wilson(right, count):
    """The interval of Wilson (1927) for the share of right answers."""
    share, z = right / count, Z**2 / count
    middle, half = share + z / 2, Z * math.sqrt(share * (1 - share) / count + z / (4 * count))
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def _chosen(model, examples, rule, batch_size, pad, team, progress):
    """The index of the likeliest answer to each example."""
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt))
    chosen = [0] * len(examples)
    for start in progress(range(0, len(examples), batch_size)):
        batch = by_length[start : start + batch_size]
        longest = max(len(c) for i in batch for c in examples[i].choices)
        places = team.of(batch)
        some = [examples[i] for i in places or batch[:1]]  # all ranks run every forward
        sums = log_likelihoods(model, some, pad, team.device, longest)
        for place, example, each in zip(places, some, sums):
            if rule == "mean":
                each = each / torch.tensor([len(c) for c in example.choices], device=each.device)
            chosen[place] = int(each.argmax())
    return [int(each) for each in team.sum(*chosen)]


def log_likelihoods(model, examples, pad, device, longest=1):
    """For each example a tensor: the log-likelihood of each of its choices after its prompt.

    The prompt runs once; what is left of answers longer than a token runs for each of them, on its
    keys and values.

    Args:
        longest: tokens of an answer that may be another rank's. Beyond one there is a second
            forward, if only for its sake.
    """
    width = max(len(e.prompt) for e in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, e in enumerate(examples):  # padded on the left: the prompts end together
        ids[row, width - len(e.prompt) :] = torch.tensor(e.prompt)
        mask[row, width - len(e.prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    model, past, before = peft.context(model, len(examples))
    positions = (mask.cumsum(1) - 1).clamp(min=0) + before
    mask = torch.cat([mask.new_ones(len(examples), before), mask], 1)
    answers = [(row, c) for row, e in enumerate(examples) for c in e.choices]
    rows = torch.tensor([row for row, _ in answers], device=device)
    longest = max(longest, *(len(c) for _, c in answers))
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past,
        logits_to_keep=1, use_cache=longest > 1,
    )  # fmt: skip
    first = out.logits[:, -1].float().log_softmax(-1)
    total = first[rows, torch.tensor([c[0] for _, c in answers], device=device)]
    if longest > 1:
        long = [i for i, (_, c) in enumerate(answers) if len(c) > 1] or [0]
        total[long] += _rest(model, [answers[i][1] for i in long], rows[long], out, mask, positions)
    return total.split([len(e.choices) for e in examples])


def _rest(model, answers, rows, out, mask, positions):
    """Log-likelihood of all but the first token of each answer after the prompt of its row."""
    longest, device = max(2, *map(len, answers)), rows.device
    ids = torch.zeros((len(answers), longest), dtype=torch.long)
    for row, answer in enumerate(answers):
        ids[row, : len(answer)] = torch.tensor(answer)
    ids = ids.to(device)
    after = torch.arange(1, longest, device=device)
    out.past_key_values.batch_select_indices(rows)
    logits = model(
        input_ids=ids[:, :-1],
        attention_mask=torch.cat([mask[rows], torch.ones_like(ids[:, :-1])], 1),
        position_ids=positions[rows, -1:] + after,
        past_key_values=out.past_key_values,
        use_cache=True,
    ).logits
    each = logits.float().log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    return (each * (after < lengths[:, None])).sum(1)


# -- other measures, as SuperGLUE reports them -----------------------------------------------------


def macro_f1(examples, chosen):
    """Mean of the F1 of every answer that is right or was chosen somewhere."""
    right = [e.right for e in examples]
    scores = [_f1(right, chosen, label) for label in {*right, *chosen}]
    return sum(scores) / len(scores)


def f1_of_answers(examples, chosen):
    """F1a: of the second choice ("Yes") over all answers to all questions."""
    return _f1([e.right for e in examples], chosen, 1)


def exact_match(examples, chosen):
    """The part of the questions of which every answer was judged right."""
    whole = {}
    for e, c in zip(examples, chosen):
        whole[e.question] = whole.get(e.question, True) and c == e.right
    return sum(whole.values()) / len(whole)


def _f1(right, chosen, label):
    both = sum(r == c == label for r, c in zip(right, chosen))
    either = right.count(label) + chosen.count(label)
    return 2 * both / either if either else 0.0


MEASURES = {"macro F1": macro_f1, "exact match": exact_match, "F1a": f1_of_answers}
