"""What defines a run, what is kept of it, and the check of every value.

The fields are the options of `lomo-kernels finetune` and the names of a `--config` file: a new one
is added here alone.
"""

import math
import types
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from .. import optim
from ..integrations import weights
from ..integrations.peft import ADAPTERS, ALONE
from ..integrations.sharding import UNITS
from ..optim.arguments import STRATEGIES
from .scoring import RULES
from .superglue import TASKS

OURS = optim.OPTIMIZERS
OPTIMIZERS = {  # default learning rates
    **{name: rule.finetune_lr for name, rule in OURS.items()},
    "sgd": 0.1,
    "adamw": 1e-4,
}
ADAPTER_LRS = {"lora": 2e-3, "prefix": 1e-2}  # by default, of AdamW on them
OURS_ALONE = {  # option -> what torch's optimizers do of it
    "strategy": ("auto",),
    "norm": ("global",),
    "rounding": ("auto", "nearest"),
    "loss_scale": ("auto", None),
    "backend": ("auto",),
}
DEFAULT_STEPS = 32  # on the default data: about five minutes on two CPU cores
SCHEDULES = ("linear", "cosine", "constant")
SHARDINGS = ("none", "fsdp2")
PLACEMENT = ("sharding", "units", "offload", "tensor_parallel")  # how processes share one model
DTYPES = ("float32", "bfloat16", "float16")
TRUNCATIONS = ("prompt-left", "skip", "error")

_LRS = ", ".join(f"{lr:g} for {name}" for name, lr in {**OPTIMIZERS, **ADAPTER_LRS}.items())
_WE = " and ".join(OURS)


