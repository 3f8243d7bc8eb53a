"""What the arguments of operations and optimizers are, for type checkers and readers."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from torch import Tensor

Tensors: TypeAlias = Tensor | Sequence[Tensor]
Products: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # pairs (left, right): left.T @ right
Integers: TypeAlias = int | Sequence[int] | None
Lows: TypeAlias = Tensor | Sequence[Tensor | None] | None  # low halves of fp32 masters
Backend: TypeAlias = Literal["auto", "native", "triton", "reference"]
Rounding: TypeAlias = Literal["nearest", "stochastic", "split"]
Method: TypeAlias = Literal["auto", "blocks", "epilogue"]
State: TypeAlias = dict[str, Tensor]
