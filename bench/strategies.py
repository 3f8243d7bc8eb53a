"""What the ways to clip cost on Llama models, as rows: operations and peak bytes of a step.

    python -m bench.strategies

Operations and what waits follow from the shapes of a model by the optimizer's own rules; peaks are
those of lomo_kernels.memory's plan, which runs the step on tensors without data. On a small Llama
that is really run python_tests/test_strategies.py finds the same of all three.
"""

from typing import NamedTuple

import transformers

from lomo_kernels import ops
from lomo_kernels.memory.predict import Job, predict
from lomo_kernels.ops import product_sumsq
from lomo_kernels.optim import choosing

from . import record

STRATEGIES = ("none", "one_backward", "two_backward", "partial")
PEAKS = (*STRATEGIES, "immediate", "sgd")  # the last: torch's, for which gradients are kept
TOKENS = (128, 512, 2048, 8192)


class Shape(NamedTuple):
    """As transformers' LlamaConfig names them: hidden_size, intermediate_size, ..."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


# Of the public config.json of huggyllama/llama-7b, -13b, -65b and meta-llama/Meta-Llama-3-8B.
MODELS = {
    "LLaMA-7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "LLaMA-13B": Shape(5120, 13824, 40, 40, 40, 32000),
    "LLaMA-65B": Shape(8192, 22016, 80, 64, 64, 32000),
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, 128256),
}


class Matrix(NamedTuple):
    name: str
    rows: int  # of its output
    cols: int  # of its input
    shares: bool = False  # its input is that of the matrix before it

    @property
    def embedding(self):  # its left factor are row numbers of 8 bytes
        return self.name == "embedding"

    @property
    def recomputed(self):  # with checkpointing, which is by decoder layers
        return self.name not in ("embedding", "head")

    @property
    def numel(self):
        return self.rows * self.cols


def layer(shape):
    """The matrices of a decoder layer in the order of their use."""
    hidden, inner = shape.hidden, shape.inner
    kv = hidden // shape.heads * shape.kv_heads
    return [
        Matrix("query", hidden, hidden),
        Matrix("key", kv, hidden, shares=True),
        Matrix("value", kv, hidden, shares=True),
        Matrix("output", hidden, hidden),
        Matrix("gate", inner, hidden),
        Matrix("up", inner, hidden, shares=True),
        Matrix("down", hidden, inner),
    ]


def matrices(shape):
    """Those of a model in the order of their use."""
    embedding = Matrix("embedding", shape.vocabulary, shape.hidden)
    return [embedding, *layer(shape) * shape.layers, embedding._replace(name="head")]


def vectors(shape):
    """Elements of the norms' weights, whose gradients are always held."""
    return (2 * shape.layers + 1) * shape.hidden


# -- bytes -----------------------------------------------------------------------------------------


def factor_bytes(m, tokens, itemsize):
    """Of the left and the right factor."""
    left = 8 * tokens if m.embedding else tokens * m.rows * itemsize
    return left, tokens * m.cols * itemsize


def keeps_factors(m, tokens, itemsize):
    return choosing.factors_are_smaller(sum(factor_bytes(m, tokens, itemsize)), m.numel * itemsize)


def waits(shape, tokens, itemsize, checkpointing=False):
    """What each matrix would keep until the norm is known, as `Lomo.would_wait` lists it; the keys
    are indices into matrices(shape)."""
    listed, alive = [], False  # the input that is shared
    for i, m in enumerate(matrices(shape)):
        alive = alive and m.shares
        nbytes = m.numel * itemsize
        if keeps_factors(m, tokens, itemsize):
            left, right = factor_bytes(m, tokens, itemsize)
            nbytes, alive = left + (0 if alive else right), True
        listed.append(choosing.Waits(i, m.name, nbytes, checkpointing and m.recomputed))
    return listed


def waiting(shape, kept, tokens, itemsize):
    """Bytes at the end of backward of what waits; `kept`: indices into matrices(shape), from 0."""
    listed = waits(shape, tokens, itemsize)
    return vectors(shape) * itemsize + sum(each.nbytes for each in listed if each.key in kept)


def parameters(shape):
    return sum(m.numel for m in matrices(shape)) + vectors(shape)


def choice(strategy, shape, tokens, itemsize, checkpointing=False):
    """The optimizer's own rule on the sizes of the whole model, with the default budget."""
    small = [choosing.Waits("vectors", "", vectors(shape) * itemsize, True)]
    budget = choosing.default_budget(parameters(shape) * itemsize)
    listed = waits(shape, tokens, itemsize, checkpointing)
    return choosing.chosen(strategy, small, listed, 0, budget)


