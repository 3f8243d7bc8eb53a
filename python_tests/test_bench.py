"""The benchmarks: rivals do the work that they are timed for, rows say what was measured."""

import contextlib
import copy
import itertools
import math
import re
import sys

import pytest
import torch

from bench import (
    __main__ as bench,
)
from bench import (
    bench_adalomo,
    bench_compile,
    bench_grad_sumsq,
    bench_lomo_update,
    bench_product_sumsq,
    bench_product_update,
    bench_train_step,
    fake_gpu,
    peers,
    performance,
    plots,
    record,
    shapes,
    suite,
    targets,
    timing,
)
from lomo_kernels import ops

CPU = timing.Where(torch.device("cpu"), 2**12, None, 4096)
CASE = shapes.Case("small", ((24, 40), (7,)))
MATRIX = shapes.Case("matrix", ((24, 40),))


def copies(each):
    return timing.Set(*([t.clone() for t in tensors] for tensors in each))


def in_dtypes(case, param, grad=None):
    return case._replace(dtype=param, grad_dtype=grad or param)


# What a rival says that does not do this work: any other error is that of a broken one.
REFUSALS = ("torch's kernel leaves these parameters as they are", "it puts its states on a GPU")


def prepared(rival, each):
    """-> the function; a rival that is not installed, or refuses, is skipped."""
    try:
        return rival.make(each)
    except ImportError as error:
        pytest.skip(str(error))
    except RuntimeError as error:
        if str(error) not in REFUSALS:
            raise
        pytest.skip(f"{rival.what}: {error}")


# -- rivals do the same work -----------------------------------------------------------------------


def expected_update(each, options):
    """By the definition, in float64; the norm of all tensors where it is clipped."""
    arguments = bench_lomo_update.options_of(torch.device("cpu")).get(options.split(",")[0], {})
    params, grads = ([t.double() for t in tensors] for tensors in each)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])).item()
    coef = float(arguments.get("clip_coef", 1.0))
    if options == bench_lomo_update.NORM:
        coef = min(1.0, 1.0 / (norm + 1e-6))
    bound, lr = arguments.get("clip_value", math.inf), bench_lomo_update.LR
    decay = 1 - lr * arguments.get("weight_decay", 0.0)
    scale = float(arguments.get("inv_scale", 1.0))
    return [p * decay - lr * (g * scale).clamp(-bound, bound) * coef for p, g in zip(params, grads)]


def updates(dtype):
    """Rivals by name."""
    case = in_dtypes(CASE, dtype)
    found = [*bench_lomo_update.rivals(case, CPU), *bench_lomo_update.features(case, CPU)]
    return {(rival.what, rival.options): rival for rival in found}


