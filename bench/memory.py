"""Rows of lomo_kernels.memory's plans: the paper's Table 1 again, which model fits which card,
adapters beside full tuning, and what waits of experts.

    python -m bench.memory [table1 | cards | adapters | experts]

Nothing is allocated: a step runs on tensors without data. Bytes are per device.
"""

import sys
from typing import NamedTuple
from unittest import mock

import torch
import transformers

from lomo_kernels import memory
from lomo_kernels.integrations import shapes
from lomo_kernels.memory import optimizers, report
from lomo_kernels.memory.predict import Job, predict, would_wait

from . import record
from .tables import origin, table

GIB = 2**30
CHECKPOINTING = (None, "non_reentrant")

# Lv et al., arXiv 2306.09782, Table 1, in GiB: parameters, gradients, states, activations, total.
PAPER = {
    ("AdamW", None): (12.55, 12.55, 75.31, 45.61, 147.02),
    ("AdamW", "non_reentrant"): (12.55, 12.55, 75.31, 1.79, 102.20),
    ("SGD", None): (12.55, 12.55, 25.10, 45.61, 96.81),
    ("SGD", "non_reentrant"): (12.55, 12.55, 25.10, 1.79, 51.99),
    ("LOMO", None): (12.55, 0.24, 0.00, 45.61, 59.40),
    ("LOMO", "non_reentrant"): (12.55, 0.24, 0.00, 1.79, 14.58),
}
REFERENCE = "lomo-optim 0.1.1"
STEPS = {  # name -> row of the paper, options of `plan`
    "adamw-master": ("AdamW", {"optimizer": "adamw-master"}),
    "sgd-master": ("SGD", {"optimizer": "sgd-master"}),
    "sgd": (None, {"optimizer": "sgd"}),
    REFERENCE: ("LOMO", None),
    "lomo": ("LOMO", {"clip_grad_norm": None}),
    "lomo, immediate": (None, {"clip_grad_norm": None, "strategy": "immediate"}),
    "lomo, clipped": (None, {"clip_grad_norm": 1.0}),
    "adalomo, clipped": (None, {"optimizer": "adalomo", "clip_grad_norm": 1.0}),
}
SHAPE = {"batch": 8, "sequence": 512}

MODELS = ("llama-7b", "llama-3-8b", "llama-13b", "llama-30b", "llama-65b", "llama-3-70b")
STEP = {"batch": 1, "sequence": 1024, "checkpointing": "non_reentrant"}


class Card(NamedTuple):
    devices: int
    gib: int  # of each
    offload: str | None = None

    def __str__(self):
        name = f"{self.gib} GiB" if self.devices == 1 else f"{self.devices} x {self.gib} GiB"
        return name if self.offload is None else f"{name}, offloaded"


# Of the public config.json of Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1, openai/gpt-oss-20b.
MIXTURES = {
    "Qwen3-30B-A3B": ("qwen3_moe", {
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936,
    }),
    "Mixtral-8x7B": ("mixtral", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8,
        "num_experts_per_tok": 2, "vocab_size": 32000, "sliding_window": None,
    }),
    "gpt-oss-20b": ("gpt_oss", {
        "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
        "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
    }),
}  # fmt: skip
TOKENS = (512, 1024, 2048)

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")  # the weights

CARDS = (Card(1, 24), Card(1, 48), Card(1, 80), Card(1, 141), Card(8, 24), Card(1, 24, "cpu"))


ADAPTED = ("llama-7b", "llama-13b", "llama-65b")
TWICE = {"strategy": "two_backward"}
WAYS = {  # what is trained, by what, checkpointing -> options of `plan`
    ("LoRA", "adamw", "yes"): {"adapter": "lora"},
    ("LoRA", "adamw", "no"): {"adapter": "lora", "checkpointing": None},
    ("prefix", "adamw", "no"): {"adapter": "prefix", "checkpointing": None},
    ("everything", "lomo, two backwards", "yes"): TWICE,
    ("everything and LoRA", "lomo, two backwards, and adamw", "yes"): {
        "adapter": "lora+lomo",
        **TWICE,
    },
    ("everything", "adamw, states in bf16", "yes"): {"optimizer": "adamw"},
}


