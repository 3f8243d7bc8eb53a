"""What a recorded step held, and when: peaks, and peaks of a model with more such layers."""

from dataclasses import dataclass

from .recorder import CATEGORIES, Place


@dataclass(frozen=True)
class Peak:
    """The bytes of each category at one moment, and where in the step that was."""

    parts: dict
    place: Place | None

    @property
    def total(self):
        return sum(self.parts.values())


@dataclass(frozen=True)
class Summary:
    """`peak`: the moment with most bytes alive. `maxima`: the most of each category at any time.
    `host`: the same of host memory, where parameters live there."""

    peak: Peak
    maxima: dict
    host: "Summary | None" = None

    def to_dict(self):
        return {
            "peak_bytes": self.peak.total,
            "peak_place": str(self.peak.place),
            "at_peak_bytes": dict(self.peak.parts),
            "maxima_bytes": dict(self.maxima),
            **({} if self.host is None else {"host": self.host.to_dict()}),
        }


def moments(recorder, home="device"):
    """(place, bytes of each category) after every event on the device, or in the memory of the
    "host"; the dict is the same one all the time."""
    alive = dict.fromkeys(CATEGORIES, 0)
    for index, size, place in recorder.log:
        if recorder.homes[index] == home:
            alive[recorder.categories[index]] += size
            yield recorder.places[place], alive


def summarise(recorder, region=lambda place: ((),), home="device"):
    """A Summary of each region of the step; `region(place)` gives the keys of those it is in."""
    peaks, maxima, keys = {}, {}, {}
    for place, alive in moments(recorder, home):
        total = sum(alive.values())
        if place not in keys:
            keys[place] = region(place)
        for key in keys[place]:
            if key not in peaks or total > peaks[key][0]:
                peaks[key] = total, Peak(dict(alive), place)
            most = maxima.setdefault(key, dict.fromkeys(CATEGORIES, 0))
            for category, held in alive.items():
                if held > most[category]:
                    most[category] = held
    return {key: Summary(peak, maxima[key]) for key, (_, peak) in peaks.items()}


def whole(regions):
    """The Summary of all regions together."""
    regions = list(regions)
    return Summary(
        max((r.peak for r in regions), key=lambda peak: peak.total),
        {c: max(r.maxima[c] for r in regions) for c in CATEGORIES},
    )


def extended(traces, *steps):
    """The Summary of a model with more layers than were traced.

    Args:
        traces: regions of a first trace, and of one more for each of `steps`, which is the trace
            before it with one layer more of a kind.
        steps: how many more of each kind there are beyond the first trace.

    Note [More layers]
    Layers that are alike are traced three and four times. A step is cut into regions: what happens
    in the first two and the last two layers, forward, backward and the step, and in each module
    outside the layers. Within a region one more layer adds the same bytes to every moment, so its
    peak is linear in their number; the whole step's peak is not, because another region may become
    the highest. Layers in the middle lie between the outer ones. The tests hold this to whole
    models.
    """
    first = traces[0]
    keys = [key for key in first if all(key in trace for trace in traces)]
    return whole(
        Summary(
            Peak(_line([t[key].peak.parts for t in traces], steps), traces[-1][key].peak.place),
            _line([t[key].maxima for t in traces], steps),
        )
        for key in keys
    )


def _line(values, steps):
    pairs = list(zip(values, values[1:], steps))
    return {c: values[0][c] + sum(n * (b[c] - a[c]) for a, b, n in pairs) for c in values[0]}


def layer_regions(layers):
    """For `summarise`: see Note [More layers]. A layer's modules have its number in their names."""

    def region(place):
        number = next((int(part) for part in place.module.split(".") if part.isdigit()), None)
        if number is None:
            return (tuple(place),)
        front, back = number <= layers - 2, number >= 1
        keys = [(place.phase, number)] if front and number < 2 else []
        return keys + ([(place.phase, number - layers)] if back and number >= layers - 2 else [])

    return region
