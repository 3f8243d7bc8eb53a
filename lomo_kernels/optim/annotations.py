"""What the arguments of optimizers are, for type checkers and readers."""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from .loss_scale import LossScale

Trained: TypeAlias = (
    nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
)
Norm: TypeAlias = Literal["global", "tensor"]
Strategy: TypeAlias = Literal["auto", "one_backward", "two_backward", "partial", "immediate"]
Rounding: TypeAlias = Literal["auto", "nearest", "stochastic", "split"]
Scale: TypeAlias = float | Literal["auto", "dynamic"] | LossScale | None
