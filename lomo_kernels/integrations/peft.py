"""Adapters through peft: which there are, what they are made of, and their folder."""

from .huggingface import ModelError, _short


def library():
    """The module peft.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError("an adapter needs peft: pip install 'lomo_kernels[adapters]'") from error
    return peft


def with_lora(model, *, rank, alpha, dropout, targets, base):
    """The model, frozen, with LoRA (Hu et al., arXiv 2106.09685) beside some of its matrices: W x
    becomes W x + alpha / rank * B A x, where A is random and B is zero.

    Args:
        model: a causal language model of transformers; changed in place.
        rank, alpha, dropout: of A and B, in float32 where the model is in 16 bits.
        targets: names of modules with commas between them, or "all-linear"; None: peft's choice for
            this kind of model.
        base: what the model is called in the adapter's folder.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ModelError: peft knows no choice, or there is no such module.
    """
    peft = library()
    names = targets if targets in (None, "all-linear") else targets.split(",")
    if isinstance(names, list):
        _check_names(model, names)
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names,
        task_type=peft.TaskType.CAUSAL_LM, base_model_name_or_path=base,
    )  # fmt: skip
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        kind = model.config.model_type
        raise ModelError(
            f"peft cannot put LoRA into this {kind} model: {_short(error)}; name modules with "
            "lora_targets"
        ) from error


def _check_names(model, names):
    """peft is content when one of them is found."""
    known = [f".{name}" for name, _ in model.named_modules()]
    for name in names:
        if not any(each.endswith(f".{name}") for each in known):
            raise ModelError(f"lora_targets must name modules of the model, got {name!r}")


def save(folder, model, tokenizer=None):
    """Writes the adapter alone: `peft.PeftModel.from_pretrained(model, folder)` loads it."""
    model.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the hub
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
