"""A training step of a LLaMA whose layers torch.compile has compiled, beside the same step without.

    python -m bench.bench_compile [--out FOLDER]

The models, tokens and dtypes of bench_train_step.py; the smallest shows the host's work. "floor"
drops each gradient as it comes; "gradients" is compiled code that leaves ordinary ones to Lomo.
`gradients_bytes` is what is held until the norm is known. Rows go to FOLDER/compile_<device>.csv;
docs/compile.md has the table.
"""

import argparse
import contextlib
import functools
import time
from pathlib import Path

import torch

from lomo_kernels.optim import compiled

from . import bench_train_step, peers, record, suite, tables, timing
from .bench_train_step import CLIPPED, LR, Case, floor

STEPS, BACKEND = 20, "inductor"
ONE = {"strategy": "one_backward", **CLIPPED}
# (what, options, is compiled, whether compiled code gives factors): how the step is made
RIVALS = {
    (what, options, is_compiled, factors): make
    for what, options, make in (
        ("floor", "", floor),
        ("Lomo", "one_backward", functools.partial(bench_train_step.ours, **ONE)),
        ("Lomo", "immediate, unclipped", functools.partial(bench_train_step.ours,
                                                           strategy="immediate")),
        ("SGD", "clip_grad_norm", functools.partial(
            peers.kept, make=lambda p: torch.optim.SGD(p, lr=LR), norm=1.0)),
    )
    for is_compiled, factors in ((False, True), (True, True), (True, False))
    if factors or options == "one_backward"
}  # fmt: skip


@contextlib.contextmanager
def gives_factors(factors):
    before, compiled.AVAILABLE = compiled.AVAILABLE, compiled.AVAILABLE and factors
    try:
        yield
    finally:
        compiled.AVAILABLE = before


def rows_of(case):
    model = case.build()
    ids = torch.randint(case.shape.vocabulary, (1, case.tokens), device=case.where.device)
    for (what, options, is_compiled, factors), make in RIVALS.items():
        torch._dynamo.reset()
        bench_train_step.renew(model)
        for layer in model.model.layers:
            layer._compiled_call_impl = None
            if is_compiled:
                layer.compile(backend=BACKEND)
        place = "eager" if not is_compiled else "compiled" if factors else "compiled, gradients"
        row = {
            "bench": "compile", "case": case.name, "what": what,
            "options": ", ".join(filter(None, (options, place))),
            "dtype": str(case.dtype).removeprefix("torch."),
            "timed": "clock" if case.where.gpu else "processor",
        }  # fmt: skip
        with gives_factors(factors):
            try:
                yield {**row, **measured(case, model, ids, make)}
            except Exception as error:  # a compiler that is not there is a row that says so
                yield {**row, "note": timing.note(error)}


def measured(case, model, ids, make):
    """On the CPU the processor's time, which others on the machine do not change."""
    gpu, samples = case.where.gpu, []
    clock = time.perf_counter if gpu else time.process_time
    optimizer, step = make(model)
    for number in range(STEPS + 2):
        if gpu:
            torch.cuda.synchronize()
            if number == 2:  # compiled, and with all states
                torch.cuda.reset_peak_memory_stats()
        start = clock()
        step(model(input_ids=ids, labels=ids).loss)
        if gpu:
            torch.cuda.synchronize()
        samples.append((clock() - start) * 1e6)
    times = timing.Times(samples[2:], None, "")
    return {
        **{f"p{q}_us": f"{times.quantile(q / 100):.0f}" for q in (20, 50, 80)},
        "tokens_per_s": f"{case.tokens / times.quantile(0.5) * 1e6:.1f}",
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else "",
        "gradients_bytes": held(optimizer, model),
    }


def held(optimizer, model):
    """Bytes of gradients and factors between backward and the step."""
    if isinstance(optimizer, torch.optim.SGD):
        return sum(param.nbytes for param in model.parameters())
    return 0 if optimizer is None else optimizer.last_waiting_bytes


def cases(where):
    """The smallest model, and the one whose step bench_train_step.py has."""
    found = [Case(where, bench_train_step.SMALLEST, 32)]
    return found + [case for rank, case in bench_train_step.cases(where) if rank == 1]


def drawn():
    """For docs/compile.md, from the rows of the CPU."""
    rows = record.read("compile_cpu")
    body = [
        [
            r["case"], r["what"], r["options"],
            f"{float(r['p50_us']) / 1e3:.1f}" if r["p50_us"] else r["note"],
            f"{int(r['gradients_bytes'] or 0) / 2**20:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    head = ["model", "by", "options", "ms a step", "MiB held until the norm is known"]
    return tables.table(head, body) + tables.origin(rows, "compile_cpu")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the rows")
    options = parser.parse_args()
    path = options.out / f"compile_{record.device_name()}.csv"
    where = timing.Where.here()
    for case in cases(where):
        for row in rows_of(case):
            record.merge(path, [row], suite.KEY, suite.FIELDS)
            print(row, flush=True)
    print(path)


if __name__ == "__main__":
    main()
