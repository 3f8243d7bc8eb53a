"""The squared norms of a step's gradients, from which `StepScalars` makes a clip coefficient."""

import itertools

import torch

from .. import ops


class Norms:
    """One squared norm for each parameter, 0 without a gradient; one tensor on each device."""

    def __init__(self, count, scalars, cancellation, backend):
        self._count, self._scalars = count, scalars
        self._cancellation, self._backend = cancellation, backend
        self._slots = {}

    def slots(self, device, first, count=1):
        """Those of parameters with neighbouring numbers."""
        if device not in self._slots:
            self._slots[device] = torch.zeros(self._count, device=device, dtype=self._scalars.dtype)
        return self._slots[device][first : first + count]

    def tensors(self):
        """Everything that adds up to the square of the total norm."""
        return list(self._slots.values())

    def measure(self, number, gradient):
        """Notes the squared norm of a parameter's gradient; says how it was found."""
        slot = self.slots(gradient.device, number)
        if not gradient.factors:
            self._sumsq(slot, gradient.dense)
            return "gradient"
        if gradient.dense is None and self.measure_factors(
            number, gradient.factors, gradient.param
        ):
            return "gram"
        slot.zero_()
        part = torch.empty_like(slot)
        for piece in gradient.pieces():
            self._sumsq(part, piece.grad)
            slot += part
        return "blocks"

    def measure_factors(self, number, factors, param):
        """By Gram matrices, if they cost less than the gradient and do not cancel; says whether."""
        tokens = sum(f.tokens for f in factors)
        if not ops.gram_is_cheaper(tokens, *param.shape) or not self._cancellation.trusts(number):
            return False
        slot = self.slots(factors[0].right.device, number)
        magnitude, scalars = torch.empty_like(slot), self._scalars.on(slot.device)
        ops.product_sumsq_(
            slot, magnitude, [[(f.left, f.right) for f in factors]],
            inv_scale=scalars.inv_scale, found_inf=scalars.skip, backend=self._backend,
        )  # fmt: skip
        return self._cancellation.note(number, slot[0], magnitude[0])

    def measure_tensors(self, numbered):
        """Of (number, tensor) pairs, neighbours in one launch."""

        def neighbours(placed):
            place, (number, grad) = placed
            return grad.device, grad.dtype, number - place

        numbered = sorted(numbered, key=lambda each: each[0])
        for (device, *_), run in itertools.groupby(enumerate(numbered), neighbours):
            numbers, grads = zip(*(each for _, each in run))
            self._sumsq(self.slots(device, numbers[0], len(numbers)), grads)

    def _sumsq(self, out, grad):
        scalars = self._scalars.on(out.device)
        ops.grad_sumsq_(
            out, grad, inv_scale=scalars.inv_scale, found_inf=scalars.skip, backend=self._backend
        )