def _reference(name, model, options):
    """In place of `optimizers.make`: the implementation that the paper's authors published."""
    import lomo_optim  # whose rows need it; its tables do not

    optimizer = lomo_optim.Lomo(model, lr=1e-3)
    return [optimizer], lambda loss: optimizer.fused_backward(loss, 1e-3)


def step(options, checkpointing, attention):
    """The Summary of a step of LLaMA-7B; `options` None: by lomo-optim."""
    if options is not None:
        found = memory.plan(
            "llama-7b", checkpointing=checkpointing, attention=attention, **SHAPE, **options
        )
        return found.summary
    job = Job("lomo-optim", checkpointing=checkpointing, attention=attention, **SHAPE)
    with mock.patch.object(optimizers, "make", _reference):
        return predict(shapes.config_of("llama-7b"), job)


def table1_rows():
    for checkpointing in CHECKPOINTING:
        for name, (_, options) in STEPS.items():
            eager, fused = (step(options, checkpointing, kind) for kind in ("eager", "sdpa"))
            yield {
                "optimizer": name,
                "checkpointing": checkpointing or "no",
                **{f"{c}_bytes": eager.maxima[c] for c in memory.CATEGORIES},
                "peak_bytes": eager.peak.total,
                "peak_place": str(eager.peak.place),
                "fused_attention_activations_bytes": fused.maxima["activations"],
                "fused_attention_peak_bytes": fused.peak.total,
            }


def card_row(model, card):
    """`plan` of a clipped step by Lomo, and the longest sequence that fits in two backwards."""
    device_memory = card.gib * GIB
    options = {**STEP, "devices": card.devices, "device_memory": device_memory}
    if card.devices > 1 or card.offload is not None:
        options |= {"units": "fine", "offload": card.offload}
    found = memory.plan(model, **options)
    longest = memory.plan(model, **options, strategy="two_backward", search="sequence")
    return {
        "model": model,
        "parameters": found.parameters,
        "devices": card.devices,
        "offload": card.offload or "no",
        "device_memory_bytes": device_memory,
        "peak_bytes": found.peak,
        "least_peak_bytes": longest.peak,
        "longest_sequence": longest.largest_sequence,
        "least_host_bytes": longest.host_peak or 0,
    }


def adapter_row(model, way):
    found = memory.plan(model, **STEP | WAYS[way])
    return {
        "model": model,
        **dict(zip(("trained", "by", "checkpointing"), way)),
        **{f"{c}_bytes": found.maxima[c] for c in memory.CATEGORIES},
        "peak_bytes": found.peak,
    }


def mixture(name):
    kind, fields = MIXTURES[name]
    return transformers.AutoConfig.for_model(kind, **fields, tie_word_embeddings=False)


def waits(name, tokens):
    """What would wait of a mixture for the norm: bytes of the experts' factors, and of everything;
    of one layer more as many as of the second."""
    config = mixture(name)
    job = Job(sequence=tokens, checkpointing="non_reentrant", options=(("clip_grad_norm", 1.0),))
    found = []
    for count in (1, 2):
        small, listed, others = would_wait(shapes.with_layers(config, count), job)
        experts = sum(each.nbytes for each in listed if each.name.endswith(EXPERTS))
        found.append((experts, others + sum(each.nbytes for each in [*small, *listed])))
    layers = config.num_hidden_layers
    return tuple(one + (layers - 1) * (two - one) for one, two in zip(*found))


def experts_row(name, tokens):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(mixture(name), dtype=torch.bfloat16)
    sizes = {key: param.nbytes for key, param in model.named_parameters()}
    factors, waiting = waits(name, tokens)
    return {
        "model": name,
        "tokens": tokens,
        "parameters_bytes": sum(sizes.values()),
        "experts_bytes": sum(size for key, size in sizes.items() if key.endswith(EXPERTS)),
        "factors_bytes": factors,
        "waits_bytes": waiting,
    }


# -- tables ----------------------------------------------------------------------------------------


