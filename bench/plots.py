"""Pictures of a device's rows, drawn from the rows alone."""

import importlib.util

COLOURS = {
    "native": "#c0392b",
    "triton": "#8e44ad",
    "Lomo": "#c0392b",
    "AdaLomo": "#e67e22",
    "lomo-optim": "#2c3e50",
}
CATEGORIES = ("parameters", "gradients", "states", "activations", "other")


def draw(rows, folder):
    """Yields the files it wrote; says so where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        yield "no plots: matplotlib is not installed"
        return
    rows = [row for row in rows if row["p50_us"]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        if (figure := plot(rows)) is not None:
            figure.savefig(path := folder / f"{name}.png", dpi=110)
            yield path


def _figure(rows, title, width=8.0, height=4.5):
    """A figure without a window, which says where its rows are from."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    origins = {(row["device"], row["commit"], row["date"]) for row in rows}
    origin = "; ".join(f"{d}, commit {c}, {day}" for d, c, day in sorted(origins))
    axes.set_title(title, fontsize=10)
    figure.supxlabel(origin, fontsize=6, color="gray")
    return figure, axes


def _label(row):
    return ", ".join(filter(None, (row["what"], row["options"])))


def speed(rows):
    """The rate of one tensor's update beside the copy's, by its size."""
    rows = [
        r for r in rows
        if r["bench"] == "lomo_update" and r["dtype"] == "bfloat16" and r["tensors"] == "1"
        and r["options"] in ("plain", "all") and not r["case"].endswith(", options")
    ]  # fmt: skip
    if not rows:
        return None
    figure, axes = _figure(rows, "update of one bf16 tensor: bytes that must move, per second")
    lines = {}
    for r in rows:
        lines.setdefault(_label(r), []).append((int(r["numel"]), float(r["gb_per_s"])))
    for label, points in sorted(lines.items()):
        what = label.split(", ")[0]
        style = "-" if label.endswith("plain") else "--"
        axes.plot(*zip(*sorted(points)), style, marker=".", label=label, color=COLOURS.get(what))
    copies = sorted(float(r["copy_gb_per_s"]) for r in rows)
    axes.axhline(copies[len(copies) // 2], color="black", lw=0.8, label="copy, median")
    axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s")
    axes.legend(fontsize=7, ncols=2)
    return figure


def features(rows):
    """What each option costs over the plain update."""
    rows = [r for r in rows if r["bench"] == "lomo_update" and r["case"].endswith(", options")]
    rows = [r for r in rows if r["what"] == "native"]
    plain = {r["case"]: float(r["p50_us"]) for r in rows if r["options"] == "plain"}
    rows = [r for r in rows if r["case"] in plain]
    if not rows:
        return None
    figure, axes = _figure(rows, "time of the update with an option, plain = 1 (median)")
    names = list(dict.fromkeys(r["options"] for r in rows))
    for i, case in enumerate(plain):
        mine = {r["options"]: float(r["p50_us"]) / plain[case] for r in rows if r["case"] == case}
        places = [names.index(name) + 0.8 * (i + 0.5) / len(plain) - 0.4 for name in mine]
        axes.barh(places, list(mine.values()), 0.8 / len(plain), label=case)
    axes.axvline(1.0, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    return figure


def _steps(rows):
    rows = [r for r in rows if r["bench"] == "train_step"]
    return rows, list(dict.fromkeys(r["case"] for r in rows))


def step_time(rows):
    """A training step, above forward and backward alone."""
    rows, cases = _steps(rows)
    if not rows:
        return None
    figure, axes = _figure(rows, "a training step, seconds (median)", height=0.22 * len(rows) + 1.2)
    labels = [f"{r['case']}: {_label(r)}" for r in rows]
    colours = [COLOURS.get(r["what"], "#7f8c8d") for r in rows]
    axes.barh(labels, [float(r["p50_us"]) / 1e6 for r in rows], color=colours)
    for case in cases:
        mine = [i for i, r in enumerate(rows) if r["case"] == case]
        floor = [float(rows[i]["p50_us"]) / 1e6 for i in mine if rows[i]["what"] == "floor"]
        axes.vlines(floor, mine[0] - 0.5, mine[-1] + 0.5, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    return figure


def memory(rows):
    """The most of each category at any moment of a step."""
    rows = [r for r in _steps(rows)[0] if r["parameters_bytes"]]  # on a GPU not of all of them
    if not rows:
        return None
    figure, axes = _figure(
        rows, "most of each category at any moment, and the peak (dot), GiB",
        height=0.22 * len(rows) + 1.6,
    )  # fmt: skip
    labels = [f"{r['case']}: {_label(r)}" for r in rows]
    left = [0.0] * len(rows)
    for category in CATEGORIES:
        sizes = [int(r[f"{category}_bytes"]) / 2**30 for r in rows]
        axes.barh(labels, sizes, left=left, label=category)
        left = [a + b for a, b in zip(left, sizes)]
    axes.plot([int(r["peak_bytes"]) / 2**30 for r in rows], labels, "ko", ms=3, label="peak")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=7)
    return figure


PLOTS = {"speed": speed, "features": features, "step_time": step_time, "memory": memory}
