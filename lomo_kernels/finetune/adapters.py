"""What a run trains in place of the model's weights: adapters of peft's."""

import torch

from ..integrations import huggingface, peft
from .sources import DataError


def check(settings):
    """Finds out whether peft is there, where a run needs it.

    Raises:
        ModelError: it is not installed.
    """
    if settings.adapter is not None:
        peft.library()


def added(settings, model, examples):
    """The model with the adapter of the settings, the same one for the same seed; without one, the
    model itself."""
    if settings.adapter is None:
        return model
    with torch.random.fork_rng(devices=()):  # the model is still on the CPU
        torch.manual_seed(settings.seed)
        if settings.adapter == "prefix":
            return peft.with_prefix(model, _first_tokens(settings, examples), base=settings.model)
        return peft.with_lora(
            model, rank=settings.lora_rank, alpha=settings.lora_alpha,
            dropout=settings.lora_dropout, targets=settings.lora_targets, base=settings.model,
        )  # fmt: skip


def _first_tokens(settings, examples):
    """With which a prefix begins: those of the first examples."""
    size, ids = settings.prefix_tokens, []
    for example in examples.train:
        if len(ids) >= size:
            break
        ids += example.prompt + example.completion
    if len(ids) < size:
        most = len(ids)
        raise DataError(f"prefix_tokens must be at most the {most} that are trained on, got {size}")
    return ids[:size]


def save(settings, folder, model, tokenizer, weights):
    """Writes what transformers loads, or, of an adapter, `peft.PeftModel.from_pretrained`."""
    if settings.adapter is None:
        huggingface.save(folder, model, tokenizer, weights)
    else:
        peft.save(folder, model, tokenizer)