def table1():
    rows = record.read("table1")
    body = []
    for row in rows:
        paper = PAPER.get((STEPS[row["optimizer"]][0], checkpointing_of(row)))
        cells = [
            f"{int(row[f'{c}_bytes']) / GIB:.2f}" + ("" if paper is None else f" ({paper[i]:.2f})")
            for i, c in enumerate(memory.CATEGORIES[:4])
        ]
        body.append(
            [
                row["optimizer"],
                "no" if row["checkpointing"] == "no" else "yes",
                *cells,
                f"{int(row['other_bytes']) / GIB:.2f}",
                f"{int(row['peak_bytes']) / GIB:.2f}"
                + ("" if paper is None else f" ({paper[4]:.2f})"),
                f"{int(row['fused_attention_activations_bytes']) / GIB:.2f}",
                f"{int(row['fused_attention_peak_bytes']) / GIB:.2f}",
            ]
        )
    head = [
        "optimizer", "checkpointing", *memory.CATEGORIES, "peak", "activations, fused attention",
        "peak, fused attention",
    ]  # fmt: skip
    return table(head, body) + origin(rows, "table1")


def checkpointing_of(row):
    return None if row["checkpointing"] == "no" else row["checkpointing"]


def cards():
    rows = record.read("cards")
    cells = {card_of(r): r for r in rows}
    body = [[m, *(_cell(cells[m, card]) for card in CARDS)] for m in MODELS]
    return table(["model", *map(str, CARDS)], body) + origin(rows, "cards")


def card_of(row):
    """The model and the card."""
    offload = None if row["offload"] == "no" else row["offload"]
    gib = int(row["device_memory_bytes"]) // GIB
    return row["model"], Card(int(row["devices"]), gib, offload)


def adapters():
    rows = record.read("adapters")
    keys = [*(f"{c}_bytes" for c in memory.CATEGORIES), "peak_bytes"]
    body = [[*way_of(row), *(f"{int(row[key]) / GIB:.2f}" for key in keys)] for row in rows]
    head = ["model", "trained", "by", "checkpointing", *memory.CATEGORIES, "peak"]
    return table(head, body) + origin(rows, "adapters")


def way_of(row):
    """The model, and the way to train it."""
    return row["model"], row["trained"], row["by"], row["checkpointing"]


def _cell(row):
    longest = f"to {int(row['longest_sequence']):,} tokens"
    margin, most = (
        int(row["device_memory_bytes"]) - int(row[key])
        for key in ("peak_bytes", "least_peak_bytes")
    )
    if (host := int(row["least_host_bytes"])) and most >= 0:
        return f"**{report.size(most)} to spare**, {longest}, {report.size(host)} of host memory"
    if margin >= GIB:
        return f"**{report.size(margin)} to spare**, {longest}"
    if most >= 0:
        return f"**{report.size(most)} to spare** in two backwards, {longest}"
    return f"{report.size(-most)} missing" + (
        f", {longest}" if int(row["longest_sequence"]) else ""
    )


def experts():
    rows = record.read("experts")
    names = ("parameters", "experts", "factors", "waits")
    body = []
    for row in rows:
        gib = {key: int(row[f"{key}_bytes"]) / GIB for key in names}
        body.append(
            [
                row["model"], row["tokens"], f"{gib['experts']:.1f} of {gib['parameters']:.1f}",
                f"{gib['factors']:.2f}", f"{gib['factors'] / gib['experts']:.1%}",
                f"{gib['waits']:.2f}",
            ]
        )  # fmt: skip
    head = [
        "model", "tokens", "gradients of experts, of all", "their factors", "share", "waits in all",
    ]  # fmt: skip
    return table(head, body) + origin(rows, "experts")


def main():
    from rich.progress import track

    rows = {
        "table1": lambda: list(table1_rows()),
        "cards": lambda: [card_row(m, card) for m in track(MODELS, "cards") for card in CARDS],
        "adapters": lambda: [adapter_row(m, w) for m in track(ADAPTED, "adapters") for w in WAYS],
        "experts": lambda: [experts_row(m, n) for m in track(MIXTURES, "experts") for n in TOKENS],
    }
    for name in sys.argv[1:] or rows:
        print(record.write(name, rows[name]()))


if __name__ == "__main__":
    main()
