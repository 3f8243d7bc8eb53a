"""What defines a run, and the check of every value of it."""

import math
from dataclasses import asdict, dataclass

import torch

from .. import optim
from ..integrations import huggingface

OURS = optim.OPTIMIZERS
OPTIMIZERS = {  # default learning rates
    **{name: rule.finetune_lr for name, rule in OURS.items()},
    "sgd": 0.1,
    "adamw": 1e-4,
}
DEFAULT_STEPS = 32  # on the default data: about five minutes on two CPU cores
SCHEDULES = ("linear", "cosine", "constant")
SHARDINGS = ("none", "fsdp2")
PLACEMENT = ("sharding", "offload", "tensor_parallel")


@dataclass(frozen=True)
class Settings:
    """What defines a run. Two runs with equal settings give equal weights, to the bit."""

    model: str = huggingface.DEFAULT_MODEL
    train: str | None = None
    held_out: str | None = None
    optimizer: str = "lomo"
    lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.1
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 4
    length: int = 128
    clip_grad_norm: float | None = 1.0
    norm: str = "global"
    strategy: str = "auto"
    clip_grad_value: float | None = None
    weight_decay: float = 0.0
    loss_scale: float | str | None = "auto"
    dtype: str = "float32"
    rounding: str = "auto"
    backend: str = "auto"
    device: str = "cpu"
    checkpointing: bool = False
    sharding: str | None = None
    offload: bool = False
    tensor_parallel: int = 1
    eval_size: int = 64
    seed: int = 0

    def __post_init__(self):
        _check(self.optimizer in OPTIMIZERS, "optimizer", f"one of {list(OPTIMIZERS)}", self)
        _check(self.schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}", self)
        _check(self.lr is None or 0 <= self.lr < math.inf, "lr", "a number of at least 0", self)
        _check(0 <= self.warmup <= 1, "warmup", "a fraction of the steps, 0 to 1", self)
        _check(
            self.epochs is None or 0 < self.epochs < math.inf,
            "epochs", "a number greater than 0", self,
        )  # fmt: skip
        _check(self.steps is None or self.steps > 0, "steps", "a whole number above 0", self)
        _check(self.batch_size > 0, "batch_size", "a whole number above 0", self)
        _check(self.length > 1, "length", "a whole number above 1", self)
        _check(self.eval_size > 0, "eval_size", "a whole number above 0", self)
        _check(self.sharding in (None, *SHARDINGS), "sharding", f"one of {SHARDINGS}", self)
        _check(
            not (self.offload and self.sharding == "none"), "sharding", "'fsdp2' with offload", self
        )
        _check(self.tensor_parallel > 0, "tensor_parallel", "a whole number above 0", self)
        dtypes = ("float32", "bfloat16", "float16")
        _check(self.dtype in dtypes, "dtype", f"one of {dtypes}", self)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"device {self.device!r} cannot be used: {reason}") from error
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZERS[self.optimizer])

    @property
    def is_sharded(self):
        """Whether one process is sharded, too; several always are."""
        return self.offload or self.sharding == "fsdp2"

    def identity(self):
        """What a run must have in common with the one that it goes on with: all but how the
        processes share the model."""
        return {k: v for k, v in asdict(self).items() if k not in PLACEMENT}


def _check(fine, name, wanted, settings):
    if not fine:
        raise ValueError(f"{name} must be {wanted}, got {getattr(settings, name)!r}")
