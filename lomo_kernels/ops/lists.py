"""What operations on lists of tensors share."""


def grouped(keys):
    """What shares a launch: {key: places in the list, ascending}, in the order of the keys."""
    groups = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
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
