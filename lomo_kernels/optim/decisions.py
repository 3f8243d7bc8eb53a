"""The scalars that decide a step: one small tensor per device, read by the host only when asked."""

import torch


class Decisions:
    """inv_scale, clip_coef and the overflow flags of one step on one device.

    Note [Two flags]
    Once a gradient is not finite, the rest of the step is skipped. A kernel that read and wrote one
    flag would skip some of its own blocks, depending on their timing. So there are two, and each
    update reads one (`skip`), writes the other (`found_inf`, also when it skips) and the next one
    swaps them: what an update does depends only on the updates before it.
    """

    def __init__(self, device, inv_scale):
        self._values = torch.zeros(4, device=device)
        self.inv_scale = None
        if inv_scale != 1.0:
            self.inv_scale = self._values[0].fill_(inv_scale)
        self.clip_coef = None
        self._flags = self._values[2:]
        self._pair = (self._values[2], self._values[3])

    def next_flags(self):
        """(skip, found_inf) for the next update."""
        self._pair = self._pair[::-1]
        return self._pair

    @property
    def skip(self):
        """The flag that the next update will read."""
        return self._pair[1]

    def found_inf(self):
        """A tensor that is not 0 when the step, as far as it went, met a non-finite gradient."""
        return self._flags.max()

    def decide(self, clip_coef, found_inf):
        """Sets what a norm pass found, before the first update: all or nothing is written."""
        if clip_coef is not None:
            self.clip_coef = self._values[1].copy_(clip_coef)
        self._flags.copy_(found_inf.expand(2))
