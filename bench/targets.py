"""What the measurements are held against: ratios within one run.

`python -m bench --check` says which are met, missed, or not measured yet.
"""

from collections.abc import Callable
from typing import NamedTuple

from .shapes import LARGE
from .suite import KEY

CPU, H200 = "cpu", "nvidia_h200"
HOSTS = ("lomo-optim", "Lomo")
SQUARE = "LLaMA-7B query 4096x4096"


class Target(NamedTuple):
    """device: whose rows. found(rows) -> the figure, None: not measured. It should be at least, or
    (`most`) at most, `bound`."""

    device: str
    text: str
    found: Callable
    bound: float
    most: bool = False

    def met(self, value):
        return value <= self.bound if self.most else value >= self.bound


class Rows:
    """Measurements of one bench, to be asked for."""

    def __init__(self, rows):
        self.rows = [row for row in rows if row["p50_us"]]

    def all(self, **wanted):
        return [r for r in self.rows if all(r[k] == v for k, v in wanted.items())]

    def one(self, **wanted):
        found = self.all(**wanted)
        return found[0] if found else None

    def ratio(self, slow, fast, column="p50_us"):
        """Of two rows' figures; None where one is not there."""
        slow, fast = (self.one(**wanted) for wanted in (slow, fast))
        if slow is None or fast is None:
            return None
        return float(slow[column]) / float(fast[column])


def _row(bench, case, what, options, dtype="bfloat16"):
    return {"bench": bench, "case": case, "what": what, "options": options, "dtype": dtype}


def update(what, options, case=SQUARE, dtype="bfloat16"):
    return _row("lomo_update", case, what, options, dtype)


def beside(theirs, ours):
    """How many times as long their update takes."""
    return lambda rows: rows.ratio(theirs, ours)


def worst_of_large(bench):
    """The smallest share of the copy rate, of plain passes over large tensors."""

    def found(rows):
        large = [
            float(r["of_copy"])
            for r in rows.all(bench=bench, what="native", options="plain", dtype="bfloat16")
            if int(r["numel"]) >= LARGE and int(r["tensors"]) == 1
        ]
        return min(large, default=None)

    return found


def of_copy(rows):
    row = rows.one(**update("native", "plain"))
    return row and float(row["of_copy"])


def worst_feature(options):
    """The largest cost of these options over the plain update, where both were timed in turn."""

    def found(rows):
        ratios = []
        for row in rows.all(bench="lomo_update", what="native", options=options):
            if not row["case"].endswith(", options") or int(row["numel"]) < 4096**2:
                continue
            key = {k: row[k] for k in KEY}
            ratios.append(rows.ratio(key, {**key, "options": "plain"}))
        return max((r for r in ratios if r is not None), default=None)

    return found


def experts(rows):
    """A list's time over that of its bytes at the copy rate."""
    found = [
        r for r in rows.all(bench="lomo_update", what="native", options="plain")
        if r["case"] == "18000 experts"
    ]  # fmt: skip
    return 1 / float(found[0]["of_copy"]) if found else None


def trained(what, options, tokens):
    return _row("train_step", f"LLaMA-7B, {tokens} tokens, 23.0 GiB", what, options)


def of_floor(rows):
    """The cheaper of the two that use each gradient in backward and nothing else."""
    return rows.ratio(trained("Lomo", "unclipped", 2048), trained("floor", "", 2048))


def eager_at_64_mi(rows):
    """The least, over the dtypes, on the largest case of the CPU."""
    ratios = []
    for dtype in ("bfloat16", "float16", "float32"):
        case = "LLaMA-65B query 8192x8192"
        slow, fast = (update(what, "all", case, dtype) for what in ("eager, reference's", "native"))
        ratios.append(rows.ratio(slow, fast))
    return None if None in ratios else min(ratios)


def host(options):
    def found(rows):
        slow, fast = (_row("host", "2000 tensors", w, options, "float32") for w in HOSTS)
        return rows.ratio(slow, fast, "per_tensor_us")

    return found


def host_reads(rows):
    """Times that the host waited in a step of ours."""
    found = [r for r in rows.all(bench="host") if r["what"] in ("Lomo", "AdaLomo")]
    return max((float(r["host_reads"]) for r in found), default=None)


TARGETS = (
    Target(H200, "update of 180 M elements and more, of the copy rate",
           worst_of_large("lomo_update"), 0.97),
    Target(H200, "update of 4096x4096 alone, of the copy rate", of_copy, 0.80),
    Target(H200, "all options, times the plain update", worst_feature("all"), 1.03, most=True),
    Target(H200, "all and stochastic rounding, times the plain update",
           worst_feature("all, stochastic"), 1.10, most=True),
    Target(H200, "norm's pass over 180 M elements and more, of the copy rate",
           worst_of_large("grad_norm"), 0.90),
    Target(H200, "p.add_ at 4096x4096, times ours",
           beside(update("p.add_", "plain"), update("native", "plain")), 1.0),
    Target(H200, "the shortest eager sequence at 4096x4096, times ours",
           beside(update("eager, fewest passes", "all"), update("native", "all")), 2.2),
    Target(H200, "_fused_sgd_ at 4096x4096, times ours",
           beside(update("_fused_sgd_", "plain"), update("native", "plain")), 1.2),
    Target(H200, "lomo-optim's update, bf16, times ours",
           beside(update("lomo-optim", "plain"), update("native", "plain")), 4.5),
    Target(H200, "lomo-optim's norm and update, bf16, times ours",
           beside(update("lomo-optim", "with norm"), update("native", "with norm")), 5.2),
    Target(H200, "lomo-optim's scale, norm and update, fp16, times ours",
           beside(update("lomo-optim", "with norm", dtype="float16"),
                  update("native", "with norm", dtype="float16")), 9.0),
    Target(H200, "18,000 tensors, times the time of their bytes", experts, 1.5, most=True),
    Target(H200, "host waits in a step", host_reads, 0, most=True),
    Target(H200, "lomo-optim's step of 7B at 512 tokens, times ours",
           beside(trained("lomo-optim", "clip_grad_norm", 512), trained("Lomo", "auto", 512)), 3.0),
    Target(H200, "lomo-optim's step of 7B at 2048 tokens, times ours",
           beside(trained("lomo-optim", "clip_grad_norm", 2048),
                  trained("Lomo", "auto", 2048)), 1.3),
    Target(H200, "step of 7B at 2048 tokens, times forward and backward alone", of_floor, 1.08,
           most=True),
    Target(CPU, "the reference's eager sequence, 64 Mi elements, times ours", eager_at_64_mi, 3.0),
    Target(CPU, "lomo-optim's host time at 2,000 tensors, times ours", host(""), 20.0),
    Target(CPU, "the same, with the norm clipped", host("clip_grad_norm"), 20.0),
    Target(CPU, "host reads in a step", host_reads, 0, most=True),
)  # fmt: skip


def check(rows_of):
    """Lines (device, text, wanted, found, verdict); `rows_of(device)` gives rows."""
    for target in TARGETS:
        value = target.found(Rows(rows_of(target.device)))
        wanted = f"{'<=' if target.most else '>='} {target.bound:g}"
        verdict = "not measured" if value is None else "met" if target.met(value) else "missed"
        yield target.device, target.text, wanted, "" if value is None else f"{value:.2f}", verdict
