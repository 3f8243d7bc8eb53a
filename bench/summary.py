"""README's few measured rows, each from one committed file."""

from . import record, tables

GIB = 2**30
HEAD = ["what", "here", "beside it", "rows"]


def one(name, **wanted):
    """The row of a file that has these values; the last one, where it was measured again."""
    return [
        row for row in record.read(name) if all(row[key] == value for key, value in wanted.items())
    ][-1]


def gib(row, key):
    return f"{int(row[key]) / GIB:.1f} GiB"


def memory():
    lomo, sgd, adamw = (
        gib(one("memory_by_kind", step=step), "peak_bytes")
        for step in ("Lomo, clipped, two backwards", "SGD, bf16", "AdamW, fp32 master")
    )
    return (
        "LLaMA-7B, a clipped step of 1024 tokens, checkpointing (predicted)",
        f"**{lomo}**",
        f"SGD {sgd}, AdamW {adamw}",
        "memory_by_kind",
    )


def card():
    row = one("cards", model="llama-65b", devices="1", offload="cpu")
    device, host = gib(row, "least_peak_bytes"), gib(row, "least_host_bytes")
    return (
        "LLaMA-65B on one card of 24 GiB, the model in host memory (predicted)",
        f"**{device}** on the card, {host} on the host",
        "12 bytes a parameter and more on the host where fp32 states live there",
        "cards",
    )  # fmt: skip


def update():
    case = {"bench": "lomo_update", "case": "LLaMA-65B query 8192x8192", "dtype": "bfloat16"}
    ours, theirs, eager = (
        f"{float(one('cpu', **case, what=what, options=options)['p50_us']) / 1e3:.1f} ms"
        for what, options in (
            ("native", "all"), ("lomo-optim", "plain"), ("eager, reference's", "all")
        )
    )  # fmt: skip
    return (
        "update of 64 Mi bf16 elements: unscaled, checked, clipped, decayed",
        f"**{ours}**",
        f"PyTorch's operations {eager}; lomo-optim, the update alone {theirs}",
        "cpu",
    )


def host():
    case = {"bench": "host", "tensors": "2000", "options": "clip_grad_norm"}
    ours, theirs = (
        f"{float(one('cpu', **case, what=what)['per_tensor_us']):.0f} µs"
        for what in ("Lomo", "lomo-optim")
    )
    return (
        "time of the host for each of 2,000 tensors, norm clipped",
        f"**{ours}**",
        f"lomo-optim {theirs}",
        "cpu",
    )


def step():
    case = {"bench": "train_step", "case": "LLaMA-34M, 256 tokens"}
    ours, theirs, sgd = (
        f"{float(one('cpu', **case, what=what, options=options)['p50_us']) / 1e6:.2f} s"
        for what, options in (("Lomo", "auto"), ("lomo-optim", "clip_grad_norm"), ("SGD", ""))
    )
    return (
        "a clipped step of a Llama of 34 M parameters, 256 tokens",
        f"**{ours}**",
        f"torch's SGD {sgd}, lomo-optim {theirs}",
        "cpu",
    )


def study():
    """Means over the seeds of the test part."""
    methods = ("lomo", "adalomo", "adamw", "lora")
    tests = [r for r in record.read("study") if (r["task"], r["part"]) == ("wordnet", "test")]
    right, held = {}, {}
    for name in methods:
        rows = [row for row in tests if row["method"] == name]
        right[name] = sum(int(r["right"]) for r in rows) / sum(int(r["count"]) for r in rows)
        held[name] = max(int(r["gradient_bytes"]) + int(r["state_bytes"]) for r in rows) / GIB
    lomo, adalomo, adamw, lora = (f"{right[name]:.3f}" for name in methods)
    return (
        "SmolLM2-135M on WordNet, 24 steps: accuracy; gradients and states (no difference shown)",
        f"**Lomo {lomo}, AdaLomo {adalomo}**; {held['lomo']:.2f} GiB",
        f"AdamW {adamw}; {held['adamw']:.2f} GiB. LoRA {lora}; {held['lora']:.3f} GiB",
        "study",
    )


def drawn():
    rows = (memory(), card(), study(), step(), update(), host())
    body = [[*row[:3], f"[{row[3]}](bench/results/{row[3]}.csv)"] for row in rows]
    return tables.table(HEAD, body)
