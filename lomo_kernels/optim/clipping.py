"""From squared norms to a clip coefficient, on the device."""

import torch


class SquaredNorms:
    """One squared norm per parameter, 0 without a gradient; one tensor per device."""

    def __init__(self, count):
        self._count = count
        self._slots = {}

    def slot(self, device, param_id):
        if device not in self._slots:
            self._slots[device] = torch.zeros(self._count, device=device)
        return self._slots[device][param_id]

    def total_norm(self):
        """sqrt of the sum over all parameters, on the device of the first gradient."""
        # In float64 the order of a few hundred additions does not show in the result.
        sums = [slots.sum(dtype=torch.float64) for slots in self._slots.values()]
        return torch.stack([s.to(sums[0].device) for s in sums]).sum().sqrt().float()


def clip_coefficient(total_norm, max_norm):
    """min(1, max_norm / (total_norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` has it."""
    return (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
