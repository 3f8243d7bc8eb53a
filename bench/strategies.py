"""What the ways to clip cost on Llama models, as rows: operations and peak bytes of a step.

    python -m bench.strategies

Operations and what waits follow from the shapes of a model (costs.py); peaks are those of
lomo_kernels.memory's plan, which runs the step on tensors without data. On a small Llama that is
really run python_tests/test_strategies.py finds the same of all three.
"""

import transformers

from lomo_kernels.memory.predict import Job, predict

from . import record
from .costs import auto, flops, partial, waiting
from .llama import MODELS, config_values, matrices, parameters
from .tables import origin, table

STRATEGIES = ("none", "one_backward", "two_backward", "partial")
PEAKS = (*STRATEGIES, "immediate", "sgd")  # the last: torch's, for which gradients are kept
TOKENS = (128, 512, 2048, 8192)


def job(strategy, tokens, checkpointing, dtype="bfloat16", device="cuda"):
    """One step with one sequence; without a norm for "none", "immediate" and "sgd"."""
    unclipped = strategy in ("none", "immediate", "sgd")
    options = {} if unclipped else {"clip_grad_norm": 1.0}
    if strategy not in ("none", "sgd"):
        options["strategy"] = strategy
    return Job(
        "sgd" if strategy == "sgd" else "lomo", dtype, 1, tokens,
        "non_reentrant" if checkpointing else None, "sdpa", device, options=tuple(options.items()),
    )  # fmt: skip


def peak(shape, *of_job, **options):
    """The most bytes alive in a step; `memory.predict.predict`."""
    config = transformers.LlamaConfig(**config_values(shape))
    return predict(config, job(*of_job, **options)).peak.total


def rows_of(name, itemsize=2):
    shape = MODELS[name]
    every = set(range(len(matrices(shape))))
    for tokens in TOKENS:
        for checkpointing in (False, True):
            count = {s: flops(shape, tokens, checkpointing, s, itemsize) for s in STRATEGIES}
            some = partial(shape, tokens, itemsize)
            yield {
                "model": name,
                "tokens": tokens,
                "checkpointing": "yes" if checkpointing else "no",
                **{f"tflops_{s}": f"{count[s] / 1e12:.3f}" for s in STRATEGIES},
                **{f"relative_{s}": f"{count[s] / count['none']:.3f}" for s in STRATEGIES[1:]},
                "waiting_bytes_one_backward": waiting(shape, every, tokens, itemsize),
                "waiting_bytes_partial": waiting(shape, some, tokens, itemsize),
                "gradient_bytes": parameters(shape) * itemsize,
                **{f"peak_bytes_{s}": peak(shape, s, tokens, checkpointing) for s in PEAKS},
                "auto": auto(shape, tokens, checkpointing, itemsize),
            }


def drawn():
    """All models, from the rows."""

    def cell(row, strategy):
        gib = f"{int(row[f'peak_bytes_{strategy}']) / 2**30:.1f} GiB"
        cost = row.get(f"relative_{strategy}")
        return gib if cost is None else f"{float(cost):.2f}x, {gib}"

    rows = record.read("strategies")
    body = [
        [
            r["model"],
            r["tokens"],
            r["checkpointing"],
            *(cell(r, s) for s in PEAKS),
            f"{int(r['waiting_bytes_one_backward']) / 2**30:.2f} GiB",
            r["auto"],
        ]
        for r in rows
    ]
    names = ("unclipped", *STRATEGIES[1:], "immediate, unclipped", "torch's SGD")
    head = ["model", "tokens", "checkpointing", *names, "one_backward waits", "auto picks"]
    return (
        "Matrix products of a step, attention's included, relative to the same step unclipped, and "
        "its peak memory, weights included; bf16, one sequence.\n\n"
        + table(head, body)
        + origin(rows, "strategies")
    )


def main():
    print(record.write("strategies", [row for name in MODELS for row in rows_of(name)]))


if __name__ == "__main__":
    main()