def partial(shape, tokens, itemsize):
    """Indices of the matrices that wait by strategy "partial"."""
    return set(choice("partial", shape, tokens, itemsize).keeps) - {"vectors"}


def auto(shape, tokens, checkpointing, itemsize=2):
    """What strategy "auto" takes."""
    return choice("auto", shape, tokens, itemsize, checkpointing).strategy


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


def config(shape):
    return transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
    )  # fmt: skip


def peak(shape, *of_job, **options):
    """The most bytes alive in a step; `memory.predict.predict`."""
    return predict(config(shape), job(*of_job, **options)).peak.total


# -- operations ------------------------------------------------------------------------------------


def gram_flops(m, tokens, inputs_are_there=False):
    """ops.product_sumsq_: tiles of half of two symmetric matrices. One-hot rows cost nothing, and
    neither do inputs whose tiles another weight has made."""
    tile = product_sumsq.TILE
    full, rest = divmod(tokens, tile)
    squares = full * tile**2 + rest**2  # of the tiles on the diagonal
    width = (0 if m.embedding else m.rows) + (0 if inputs_are_there else m.cols)
    return width * (tokens**2 + squares)


def product_flops(m, tokens):
    """Forward, an input's gradient, or a weight's gradient; an embedding multiplies nothing."""
    return 0 if m.embedding else 2 * tokens * m.numel


def attention_flops(shape, tokens):
    """Both products of a layer's scores in forward, without use of causality; backward is twice."""
    return 4 * tokens**2 * shape.hidden


def by_gram(m, tokens):
    return ops.gram_is_cheaper(tokens, m.rows, m.cols)


def first_flops(m, tokens, itemsize, strategy, waits, inputs_are_there):
    """A weight's gradient and its norm in the first or only backward, and updates that waited."""
    form = product_flops(m, tokens)
    if strategy == "none":
        return form
    if not waits:  # until the second backward
        return gram_flops(m, tokens) if by_gram(m, tokens) else form
    if not keeps_factors(m, tokens, itemsize):
        return form
    norm = gram_flops(m, tokens, inputs_are_there) if by_gram(m, tokens) else form
    return form + norm


def flops(shape, tokens, checkpointing, strategy, itemsize=2):
    """Matrix products of a step with one sequence, 2 for a multiplication and addition."""
    listed = matrices(shape)
    every = set(range(len(listed)))
    kept = {"none": set(), "one_backward": every, "two_backward": set()}.get(strategy)
    if kept is None:
        kept = partial(shape, tokens, itemsize)
    attention = attention_flops(shape, tokens)
    forward = sum(product_flops(m, tokens) for m in listed) + shape.layers * attention
    total = forward + 2 * shape.layers * attention
    measured = False  # whether the norm of a weight with the same inputs is by Gram matrices
    for i, m in enumerate(listed):
        measured = measured and m.shares
        total += product_flops(m, tokens)  # the gradient of its input
        total += first_flops(m, tokens, itemsize, strategy, i in kept, measured)
        measured |= i in kept and by_gram(m, tokens)
    recomputed = layer_flops(shape, tokens, strategy)
    if checkpointing:
        total += shape.layers * recomputed
    if strategy in ("none", "one_backward"):
        return total
    # The second backward ends at the first matrix that does not wait.
    again = listed[max(kept, default=-1) + 1 :]
    total += sum(2 * product_flops(m, tokens) for m in again)
    names = [m.name for m in again]
    total += 2 * names.count("value") * attention
    if checkpointing:
        total += names.count("down") * recomputed
    return total


def layer_flops(shape, tokens, strategy):
    """The forward of a layer as checkpointing repeats it.

    It ends as soon as everything is saved again: before the last product where torch does it,
    after it where the optimizer's function does.
    """
    listed = layer(shape)[: -1 if strategy == "none" else None]
    return sum(product_flops(m, tokens) for m in listed) + attention_flops(shape, tokens)


# -- rows ------------------------------------------------------------------------------------------


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


def table():
    """All models, from the rows."""
    from .readme import _source, _table  # which may import this module

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
        + _table(head, body)
        + _source(rows, "strategies")
    )


def main():
    print(record.write("strategies", [row for name in MODELS for row in rows_of(name)]))


if __name__ == "__main__":
    main()
