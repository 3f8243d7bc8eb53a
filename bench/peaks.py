"""Peak bytes of a training step on the meta device: a model's own code runs, no number exists.

The step is the real one of transformers' Llama and of `Lomo`; what is left out are the kernels,
which allocate nothing, and questions to the host. Attention is the fused one, which saves its
inputs, its output and one number for each row.
"""

import contextlib
from unittest import mock

import torch

from lomo_kernels import Lomo, ops
from lomo_kernels.memory import LiveBytes
from lomo_kernels.optim import linear


def _attention(module, query, key, value, mask, scaling, dropout=0.0, **options):
    """What a fused attention keeps for backward; its operator for CPUs knows the meta device."""
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout, True, scale=scaling
    )
    return out[0].transpose(1, 2), None


def build(shape, checkpointing, dtype, device="meta"):
    import transformers

    transformers.AttentionInterface.register("without_values", _attention)
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary, attn_implementation="without_values", use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(device, dtype).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _nothing(*args, **kwargs):
    """Not a Mock, which would keep its arguments, and their memory."""


def _trusted(*args):
    return True


@contextlib.contextmanager
def _without_values():
    """A GPU's products of 16-bit factors, no kernels, no host."""
    with contextlib.ExitStack() as stack:
        for name in ("lomo_update_", "grad_sumsq_", "decide_", "pick_backend"):
            stack.enter_context(mock.patch.object(ops, name, _nothing))
        stack.enter_context(
            mock.patch.object(linear, "_is_direct", lambda t: t.dtype is not torch.float32)
        )
        stack.enter_context(mock.patch.object(linear.Cancellation, "note", _trusted))
        stack.enter_context(mock.patch.object(linear.Cancellation, "close", _nothing))
        yield


def step_peak(model, ids, optimizer):
    """Peak bytes of a forward and `optimizer(loss)`, weights included."""
    with LiveBytes() as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.add(tensor)
        optimizer(model(input_ids=ids, labels=ids).loss)
    return live.peak


def lomo(model, strategy, **options):
    """`strategy` "none": without clipping."""
    if strategy != "none":
        options |= {"clip_grad_norm": 1.0, "strategy": strategy}
    return Lomo(model, lr=0.1, **options)


def peak(shape, tokens, checkpointing, strategy, dtype=torch.bfloat16):
    """Peak bytes of a step with one sequence; "held": backward alone, its gradients kept."""
    model = build(shape, checkpointing, dtype)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with _without_values():
        if strategy == "held":
            return step_peak(model, ids, torch.Tensor.backward)
        return step_peak(model, ids, lomo(model, strategy).backward)
