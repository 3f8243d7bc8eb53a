"""Llama models as shapes: what a decoder layer multiplies, and what the norms hold."""

from typing import NamedTuple


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


def parameters(shape):
    return sum(m.numel for m in matrices(shape)) + vectors(shape)


def config_values(shape):
    """For transformers' LlamaConfig."""
    return {
        "hidden_size": shape.hidden, "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
    }  # fmt: skip
