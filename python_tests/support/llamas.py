"""A small Llama of transformers, and data for its trainers."""

import models
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def tiny_llama(dtype=torch.float32):
    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return transformers.LlamaForCausalLM(config).to(dtype)


def data(count=24):
    ids = models.tokens(batch=count)
    return [{"input_ids": row, "labels": row} for row in ids]
