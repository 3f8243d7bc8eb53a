"""The tables of docs/benchmarks.md, of every device that has rows."""

from . import peers, record, targets
from .tables import origin, table


def devices():
    """Names of the files with rows of the suite: the CPU, then GPUs."""
    names = [p.stem for p in record.RESULTS.glob("nvidia_*.csv")]
    return [targets.CPU, *sorted(names)]


def pivot(rows, bench, case):
    """Median milliseconds by dtype, for each (what, options); and the share of the copy in bf16."""
    found = {}
    for r in rows:
        if r["bench"] == bench and r["case"] == case and r["p50_us"]:
            found.setdefault((r["what"], r["options"]), {})[r["dtype"]] = r
    return found


DTYPES = ("bfloat16", "float16", "float32")


def kernels(rows):
    """The largest case of each kernel's bench."""
    for bench, title in (
        ("lomo_update", "Update"), ("grad_sumsq", "Squared norm"), ("adalomo", "AdaLomo's update")
    ):  # fmt: skip
        single = [r for r in rows if r["bench"] == bench and r["tensors"] == "1"]
        three = {r["case"] for r in single if r["dtype"] == "float16"}  # the others have bf16 alone
        if not three:
            continue
        largest = max((r for r in single if r["case"] in three), key=lambda r: int(r["numel"]))
        body = []
        for (what, options), by_dtype in pivot(rows, bench, largest["case"]).items():
            if what == "copy":
                continue
            cells = [f"{float(by_dtype[d]['p50_us']) / 1e3:.2f}" if d in by_dtype else ""
                     for d in DTYPES]  # fmt: skip
            share = by_dtype[DTYPES[0]]["of_copy"] if DTYPES[0] in by_dtype else ""
            body.append([what, options, *cells, share and f"{float(share):.2f}"])
        numel = int(largest["numel"]) / 2**20
        yield (
            f"{title}, {largest['case']} ({numel:.0f} Mi elements), milliseconds:",
            ["by", "options", "bf16", "fp16", "fp32", "of the copy rate, bf16"],
            body,
        )


def host(rows):
    rows = [r for r in rows if r["bench"] == "host" and r["p50_us"]]
    rows = [r for r in rows if r["what"] != "backward alone"]
    counts = sorted({int(r["tensors"]) for r in rows})
    found = {}
    for r in rows:
        found.setdefault((r["what"], r["options"]), {})[int(r["tensors"])] = r
    body = [
        [
            what,
            options,
            *(f"{float(by[n]['per_tensor_us']):.1f}" if n in by else "not run" for n in counts),
            *(by[2000][name] if 2000 in by else "" for name in ("launches", "host_reads")),
        ]
        for (what, options), by in found.items()
    ]
    if body:
        head = ["by", "options", *(f"{n:,} tensors" for n in counts), "launches", "reads"]
        yield (
            "Host time of a step beyond backward's, microseconds a tensor; launches, and values "
            "that the host reads, in a step of 2,000 tensors:",
            head,
            body,
        )


MEMORY = ("peak", "gradients", "states", "activations")


def sizes(row):
    return [row[f"{name}_bytes"] for name in MEMORY]


def published(each):
    """A line of others' own figures."""
    options = ", ".join(filter(None, (each.options, f"as published, {peers.FORGE_DEVICE}")))
    return [peers.FORGE_CASE, each.what, options, f"{each.seconds:.3f}", "", each.peak, "", "", ""]


def train(rows):
    body = [
        [
            r["case"],
            r["what"],
            r["options"],
            f"{float(r['p50_us']) / 1e6:.3f}" if r["p50_us"] else r["note"],
            r["tokens_per_s"],
            *(f"{int(size) / 2**30:.3f}" if size else "" for size in sizes(r)),
        ]
        for r in rows
        if r["bench"] == "train_step"
    ]
    if any(row[0] == peers.FORGE_CASE for row in body):
        body += [published(each) for each in peers.FORGE]
    if body:
        yield (
            "A training step:",
            ["model", "by", "options", "s", "tokens/s", *(f"{c}, GiB" for c in MEMORY)],
            body,
        )


def performance():
    text = ""
    for device in devices():
        rows = record.read(device)
        if not rows:
            continue
        text += f"### {rows[0]['device']}\n\n"
        for part in (kernels, host, train):
            for title, head, body in part(rows):
                text += f"{title}\n\n{table(head, body)}\n"
        text = text.rstrip("\n") + "\n" + origin(rows, device) + "\n"
    if len(devices()) == 1:
        text += (
            "**No GPU has been measured yet.** The CUDA and Triton kernels are checked on the CPU "
            "and as machine code; their speed on a device, and their bit parity there, are not "
            "shown.\n\n"
        )
    body = [list(each) for each in targets.check(record.read, devices()[1:])]
    return text + table(["device", "target", "wanted", "measured", ""], body)