def _option(default, help):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Settings:
    """What defines a run. Two runs with equal settings, of files that hold the same, give equal
    weights, to the bit."""

    model: str = _option(
        weights.DEFAULT_MODEL,
        "smollm2-135m-instruct, a local directory, a .gguf file or a model id",
    )
    train: str | None = _option(
        None, "examples: a .jsonl, .json, .csv, .tsv, .parquet or text file, or a data set's folder"
    )
    held_out: str | None = _option(
        None, "examples for the score; without it a tenth of --train is held out"
    )
    task: str | None = _option(None, f"a task of SuperGLUE in place of --train: {', '.join(TASKS)}")
    data: str | None = _option(
        None, "where the task's rows are: the release's folder, or a data set of the hub's format"
    )
    prompt_file: str | None = _option(
        None, "YAML with the task's prompt, and choices, in place of those of the LOMO authors"
    )
    train_size: int | None = _option(
        None, "examples to train on, taken by --seed; by default all, and 1000 of a task"
    )
    length: int = _option(128, "tokens of an example at most")
    truncate: str = _option(
        "prompt-left",
        "what becomes of longer examples: prompt-left cuts the beginning of the prompt, skip "
        "leaves them out, error refuses them",
    )
    adapter: str | None = _option(
        None,
        "of peft's: lora or prefix, trained by adamw in place of the weights, or lora+lomo, beside "
        "them",
    )
    adapter_lr: float | None = _option(
        None,
        "largest learning rate of the adapters of lora+lomo, --lr being that of the weights; by "
        f"default {ADAPTER_LRS['lora']:g}",
    )
    lora_rank: int = _option(8, "rank of LoRA's matrices")
    lora_alpha: float = _option(16.0, "LoRA's product is multiplied by this over the rank")
    lora_dropout: float = _option(0.0, "part of LoRA's inputs that is dropped in training")
    lora_targets: str | None = _option(
        None, "modules that get LoRA, e.g. q_proj,v_proj or all-linear; by default peft's choice"
    )
    prefix_tokens: int = _option(
        20, "of a prefix, which begins with the first tokens of the examples"
    )
    optimizer: str | None = _option(
        None, f"{', '.join(OPTIMIZERS)}; by default lomo, and adamw of lora and prefix"
    )
    lr: float | None = _option(None, f"largest learning rate; by default {_LRS}")
    schedule: str = _option("linear", ", ".join(SCHEDULES))
    warmup: float = _option(0.1, "fraction of the steps in which the learning rate rises")
    epochs: float | None = _option(
        None, "passes over the examples; by default 1, and 32 steps of the default data"
    )
    steps: int | None = _option(None, "number of steps, instead of --epochs")
    batch_size: int = _option(4, "examples in a backward, of all processes together")
    gradient_accumulation: int = _option(1, "backwards in a step")
    clip_grad_norm: float | None = _option(1.0, "largest gradient norm; 0 switches clipping off")
    norm: str = _option("global", "global: one norm of all gradients; tensor: each tensor's own")
    strategy: str = _option("auto", f"how {_WE} update: {', '.join(STRATEGIES)}")
    clip_grad_value: float | None = _option(None, "largest absolute value of a gradient element")
    weight_decay: float = _option(0.0, "decoupled weight decay")
    loss_scale: float | str | None = _option(
        "auto", "factor of the loss: a number, dynamic, none, or auto: dynamic for float16"
    )
    dtype: str = _option(
        "float32",
        "float32, bfloat16 or float16; by default float32 on a CPU, bfloat16 on a GPU",
    )
    autocast: bool = _option(False, "compute in bfloat16 with float32 weights")
    rounding: str = _option("auto", "of 16-bit parameters: auto, nearest, stochastic or split")
    backend: str = _option("auto", "auto, native, triton or reference")
    device: str = _option("cpu", "cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    checkpointing: bool = _option(
        False, "recompute activations in backward: less memory, a third more time"
    )
    score: str = _option(
        "mean",
        "by which of their tokens' log-likelihoods answers are ranked: the mean, as in the paper, "
        "or the sum",
    )
    eval_size: int | None = _option(
        None, "held-out examples that are scored; by default 64, and 1000 of a task"
    )
    eval_every: int | None = _option(
        None,
        "steps between scores of a validation part, a tenth of what is trained on otherwise; the "
        "weights with the best one are taken",
    )
    sharding: str | None = _option(
        None, "none or fsdp2: each process has a part of the model; by default fsdp2 for several"
    )
    units: str = _option(
        "layer", "what a device gathers of a sharded model at a time: layer, or fine: less memory"
    )
    offload: bool = _option(
        False, "the model lives in host memory and is updated there; with one process, too"
    )
    tensor_parallel: int = _option(1, "processes that share each matrix, by transformers' plan")
    seed: int = _option(
        0, "of the order of the examples, of adapters, dropout and stochastic rounding"
    )

    def __post_init__(self):
        if self.clip_grad_norm == 0:
            object.__setattr__(self, "clip_grad_norm", None)
        if self.optimizer is None:
            name = "adamw" if self.adapter in ALONE else "lomo"
            object.__setattr__(self, "optimizer", name)
        self._one_of("optimizer", tuple(OPTIMIZERS))
        if self.optimizer not in OURS:
            for name, able in OURS_ALONE.items():
                wanted = f"{' or '.join(map(str, able))} with optimizer {self.optimizer}"
                self._check(name, lambda value, able=able: value in able, wanted)
        self._one_of("schedule", SCHEDULES)
        self._one_of("dtype", DTYPES)
        self._one_of("score", RULES)
        self._one_of("truncate", TRUNCATIONS)
        for name in ("lr", "adapter_lr"):
            self._check(name, lambda lr: lr is None or 0 <= lr < math.inf, "a number of at least 0")
        self._check("warmup", lambda part: 0 <= part <= 1, "a fraction of the steps, 0 to 1")
        self._check("epochs", lambda n: n is None or 0 < n < math.inf, "a number greater than 0")
        for name in (
            "steps", "batch_size", "gradient_accumulation", "train_size", "eval_size", "eval_every",
            "tensor_parallel", "lora_rank", "prefix_tokens",
        ):  # fmt: skip
            self._check(name, lambda n: n is None or n > 0, "a whole number above 0")
        self._check("autocast", lambda on: not on or self.dtype == "float32", "with dtype float32")
        self._check("lora_alpha", lambda alpha: 0 < alpha < math.inf, "a number greater than 0")
        self._check("lora_dropout", lambda part: 0 <= part < 1, "at least 0 and below 1")
        self._check_adapter()
        self._check_task()
        if self.sharding is not None:
            self._one_of("sharding", SHARDINGS)
        self._check(
            "sharding", lambda how: not (self.offload and how == "none"), "fsdp2 with offload"
        )
        self._one_of("units", UNITS)
        self._check("length", lambda n: n > 1, "a whole number above 1")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"device {self.device!r} cannot be used: {reason}") from error
        if self.lr is None:
            default = ADAPTER_LRS.get(self.adapter, OPTIMIZERS[self.optimizer])
            object.__setattr__(self, "lr", default)
        if self.adapter_lr is None and self.adapter == "lora+lomo":
            object.__setattr__(self, "adapter_lr", ADAPTER_LRS["lora"])
        if self.eval_size is None:
            object.__setattr__(self, "eval_size", 1000 if self.task else 64)
        if self.train_size is None and self.task:
            object.__setattr__(self, "train_size", 1000)

    @property
    def is_sharded(self) -> bool:
        """Whether one process is sharded, too; several always are."""
        return self.offload or self.sharding == "fsdp2"

    def identity(self) -> dict[str, Any]:
        """What a run has in common with one that goes on with it, maybe in other processes."""
        return {key: value for key, value in asdict(self).items() if key not in PLACEMENT}

    def _check_adapter(self):
        if self.adapter is None:
            return
        self._one_of("adapter", ADAPTERS)
        able = ("adamw",) if self.adapter in ALONE else tuple(OURS)
        wanted = f"{' or '.join(able)} with adapter {self.adapter}"
        self._check("optimizer", lambda name: name in able, wanted)
        if self.adapter == "lora+lomo":
            whose = "with adapter lora+lomo, as adamw has no loss scale"
            self._check("dtype", lambda name: name != "float16", f"float32 or bfloat16 {whose}")
            self._check("loss_scale", lambda scale: scale in (None, "auto"), f"none {whose}")
        if self.adapter == "prefix":
            wanted = "left out with adapter prefix, whose keys and values peft adds in one forward"
            self._check("checkpointing", lambda on: not on, wanted)
        for name, alone in (
            ("sharding", (None, "none")), ("units", ("layer",)), ("offload", (False,)),
            ("tensor_parallel", (1,)),
        ):  # fmt: skip
            wanted = "left out with an adapter, which one process trains"
            self._check(name, lambda value, alone=alone: value in alone, wanted)

    def _check_task(self):
        if self.task is None:
            for name in ("data", "prompt_file"):
                self._check(name, lambda value: value is None, "of a task: name one with --task")
            return
        self._one_of("task", TASKS)
        self._check("data", lambda value: value is not None, f"where the rows of {self.task} are")
        for name in ("train", "held_out"):
            self._check(name, lambda value: value is None, "left out with a task")

    def _check(self, name, fine, wanted):
        value = getattr(self, name)
        if not fine(value):
            raise ValueError(f"{name} must be {wanted}, got {value!r}")

    def _one_of(self, name, known):
        self._check(name, lambda value: value in known, f"one of {', '.join(known)}")