@pytest.mark.filterwarnings("ignore")  # what other packages warn of is theirs
@pytest.mark.parametrize(
    ("key", "dtype"),
    [(key, dtype) for dtype in (torch.bfloat16, torch.float32) for key in updates(dtype)],
    ids=lambda value: ", ".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_rival_makes_the_update(key, dtype):
    case, rival = in_dtypes(CASE, dtype), updates(dtype)[key]
    each = timing.Set(
        [torch.randn(s).to(dtype) for s in case.shapes],
        [torch.randn(s).mul_(20).to(dtype) for s in case.shapes],
    )
    wanted = expected_update(each, rival.options)
    before = copies(each)
    prepared(rival, each)()
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6}[dtype]  # of what was added up
    for p, want, old in zip(each.params, wanted, before.params):
        size = old.double().abs() + (want - old).abs()
        assert ((p - want).abs() <= tolerance * size).all()
        assert not torch.equal(p, old) or dtype is torch.bfloat16  # where it may round to nothing


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.0])
@pytest.mark.parametrize("rival", [peers.sequence, peers.shortest])
def test_eager_rivals_look_for_what_is_not_finite(rival, value):
    arguments = bench_lomo_update.options_of(torch.device("cpu"))[bench_lomo_update.ALL]
    grads = [torch.ones(3), torch.tensor([1.0, value])]
    rival(timing.Set([torch.ones(3), torch.ones(2)], grads), lr=0.1, **arguments)()
    assert arguments["found_inf"].item() == (not math.isfinite(value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_norm_is_the_norm(dtype):
    case = in_dtypes(CASE, dtype)
    (each, *_) = timing.sets_of(case, CPU)
    wanted = [torch.linalg.vector_norm(g.double()).item() for g in each.grads]
    for rival in bench_grad_sumsq.rivals(case, CPU):
        if rival.what in ops.BACKENDS:
            run = rival.make(each)
            run()
            scale = 1 / bench_lomo_update.SCALE if rival.options == "all" else 1.0
            found = run.args[0].sqrt() / scale
        else:
            found = torch.stack(list(rival.make(each)()))
        assert found.tolist() == pytest.approx(wanted, rel=1e-5), rival


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", ["native", "transformers' Adafactor", "torch's Adafactor"])
def test_every_rival_makes_adalomo_s_update(what):
    case = in_dtypes(MATRIX, torch.float32)
    rival = next(r for r in bench_adalomo.rivals(case, CPU) if r.what == what)
    (each, *_) = timing.sets_of(case, CPU)
    want = copies(each)
    state = [ops.adalomo_state(p) for p in want.params]
    ops.adalomo_update_(*want, state, lr=bench_adalomo.LR, backend="reference")
    prepared(rival, each)()
    torch.testing.assert_close(each.params, want.params, rtol=1e-4, atol=1e-6)


STEPS = {**bench_train_step.STEPS, **bench_train_step.FORGE}
# Those with a plain optimizer's rule in any dtype; others count in fp32, or by rules of their own.
PLAIN = [key for key in STEPS if key[0] in ("Lomo", "SGD", "AdamW") and key[1] != "fp32 master"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [*PLAIN, ("optimi", "SGD, gradient release")], ids=", ".join)
def test_every_rival_makes_the_step(key):
    """A small LLaMA in fp64, beside autograd's gradients and torch's plain optimizers."""
    case = bench_train_step.Case(CPU, bench_train_step.SMALLEST, 32)
    case.dtype = torch.float64  # a step is small
    model, (what, options) = case.build(), key
    ids = torch.randint(case.shape.vocabulary, (1, 32))
    plain = copy.deepcopy(model)
    plain(input_ids=ids, labels=ids).loss.backward()
    if not re.search("unclipped|release|foreach|^fused$", options):
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    kind = torch.optim.AdamW if "AdamW" in what + options else torch.optim.SGD
    kind(plain.parameters(), lr=bench_train_step.LR, foreach=False).step()
    before = [p.detach().clone() for p in model.parameters()]
    try:
        _, step = STEPS[key](model)
    except ImportError as error:
        pytest.skip(str(error))
    step(model(input_ids=ids, labels=ids).loss)
    for p, old, want in zip(model.parameters(), before, plain.parameters()):
        change = (want - old).abs().max()
        assert change > 1e-9
        assert (p - want).abs().max() <= 1e-5 * change


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_rows(monkeypatch):
    monkeypatch.setattr(bench_compile, "STEPS", 3)
    monkeypatch.setattr(bench_compile, "BACKEND", "aot_eager")
    chosen = {k: v for k, v in bench_compile.RIVALS.items() if k[1] == "one_backward" or not k[2]}
    monkeypatch.setattr(bench_compile, "RIVALS", chosen)
    rows = list(bench_compile.rows_of(bench_compile.cases(CPU)[0]))
    held = {r["options"]: r["gradients_bytes"] for r in rows}
    assert all(float(r["tokens_per_s"]) > 0 for r in rows)
    ways = [f"one_backward, {way}" for way in ("eager", "compiled", "compiled, gradients")]
    eager, compiled, gradients = (held[way] for way in ways)
    assert eager == compiled < gradients < held["clip_grad_norm, eager"]


PRODUCT = shapes.Products("product", ((24, 40, 0),), 9, updated=True)
LAYER = shapes.products_of("layer", bench_product_sumsq.Shape(16, 24, 2, 2, 1, 0), 7, 2)


@pytest.mark.parametrize("what", ["auto", "native", "dW, lomo_update_", "dW, p.add_", "dW alone"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_rival_applies_the_product(what, dtype):
    case = PRODUCT._replace(dtype=dtype)
    for rival in [r for r in bench_product_update.rivals(case, CPU) if r.what == what]:
        each = timing.Set([torch.randn(24, 40).to(dtype)], [torch.randn(9, n).to(dtype)
                          for n in (24, 40)])  # fmt: skip
        ((left, right),) = case.pairs(each)
        grad = left.double().T @ right.double()
        before, (want,) = each.params[0].clone(), expected_update(
            timing.Set(each.params, [grad]), rival.options.rpartition("blocks, ")[2]
        )  # fmt: skip
        result = rival.make(each)()
        if what == "dW alone":
            torch.testing.assert_close(result.double(), grad, rtol=2**-7, atol=1e-5)
            assert torch.equal(each.params[0], before)
            continue
        tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6}[dtype]
        size = before.double().abs() + (want - before).abs()
        assert ((each.params[0] - want).abs() <= tolerance * size).all()


def test_every_rival_finds_the_norms_of_a_layer():
    """Queries, keys and values share an input, and so do gate and up; each set has them once."""
    assert [place for *_, place in LAYER.matrices] == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5, 6, 6, 7]
    (each, *_) = timing.sets_of(LAYER, CPU)
    assert len(each.grads) == 14 + 8
    pairs = LAYER.pairs(each)
    assert pairs[0][1] is pairs[2][1]
    wanted = [(a.double().T @ b.double()).square().sum().item() for a, b in pairs]
    for rival in bench_product_sumsq.rivals(LAYER, CPU):
        run = rival.make(each)
        run()
        if rival.options == "plain" and rival.what == "native":
            assert run.args[0].tolist() == pytest.approx(wanted, rel=1e-5)


def test_what_a_product_must_move_and_multiply():
    """4 bytes an element of a 16-bit weight and the factors; 2 operations a token and element."""
    n = 24 * 40
    found = {r.options: r for r in bench_product_update.rivals(PRODUCT, CPU)}
    factors = 2 * 9 * (24 + 40)
    assert found["blocks, plain"].bytes == 4 * n + factors
    assert found["blocks, all, split"].bytes == 8 * n + factors
    assert {r.flops for r in found.values()} == {2 * 9 * n}
    assert next(bench_product_update.jobs(CPU._replace(largest=2**26))).numel == 4096**2
    whole = shapes.products_of("7B", bench_product_sumsq.MODELS["LLaMA-7B"], 512, 32)
    assert len(whole.matrices) == 7 * 32
    # 0.7 TFLOP in place of dW's 6.6: lefts of five matrices of 4096 and two of 11008, four inputs
    assert bench_product_sumsq.flops(whole) == 512 * 640 * 32 * (8 * 4096 + 3 * 11008)
    rows = list(timing.rows(CPU, "product_update", PRODUCT, found.values(), seconds=0.0))
    rate = rows[0]["flops"] / float(rows[0]["p50_us"]) / 1e6
    assert float(rows[0]["tflop_per_s"]) == pytest.approx(rate, abs=0.01)
    assert set(rows[0]) <= set(suite.FIELDS)


@pytest.mark.parametrize("largest", [2**12, 17_000_000, 20_000_000, 2**28])
def test_no_job_has_the_name_of_another(largest):
    """Its rows would take their place. The large case is the square one where that is the largest
    that fits, and then another takes its part."""
    names = [job.name for job in suite.chosen(bench.JOBS, CPU._replace(largest=largest))]
    assert len(names) == len(set(names)) > 20


def test_bytes_that_must_move():
    """Of 16-bit tensors, an element: 6, with a split master 10, with the norm 8; 2; 10."""
    n = CASE.numel
    found = {r.options: r.bytes / n for r in bench_lomo_update.rivals(CASE, CPU)}
    assert (found["plain"], found["all"], found["all, split"], found["with norm"]) == (6, 6, 10, 8)
    assert {r.bytes / n for r in bench_grad_sumsq.rivals(CASE, CPU)} == {2}
    assert {r.options: r.bytes / n for r in bench_adalomo.rivals(CASE, CPU)}["plain"] == 10
    mixed = in_dtypes(CASE, torch.float32, torch.bfloat16)
    assert bench_lomo_update.traffic(mixed, "plain") == 10 * n


# -- how it is timed -------------------------------------------------------------------------------


def test_every_rival_has_a_row_and_a_failing_one_says_why():
    def fails(each):
        raise torch.OutOfMemoryError("no room")

    good = timing.Rival("good", "plain", 6 * MATRIX.numel, lambda each: each.params[0].zero_)
    bad = timing.Rival("bad", "plain", 6 * MATRIX.numel, fails)
    found = list(timing.rows(CPU, "some", MATRIX, [bad, good], seconds=0.0))
    assert [row["what"] for row in found] == ["bad", "good", "copy"]
    assert found[0]["note"] == "out of memory"
    assert "p50_us" not in found[0]
    for row in found[1:]:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        rate = int(row["bytes"]) / float(row["p50_us"]) / 1e3
        assert float(row["gb_per_s"]) == pytest.approx(rate, rel=0.05, abs=0.01)
        assert set(row) <= set(suite.FIELDS)
    assert float(found[-1]["of_copy"]) == 1.0


def test_figures_of_known_times(monkeypatch):
    """600 bytes in 2 us are 0.3 GB/s, three quarters of a copy of 1600 bytes in 4 us."""
    one, copy = (
        timing.Rival("one", "", 600, None, flops=5 * 10**6),
        timing.Rival("c", "", 1600, None),
    )
    times = {one: timing.Times([1.0, 2.0, 9.0], 3.5, "graph"), copy: timing.Times([4.0], None, "")}
    monkeypatch.setattr(timing, "compare", lambda *arguments: times.items())
    where = CPU._replace(sheet=0.6e9)
    found, _ = timing.rows(where, "some", MATRIX, [one], seconds=0.0)
    figures = ("p50_us", "host_us", "gb_per_s", "copy_gb_per_s", "of_copy", "of_sheet")
    assert [found[name] for name in figures] == ["2.00", "3.50", "0.30", "0.40", "0.7500", "0.5000"]
    assert found["tflop_per_s"] == "2.50"
    assert (found["p20_us"], found["p80_us"]) == ("1.40", "6.20")  # between neighbouring samples


def test_sets_are_larger_than_the_cache_and_used_in_turn():
    where = CPU._replace(cache=50_000)
    sets = timing.sets_of(MATRIX, where)
    assert sum(p.nbytes + g.nbytes for s in sets for p, g in zip(*s)) > 3 * where.cache
    used = []
    clock = timing.CpuClock([lambda i=i: used.append(i) for i in range(len(sets))])
    used.clear()
    clock.sample()
    clock.sample()
    assert all(b == (a + 1) % len(sets) for a, b in itertools.pairwise(used))
    assert torch.cat([p.flatten() for s in sets for p in s.params]).unique().numel() > 100


@pytest.mark.parametrize("kind", ["graph", "stops the host", "fails in a capture", "not known"])
def test_timing_on_a_gpu_without_one(monkeypatch, kind):
    """The course of it: warm up, capture or not, read other memory, replay between events."""
    done, modes, streams, replays = [], [], [], []

    @contextlib.contextmanager
    def capture(graph, pool):
        yield
        if kind == "fails in a capture":
            raise RuntimeError("operation not permitted when stream is capturing")

    def run():
        if kind == "stops the host" and modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        done.append("run")

    for name, fake in {
        **fake_gpu.FAKES, "graph": capture, "set_sync_debug_mode": modes.append,
        "current_stream": lambda: "stream", "set_stream": streams.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(fake_gpu.Graph, "replay", lambda self: replays.append(self))
    monkeypatch.setattr(fake_gpu.Event, "elapsed_time", lambda self, end: 8.0)  # milliseconds
    rival = timing.Rival("it", "", 10**8, None, captured=kind != "not known")
    clock = timing.GpuClock([run, run], rival, lambda: done.append("flush"))
    assert clock.how == ("graph" if kind == "graph" else "events")
    assert len(clock.runs) == 4  # more than 256 MB of traffic
    assert streams == (["stream"] if kind == "fails in a capture" else [])
    done.clear()
    assert clock.sample() == 8.0 / 4 * 1e3
    assert done == ["flush"] + ([] if kind == "graph" else ["run"] * 4)
    assert len(replays) == (2 if kind == "graph" else 0)
    assert clock.host() > 0
    assert modes == ([] if kind == "not known" else ["error", "default"])


def test_a_sample_on_a_gpu_has_at_most_2000_calls(monkeypatch):
    for name, fake in fake_gpu.FAKES.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    runs = [lambda: None] * 1024
    clock = timing.GpuClock(
        runs, timing.Rival("small", "", 1000, None, captured=True), lambda: None
    )
    assert len(clock.runs) == timing.CALLS == 2000


def test_the_copy_beside_many_small_sets_is_made_once(monkeypatch):
    """Its tensors are as large as the largest case's, however small the others are."""
    made = []
    copy = timing.Rival("copy", "", 4, lambda _: made.append(1) or (lambda: None))
    monkeypatch.setattr(timing, "copy_of", lambda where: copy)
    where = CPU._replace(cache=50_000)
    sets = []
    rival = timing.Rival("it", "", 4, lambda each: sets.append(each) or (lambda: None))
    found = list(timing.compare(where, MATRIX, [rival], seconds=0.0))
    assert [each.what for each, _ in found] == ["it", "copy"]
    assert len(sets) > 20
    assert len(made) == 1


def test_others_programs_are_not_captured():
    """What is not known to be capturable would leave torch in the middle of a capture."""
    found = {r.what: r.captured for r in bench_lomo_update.rivals(MATRIX, CPU)}
    for what in ("optimi", "pytorch_optimizer", "lomo-optim"):
        assert not found[what]
    for what in ("native", "p.add_", "_fused_sgd_", "eager, fewest passes"):
        assert found[what]
    assert not any(r.captured for r in bench_adalomo.rivals(MATRIX, CPU) if r.what != "native")


def test_shapes():
    known = shapes.of_models()
    assert known[(4096, 4096)].name == targets.SQUARE
    assert known[(22016, 8192)].numel >= shapes.LARGE
    assert {(4096,), (32000, 4096), (128256, 4096), (8192, 8192)} <= set(known)
    sizes = [2 * case.numel for case in shapes.sweep()]
    assert (sizes[0], sizes[-1]) == (2**10, 2**30)
    assert len(shapes.experts(2**29).shapes) == 18_000
    assert shapes.experts(2**26).numel <= 2**26


# -- jobs, rows, targets ---------------------------------------------------------------------------


def job(rank, name, numel=1, rows=()):
    return suite.Job(rank, name, lambda seconds: iter(rows), numel)


def test_jobs_run_by_rank_within_the_budget(tmp_path):
    ran = []
    listed = [job(2, "second"), job(0, "first"), job(1, "too large", numel=5000)]
    jobs = suite.chosen([lambda _: listed], CPU)
    left = suite.run(jobs, CPU, 1.0, tmp_path / "rows.csv", say=ran.append)
    assert [line.rpartition("] ")[2] for line in ran] == ["first", "second"]
    assert left == []
    late = suite.run(jobs, CPU, 0.0, tmp_path / "rows.csv")
    assert late == ["no time: first", "no time: second"]
    assert [job.name for job in suite.chosen([lambda _: listed], CPU, ["sec", "third"])] == [
        "second"
    ]


def test_a_job_has_a_process_and_needs_the_time_for_it(tmp_path):
    began = []

    def apart(job, seconds, limit):
        began.append((job.name, limit))
        return {"fails": "exit 1"}.get(job.name)

    listed = [job(0, "fails"), job(0, "long")._replace(least=1000.0), job(0, "well")]
    left = suite.run(listed, CPU, 10.0, tmp_path / "rows.csv", apart, say=lambda line: None)
    assert began == [("fails", suite.MOST), ("well", suite.MOST)]
    assert left == ["failed: fails: exit 1", "no time: long"]


@pytest.mark.parametrize(("minutes", "what"), [(0.5, "no time"), (10.0, "failed")])
def test_a_job_that_is_ended_has_failed_unless_the_budget_ended_it(tmp_path, minutes, what):
    limits = []

    def apart(job, seconds, limit):
        limits.append(limit)
        return suite.ENDED

    listed = [job(0, "long")]
    left = suite.run(listed, CPU, minutes, tmp_path / "rows.csv", apart, say=lambda line: None)
    assert left == [f"{what}: long: {suite.ENDED}"]
    assert limits[0] == pytest.approx(min(suite.MOST, 60 * minutes), abs=1)


def test_a_process_that_dies_or_hangs_is_a_failure(tmp_path, capfd):
    apart = suite.process(CPU, tmp_path)
    assert apart(job(0, "no such job"), 0.1, 100) == "exit 1"
    assert capfd.readouterr().err == "no job 'no such job'\n"
    assert apart(job(0, "hangs"), 0.1, 0.2) == suite.ENDED


def test_rows_are_saved_as_they_are_made(tmp_path):
    path, seen = tmp_path / "rows.csv", []

    def makes(seconds):
        for case in "abc":
            seen.append(len(record.load(path)))
            yield {"bench": "b", "case": case, "p50_us": 1.0}

    assert suite.run_one(suite.Job(0, "job", makes), 1.0, path) is None
    assert seen == [0, 1, 2]


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    def fails(seconds):
        yield {"bench": "b", "case": "before", "p50_us": 1.0}
        raise ValueError("no such thing")

    after = job(1, "after", rows=[{"bench": "b", "case": "after", "p50_us": 2.0}])
    listed, path = [suite.Job(0, "bad", fails), after], tmp_path / "rows.csv"
    left = suite.run(listed, CPU, 1.0, path, say=lambda line: None)
    assert left == ["failed: bad: ValueError: no such thing"]
    assert [row["case"] for row in record.load(path)] == ["before", "after"]


@pytest.mark.parametrize("value", ["0", "100", "many"])
def test_the_largest_case_has_a_tensor(value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--largest", value])
    with pytest.raises(SystemExit):
        bench.main()
    assert f"--largest: wanted a whole number of at least 4096, got '{value}'" in (
        capsys.readouterr().err
    )


def test_new_rows_replace_those_of_the_same_measurement(tmp_path):
    path = tmp_path / "rows.csv"
    for us in (1.0, 2.0):
        rows = [{"bench": "b", "case": "c", "what": what, "p50_us": us} for what in ("x", "y")]
        record.merge(path, rows if us == 1.0 else rows[:1], suite.KEY, suite.FIELDS)
    found = record.load(path)
    assert [(row["what"], row["p50_us"]) for row in found] == [("x", "2.0"), ("y", "1.0")]
    for name in ("date", "device", "versions", "commit"):
        assert found[0][name], name
    kept = [{**found[0], "p50_us": "3.0", "commit": "of another tree"}]
    record.merge(path, kept, suite.KEY, suite.FIELDS)
    assert record.load(path) == [*kept, found[1]]


def test_rows_that_were_read_keep_their_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.write("some", [{"case": "a"}, {"case": "b"}])
    first, second = record.read("some")
    assert first["commit"] == record.COMMIT
    old = {**first, "commit": "abc", "date": "2020-02-20", "versions": "torch 1"}
    record.write("some", [old, second])
    assert record.read("some") == [old, second]


def test_clocks_are_read_while_the_gpu_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(record, "ASK", ["sh", "-c", "sleep 0.1; echo 1980 MHz, 2619 MHz"])
    done = []
    assert record.clocks_while(lambda: done.append(1)) == "1980 MHz, 2619 MHz"
    assert len(done) > 1
    monkeypatch.setattr(record, "ASK", ["no-such-program"])
    assert record.clocks_while(done.clear) == "unknown"


def test_rows_of_a_tree_without_git(monkeypatch):
    def no_git(*arguments, **options):
        raise FileNotFoundError("git")

    assert record.commit() == record.COMMIT or "+changes" in record.commit()
    monkeypatch.setattr(record.subprocess, "run", no_git)
    assert record.commit() == "unknown"


def row(bench, case, what, options, us, dtype="bfloat16", **more):
    found = dict.fromkeys(suite.FIELDS, "")
    given = {"bench": bench, "case": case, "what": what, "options": options, "dtype": dtype}
    return {**found, **given, "p50_us": str(us), "numel": str(2**24), "tensors": "1", **more}


def test_targets_are_met_missed_or_not_measured():
    square = targets.SQUARE
    rows = [
        row("lomo_update", square, "native", "plain", 40, of_copy="0.81"),
        row("lomo_update", square, "p.add_", "plain", 30),
        row("lomo_update", f"{square}, options", "native", "plain", 40),
        row("lomo_update", f"{square}, options", "native", "all", 40.8),
        row("lomo_update", "large", "native", "plain", 40, numel=str(2 * 10**8), of_copy="0.98"),
        row("lomo_update", "larger", "native", "plain", 40, numel=str(3 * 10**8), of_copy="0.95"),
        row("lomo_update", "18000 experts", "native", "plain", 9, of_copy="0.5", tensors="18000"),
        row("host", "2000 tensors", "Lomo", "", 9, host_reads="0"),
    ]
    found = {
        text: (value, verdict)
        for _, text, _, value, verdict in targets.check(
            {"nvidia_h100": rows, targets.CPU: []}.__getitem__, ["nvidia_h100"]
        )
    }
    assert found["update of 4096x4096 alone, of the copy rate"] == ("0.81", "met")
    assert found["p.add_ at 4096x4096, times ours"] == ("0.75", "missed")
    assert found["all options, times the plain update"] == ("1.02", "met")
    assert found["update of 180 M elements and more, of the copy rate"] == ("0.95", "missed")
    assert found["18,000 tensors, times the time of their bytes"] == ("2.00", "missed")
    assert found["host waits in a step"] == ("0.00", "met")
    assert found["lomo-optim's update, bf16, times ours"] == ("", "not measured")


def test_targets_of_a_step_and_of_products():
    def step(what, options, tokens, us):
        return row("train_step", f"LLaMA-7B, {tokens} tokens", what, options, us)

    immediate = ("Lomo", "immediate, unclipped")
    rows = [
        step("floor", "", 512, 100.0), step("floor", "", 2048, 400.0),
        step("Lomo", "one_backward", 512, 108.0), step("Lomo", "one_backward", 2048, 480.0),
        step(*immediate, 512, 101.0), step(*immediate, 2048, 416.0),
        row("product_sumsq", "LLaMA-7B, 32 layers, 512 tokens", "triton", "plain", 4.32),
        *(row("product_update", case, "auto", "plain", us) for case, us in (("a", 10), ("b", 12))),
        *(row("product_update", case, "dW alone", "plain", 9) for case in "ab"),
    ]  # fmt: skip
    checked = targets.check(lambda device: rows, ["nvidia_b200"])
    found = {text: rest for device, text, *rest in checked if device == "nvidia_b200"}
    beside = "times forward and backward alone"
    assert found[f"clipped step of 7B at 512 tokens, {beside}"] == ["<= 1.1", "1.08", "met"]
    assert found[f"clipped step of 7B at 2048 tokens, {beside}"] == ["<= 1.15", "1.20", "missed"]
    assert found[f"immediate, unclipped step of 7B, {beside}"] == ["<= 1.03", "1.04", "missed"]
    text = "dW's product alone, times product_update_ at each shape"
    assert found[text] == [">= 0.75", "0.75", "met"]
    text = "product_sumsq_ of 7B's weights at 512 tokens, of the clipped step"
    assert found[text] == ["<= 0.05", "0.04", "met"]
    # a card has a bound of its own where its instructions and not its memory set it
    assert found["update of 4096x4096 alone, of the copy rate"][0] == ">= 0.6"
    assert [d for d, *_ in targets.check(lambda device: [], [])].count("gpu") == len(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command(tmp_path, monkeypatch, capsys):
    """Small sizes, a second of each bench; then the rows are held to the targets."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.setattr(timing, "ROUNDS", 3)
    for only in ("options", "grad_sumsq", "train_step"):
        arguments = ["--minutes", "5", "--largest", "4096", "--only", only, "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        assert bench.main() == 0
    name = record.device_name()
    rows = record.load(tmp_path / f"{name}.csv")
    assert {r["bench"] for r in rows} == {"lomo_update", "grad_sumsq", "train_step"}
    steps = {(r["what"], r["options"]): r for r in rows if r["bench"] == "train_step"}
    assert set(steps) == set(bench_train_step.STEPS)
    for key in (("Lomo", "auto"), ("AdamW", ""), ("floor", "")):
        assert float(steps[key]["tokens_per_s"]) > 0
        assert int(steps[key]["peak_bytes"]) > int(steps[key]["parameters_bytes"]) > 0
    assert int(steps["Lomo", "unclipped"]["states_bytes"]) == 0
    assert int(steps["AdamW", ""]["states_bytes"]) > 0
    files = sorted(p.name for p in (tmp_path / name).iterdir())
    assert files == ["features.png", "memory.png", "step_time.png"]
    assert "fastest other" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench", "--check", "--out", str(tmp_path)])
    assert bench.main() == 0
    assert "not measured" in capsys.readouterr().out


@pytest.mark.slow
def test_a_bench_alone_prints_every_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "ROUNDS", 3)
    arguments = ["--minutes", "5", "--largest", "4096", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench_grad_sumsq", *arguments])
    suite.main([bench_grad_sumsq.jobs], bench_grad_sumsq.__doc__)
    rows = record.load(tmp_path / f"{record.device_name()}.csv")
    printed = capsys.readouterr().out
    assert printed.count(" of copy") == len(rows) > 20


def test_no_rows_no_plots(tmp_path):
    assert list(plots.draw([], tmp_path)) in ([], ["no plots: matplotlib is not installed"])


def test_rows_of_another_folder_are_taken(tmp_path, monkeypatch, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    ours = row("grad_sumsq", "large", "native", "plain", 40, commit="abc", device="d")
    for folder, rows in ((here, [ours]), (there, [{**ours, "p50_us": "39"}])):
        record.merge(folder / "cpu.csv", rows, suite.KEY, suite.FIELDS)
    files = ["--take", str(there / "cpu.csv"), "--out", str(here)]
    monkeypatch.setattr(sys, "argv", ["bench", *files])
    assert bench.main() == 0
    (found,) = record.load(here / "cpu.csv")
    assert (found["p50_us"], found["commit"]) == ("39", "abc")


def test_published_figures_stand_beside_measured_ones_and_not_among_them(tmp_path):
    """On a GPU most steps have no categories of memory."""
    measured = row("train_step", peers.FORGE_CASE, "Lomo", "auto", 9e4, peak_bytes=str(2**34))
    whole = {f"{name}_bytes": "1" for name in plots.CATEGORIES}
    rows = [measured, {**measured, **whole, "what": "AdamW"}]
    ((_, head, body),) = performance.train(rows)
    assert {len(line) for line in body} == {len(head)}
    assert body[0][3:] == ["0.090", "", "16.000", "", "", ""]
    theirs = {tuple(line[1:4]): line[5] for line in body[2:]}
    assert theirs["FORGE", "AdamW, as published, one H200", "0.110"] == "48.36 GB"
    assert len(theirs) == len(peers.FORGE)
    assert list(performance.train([])) == []
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    drawn = [path.name for path in plots.draw(rows, tmp_path)]
    assert drawn == ["step_time.png", "memory.png"]
