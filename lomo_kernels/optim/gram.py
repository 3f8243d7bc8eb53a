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
        self._found = defaultdict(list)  # device -> [(numbers, ratios)]
        self._arriving = []

    def trusts(self, number):
        """Of a parameter, by its number."""
        return number not in self._heavy

    def note(self, numbers, totals, magnitudes):
        """-> the numbers whose total is to be used now."""
        ratios = magnitudes / totals
        if ratios.device.type == "cpu":
            # a NaN is not heavy
            self._heavy.update(n for n, r in zip(numbers, ratios.tolist()) if r > MAX_CANCELLATION)
            return {number for number in numbers if self.trusts(number)}
        self._found[ratios.device].append((numbers, ratios))
        return set(numbers)

    def close(self):
        if (self._found or self._arriving) and torch.cuda.is_current_stream_capturing():
            self._found.clear()  # no host code runs when the step is replayed
            return  # and to ask an event would end the capture
        for device, found in self._found.items():
            numbers = [number for each, _ in found for number in each]
            host = torch.empty(len(numbers), dtype=torch.float64, pin_memory=True)
            host.copy_(torch.cat([ratios for _, ratios in found]), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._arriving.append((event, numbers, host))
        self._found.clear()
        waiting = []
        for event, numbers, host in self._arriving:
            if event.query():
                heavy = zip(numbers, host.tolist())
                self._heavy.update(number for number, ratio in heavy if ratio > MAX_CANCELLATION)
            else:
                waiting.append((event, numbers, host))
        self._arriving = waiting
