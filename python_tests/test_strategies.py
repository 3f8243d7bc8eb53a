"""The operations and bytes that bench computes, against a small Llama that is run."""

import models
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import costs, llama, strategies
from lomo_kernels import Lomo
from lomo_kernels.memory import predict
from lomo_kernels.memory.timeline import summarise, whole
from lomo_kernels.ops import product_sumsq

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SHAPE = llama.Shape(hidden=64, inner=160, layers=3, heads=4, kv_heads=2, vocabulary=256)


def build(checkpointing):
    config = transformers.LlamaConfig(
        hidden_size=SHAPE.hidden, intermediate_size=SHAPE.inner, num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads, num_key_value_heads=SHAPE.kv_heads,
        vocab_size=SHAPE.vocabulary, max_position_embeddings=2048,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Other attentions are operators whose products are counted by other rules, or not at all.
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.float().train()


def measured(strategy, tokens, checkpointing):
    """-> (operations of a step, the optimizer)"""
    model = build(checkpointing)
    clip = {} if strategy == "none" else {"clip_grad_norm": 1e-3, "strategy": strategy}
    optimizer = Lomo(model, lr=1e-3, **clip)
    ids = torch.randint(SHAPE.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False, custom_mapping=models.FLOPS) as counter:
        optimizer.backward(model(input_ids=ids, labels=ids).loss)
    return counter.get_total_flops(), optimizer


def waits(strategy, tokens):
    kept = {
        "none": None,
        "two_backward": None,
        "one_backward": range(len(llama.matrices(SHAPE))),
        "partial": costs.partial(SHAPE, tokens, 4),
    }[strategy]
    return 0 if kept is None else costs.waiting(SHAPE, kept, tokens, 4)


# Factors are smaller than the gradient below 21 tokens for key and value, 32 for query and output,
# 46 for the others, 51 for the head.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tokens", [8, 27, 32, 96])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("strategy", strategies.STRATEGIES)
def test_a_step_costs_what_is_computed(strategy, checkpointing, tokens):
    count, optimizer = measured(strategy, tokens, checkpointing)
    computed = costs.flops(SHAPE, tokens, checkpointing, strategy, itemsize=4)
    assert count == pytest.approx(computed, rel=0.01)
    assert optimizer.last_waiting_bytes == pytest.approx(waits(strategy, tokens), rel=0.02)


@pytest.mark.parametrize("strategy", ["one_backward", "two_backward"])
def test_tiles_of_gram_matrices(strategy, monkeypatch):
    monkeypatch.setattr(product_sumsq, "TILE", 8)
    monkeypatch.setattr(product_sumsq, "_TORCH_TILE", {"cpu": 8})
    count, _ = measured(strategy, 20, False)
    computed = costs.flops(SHAPE, 20, False, strategy, itemsize=4)
    assert count == pytest.approx(computed, rel=0.01)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tokens", [4, 8, 32])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_auto(checkpointing, tokens):
    _, optimizer = measured("auto", tokens, checkpointing)
    picked = costs.auto(SHAPE, tokens, checkpointing, itemsize=4)
    assert optimizer.explain().startswith(f"strategy {picked}: ")


LAYERS = 9  # so many that the plan does not trace all of them
PEAK_TOLERANCE = 0.001  # scalars that only one of the two makes


def alive_at_most(strategy, tokens, checkpointing):
    """Measured on a model that is there."""
    job = strategies.job(strategy, tokens, checkpointing, "float32", "cpu")
    config = transformers.LlamaConfig(**llama.config_values(SHAPE._replace(layers=LAYERS)))
    model = predict.model_of(config, job)
    return whole(summarise(predict.record(model, job)).values()).peak.total


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("strategy", "tokens"), [(s, 40) for s in strategies.PEAKS] + [("auto", 8), ("auto", 96)]
)
def test_the_peak_of_a_step_is_the_planned_one(strategy, checkpointing, tokens):
    shape = SHAPE._replace(layers=LAYERS)
    planned = strategies.peak(shape, strategy, tokens, checkpointing, dtype="float32", device="cpu")
    measured = alive_at_most(strategy, tokens, checkpointing)
    assert measured == pytest.approx(planned, rel=PEAK_TOLERANCE)


def test_parameters_are_those_of_the_model():
    assert llama.parameters(SHAPE) == sum(p.numel() for p in build(False).parameters())
    counts = [llama.parameters(shape) for shape in llama.MODELS.values()]
    assert counts == [6_738_415_616, 13_015_864_320, 65_285_660_672, 8_030_261_248]


def test_the_table_has_every_model():
    lines = [line for line in strategies.drawn().splitlines() if line.startswith("| L")]
    assert len(lines) == len(llama.MODELS) * len(strategies.TOKENS) * 2
    assert len({line.count("|") for line in lines}) == 1
