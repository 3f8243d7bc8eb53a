"""What operations on lists of tensors share."""

import itertools


def grouped(keys, rows=None):
    """What shares a launch: {key: its rows}, in the order of the list; None: their places in it."""
    groups = {}
    for key, row in zip(keys, itertools.count() if rows is None else rows):
        groups.setdefault(key, []).append(row)
    return groups


def scatter_(flat, places, values):
    """flat[places] = values, without a list of indices on its way to the device: it would wait.

    places: ascending; neighbours are copied together.
    """
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + 1:
            first = places[start]
            flat[first : first + end - start].copy_(values[start:end])
            start = end
