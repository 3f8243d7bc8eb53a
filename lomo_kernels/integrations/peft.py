"""Adapters through peft: which there are, what they are made of, and their folder."""

import torch

from .common import ModelError, needed, short

ALONE = ("lora", "prefix")  # in place of the model's weights
ADAPTERS = (*ALONE, "lora+lomo")
OPTIONS = {  # option -> adapters that have it
    "adapter_lr": ("lora+lomo",),
    "prefix_tokens": ("prefix",),
    **dict.fromkeys(
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"), ("lora", "lora+lomo")
    ),
}


def check_used(values, defaults, adapters):
    """Finds options that none of the adapters would look at.

    Args:
        values, defaults: of options, by name.

    Raises:
        ValueError: which, and whose they are.
    """
    for name, value in values.items():
        able = OPTIONS[name]
        if value != defaults[name] and not set(adapters) & set(able):
            raise ValueError(
                f"{name} must be left out without adapter {' or '.join(able)}, got {value!r}"
            )


def installed():
    """The module peft.

    Raises:
        ModelError: it is not installed.
    """
    return needed("peft", "an adapter", "adapters")


def with_lora(model, *, rank, alpha=1.0, dropout=0.0, targets=None, base=None, frozen=True):
    """The model with LoRA (Hu et al., arXiv 2106.09685) beside some of its matrices: W x
    becomes W x + alpha / rank * B A x, where A is random and B is zero.

    Args:
        model: a causal language model of transformers; changed in place.
        rank, alpha, dropout: of A and B, in float32 where the model is in 16 bits.
        targets: names of modules with commas between them, or "all-linear"; None: peft's choice for
            this kind of model.
        base: what the model is called in the adapter's folder.
        frozen: whether the rest of the model is.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ModelError: peft knows no choice, or there is no such module.
    """
    peft = installed()
    names = targets if targets in (None, "all-linear") else targets.split(",")
    if isinstance(names, list):
        _check_names(model, names)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names,
        task_type=peft.TaskType.CAUSAL_LM, base_model_name_or_path=base,
    )  # fmt: skip
    try:
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        kind = model.config.model_type
        raise ModelError(
            f"peft cannot put LoRA into this {kind} model: {short(error)}; name modules with "
            "lora_targets"
        ) from error
    return adapted if frozen else adapted.requires_grad_()


def _check_names(model, names):
    """peft is content when one of them is found."""
    known = [f".{name}" for name, _ in model.named_modules()]
    for name in names:
        if not any(each.endswith(f".{name}") for each in known):
            raise ModelError(f"lora_targets must name modules of the model, got {name!r}")


def with_prefix(model, ids, *, base=None):
    """The model, frozen, with keys and values before every sequence in each layer (Li and Liang,
    arXiv 2101.00190), which are those of real tokens at first: it gives what the model gives after
    these tokens. In float32, as `with_lora`.

    Args:
        model: a causal language model of transformers; changed in place.
        ids: the tokens.
        base: what the model is called in the adapter's folder.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ModelError: peft's prefix does not go with this kind of model.
    """
    peft = installed()
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=len(ids), task_type=peft.TaskType.CAUSAL_LM, base_model_name_or_path=base
    )
    try:
        flat = _keys_and_values(model, ids)
        adapted = peft.get_peft_model(model, config)
        adapted.prompt_encoder["default"].float().embedding.weight.data.copy_(flat)
    except (ValueError, AttributeError, RuntimeError) as error:
        kind = model.config.model_type
        raise ModelError(f"peft has no prefix for this {kind} model: {short(error)}") from error
    return adapted


@torch.no_grad()
def _keys_and_values(model, ids):
    """Those of the tokens, [tokens, layers * 2 * heads * size of a head], as peft keeps them."""
    training = model.training
    cache = model.eval()(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    model.train(training)
    each = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return torch.cat([tensor[0].transpose(0, 1).flatten(1) for tensor in each], 1)


def divided(model):
    """-> (parameters of the model itself, those of its LoRA), with their names, as optimizers take
    them."""
    own, beside = [], []
    for name, param in model.named_parameters():
        (beside if "lora_" in name else own).append((name, param))
    return own, beside


def base_weights(model):
    """Those of the model itself under a LoRA, by the names that they have without it; tied ones
    once."""
    base = model.get_base_model()
    saved = base.state_dict().keys()
    tensors = {name: tensor for name, tensor in base.named_buffers() if name in saved}
    tensors |= {name: p.detach() for name, p in base.named_parameters() if "lora_" not in name}
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}


def context(model, rows):
    """What a model has before the tokens of a batch: (the model to call, a cache or None, how many
    tokens are in it). peft's own forward begins with its prefix again whenever it is called."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        return model, None, 0
    return model.get_base_model(), model.get_prompt(rows), config.num_virtual_tokens


def save(folder, model, tokenizer=None):
    """Writes the adapter alone: `peft.PeftModel.from_pretrained(model, folder)` loads it."""
    model.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the hub
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
