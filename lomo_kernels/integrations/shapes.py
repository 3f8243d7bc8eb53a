"""Configurations of causal language models, and models of them whose weights nobody needs."""

import contextlib
import copy
import json
import warnings
from pathlib import Path
from unittest import mock

from .library import ModelError, short, transformers_for

_LLAMA = {"model_type": "llama", "max_position_embeddings": 1 << 20}


def _llama(hidden, inner, layers, heads, kv_heads=None, vocabulary=32000, **more):
    return _LLAMA | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads,
        "vocab_size": vocabulary, **more,
    }  # fmt: skip


# The sizes in the public config.json of huggyllama/llama-*, meta-llama/Meta-Llama-3-*,
# mistralai/Mistral-7B-v0.1 and HuggingFaceTB/SmolLM2-135M. No limit of positions is taken over.
CONFIGS = {
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-30b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, model_type="mistral", sliding_window=None),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}


def config_of(name):
    """The configuration of a model, whose weights are not needed.

    Args:
        name: one of `CONFIGS`, a config.json, a folder with one, or a transformers configuration.

    Raises:
        ModelError: there is no such thing, or transformers knows no such configuration.
    """
    transformers = transformers_for("planning for a transformers model")
    if isinstance(name, transformers.PretrainedConfig):
        return name
    try:
        if (known := CONFIGS.get(str(name).lower())) is not None:
            return transformers.AutoConfig.for_model(**known)
        path = Path(name)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            raise ModelError(
                f"there is no model {str(name)!r}: name a config.json, a folder with one, or one "
                f"of {', '.join(CONFIGS)}"
            )
        values = json.loads(path.read_text())
        return transformers.AutoConfig.for_model(**values)
    except ModelError:
        raise
    except Exception as error:  # a wrong configuration fails anywhere in transformers
        raise ModelError(f"cannot use the configuration {str(name)!r}: {short(error)}") from error


def from_config(config, dtype, checkpointing=None, attention=None):
    """A causal language model with weights that nobody has trained; on fake tensors with none.

    Args:
        config: of transformers.
        dtype: of the parameters.
        checkpointing: None, "non_reentrant" or "reentrant".
        attention: "eager", "sdpa" or another of transformers'; None: its choice.

    Raises:
        ModelError: transformers cannot build it.
    """
    transformers = transformers_for("planning for a transformers model")
    try:
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    except Exception as error:  # a wrong configuration fails anywhere in the model's own code
        kind = getattr(config, "model_type", type(config).__name__)
        raise ModelError(f"transformers cannot build this {kind} model: {short(error)}") from error
    model.config.use_cache = False
    if checkpointing is not None:
        options = {"use_reentrant": checkpointing == "reentrant"}
        with warnings.catch_warnings():  # the method's new name is not in transformers 5.0
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(options)
    return model.train()


@contextlib.contextmanager
def without_values():
    """In which models run on tensors that have shapes and no values.

    A row holds one sequence: models would look at positions for that, take each row for several
    packed ones, and make a mask that training has no use for. Products of grouped experts have
    shapes for bfloat16 alone in torch; transformers' own ones, with the same results alive, take
    their place, as they do when it compiles.
    """
    from transformers import masking_utils
    from transformers.integrations import moe

    replaced = [
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        (moe, "_can_use_grouped_mm", lambda input, weight, offs: False),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, replacement in replaced:
            if hasattr(module, name):  # transformers 5.0 has fewer
                stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def layers_of(config):
    """The number of decoder layers, if they may be traced for each other, else None."""
    config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    kinds = getattr(config, "layer_types", None) or ["same"]
    return layers if len(set(kinds)) == 1 else None


def with_layers(config, layers):
    """A copy of the configuration with another number of layers.

    Raises:
        ModelError: it cannot be changed.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    try:
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1] * layers
        text.num_hidden_layers = layers
    except Exception as error:
        raise ModelError(f"the number of layers cannot be changed: {short(error)}") from error
    return config
