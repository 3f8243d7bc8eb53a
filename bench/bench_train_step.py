"""A training step of a LLaMA: time, tokens per second, peak memory and what it is of.

    python -m bench.bench_train_step [--minutes 8] [--largest N]

Random weights of the published shapes, made on the device; bf16 and non-reentrant activation
checkpointing on a GPU, fp32 and neither on the CPU. Every optimizer steps the same weights. "floor"
is forward and backward with each gradient dropped as it comes: what is above it is the optimizer's.
Peak memory is the allocator's on a GPU, within a cap where the case names one; its categories, and
the peak on the CPU, are those of `lomo_kernels.memory.measure`, which on a GPU takes so long that
two of the optimizers have them. FORGE's protocol is peers.py's: 20 steps, no checkpointing.
"""

import functools
import gc
import time

import torch
import transformers

from lomo_kernels import AdaLomo, Lomo
from lomo_kernels.memory import measure
from lomo_kernels.memory.optimizers import MasterCopy

from . import peers, record, suite, timing
from .llama import MODELS, Shape, config_values, parameters

SIZES = {
    **{name.removeprefix("LLaMA-"): shape for name, shape in MODELS.items()},
    "30B": Shape(6656, 17920, 60, 52, 52, 32000),
    "34M": Shape(512, 1376, 8, 8, 8, 8192),
    "0.2M": Shape(64, 176, 2, 4, 4, 512),
}
SMALLEST = "0.2M"
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


def of_torch(kind, norm=1.0, **options):
    return functools.partial(peers.kept, make=lambda p: kind(p, lr=LR, **options), norm=norm)


def strategy(name):
    return functools.partial(ours, strategy=name, **CLIPPED)


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
# Most informative first: a budget may end before the last.
STEPS = {
    ("floor", ""): floor,
    ("Lomo", "auto"): strategy("auto"),
    ("Lomo", "one_backward"): strategy("one_backward"),
    ("Lomo", "immediate, unclipped"): functools.partial(ours, strategy="immediate"),
    ("lomo-optim", "clip_grad_norm"): functools.partial(peers.lomo_optim_step, lr=LR, norm=1.0),
    ("Lomo", "unclipped"): ours,
    ("lomo-optim", "unclipped"): functools.partial(peers.lomo_optim_step, lr=LR),
    ("Lomo", "two_backward"): strategy("two_backward"),
    ("AdaLomo", "auto"): functools.partial(ours, kind=AdaLomo, **CLIPPED),
    ("AdamW", "fused"): of_torch(ADAMW, norm=None, fused=True),
    ("AdamW", "fused, clip_grad_norm"): of_torch(ADAMW, fused=True),
    ("SGD", "fused"): of_torch(SGD, norm=None, fused=True),
    ("SGD", "fused, clip_grad_norm"): of_torch(SGD, fused=True),
    ("optimi", "SGD, gradient release"): functools.partial(peers.optimi_released, lr=LR),
    ("FlashOptim", "AdamW, gradient release"): functools.partial(peers.flashoptim_released, lr=LR),
    ("SGD", ""): of_torch(SGD),
    ("AdamW", ""): of_torch(ADAMW),
    ("Lomo", "partial"): strategy("partial"),
    ("SGD", "fp32 master"): functools.partial(
        peers.kept, make=lambda p: MasterCopy(p, SGD, lr=LR), norm=1.0
    ),
}
FEW = 8  # of them, for the largest models
# FORGE's table has AdamW alone, unclipped.
FORGE = {
    key: STEPS[key]
    for key in (
        ("floor", ""), ("Lomo", "unclipped"), ("AdamW", "fused"), ("Lomo", "auto"),
        ("Lomo", "immediate, unclipped"), ("AdaLomo", "auto"),
        ("FlashOptim", "AdamW, gradient release"), ("optimi", "SGD, gradient release"),
        ("SGD", "fused"), ("AdamW", "fused, clip_grad_norm"), ("SGD", "fused, clip_grad_norm"),
    )
}  # fmt: skip
FORGE["optimi", "AdamW, gradient release"] = functools.partial(
    peers.optimi_released, lr=LR, kind="AdamW"
)
FORGE["AdamW", "foreach=False"] = of_torch(ADAMW, norm=None, foreach=False)
FORGE_STEPS, FORGE_SIZE = 20, "Llama-3-8B"
# Whose memory is told by category on a GPU.
MEASURED = (("Lomo", "auto"), ("AdamW", ""))


