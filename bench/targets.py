"""What the measurements are held against: ratios within one run, which any GPU should give.

`python -m bench --check` says which are met, missed, or not measured yet.

Note [Cards]: a B200 moves 1.7 times an H200's bytes with 1.07 times its instructions. Of about 41
warp instructions for 256 elements of 6 bytes that an H200 can issue, 25 are left, and a bf16 update
with stochastic rounding has 29 (python_tests/test_machine_code.py); the microseconds of a launch
weigh as much more. Other cards have more instructions for a byte than an H200.
"""

from collections.abc import Callable
from typing import NamedTuple

from .shapes import LARGE
from .suite import KEY

CPU, GPU = "cpu", "gpu"  # the second: every one that has rows
HOSTS = ("lomo-optim", "Lomo")
SQUARE = "LLaMA-7B query 4096x4096"


class Target(NamedTuple):
    """device: whose rows. found(rows) -> the figure, None: not measured. It should be at least, or
    (`most`) at most, `bound`; cards: part of a device's name -> another bound, Note [Cards]."""

    device: str
    text: str
    found: Callable
    bound: float
    most: bool = False
    cards: dict = {}  # noqa: RUF012 - nobody writes it

    def bound_on(self, device):
        return next((b for part, b in self.cards.items() if part in device), self.bound)

    def met(self, value, device):
        bound = self.bound_on(device)
        return value <= bound if self.most else value >= bound


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
    return _row("train_step", f"LLaMA-7B, {tokens} tokens", what, options)


def of_floor(what, options, *tokens):
    """A step of 7B over forward and backward alone; the worst, of batches of so many tokens."""

    def found(rows):
        ratios = [rows.ratio(trained(what, options, n), trained("floor", "", n)) for n in tokens]
        return max((r for r in ratios if r is not None), default=None)

    return found


def product_update(rows):
    """dW's product alone over our update, in the time of the slowest case."""
    ratios = []
    for row in rows.all(bench="product_update", what="auto", options="plain", dtype="bfloat16"):
        key = {k: row[k] for k in KEY}
        ratios.append(rows.ratio({**key, "what": "dW alone"}, key))
    return min((r for r in ratios if r is not None), default=None)


def product_sumsq(rows):
    """The norms of all weights from their factors, over the step that needs them."""
    norms = _row("product_sumsq", "LLaMA-7B, 32 layers, 512 tokens", "triton", "plain")
    return rows.ratio(norms, trained("Lomo", "one_backward", 512))


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
    Target(GPU, "update of 180 M elements and more, of the copy rate",
           worst_of_large("lomo_update"), 0.97),
    Target(GPU, "update of 4096x4096 alone, of the copy rate", of_copy, 0.80,
           cards={"b200": 0.60}),
    Target(GPU, "all options, times the plain update", worst_feature("all"), 1.03, most=True),
    Target(GPU, "all and stochastic rounding, times the plain update",
           worst_feature("all, stochastic"), 1.10, most=True, cards={"b200": 1.25}),
    Target(GPU, "norm's pass over 180 M elements and more, of the copy rate",
           worst_of_large("grad_sumsq"), 0.90),
    Target(GPU, "p.add_ at 4096x4096, times ours",
           beside(update("p.add_", "plain"), update("native", "plain")), 1.0),
    Target(GPU, "the shortest eager sequence at 4096x4096, times ours",
           beside(update("eager, fewest passes", "all"), update("native", "all")), 2.2),
    Target(GPU, "_fused_sgd_ at 4096x4096, times ours",
           beside(update("_fused_sgd_", "plain"), update("native", "plain")), 1.2),
    Target(GPU, "lomo-optim's update, bf16, times ours",
           beside(update("lomo-optim", "plain"), update("native", "plain")), 4.5),
    Target(GPU, "lomo-optim's norm and update, bf16, times ours",
           beside(update("lomo-optim", "with norm"), update("native", "with norm")), 5.2),
    Target(GPU, "lomo-optim's scale, norm and update, fp16, times ours",
           beside(update("lomo-optim", "with norm", dtype="float16"),
                  update("native", "with norm", dtype="float16")), 9.0),
    Target(GPU, "18,000 tensors, times the time of their bytes", experts, 1.5, most=True),
    Target(GPU, "host waits in a step", host_reads, 0, most=True),
    Target(GPU, "lomo-optim's step of 7B at 512 tokens, times ours",
           beside(trained("lomo-optim", "clip_grad_norm", 512), trained("Lomo", "auto", 512)), 3.0),
    Target(GPU, "lomo-optim's step of 7B at 2048 tokens, times ours",
           beside(trained("lomo-optim", "clip_grad_norm", 2048),
                  trained("Lomo", "auto", 2048)), 1.3),
    Target(GPU, "clipped step of 7B at 512 tokens, times forward and backward alone",
           of_floor("Lomo", "one_backward", 512), 1.10, most=True),
    Target(GPU, "clipped step of 7B at 2048 tokens, times forward and backward alone",
           of_floor("Lomo", "one_backward", 2048), 1.15, most=True),
    Target(GPU, "unclipped step of 7B at 2048 tokens, times forward and backward alone",
           of_floor("Lomo", "unclipped", 2048), 1.08, most=True),
    Target(GPU, "immediate, unclipped step of 7B, times forward and backward alone",
           of_floor("Lomo", "immediate, unclipped", 512, 2048), 1.03, most=True),
    Target(GPU, "dW's product alone, times product_update_ at each shape", product_update, 0.75),
    Target(GPU, "product_sumsq_ of 7B's weights at 512 tokens, of the clipped step",
           product_sumsq, 0.05, most=True),
    Target(CPU, "the reference's eager sequence, 64 Mi elements, times ours", eager_at_64_mi, 3.0),
    Target(CPU, "lomo-optim's host time at 2,000 tensors, times ours", host(""), 20.0),
    Target(CPU, "the same, with the norm clipped", host("clip_grad_norm"), 20.0),
    Target(CPU, "host reads in a step", host_reads, 0, most=True),
)  # fmt: skip


def check(rows_of, gpus):
    """Lines (device, text, wanted, found, verdict); `rows_of(device)` gives rows."""
    for target in TARGETS:
        for device in [CPU] if target.device == CPU else gpus or [GPU]:
            value = target.found(Rows(rows_of(device)))
            wanted = f"{'<=' if target.most else '>='} {target.bound_on(device):g}"
            found, verdict = "", "not measured"
            if value is not None:
                found = f"{value:.2f}"
                verdict = "met" if target.met(value, device) else "missed"
            yield device, target.text, wanted, found, verdict
