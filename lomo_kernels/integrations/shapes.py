"""Configurations of causal language models, and models of them whose weights nobody needs."""

import contextlib
import copy
import json
import re
import warnings
from pathlib import Path
from unittest import mock

from .common import ModelError, short, transformers_for, without_bars

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
        name: one of `CONFIGS`, a config.json, a folder with one, a model id of the hub (of which
            the configuration alone is loaded), or a transformers configuration.

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
        if not path.is_file() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            with without_bars(transformers):
                return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if not path.is_file():
            raise ModelError(
                f"there is no model {str(name)!r}: name a config.json, a folder with one, a model "
                f"id OWNER/NAME, or one of {', '.join(CONFIGS)}"
            )
        values = json.loads(path.read_text())
        return transformers.AutoConfig.for_model(**values)
    except ModelError:
        raise
    except Exception as error:  # a wrong configuration fails anywhere in transformers
        raise ModelError(f"cannot use the configuration {str(name)!r}: {short(error)}") from error


def kind_of(config):
    """The automatic class of transformers whose model of this configuration is trained on tokens.

    Raises:
        ModelError: there is none.
    """
    transformers = transformers_for("planning for a transformers model")
    if config.is_encoder_decoder:
        kinds = ["AutoModelForSeq2SeqLM"]
    else:
        kinds = ["AutoModelForCausalLM", "AutoModelForImageTextToText"]
        # models of both kinds are decoders only where they are told to be
        kinds.insert(1 if getattr(config, "is_decoder", False) else 0, "AutoModelForMaskedLM")
    for kind in kinds:
        if type(config) in getattr(transformers, kind)._model_mapping:
            return kind
    raise ModelError(
        f"transformers trains no {config.model_type} model on tokens alone, as a causal, masked, "
        "sequence-to-sequence or image-and-text language model"
    )


def from_config(config, dtype, checkpointing=None, attention=None, kind="AutoModelForCausalLM"):
    """A model with weights that nobody has trained; on fake tensors with none.

    Args:
        config: of transformers.
        dtype: of the parameters.
        checkpointing: None, "non_reentrant" or "reentrant".
        attention: "eager", "sdpa" or another of transformers'; None: its choice.
        kind: an automatic class of transformers.

    Raises:
        ModelError: transformers cannot build it.
    """
    transformers = transformers_for("planning for a transformers model")
    try:
        model = getattr(transformers, kind).from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    except Exception as error:  # a wrong configuration fails anywhere in the model's own code
        name = getattr(config, "model_type", type(config).__name__)
        raise ModelError(f"transformers cannot build this {name} model: {short(error)}") from error
    for part in model.modules():  # a decoder beside an encoder has a configuration of its own
        if isinstance(part, transformers.PreTrainedModel):
            part.config.use_cache = False
    if checkpointing is not None:
        options = {"use_reentrant": checkpointing == "reentrant"}
        with warnings.catch_warnings():  # the method's new name is not in transformers 5.0
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(options)
    return model.train()


@contextlib.contextmanager
def without_values():
    """In which models are made and run on tensors that have shapes and no values.

    Nothing is initialised: some models look at what they drew for that. A row holds one sequence:
    models would look at positions, take each row for several packed ones, and make a mask that
    training has no use for. Products of grouped experts have shapes for bfloat16 alone in torch;
    transformers' own ones, with the same results alive, take their place, as they do when it
    compiles.
    """
    from transformers import PreTrainedModel, masking_utils
    from transformers.integrations import moe

    replaced = [
        (PreTrainedModel, "initialize_weights", lambda model: None),
        (masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
        (moe, "_can_use_grouped_mm", lambda input, weight, offs: False),
    ]
    with contextlib.ExitStack() as stack:
        for module, name, replacement in replaced:
            if hasattr(module, name):  # transformers 5.0 has fewer
                stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def is_multimodal(config):
    """Whether the model reads more than tokens: images, sound."""
    return config.get_text_config() is not config and not config.is_encoder_decoder


def layers_of(config):
    """The number of decoder layers, if they may be traced for each other, else None."""
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    kinds = getattr(text, "layer_types", None) or ["same"]
    return layers if len(set(kinds)) == 1 and not config.is_encoder_decoder else None


def with_layers(config, layers):
    """A copy of the configuration with another number of layers.

    Raises:
        ModelError: it cannot be changed.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    try:
        text.num_hidden_layers = layers
        kinds = getattr(text, "layer_types", None)
        if kinds and len(kinds) != layers:  # some configurations make it of the number
            text.layer_types = kinds[:1] * layers
    except Exception as error:
        raise ModelError(f"the number of layers cannot be changed: {short(error)}") from error
    return config