@dataclass(frozen=True)
class Output:
    """What is kept and shown of a run; its weights do not depend on it."""

    out: str | None = _option(
        None, "folder for checkpoints and the model; an interrupted run goes on there"
    )
    save_every: int | None = _option(
        None, "steps between checkpoints; by default a quarter of the run"
    )
    keep: int = _option(0, "newest checkpoints that stay when the run is over")
    log: str | None = _option(
        None,
        "folder for log.jsonl, by default --out's; and for TensorBoard's events, where it is "
        "installed",
    )
    compare: str | None = _option(
        None,
        "other optimizers and adapters on the same data, e.g. sgd,adamw,lora or sgd=0.1,lora=4e-3",
    )

    def __post_init__(self):
        if self.save_every is not None and self.save_every <= 0:
            raise ValueError(f"save_every must be a whole number above 0, got {self.save_every}")
        if self.keep < 0:
            raise ValueError(f"keep must be a whole number of at least 0, got {self.keep}")


def typed(cls, values):
    """The fields of `cls` among `values`, which are texts as on a command line or YAML's values,
    in the types that the fields have.

    Raises:
        ValueError: which field, what was wanted, what came.
    """
    return {
        each.name: _typed(each, values[each.name]) for each in fields(cls) if each.name in values
    }


def _typed(each, value):
    kinds = each.type.__args__ if isinstance(each.type, types.UnionType) else (each.type,)
    no_number = value == "none" and float in kinds  # as a text it may be a file's name
    if types.NoneType in kinds and (value is None or no_number):
        return None
    if bool in kinds and isinstance(value, bool):
        return value
    text = str(value)  # YAML reads 1e-4 as a text, and a name like 1234 as a number
    for kind in (int, float, str):
        if kind in kinds and value is not None and not isinstance(value, (bool, list, dict)):
            try:
                return kind(text)
            except ValueError:
                continue
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    wanted = " or ".join(names[kind] for kind in kinds if kind in names)
    raise ValueError(f"{each.name} must be {wanted}, got {value!r}")
