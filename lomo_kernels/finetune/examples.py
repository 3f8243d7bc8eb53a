"""Token ids of examples, and batches of them."""

from dataclasses import dataclass

import torch

IGNORE = -100  # torch.nn.functional.cross_entropy's ignore_index


@dataclass(frozen=True)
class Example:
    """Token ids. The loss is that of the completion, or of its tokens that `trained` marks.

    Where the score is a choice, `choices` are the token ids of each answer (without the end token,
    which closes the completion) and `right` says which one is; `question` is the same for answers
    that are counted together.
    """

    prompt: tuple
    completion: tuple
    trained: tuple | None = None
    choices: tuple | None = None
    right: int | None = None
    question: object = None

    @property
    def counted(self):
        """How many of its tokens the loss is the mean over."""
        trained = self.trained or (True,) * len(self.completion)
        follows_nothing = not self.prompt and any(trained[:1])
        return sum(trained) - follows_nothing


def batch_of(examples, pad, device):
    """input_ids, attention_mask and labels, padded on the right."""
    width = max(len(e.prompt) + len(e.completion) for e in examples)
    ids = torch.full((len(examples), width), pad)
    labels = torch.full((len(examples), width), IGNORE)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, e in enumerate(examples):
        start, end = len(e.prompt), len(e.prompt) + len(e.completion)
        ids[row, :end] = torch.tensor(e.prompt + e.completion)
        labels[row, start:end] = ids[row, start:end]
        if e.trained is not None:
            labels[row, start:end][~torch.tensor(e.trained)] = IGNORE
        mask[row, :end] = 1
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def batches(count, size, seed, epoch):
    """The index lists of an epoch, the same for the same seed; the last may be short."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    return [order[i : i + size] for i in range(0, count, size)]
