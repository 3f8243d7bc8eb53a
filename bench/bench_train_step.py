"""A training step of a LLaMA: time, tokens per second, peak memory and what it is of.

    python -m bench.bench_train_step [--minutes 8] [--largest N]

Random weights of the published shapes, made on the device; bf16 and non-reentrant activation
checkpointing on a GPU, fp32 and neither on the CPU. Every optimizer steps the same weights. "floor"
is forward and backward with each gradient dropped as it comes: what is above it is the optimizer's.
Peak memory is the allocator's on a GPU, within a cap where the case names one; its categories, and
the peak on the CPU, are those of `lomo_kernels.memory.measure`.
"""

import functools
import gc
import time

import torch
import transformers

from lomo_kernels import AdaLomo, Lomo
from lomo_kernels.memory import measure
from lomo_kernels.memory.optimizers import MasterCopy

from . import suite, timing
from .strategies import MODELS, Shape, config, parameters

SIZES = {
    **{name.removeprefix("LLaMA-"): shape for name, shape in MODELS.items()},
    "30B": Shape(6656, 17920, 60, 52, 52, 32000),
    "34M": Shape(512, 1376, 8, 8, 8, 8192),
    "0.2M": Shape(64, 176, 2, 4, 4, 512),
}
LR = 1e-4
CLIPPED = {"clip_grad_norm": 1.0}


class Floor:
    """Drops every gradient the moment it exists."""

    def __init__(self, model):
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(self.drop)

    @staticmethod
    def drop(param):
        param.grad = None


def floor(model):
    Floor(model)
    return None, torch.Tensor.backward


def ours(model, kind=Lomo, **options):
    optimizer = kind(model, lr=LR, **options)
    return optimizer, optimizer.backward


def lomo_optim(model, norm=None):
    import lomo_optim

    optimizer = lomo_optim.Lomo(model, lr=LR, clip_grad_norm=norm)

    def step(loss):
        if norm:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, LR)

    return None, step


def kept(model, make):
    """An optimizer that needs all gradients, clipped as torch does it."""
    optimizer = make(model.parameters())

    def step(loss):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def strategy(name):
    return functools.partial(ours, strategy=name, **CLIPPED)


# Most informative first: a budget may end before the last.
STEPS = {
    ("floor", ""): floor,
    ("Lomo", "auto"): strategy("auto"),
    ("lomo-optim", "clip_grad_norm"): functools.partial(lomo_optim, norm=1.0),
    ("Lomo", "unclipped"): ours,
    ("lomo-optim", "unclipped"): lomo_optim,
    ("Lomo", "two_backward"): strategy("two_backward"),
    ("AdaLomo", "auto"): functools.partial(ours, kind=AdaLomo, **CLIPPED),
    ("SGD", ""): functools.partial(kept, make=lambda p: torch.optim.SGD(p, lr=LR)),
    ("AdamW", ""): functools.partial(kept, make=lambda p: torch.optim.AdamW(p, lr=LR)),
    ("Lomo", "immediate, unclipped"): functools.partial(ours, strategy="immediate"),
    ("Lomo", "one_backward"): strategy("one_backward"),
    ("Lomo", "partial"): strategy("partial"),
    ("SGD", "fp32 master"): functools.partial(
        kept, make=lambda p: MasterCopy(p, torch.optim.SGD, lr=LR)
    ),
}
FEW = 6  # of them, for the largest models


