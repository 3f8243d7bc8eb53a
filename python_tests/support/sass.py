"""Ways through a kernel's machine code, as cuobjdump prints it."""

import heapq
import re


def instructions(body):
    """[(address, text)] of one function."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", body)
    return [(int(address, 16), text.strip()) for address, text in found]


def _next(code, places, k):
    """Places after k; None: the end."""
    text = code[k][1]
    predicated = text.startswith("@")
    operation = re.sub(r"^@!?U?P\w+\s+", "", text)
    if (jump := re.match(r"BRA\S*\s+(U?P\w+|!U?P\w+)?.*?(0x[0-9a-f]+)", operation)) is not None:
        yield places[int(jump[2], 16)]
        if predicated or jump[1]:
            yield k + 1
    elif operation.startswith("EXIT"):
        yield None
        if predicated:
            yield k + 1
    elif k + 1 < len(code):
        yield k + 1


def shortest(code, through):
    """Instructions on the shortest way from the beginning to an end that meets the patterns of
    `through` in this order: what a warp issues where nothing unusual happens, and loops once."""
    places = {address: k for k, (address, _) in enumerate(code)}
    best, waiting = {(0, 0): 1}, [(1, 0, 0)]
    while waiting:
        length, k, met = heapq.heappop(waiting)
        if best[k, met] < length:
            continue
        now = met + (met < len(through) and re.search(through[met], code[k][1]) is not None)
        for after in _next(code, places, k):
            if after is None:
                if now == len(through):
                    return length
            elif length + 1 < best.get((after, now), float("inf")):
                best[after, now] = length + 1
                heapq.heappush(waiting, (length + 1, after, now))
    return None
