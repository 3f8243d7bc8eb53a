"""The pictures of README and docs, and the rows that they are drawn from.

    python -m bench.pictures           draws docs/pictures from the committed rows
    python -m bench.pictures --rows    makes the rows of memory by kind and over time first

Bytes by kind are plans of LLaMA-7B, which allocate nothing. Bytes over time are measured on a step
of a model that a CPU trains. Speeds are rows of the suite.
"""

import argparse
from pathlib import Path

import torch
import transformers

from lomo_kernels import memory

from . import bench_train_step, record
from .llama import config_values

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
KINDS = memory.CATEGORIES
# Distinct for readers who do not tell red from green (Okabe and Ito's palette).
COLOURS = dict(zip(KINDS, ("#0072b2", "#e69f00", "#56b4e9", "#009e73", "#bbbbbb")))
GIB = 2**30

# One sequence of 1024 tokens, bf16, checkpointing: name in the picture -> options of `plan`.
STEPS = {
    "AdamW, fp32 master": {"optimizer": "adamw-master"},
    "AdamW, bf16 states": {"optimizer": "adamw"},
    "SGD, fp32 master": {"optimizer": "sgd-master"},
    "SGD, bf16": {"optimizer": "sgd"},
    "AdaLomo, clipped": {"optimizer": "adalomo", "strategy": "two_backward"},
    "Lomo, clipped, one backward": {"strategy": "one_backward"},
    "Lomo, clipped, two backwards": {"strategy": "two_backward"},
}
DRAWN = [name for name in STEPS if name != "SGD, fp32 master"]
CARD = 24 * GIB


def kinds_rows():
    for name, options in STEPS.items():
        found = memory.plan(
            "llama-7b", sequence=1024, batch=1, checkpointing="non_reentrant", **options
        )
        yield {
            "step": name,
            "peak_bytes": found.peak,
            **{f"{kind}_bytes": found.at_peak[kind] for kind in KINDS},
        }


OVER_TIME = {  # name in the picture -> a step of bench_train_step
    "SGD": bench_train_step.STEPS["SGD", ""],
    "Lomo, one backward": bench_train_step.STEPS["Lomo", "one_backward"],
    "Lomo, two backwards": bench_train_step.STEPS["Lomo", "two_backward"],
}
SHAPE, TOKENS = bench_train_step.SIZES["34M"], 256
POINTS = 120  # of a line; each is the worst moment of as many events


