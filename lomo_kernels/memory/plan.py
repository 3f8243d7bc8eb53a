"""What a training step of a model would need, without the model."""

import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..integrations import peft, shapes
from ..integrations.sharding import UNITS
from . import report
from .optimizers import OPTIMIZERS, RELEASING
from .predict import Job, largest, parameters, predict
from .timeline import Summary

CHECKPOINTING = (None, "non_reentrant", "reentrant")
SHARDING = ("none", "fsdp2", "zero3")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What `plan` found, per device; `print` shows a table.

    peak: bytes alive at the worst moment of a step whose states exist. place: where that is.
    at_peak: bytes of each category at that moment. maxima: the most of each category at any moment.
    margin: device_memory - peak, None where no device memory was given. fits: whether it is >= 0.
    host_peak, host_at_peak: the same of host memory, where parameters live there, else None.
    largest_batch, largest_sequence: the most that fit, the other being as it is; None where they
    were not asked for. text_alone: the model reads images or sound too, and the step has none.
    """

    model: str
    job: Job
    parameters: int
    summary: Summary
    device_memory: int | None
    largest_batch: int | None = None
    largest_sequence: int | None = None
    text_alone: bool = False

    @property
    def peak(self):
        return self.summary.peak.total

    @property
    def place(self):
        return str(self.summary.peak.place)

    @property
    def at_peak(self):
        return dict(self.summary.peak.parts)

    @property
    def maxima(self):
        return dict(self.summary.maxima)

    @property
    def host_peak(self):
        host = self.summary.host
        return None if host is None else host.peak.total

    @property
    def host_at_peak(self):
        host = self.summary.host
        return None if host is None else dict(host.peak.parts)

    @property
    def margin(self):
        return None if self.device_memory is None else self.device_memory - self.peak

    @property
    def fits(self):
        return None if self.device_memory is None else self.margin >= 0

    def verdict(self) -> str:
        """One sentence: whether it fits, by how much, and what would."""
        text = f"needs {report.size(self.peak)} on each device"
        if self.device_memory is not None:
            text = f"{report.size(abs(self.margin))} of {report.size(self.device_memory)}"
            text = f"fits, {text} to spare" if self.fits else f"does not fit: {text} missing"
        if self.host_peak is not None:
            text += f"; {report.size(self.host_peak)} of host memory"
            text += " for each device" if self.job.shards > 1 else ""
        for name, most in (("batch", self.largest_batch), ("sequence", self.largest_sequence)):
            if most is not None:
                text += f"; largest {name} {most}" if most else f"; no {name} fits"
        return text + ("; on text alone, without images or sound" if self.text_alone else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything, in bytes, for json."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            **{key: value for key, value in vars(self.job).items() if "options" not in key},
            **dict(self.job.options),
            **dict(self.job.adapter_options),
            **self.summary.to_dict(),
            "device_memory_bytes": self.device_memory,
            "margin_bytes": self.margin,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "largest_sequence": self.largest_sequence,
            "text_alone": self.text_alone,
        }

    def __str__(self):
        return "\n".join([report.text(self.summary), self.verdict()])

    def plot(self, path: str | Path) -> None:
        """Draws the categories at the peak as a bar into an image file; needs matplotlib."""
        report.plot_bars([(self.job.name, self.summary)], self.device_memory, path)


def plan(
    model: Any,
    *,
    optimizer: str | None = None,
    adapter: str | None = None,
    lora_rank: int = 8,
    lora_dropout: float = 0.0,
    lora_targets: str | None = None,
    prefix_tokens: int = 20,
    clip_grad_norm: float | None = 1.0,
    strategy: str = "auto",
    rounding: str = "auto",
    dtype: str = "bfloat16",
    batch: int = 1,
    sequence: int = 512,
    checkpointing: str | None = None,
    attention: str | None = None,
    devices: int = 1,
    sharding: str | None = None,
    units: str = "layer",
    offload: str | None = None,
    device: str = "cuda",
    device_memory: int | str | None = None,
    search: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Predicts the memory of a training step, in bytes per device, without allocating the model.

    The model's own code and the optimizer's run a real forward, backward and step on tensors
    without data (torch's FakeTensorMode), whose storages are followed as `measure` does it.
    Models of layers that are alike are traced with a few of them (timeline.py, Note [More layers]).
    Not in it: what an allocator rounds up or loses to fragmentation, the CUDA context (0.3 to 0.6
    GiB), workspaces inside kernels and communication libraries.

    Args:
        model: one of `integrations.shapes.CONFIGS`, a config.json, a folder with one, a model
            id of the hub (the configuration alone is loaded), or a transformers configuration, of
            a causal, masked, sequence-to-sequence or image-and-text language model.
        optimizer: one of `OPTIMIZERS`; None: "lomo", and "adamw" of the adapters "lora" and
            "prefix", which have no other. "-master" keeps an fp32 copy of the parameters and fp32
            states, mixed precision as it is usual; "adamw" and "sgd" are torch's.
        adapter: "lora" or "prefix", trained in place of the parameters, or "lora+lomo", LoRA by
            AdamW beside them; in float32 (docs/adapters.md).
        lora_rank, lora_dropout, lora_targets, prefix_tokens: of an adapter, as in
            `finetune.Settings`.
        clip_grad_norm, strategy, rounding: of lomo and adalomo, as in `Lomo`. torch's optimizers
            have no strategies and round to nearest; clipping changes nothing of their memory.
        dtype: of the parameters: "float32", "bfloat16", "float16".
        batch, sequence: sequences of a step on each device, and tokens of each, without padding;
            a decoder beside an encoder has as many.
        checkpointing: None, "non_reentrant" or "reentrant".
        attention: "eager", "sdpa" or another of transformers'; None: its choice.
        devices, sharding: "fsdp2" or "zero3": parameters, gradients and states are shared by so
            many devices, by `fully_shard`, of which only this one exists. None: "none" for one
            device without offload, else "fsdp2". "zero3", of torch's optimizers alone, is planned
            in the same way: DeepSpeed's own buffers are not known.
        units: "layer" or "fine", as in `integrations.sharding.shard`.
        offload: "cpu": parameters, gradients and states live in host memory, planned apart.
        device: "cuda", or "cpu", where products of 16-bit factors need copies in fp32.
        device_memory: bytes, or a text such as "24GiB" or "24GB".
        search: "batch" or "sequence": also find the largest that fits into it.
        progress: called with a line of text before each thing that takes a second.

    Returns:
        A `Plan`.

    Raises:
        ValueError: which argument, what was wanted, what came.
        ModelError: there is no such model, or transformers cannot build it.
        RuntimeError: `devices` above 1 inside a process group.
    """
    _one_of("adapter", adapter, (None, *peft.ADAPTERS))
    if optimizer is None:
        optimizer = "adamw" if adapter in peft.ALONE else "lomo"
    able = {None: OPTIMIZERS, "lora+lomo": tuple(RELEASING)}.get(adapter, ("adamw",))
    _one_of("optimizer", optimizer, able)
    _one_of("dtype", dtype, DTYPES)
    _one_of("checkpointing", checkpointing, CHECKPOINTING)
    _one_of("device", device, ("cuda", "cpu"))
    _one_of("search", search, (None, "batch", "sequence"))
    for name, value in (
        ("batch", batch), ("sequence", sequence), ("devices", devices), ("lora_rank", lora_rank),
        ("prefix_tokens", prefix_tokens),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    _one_of("units", units, UNITS)
    _one_of("offload", offload, (None, "cpu"))
    if sharding is None:
        sharding = "none" if devices == 1 and offload is None else "fsdp2"
    _one_of("sharding", sharding, SHARDING)
    if devices == 1 and sharding != "none" and offload is None:
        raise ValueError(f"sharding {sharding!r} needs devices of at least 2, got 1")
    if sharding == "zero3" and optimizer in RELEASING:
        raise ValueError(f"{optimizer} trains no parameters of DeepSpeed: take sharding 'fsdp2'")
    if optimizer not in RELEASING:  # torch's, which round to nearest
        _one_of(f"strategy of {optimizer}", strategy, ("auto",))
        _one_of(f"rounding of {optimizer}", rounding, ("auto", "nearest"))
    for name, value, default in (("units", units, "layer"), ("offload", offload, None)):
        if sharding == "none" and value != default:
            raise ValueError(f"{name} {value!r} needs sharding 'fsdp2', got 'none'")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, got {lora_dropout!r}")
    of_adapter = {
        "lora_rank": lora_rank, "lora_dropout": lora_dropout, "lora_targets": lora_targets,
        "prefix_tokens": prefix_tokens,
    }  # fmt: skip
    defaults = {name: inspect.signature(plan).parameters[name].default for name in of_adapter}
    peft.check_used(of_adapter, defaults, [adapter])
    of_adapter = {n: value for n, value in of_adapter.items() if adapter in peft.OPTIONS[n]}
    if adapter is not None and sharding != "none":
        raise ValueError(f"adapter must be None with sharding {sharding!r}, got {adapter!r}")
    if adapter == "prefix" and checkpointing is not None:
        raise ValueError(f"checkpointing must be None with a prefix, got {checkpointing!r}")
    memory = None if device_memory is None else byte_count(device_memory)
    if search and memory is None:
        raise ValueError("the search for what fits needs device_memory, got none")
    progress("reading the configuration")
    config = shapes.config_of(model)
    options = {}
    if optimizer in RELEASING:
        options = {"clip_grad_norm": clip_grad_norm, "strategy": strategy, "rounding": rounding}
    job = Job(
        optimizer, dtype, batch, sequence, checkpointing, attention, device,
        1 if sharding == "none" else devices, units, offload, tuple(options.items()), adapter,
        tuple(of_adapter.items()),
    )  # fmt: skip
    summary = predict(config, job, progress)
    most = {}
    if search:
        tries = itertools.count(1)

        def needs(changed):
            what = f"try {next(tries)}, {search} {getattr(changed, search)}"
            return predict(config, changed, lambda text: progress(f"{what}: {text}")).peak.total

        most = {f"largest_{search}": largest(search, job, needs, memory)}
    name = model if isinstance(model, str) else getattr(config, "model_type", "model")
    more = {"text_alone": shapes.is_multimodal(config), **most}
    return Plan(str(name), job, parameters(config), summary, memory, **more)


def _one_of(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def byte_count(value):
    """Bytes of a number, or of a text with a unit: "24GiB" or "24G" is 24 * 2**30, "24GB" 24e9.

    Raises:
        ValueError: neither, or not above 0.
    """
    units = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
    units |= {f"{unit}ib": size for unit, size in units.items() if unit}
    units |= {f"{unit}b": 1000 ** (i + 1) for i, unit in enumerate("kmgt")}
    match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", str(value).lower())
    try:
        size = float(match[1]) * units[match[2]]
    except (TypeError, KeyError, ValueError):
        size = 0
    if not 0 < size < math.inf:
        raise ValueError(f"device_memory must be bytes or a text such as 24GiB, got {value!r}")
    return int(size)


__all__ = ["OPTIMIZERS", "Plan", "byte_count", "plan"]
