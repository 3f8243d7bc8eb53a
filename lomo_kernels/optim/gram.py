"""When the norm of a product from its Gram matrices is not to be trusted."""

from collections import defaultdict

import torch

# Gram matrices add up terms that cancel. Their relative error is about 2**-24 times this ratio of
# the sum of magnitudes to the sum; above it, blocks of dW are squared instead.
MAX_CANCELLATION = 256.0


class Cancellation:
    """Which weights' Gram matrices cannot be trusted, found out without making the host wait.

    On a CPU at once; on a GPU from the last step whose figures have arrived, so that a weight which
    begins to cancel is measured by blocks one or two steps later.
    """

    def __init__(self):
        self._heavy = set()
        self._found = defaultdict(list)  # device -> [(param_id, ratio)]
        self._arriving = []

    def trusts(self, param_id):
        return param_id not in self._heavy

    def note(self, param_id, total, magnitude):
        """-> whether to use `total` now."""
        ratio = magnitude / total
        if ratio.device.type == "cpu":
            if ratio > MAX_CANCELLATION:  # not for NaN
                self._heavy.add(param_id)
            return self.trusts(param_id)
        self._found[ratio.device].append((param_id, ratio))
        return True

    def close(self):
        if (self._found or self._arriving) and torch.cuda.is_current_stream_capturing():
            self._found.clear()  # no host code runs when the step is replayed
            return  # and to ask an event would end the capture
        for device, found in self._found.items():
            ids, ratios = zip(*found)
            host = torch.empty(len(ids), dtype=torch.float64, pin_memory=True)
            host.copy_(torch.stack(ratios), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._arriving.append((event, ids, host))
        self._found.clear()
        waiting = []
        for event, ids, host in self._arriving:
            if event.query():
                self._heavy.update(i for i, r in zip(ids, host.tolist()) if r > MAX_CANCELLATION)
            else:
                waiting.append((event, ids, host))
        self._arriving = waiting