def over_time_rows():
    """A clipped step, after one that made the states; random weights and tokens."""
    for name, made in OVER_TIME.items():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**config_values(SHAPE))
        model = transformers.LlamaForCausalLM(config).train()
        ids = torch.randint(SHAPE.vocabulary, (1, TOKENS))
        optimizer, step = made(model)
        step(model(input_ids=ids, labels=ids).loss)
        with memory.measure(model, optimizer) as measured:
            step(model(input_ids=ids, labels=ids).loss)
        lines = measured.timeline()
        known = lines["parameters"].index(max(lines["parameters"]))  # before it they are listed
        lines = {kind: sizes[known:] for kind, sizes in lines.items()}
        totals = [sum(sizes) for sizes in zip(*lines.values())]
        for point in range(POINTS):
            first, end = (len(totals) * (point + i) // POINTS for i in (0, 1))
            worst = max(range(first, end), key=totals.__getitem__)
            yield {
                "step": name,
                "part": f"{point / POINTS:.4f}",
                **{f"{kind}_bytes": lines[kind][worst] for kind in KINDS},
            }


# -- drawing ---------------------------------------------------------------------------------------


def _figure(rows, width, height, parts=1):
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(1, parts, sharey=True, squeeze=False)[0]
    origins = dict.fromkeys((row["device"], row["commit"], row["date"]) for row in rows)
    origin = "; ".join(f"{device}, commit {commit}, {day}" for device, commit, day in origins)
    figure.supxlabel(origin, fontsize=6, color="gray")
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def memory_by_kind(rows):
    """A stacked bar for each way to step, with its total at its end."""
    figure, (axes,) = _figure(rows, 8.6, 3.6)
    found = {row["step"]: row for row in rows}
    names = [name for name in DRAWN if name in found]
    left = [0.0] * len(names)
    for kind in KINDS:
        sizes = [int(found[name][f"{kind}_bytes"]) / GIB for name in names]
        axes.barh(names, sizes, 0.7, left=left, color=COLOURS[kind], label=kind)
        for name, size, start in zip(names, sizes, left):
            if size > 6:
                color = "white" if kind == "parameters" else "black"
                text = f"{size:.1f}"
                place = {"ha": "center", "va": "center", "fontsize": 8}
                axes.text(start + size / 2, name, text, color=color, **place)
        left = [start + size for start, size in zip(left, sizes)]
    for name, end in zip(names, left):
        axes.text(end + 1, name, f"{end:.1f} GiB", va="center", fontsize=9, weight="bold",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
    axes.axvline(CARD / GIB, color="black", lw=0.9, ls="--")
    axes.text(CARD / GIB + 0.6, -0.62, "a card of 24 GiB", fontsize=8, va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * max(left))
    axes.set_xlabel("GiB at the worst moment of a step")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(
        "LLaMA-7B, every parameter trained: one sequence of 1024 tokens, bf16, checkpointing",
        fontsize=10,
    )
    return figure


def memory_over_time(rows):
    """One panel for each way to step, on one scale."""
    figure, panels = _figure(rows, 9.0, 3.3, len(OVER_TIME))
    for axes, name in zip(panels, OVER_TIME):
        mine = [row for row in rows if row["step"] == name]
        sizes = {kind: [int(row[f"{kind}_bytes"]) / 2**20 for row in mine] for kind in KINDS}
        axes.stackplot(
            [100 * float(row["part"]) for row in mine], *sizes.values(), labels=KINDS,
            colors=[COLOURS[kind] for kind in KINDS], linewidth=0,
        )  # fmt: skip
        peak = max(map(sum, zip(*sizes.values())))
        axes.axhline(peak, color="black", lw=0.8, ls="--")
        axes.set_title(f"{name}: {peak:.0f} MiB", fontsize=10)
        axes.set_xlabel("% of the step's allocations")
        axes.margins(x=0)
    panels[0].set_ylabel("MiB")
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8,
                  ncols=len(KINDS), loc="outside upper center")  # fmt: skip
    return figure


# What is drawn of the suite's rows: label -> (what, options).
RATES = {
    "lomo_kernels, clipped, scaled, checked": ("native", "all"),
    "lomo-optim, the update alone": ("lomo-optim", "plain"),
    "PyTorch's operations, the same work": ("eager, reference's", "all"),
}
SPEEDS = dict(zip(RATES, ("#0072b2", "#e69f00", "#999999")))


def speed(rows):
    """Bytes a second that an update must move, by the number of elements."""
    rows = [
        row for row in rows
        if row["bench"] == "lomo_update" and row["dtype"] == "bfloat16" and row["tensors"] == "1"
        and row["p50_us"] and not row["case"].endswith(", options")
    ]  # fmt: skip
    figure, (axes,) = _figure(rows, 8.0, 3.6)
    for label, wanted in RATES.items():
        points = sorted(
            (int(row["numel"]), float(row["gb_per_s"]))
            for row in rows
            if (row["what"], row["options"]) == wanted
        )
        axes.plot(*zip(*points), marker=".", color=SPEEDS[label])
        axes.annotate(label, points[-1], (6, 0), textcoords="offset points", va="center",
                      fontsize=8, color=SPEEDS[label])  # fmt: skip
    copies = sorted(float(row["copy_gb_per_s"]) for row in rows)
    axes.axhline(copies[len(copies) // 2], color="black", lw=0.8, ls="--")
    axes.text(axes.get_xlim()[0], copies[len(copies) // 2] * 1.1, " a copy", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="elements of a bf16 tensor", ylabel="GB/s")
    axes.set_xlim(right=axes.get_xlim()[1] * 60)
    figure.suptitle("The update of one tensor, on the CPU", fontsize=10)
    return figure


PICTURES = {  # name -> the file of its rows, and how they are drawn
    "memory_by_kind": ("memory_by_kind", memory_by_kind),
    "memory_over_time": ("memory_over_time", memory_over_time),
    "speed": ("cpu", speed),
}


def draw(folder=FOLDER):
    """Writes the pictures as SVG, whose words stay words, and yields their paths."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, drawn) in PICTURES.items():
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            path = folder / f"{name}.svg"
            drawn(record.read(file)).savefig(path, metadata={"Date": None})
        yield path


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", action="store_true", help="make the rows of memory first")
    if parser.parse_args().rows:
        for name, rows in (
            ("memory_by_kind", kinds_rows()),
            ("memory_over_time", over_time_rows()),
        ):
            print(record.write(name, list(rows)))
    for path in draw():
        print(path)


if __name__ == "__main__":
    main()
