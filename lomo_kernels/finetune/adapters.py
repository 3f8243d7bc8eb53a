"""What a run trains in place of the model's weights, or beside them: adapters of peft's."""

from dataclasses import fields

import torch

from ..integrations import peft, weights
from . import stepping
from .settings import Settings
from .sources import DataError


def check(settings):
    """Finds out whether peft is there, where a run needs it.

    Raises:
        ModelError: it is not installed.
    """
    if settings.adapter is not None:
        peft.installed()


def check_used(several):
    """Finds options of adapters that none of the runs would look at.

    Raises:
        ValueError: which, and whose they are.
    """
    values = {name: getattr(several[0], name) for name in peft.OPTIONS}
    defaults = {each.name: each.default for each in fields(Settings)}
    peft.check_used(values, defaults, [settings.adapter for settings in several])


def planned(settings):
    """What `memory.plan` takes of the adapter's options."""
    names = ("lora_rank", "lora_dropout", "lora_targets", "prefix_tokens")
    return {n: getattr(settings, n) for n in names if settings.adapter in peft.OPTIONS[n]}


def added(settings, model, examples):
    """The model with the adapter of the settings, the same one for the same seed; without one, the
    model itself."""
    if settings.adapter is None:
        return model
    with torch.random.fork_rng(devices=()):  # the model is still on the CPU
        torch.manual_seed(settings.seed)
        if settings.adapter == "prefix":
            return peft.with_prefix(model, _first_tokens(settings, examples), base=settings.model)
        together = settings.adapter == "lora+lomo"
        return peft.with_lora(
            model, rank=settings.lora_rank, alpha=settings.lora_alpha,
            dropout=settings.lora_dropout, targets=settings.lora_targets,
            base="the model in the folder above" if together else settings.model,
            frozen=not together,
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


def optimizers(settings, model):
    """-> [the optimizer of the settings], and AdamW of the adapters where that has the model.

    As the LOMO authors' code has it, the norm that clips the model's gradients is of these alone,
    and the adapters' are not clipped.
    """
    if settings.adapter != "lora+lomo":
        return [stepping.make(settings, model)]
    own, beside = peft.divided(model)
    lr, decay = settings.adapter_lr, settings.weight_decay
    return [stepping.make(settings, own), torch.optim.AdamW(beside, lr=lr, weight_decay=decay)]


def save(settings, folder, model, tokenizer, gathered):
    """Writes what transformers loads, or, of an adapter, `peft.PeftModel.from_pretrained`. Of both:
    the one, with the other in its folder "adapter"."""
    if settings.adapter is None:
        weights.save(folder, model, tokenizer, gathered)
    elif settings.adapter == "lora+lomo":
        weights.save(folder, model.get_base_model(), tokenizer, peft.base_weights(model))
        peft.save(folder / weights.ADAPTER, model)
    else:
        peft.save(folder, model, tokenizer)
