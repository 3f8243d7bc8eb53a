"""One backward on models of transformers that nobody edited, against clip_grad_norm_ and SGD."""

import copy
import re

import models
import pytest
import torch
from torch import nn

from lomo_kernels import Lomo

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LR, CLIP, VOCABULARY, WIDTH = 0.1, 0.3, 512, 96
SHAPE = {
    "hidden_size": WIDTH, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}  # fmt: skip
LATENT = {
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_inner": 192}
# name -> (configuration, what differs, whether every matrix keeps factors, experts do in any case).
# The gradients of routers are smaller than factors, and a matrix of Mamba is not multiplied.
MODELS = {
    "llama": ("LlamaConfig", {}, True),
    "tied llama": ("LlamaConfig", {"tie_word_embeddings": True}, True),
    "qwen3": ("Qwen3Config", {"head_dim": 24}, True),
    "gemma2": ("Gemma2Config", {"head_dim": 24}, True),
    "phi3": ("Phi3Config", {}, True),
    "mistral": ("MistralConfig", {}, True),
    "olmo2": ("Olmo2Config", {}, True),
    "gpt2": ("GPT2Config", GPT, True),
    "opt": ("OPTConfig", {"ffn_dim": 192, "word_embed_proj_dim": WIDTH}, True),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, True),
    "gpt-neox": ("GPTNeoXConfig", {}, True),
    "mixtral": ("MixtralConfig", EXPERTS, False),
    "qwen3-moe": ("Qwen3MoeConfig", {"head_dim": 24, **EXPERTS}, False),
    "gpt-oss": ("GptOssConfig", {"head_dim": 24, **EXPERTS}, False),
    "deepseek-v3": ("DeepseekV3Config", {**EXPERTS, **LATENT}, False),
    "mamba": ("MambaConfig", {"state_size": 8}, False),
}


def build(name):
    config, more, _ = MODELS[name]
    config = getattr(transformers, config)(**{**SHAPE, **more})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.08)
    return model.float().eval()  # no dropout, whose random numbers two models would not share


def loss_of(model, length=16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (1, length), generator=generator)
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_one_backward(name):
    model = build(name)
    expected = copy.deepcopy(model)
    before = [p.detach().clone() for p in expected.parameters()]
    loss_of(expected).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), CLIP)
    torch.optim.SGD(expected.parameters(), lr=LR).step()
    assert norm > CLIP

    optimizer = Lomo(model, lr=LR, clip_grad_norm=CLIP, strategy="one_backward")
    loss_of(model).backward()
    optimizer.step()
    assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-5)
    for p, q, old in zip(model.parameters(), expected.parameters(), before, strict=True):
        moved = (q.detach() - old).norm()
        assert (p.detach() - q.detach()).norm() <= 1e-4 * moved + 1e-7
    largest = re.search("largest gradients held: ([^,]*)", optimizer.explain())[1]
    assert model.get_parameter(largest).dim() == (1 if MODELS[name][2] else 2)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("length", [32, 64, 128])
def test_what_waits_takes_the_room_of_activations(length):
    """Peak bytes of a whole step, weights included: as if every gradient were dropped."""
    peaks = {}
    for kind in ("dropped", "kept", "one_backward"):
        model = build("llama")
        if kind == "dropped":
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        step = torch.Tensor.backward
        if kind == "one_backward":
            step = Lomo(model, lr=LR, clip_grad_norm=CLIP, strategy=kind).backward
        with models.LiveBytes() as live:
            step(loss_of(model, length))
        peaks[kind] = live.peak
    assert peaks["one_backward"] <= 1.01 * peaks["dropped"]
    assert peaks["one_backward"] <= peaks["kept"]
    assert length > 32 or peaks["one_backward"] < 0.9 * peaks["kept"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "experts", "picked"),
    [
        ("llama", None, "one_backward"),
        ("mamba", None, "one_backward"),
        ("mixtral", "grouped_mm", "one_backward"),
        ("mixtral", "batched_mm", "partial"),
    ],
)
def test_auto_counts_gradients_that_have_no_factors(name, experts, picked):
    """Those of experts whose weights are copied for each token, most of such a model, would wait
    whole."""
    model = build(name)
    if experts is not None:
        model.set_experts_implementation(experts)
    optimizer = Lomo(model, lr=LR, clip_grad_norm=CLIP)
    optimizer.backward(loss_of(model))
    assert optimizer.explain().startswith(f"strategy {picked}: ")
    if picked == "partial":
        assert optimizer.last_waiting_bytes <= sum(p.nbytes for p in model.parameters()) / 4
