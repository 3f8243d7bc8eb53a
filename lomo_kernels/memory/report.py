"""Tables and pictures of bytes."""

from .recorder import CATEGORIES

COLORS = dict(zip(CATEGORIES, ("#4c72b0", "#c44e52", "#8172b3", "#55a868", "#b0b0b0")))


def size(count):
    """Bytes for people: 12.34 GiB, or the unit below where that says more."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def text(summary):
    """A table: each category at the peak, and at its own highest."""
    rows = [
        (category, size(summary.peak.parts[category]), size(summary.maxima[category]))
        for category in CATEGORIES
    ]
    rows.append(("peak", size(summary.peak.total), ""))
    lines = [f"{'':14}{'at the peak':>14}{'highest':>14}"]
    lines += [f"{name:14}{at:>14}{most:>14}" for name, at, most in rows]
    return "\n".join([*lines, f"the peak is in {summary.peak.place}"])


def plot_timeline(lines, peak, path):
    """Bytes of each category over the step, stacked."""
    figure, axes = _figure()
    steps = range(len(next(iter(lines.values()))))
    axes.stackplot(
        steps,
        *([value / 2**30 for value in lines[c]] for c in CATEGORIES),
        labels=CATEGORIES,
        colors=[COLORS[c] for c in CATEGORIES],
        step="post",
        linewidth=0,
    )
    axes.axhline(peak.total / 2**30, color="black", linewidth=0.8, linestyle="--")
    axes.set_title(f"peak {size(peak.total)}, in {peak.place}", fontsize=10)
    axes.set_xlabel("allocations and releases, in order")
    _save(figure, axes, path)


def plot_bars(bars, limit, path):
    """One stacked bar for each (name, Summary): its categories at the peak; a line at `limit`."""
    figure, axes = _figure()
    bottoms = [0.0] * len(bars)
    for category in CATEGORIES:
        heights = [summary.peak.parts[category] / 2**30 for _, summary in bars]
        names = [name for name, _ in bars]
        axes.bar(names, heights, bottom=bottoms, label=category, color=COLORS[category])
        bottoms = [below + height for below, height in zip(bottoms, heights)]
    if limit is not None:
        axes.axhline(limit / 2**30, color="black", linewidth=0.8, linestyle="--")
    _save(figure, axes, path)


def _figure():
    try:
        from matplotlib.figure import Figure  # no pyplot: that would look for a display
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'lomo_kernels[plot]'") from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure, figure.subplots()


def _save(figure, axes, path):
    axes.set_ylabel("GiB")
    axes.margins(x=0.05)
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # an ending that is no image format
        raise ValueError(f"cannot write {path}: {error}") from error