class Case:
    """A model, a batch of one sequence, and the memory it may use."""

    def __init__(self, where, size, tokens, cap=None):
        self.where, self.size, self.tokens, self.cap = where, size, tokens, cap
        self.shape = SIZES[size]
        self.dtype = torch.bfloat16 if where.gpu else torch.float32
        self.name = f"LLaMA-{size}, {tokens} tokens" + (f", {cap} GiB" if cap else "")

    def limit(self):
        if self.where.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            fraction = min(1.0, self.cap * 2**30 / total) if self.cap else 1.0
            torch.cuda.set_per_process_memory_fraction(fraction)

    def build(self):
        """The model; its weights are not those of another call."""
        of_model = config(self.shape)
        of_model.use_cache = False
        with torch.device(self.where.device):
            model = transformers.AutoModelForCausalLM.from_config(
                of_model, dtype=self.dtype, attn_implementation="sdpa"
            )
        if self.where.gpu:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def rows(self, seconds):
        self.limit()
        try:
            model = self.build()
            ids = torch.randint(self.shape.vocabulary, (1, self.tokens), device=self.where.device)
            few = parameters(self.shape) > 10e9  # whose steps take seconds
            for key, make in list(STEPS.items())[: FEW if few else None]:
                renew(model)
                measured = functools.partial(one, self.where, model, ids, make, seconds / FEW)
                yield self.row(key, measured)
        finally:
            model = None
            if self.where.gpu:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)

    def row(self, key, measured):
        row = {
            "bench": "train_step", "case": self.name, "what": key[0], "options": key[1],
            "dtype": str(self.dtype).removeprefix("torch."), "numel": parameters(self.shape),
            "timed": "clock",
        }  # fmt: skip
        try:
            samples, summary, peak = measured()
        except Exception as error:  # an optimizer that has no room is a row that says so
            return {**row, "note": timing.note(error)}
        times = timing.Times(samples, None, "")
        return {
            **row,
            **{f"p{q}_us": f"{times.quantile(q / 100):.0f}" for q in (20, 50, 80)},
            "tokens_per_s": f"{self.tokens / times.quantile(0.5) * 1e6:.1f}",
            "peak_bytes": peak,
            **{f"{name}_bytes": size for name, size in summary.maxima.items()},
        }


def renew(model):
    """Parameters without hooks and gradients, over the same memory: some optimizers never take
    their hooks off, and one that had no room leaves gradients."""
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = torch.nn.Parameter(param.detach())
    gc.collect()  # optimizers and their hooks know each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one(where, model, ids, make, seconds):
    """-> (microseconds of steps, a step's `Measurement`, its peak in bytes)."""
    optimizer, step = make(model)

    def whole():
        step(model(input_ids=ids, labels=ids).loss)

    def wait():
        if where.gpu:
            torch.cuda.synchronize()

    whole()  # compiles, and makes states
    wait()
    if where.gpu:
        torch.cuda.reset_peak_memory_stats()
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 3 or (len(samples) < timing.ROUNDS and time.perf_counter() < end):
        start = time.perf_counter()
        whole()
        wait()
        samples.append((time.perf_counter() - start) * 1e6)
    peak = torch.cuda.max_memory_allocated() if where.gpu else None
    with measure(model, optimizer) as summary:
        whole()
    if hasattr(optimizer, "remove"):
        optimizer.remove()
    return samples, summary, summary.peak if peak is None else peak


def cases(where):
    """(rank, case): what has room on this device."""
    if not where.gpu:
        size = "34M" if where.largest >= parameters(SIZES["34M"]) else "0.2M"
        yield 1, Case(where, size, 256 if size == "34M" else 32)
        return
    total = torch.cuda.get_device_properties(0).total_memory
    for rank, size, tokens, cap in (
        (1, "7B", 512, 23.0), (1, "7B", 2048, 23.0), (2, "7B", 2048, None), (2, "7B", 512, None),
        (4, "65B", 512, None), (4, "13B", 512, None), (5, "30B", 512, None), (5, "13B", 2048, None),
        (6, "65B", 2048, None), (6, "30B", 2048, None),
    ):  # fmt: skip
        if total >= max(2.1 * parameters(SIZES[size]), (cap or 0) * 2**30):
            yield rank, Case(where, size, tokens, cap)


def jobs(where):
    for rank, case in cases(where):
        yield suite.Job(rank, f"train_step: {case.name}", case.rows)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
