"""Which items each run got right: how rows keep them, and what can be said of a mean.

An interval is that of a bootstrap over items and seeds at once (Owen, "The pigeonhole bootstrap",
2007): both are drawn again with replacement, each by itself. Two methods that answered the same
items with the same seeds are compared through their differences, so that what makes an item hard
for both does not widen the interval.
"""

import functools

import torch

RESAMPLES = 10_000


def packed(items):
    """A text of "0" and "1" as hexadecimal digits, each for four of them."""
    return "".join(f"{int(items[i : i + 4].ljust(4, '0'), 2):x}" for i in range(0, len(items), 4))


def bits(digits, count):
    """The text of which `packed` made these digits, `count` long."""
    return "".join(f"{int(digit, 16):04b}" for digit in digits)[:count]


def unpacked(digits, count):
    """The same as a float64 tensor."""
    return torch.tensor([int(bit) for bit in bits(digits, count)], dtype=torch.float64)


def interval(values, level=0.95):
    """-> (low, high): between these quantiles lie the means of `level` of all resamples.

    Args:
        values: [seeds, items], of a method, or the difference of two.
    """
    seeds, items = values.shape
    means = (_drawn(seeds, 0) * (_drawn(items, 1) @ values.double().T)).sum(1)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return tuple(torch.quantile(means, edges).tolist())


@functools.lru_cache(maxsize=4)
def _drawn(count, seed):
    """[resamples, count]: the weight of each of so many in a mean; the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(count, (RESAMPLES, count), generator=generator)
    ones = torch.full((RESAMPLES, count), 1 / count, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add(1, picks, ones)