class Case:
    """A model, a batch of one sequence, and the memory it may use."""

    def __init__(self, where, size, tokens, cap=None, forge=False):
        self.where, self.size, self.tokens, self.cap, self.forge = where, size, tokens, cap, forge
        self.shape = SIZES[size]
        self.dtype = torch.bfloat16 if where.gpu else torch.float32
        self.name = f"LLaMA-{size}, {tokens} tokens" + (f", {cap} GiB" if cap else "")
        if forge:
            self.name = peers.FORGE_CASE

    def limit(self):
        if self.where.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            fraction = min(1.0, self.cap * 2**30 / total) if self.cap else 1.0
            torch.cuda.set_per_process_memory_fraction(fraction)

    def build(self):
        """The model; its weights are not those of another call."""
        of_model = transformers.LlamaConfig(**config_values(self.shape))
        of_model.use_cache = False
        with torch.device(self.where.device):
            model = transformers.AutoModelForCausalLM.from_config(
                of_model, dtype=self.dtype, attn_implementation="sdpa"
            )
        if self.where.gpu and not self.forge:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def rows(self, seconds):
        self.limit()
        try:
            model = self.build()
            ids = torch.randint(self.shape.vocabulary, (1, self.tokens), device=self.where.device)
            for key, make in self.steps().items():
                renew(model)
                yield self.row(key, lambda make=make, key=key: self.one(key, model, ids, make,
                                                                       seconds / FEW))  # fmt: skip
        finally:
            model = None
            if self.where.gpu:
                torch.cuda.empty_cache()
                torch.cuda.set_per_process_memory_fraction(1.0)

    def steps(self):
        if self.forge:
            return FORGE
        few = parameters(self.shape) > 10e9  # whose steps take seconds
        return dict(list(STEPS.items())[: FEW if few else None])

    def one(self, key, model, ids, make, seconds):
        measured = key in MEASURED or not self.where.gpu
        steps = FORGE_STEPS if self.forge else None
        return one(self.where, model, ids, make, seconds, steps, measured)

    def row(self, key, measured):
        row = {
            "bench": "train_step", "case": self.name, "what": key[0], "options": key[1],
            "dtype": str(self.dtype).removeprefix("torch."), "numel": parameters(self.shape),
            "timed": "clock",
        }  # fmt: skip
        try:
            samples, maxima, peak, clocks = measured()
        except Exception as error:  # an optimizer that has no room is a row that says so
            return {**row, "note": timing.note(error)}
        times = timing.Times(samples, None, "")
        return {
            **row,
            **{f"p{q}_us": f"{times.quantile(q / 100):.0f}" for q in (20, 50, 80)},
            "tokens_per_s": f"{self.tokens / times.quantile(0.5) * 1e6:.1f}",
            "peak_bytes": peak,
            **{f"{name}_bytes": size for name, size in maxima.items()},
            "clocks": clocks,
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


def one(where, model, ids, make, seconds, steps=None, measured=True):
    """steps: how many; None: what fits into `seconds`, three at least. measured: whether to tell
    the memory by category. -> (microseconds of steps, a step's largest bytes by category, its peak
    in bytes, clocks)."""
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
    least, most = (3, timing.ROUNDS) if steps is None else (steps, steps)
    while len(samples) < least or (len(samples) < most and time.perf_counter() < end):
        start = time.perf_counter()
        whole()
        wait()
        samples.append((time.perf_counter() - start) * 1e6)
    peak = torch.cuda.max_memory_allocated() if where.gpu else None
    clocks, maxima = record.clocks_while(whole), {}
    if measured:
        with measure(model, optimizer) as summary:
            whole()
        maxima, peak = summary.maxima, summary.peak if peak is None else peak
    if hasattr(optimizer, "remove"):
        optimizer.remove()
    return samples, maxima, peak, clocks


def cases(where):
    """(rank, case): what has room on this device, and no tensor larger than asked for."""
    fitting = [s for s in SIZES if SIZES[s].vocabulary * SIZES[s].hidden <= where.largest]
    if not where.gpu:
        size = "34M" if where.largest >= parameters(SIZES["34M"]) else SMALLEST
        yield 1, Case(where, size, 256 if size == "34M" else 32)
        return
    if "7B" not in fitting:
        yield 1, Case(where, SMALLEST, 32)
        yield 3, Case(where, SMALLEST, 32, forge=True)
        return
    total = torch.cuda.get_device_properties(0).total_memory
    for rank, size, tokens, cap in (
        (1, "7B", 512, None), (2, "7B", 2048, None), (4, "7B", 512, 23.0), (4, "7B", 2048, 23.0),
        (5, "65B", 512, None), (5, "13B", 512, None), (6, "30B", 512, None), (6, "13B", 2048, None),
        (7, "65B", 2048, None), (7, "30B", 2048, None),
    ):  # fmt: skip
        if size in fitting and total >= max(2.1 * parameters(SIZES[size]), (cap or 0) * 2**30):
            yield rank, Case(where, size, tokens, cap)
    if FORGE_SIZE in fitting and total >= 2.1 * parameters(SIZES[FORGE_SIZE]):
        yield 3, Case(where, FORGE_SIZE, 512, forge=True)


def jobs(where):
    least = 45 if where.gpu else 0  # until the first optimizers of a large model are told
    for rank, case in cases(where):
        yield suite.Job(rank, f"train_step: {case.name}", case.rows, least=least)


if __name__ == "__main__":
    raise SystemExit(suite.main([jobs], __doc__))
