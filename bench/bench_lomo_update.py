"""The update of one large tensor on the CPU: ours, and the same arithmetic in eager PyTorch.

    python -m bench.bench_lomo_update [--numel 67108864] [--rounds 15]

Rivals run in turn, in another order each round, so that what slows the machine and what the one
before left in the caches meets all of them; a row has the median and the 20th and 80th percentile.
`bytes` is what an element must move at least.
"""

import argparse
import random
import time

import torch

from lomo_kernels import ops

from . import record

LR, DECAY = 1e-3, 0.1


def rivals(dtype, numel):
    """name -> (bytes per element, function)."""
    p = torch.randn(numel).to(dtype)
    g = torch.randn(numel).to(dtype)
    low = torch.zeros(numel, dtype=torch.int16)
    copy = torch.empty_like(p)
    size = p.element_size()
    scalars = {
        "inv_scale": torch.tensor([1 / 1024]),
        "clip_coef": torch.tensor([0.37]),
        "found_inf": torch.zeros(1),
        "skip": torch.zeros(1),
    }
    sumsq = torch.zeros(1)

    def ours(rounding="nearest", **options):
        def run():
            ops.lomo_update_(
                p, g, lr=LR, rounding=rounding, low=low if rounding == "split" else None, **options
            )

        return run

    def eager():
        """What the reference optimizer's hook does: scale, detect, clip, decay, step, store."""
        g32 = g.float()
        scalars["found_inf"].masked_fill_(~g32.isfinite().all(), 1.0)
        g32.mul_(scalars["inv_scale"]).clamp_(-1.0, 1.0).mul_(scalars["clip_coef"])
        p32 = p.float().mul_(1 - LR * DECAY).sub_(g32, alpha=LR)
        p.copy_(p32)

    everything = {"weight_decay": DECAY, "clip_value": 1.0, **scalars}
    found = {
        "copy": (2 * size, lambda: copy.copy_(p)),
        "native, plain": (3 * size, ours()),
        "native, all options": (3 * size, ours(**everything)),
        "eager, all options": (3 * size, eager),
        "p.add_(g, alpha=-lr)": (3 * size, lambda: p.add_(g, alpha=-LR)),
        "native, squared norm": (size, lambda: ops.grad_sumsq_(sumsq, g)),
        "torch, squared norm": (size, lambda: torch.linalg.vector_norm(g, dtype=torch.float32)),
    }
    if dtype is not torch.float32:
        found["native, stochastic"] = (3 * size, ours("stochastic", **everything))
    if dtype is torch.bfloat16:
        found["native, split"] = (3 * size + 4, ours("split", **everything))
    return found


def measure(dtype, numel, rounds):
    times = {name: [] for name in rivals(dtype, 1)}
    functions = rivals(dtype, numel)
    for _, run in functions.values():
        run()
    order = list(functions)
    for round in range(rounds):
        random.Random(round).shuffle(order)
        for name in order:
            run = functions[name][1]
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    for name, (size, _) in functions.items():
        ordered = torch.tensor(times[name]).mul(1e3)
        p20, p50, p80 = (ordered.quantile(q).item() for q in (0.2, 0.5, 0.8))
        yield {
            "what": name,
            "dtype": str(dtype).removeprefix("torch."),
            "numel": numel,
            "bytes": size,
            "p20_ms": f"{p20:.2f}",
            "p50_ms": f"{p50:.2f}",
            "p80_ms": f"{p80:.2f}",
            "gb_per_s": f"{numel * size / p50 / 1e6:.1f}",
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--numel", type=int, default=2**26)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    rows = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for row in measure(dtype, options.numel, options.rounds):
            rows.append(row)
            print(
                f"{row['dtype']:10}{row['what']:24}{row['p50_ms']:>10} ms{row['gb_per_s']:>8} GB/s"
            )
    print(record.write("cpu_lomo_update", rows))


if __name__ == "__main__":
    main()
