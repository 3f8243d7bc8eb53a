"""Held-out scores: perplexity, or accuracy by the likeliest answer."""

import math
from dataclasses import dataclass

import torch

from .data import batch_of, counted


@dataclass(frozen=True)
class Score:
    name: str  # "perplexity" (lower is better) or "accuracy" (higher is better)
    value: float
    count: int  # tokens or questions

    def __str__(self):
        return f"{self.name} {self.value:.3f}"


@torch.no_grad()
def score(model, data, examples, *, batch_size, pad, team, progress):
    """The score of `examples` under the model, which is in evaluation mode meanwhile.

    Each rank takes its part of each batch, and all get the same score.
    """
    training = model.training
    model.eval()
    try:
        if data.candidates is None:
            return _perplexity(model, examples, batch_size, pad, team, progress)
        return _accuracy(model, examples, data.candidates, batch_size, pad, team, progress)
    finally:
        model.train(training)


def _perplexity(model, examples, batch_size, pad, team, progress):
    total, count = 0.0, 0
    for start in progress(range(0, len(examples), batch_size)):
        some, weight = team.of_batch(examples[start : start + batch_size], pad)
        batch = batch_of(some, pad, team.device)
        loss = model(**batch).loss.item()
        if weight:
            total += loss * counted(batch)
            count += counted(batch)
    total, count = team.sum(total, count)
    mean = total / count
    return Score("perplexity", math.exp(mean) if mean < 700 else math.inf, int(count))


def _accuracy(model, examples, candidates, batch_size, pad, team, progress):
    """The LOMO paper's inference rule: every answer is put after the question, and the one with the
    highest mean log-likelihood is taken. The question runs once; only what is left of answers
    longer than a token runs for each of them, on its keys and values."""
    right = 0
    for start in progress(range(0, len(examples), batch_size)):
        batch = examples[start : start + batch_size]
        some = team.of(batch)  # a rank without any takes part all the same
        likelihood = _mean_log_likelihood(model, some or batch[:1], candidates, pad, team.device)
        chosen = likelihood.argmax(1).tolist()
        right += sum(candidates[c] == e.completion for c, e in zip(chosen, some))
    (right,) = team.sum(right)
    return Score("accuracy", right / len(examples), len(examples))


def _mean_log_likelihood(model, examples, candidates, pad, device):
    """[questions, candidates]."""
    width = max(len(e.prompt) for e in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, e in enumerate(examples):  # padded on the left: the questions end together
        ids[row, width - len(e.prompt) :] = torch.tensor(e.prompt)
        mask[row, width - len(e.prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    longest = max(len(c) for c in candidates)
    out = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1,
        use_cache=longest > 1,
    )  # fmt: skip
    first = out.logits[:, -1].float().log_softmax(-1)
    lengths = torch.tensor([len(c) for c in candidates], device=device)
    total = first[:, [c[0] for c in candidates]]
    if longest > 1:
        rest = torch.full((len(candidates), longest), pad)
        for row, c in enumerate(candidates):
            rest[row, : len(c)] = torch.tensor(c)
        rest = rest.to(device).repeat(len(examples), 1)
        out.past_key_values.batch_repeat_interleave(len(candidates))
        mask = mask.repeat_interleave(len(candidates), 0)
        after = torch.arange(1, longest, device=device)
        logits = (
            model(
                input_ids=rest[:, :-1],
                attention_mask=torch.cat([mask, torch.ones_like(rest[:, :-1])], 1),
                position_ids=positions[:, -1:].repeat_interleave(len(candidates), 0) + after,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            .logits.float()
            .log_softmax(-1)
        )
        each = logits.gather(2, rest[:, 1:, None])[:, :, 0].view(len(examples), len(candidates), -1)
        total = total + (each * (after < lengths[:, None])).sum(2)
    return total / lengths
