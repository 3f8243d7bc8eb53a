"""The contract of AdaLomo's update of tensors that several ranks share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks
from .adalomo import Update, as_lists
from .annotations import Backend, Rounding, State
from .reference import Part


class AdalomoParts:
    """The formula of `adalomo_update_`, whose sums are over whole tensors, on parts of them.

    A part is consecutive rows of a tensor: rows of a matrix [R, C], matrices of a stack [B, R, C],
    elements of a vector, or all of it. Three calls, and between them each rank gathers what all
    have, [ranks, n] in the same order everywhere, with a collective of the caller's choice::

        update = AdalomoParts(param, grad, state, shape=..., offset=..., lr=...)
        squares = update.squares(gather(update.statistics))
        update.update_(gather(squares))

    `statistics`, float32 [n], holds for each tensor in turn the sum of squares of param, and for
    a matrix also the sum over its rows of the new row moments and the C sums of squares of its
    columns: 1 or 2 + C numbers, as many on every rank. `squares(every)` gives the sums of squares
    of the updates u, one for each tensor. The sums of the ranks are added in their order in
    float64 and rounded once to fp32, so the column moments and all else that ranks share have the
    same bits on all of them; and one rank that has everything gets the bits of `adalomo_update_`.
    With more ranks sums are added in another order: results differ by a few units of fp32's last
    place (of row and column moments, and of the update).

    Nothing but found_inf and new tensors is written before `update_`. Between the calls the
    arguments must stay as they are, and `skip` must be the same on all ranks. An element of grad
    that is not finite makes sums NaN or infinite for all ranks: every one leaves that tensor and
    its state as they are and sets its `found_inf`.

    Args:
        param, grad, state: sequences, as in `adalomo_update_`: what this rank has, or an empty
            tensor [0, ...] of as many dimensions. The state is that of the part
            (`adalomo_state(param)`), so the column moments of a matrix are there on every rank.
        shape: for each the shape of the whole tensor.
        offset: for each the index of its first element in the whole: stochastic rounding draws the
            bits that the whole tensor would.
        counts: for each whether this rank's sums count; False for a copy of a part that another
            rank has too. None: all do.
        lr, weight_decay, eps, clip_threshold, decay_rate, inv_scale, clip_value, clip_coef,
            found_inf, skip, rounding, low, seed, param_id, sums, backend: as in
            `adalomo_update_`, the same on all ranks but for low and sums, which are the part's.

    Raises:
        TypeError, ValueError: which argument, what was wanted, what came; nothing was written.
        RuntimeError: the backend cannot run on param's device, or its kernel failed; calls out of
            their order.
    """

    def __init__(
        self,
        param: Sequence[Tensor],
        grad: Sequence[Tensor],
        state: Sequence[State],
        *,
        shape: Sequence[Sequence[int]],
        offset: Sequence[int],
        counts: Sequence[bool] | None = None,
        lr: float,
        weight_decay: float = 0.0,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        inv_scale: Tensor | None = None,
        clip_value: float | None = None,
        clip_coef: Tensor | None = None,
        found_inf: Tensor | None = None,
        skip: Tensor | None = None,
        rounding: Rounding = "nearest",
        low: Sequence[Tensor | None] | None = None,
        seed: int = 0,
        param_id: Sequence[int] | None = None,
        sums: Sequence[Tensor | None] | None = None,
        backend: Backend = "auto",
    ) -> None:
        params = list(param)
        if not params:
            raise ValueError("param must have at least one tensor, got none")
        rest = as_lists(len(params), grad, state, low, sums, param_id)
        shapes = checks.as_list("shape", shape, len(params))
        offsets = checks.as_list("offset", offset, len(params))
        counts = checks.as_list("counts", counts, len(params), [True] * len(params))
        parts, length = [], 0
        for number, (p, whole, first) in enumerate(zip(params, shapes, offsets)):
            checks.check_tensor("param", p)
            parts.append(Part(torch.Size(whole), first, length, number))
            _check_part(p, parts[-1])
            length += parts[-1].length
        self._update = Update(
            params, *rest, parts, lr, weight_decay, eps, clip_threshold, decay_rate, inv_scale,
            clip_value, clip_coef, found_inf, skip, rounding, seed, backend,
        )  # fmt: skip
        self._copies = [part for part, own in zip(parts, counts) if not own]
        self._count, self._totals = len(params), None
        self.statistics = params[0].new_empty(length, dtype=torch.float32)
        self._kept = [
            self._update.module.adalomo_statistics_(self.statistics, items, **options)
            for items, options in self._update.groups
        ]
        self._clear([self.statistics[p.slot :][: p.length] for p in self._copies])

    def squares(self, every: Tensor) -> Tensor:
        """Sums of squares of the updates [tensors], from the statistics [ranks, n] of all."""
        self._totals = self._add(every, len(self.statistics))
        out = self.statistics.new_empty(self._count)
        for (items, options), kept in zip(self._update.groups, self._kept):
            self._update.module.adalomo_squares_(out, items, kept, self._totals, **options)
        self._clear([out[p.number : p.number + 1] for p in self._copies])
        return out

    def update_(self, every: Tensor) -> None:
        """The update, from the squares [ranks, tensors] of all; the object is used up."""
        if self._totals is None:
            raise RuntimeError("update_() must come once, after squares()")
        totals = self._add(every, self._count)
        for (items, options), kept in zip(self._update.groups, self._kept):
            self._update.module.adalomo_parts_update_(items, kept, self._totals, totals, **options)
        self._update.finish()
        self._update = self._kept = self._totals = None

    @staticmethod
    def _clear(copies):
        if copies:
            torch._foreach_zero_(copies)

    def _add(self, every, length):
        """[ranks, length] -> [length], in the order of the ranks."""
        if not isinstance(every, torch.Tensor) or every.dtype is not torch.float32:
            got = every.dtype if isinstance(every, torch.Tensor) else type(every).__name__
            raise TypeError(f"every must be a float32 tensor, got {got}")
        if every.ndim != 2 or every.shape[0] == 0 or every.shape[1] != length:
            raise ValueError(f"every must have shape [ranks, {length}], got {tuple(every.shape)}")
        device = self.statistics.device
        if every.device != device:
            raise ValueError(f"every must be on param's device {device}, got {every.device}")
        total = every[0].double()
        for rank in every[1:]:
            total += rank
        return total.float()


def _check_part(param, part):
    whole, offset = part.shape, part.offset
    if len(whole) != param.ndim or whole[1:] != param.shape[1:]:
        raise ValueError(
            f"shape must be param's but for the number of rows, {tuple(param.shape)}, "
            f"got {tuple(whole)}"
        )
    checks.check_integer("offset", offset, 2**63)
    row = max(1, whole[1:].numel())
    if offset % row or offset + param.numel() > whole.numel():
        raise ValueError(
            f"offset must be that of rows that shape {tuple(whole)} has, got {offset} for "
            f"{tuple(param.shape)}"
        )
