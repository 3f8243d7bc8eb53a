"""The squared norms of a step's gradients, from which `StepScalars` makes a clip coefficient."""

import itertools
from collections import defaultdict

import torch

from .. import ops
from ..ops.factors import tokens_of
from ..ops.lists import scatter_


class Norms:
    """One squared norm for each parameter, 0 without a gradient; one tensor on each device."""

    def __init__(self, numbers, scalars, cancellation, backend):
        self._numbers, self._scalars = numbers, scalars
        self._cancellation, self._backend = cancellation, backend
        self._slots = {}

    def slots(self, device, first, count=1):
        """Those of parameters with neighbouring numbers."""
        if device not in self._slots:
            self._slots[device] = torch.zeros(
                len(self._numbers), device=device, dtype=self._scalars.dtype
            )
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
        if self.measure_products([(number, gradient)]):
            return "gram"
        slot.zero_()
        part = torch.empty_like(slot)
        for piece in gradient.blocks(zeros=False):
            self._sumsq(part, piece.grad)
            slot += part
        return "blocks"

    def measure_products(self, numbered):
        """Of (number, gradient) pairs those that have factors alone, by Gram matrices, together;
        weights with the same inputs share the inputs' matrices, experts add up.

        Returns:
            The numbers of those for which that costs less than the gradient, and does not cancel.
        """
        devices = defaultdict(list)
        for number, gradient in numbered:
            if not gradient.factors or gradient.dense is not None:
                continue
            if not self._cancellation.trusts(number):
                continue
            products = gradient.products()
            if _gram_is_cheaper(products, gradient.shape):
                devices[gradient.device].append((number, _with_tokens(products)))
        measured = set()
        for device, group in devices.items():
            numbers, products = zip(*sorted(group, key=lambda each: each[0]))
            first = numbers[0]
            slots = self.slots(device, first, numbers[-1] - first + 1)
            counts = [len(each) for each in products]
            in_place = len(slots) == len(numbers) == sum(counts)
            sumsq = slots if in_place else slots.new_empty(sum(counts))
            magnitude, scalars = torch.empty_like(sumsq), self._scalars.on(device)
            ops.product_sumsq_(
                sumsq, magnitude, [pairs for each in products for pairs in each],
                inv_scale=scalars.inv_scale, found_inf=scalars.skip, backend=self._backend,
            )  # fmt: skip
            if sum(counts) > len(counts):
                sumsq, magnitude = _sums(sumsq, counts), _sums(magnitude, counts)
            if not in_place:
                scatter_(slots, [number - first for number in numbers], sumsq)
            measured |= self._cancellation.note(numbers, sumsq, magnitude)
        return measured

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


def _gram_is_cheaper(products, shape):
    """Of all experts together: the tokens are those that a token meets, on average."""
    tokens = [tokens_of(pairs) for pairs in products]
    met = sum(count**2 for count in tokens) / max(1, sum(tokens))
    return ops.gram_is_cheaper(met, *shape)


def _with_tokens(products):
    return [pairs for pairs in products if tokens_of(pairs)] or products[:1]


def _sums(values, counts):
    """Of so many neighbours each."""
    sums = [part.sum(dtype=torch.float64) for part in values.split(counts)]
    return torch.stack(sums).to(values.dtype)
