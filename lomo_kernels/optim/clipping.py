"""The squared norms of a step, from which `Decisions` makes a clip coefficient."""

import torch


class SquaredNorms:
    """One squared norm per parameter, 0 without a gradient; one tensor per device."""

    def __init__(self, count):
        self._count = count
        self._slots = {}

    def slots(self, device, first, count=1):
        """Those of parameters with neighbouring numbers."""
        if device not in self._slots:
            self._slots[device] = torch.zeros(self._count, device=device)
        return self._slots[device][first : first + count]

    def tensors(self):
        """Everything that adds up to the square of the total norm."""
        return list(self._slots.values())
