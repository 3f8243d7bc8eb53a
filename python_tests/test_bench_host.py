"""What a step asks of the host for many tensors, counted: launches, reads, watched operations."""

import functools

import pytest
import torch

from bench import bench_host, timing
from lomo_kernels import AdaLomo, Lomo, ops
from lomo_kernels.optim import watching

CPU = timing.Where(torch.device("cpu"), 2**20, None, 4096)
CLIPPED = bench_host.CLIPPED


@pytest.fixture(autouse=True)
def unpoisoned_memory(poisoned_memory, monkeypatch):
    """Poisoning is an operator too."""
    monkeypatch.undo()


def counts(count, kind=Lomo, **options):
    """-> (launches beyond backward's, reads)"""
    found = []
    for make in (
        bench_host.backward_alone, functools.partial(bench_host.ours, kind=kind, **options)
    ):  # fmt: skip
        step = make(bench_host.Model(count, torch.device("cpu")))
        step()
        found.append(bench_host.counts(CPU, step))
    return found[1][0] - found[0][0], found[1][1]


def test_launches_of_many_held_gradients_do_not_grow_with_their_number():
    few, many = counts(10, **CLIPPED), counts(90, **CLIPPED)
    assert few == many
    assert few[0] < 10


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
def test_one_launch_for_each_gradient_that_does_not_wait(kind):
    few, many = counts(10, kind), counts(90, kind)
    assert many[0] - few[0] == 80


@pytest.mark.parametrize("options", [{}, CLIPPED, {**CLIPPED, "strategy": "two_backward"}], ids=str)
def test_nothing_is_read(options):
    assert counts(10, **options)[1] == 0


def test_our_own_work_is_not_watched(monkeypatch):
    """Watching costs microseconds for each of many small operations."""
    seen = []
    real = watching._Watched.__torch_function__.__func__

    def count(cls, func, types, args=(), kwargs=None):
        seen.append(func)
        return real(cls, func, types, args, kwargs)

    model = bench_host.Model(10, torch.device("cpu"))
    step = bench_host.ours(model, **CLIPPED)
    step()
    monkeypatch.setattr(watching._Watched, "__torch_function__", classmethod(count))
    model.loss()
    in_forward, seen[:] = len(seen), []
    step()
    assert len(seen) == in_forward


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_norms_of_several_dtypes_stay_in_their_places(backend):
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.float16]
    grads = [torch.randn(7 + k, generator=generator).to(d) for k, d in enumerate(dtypes)]
    sumsq = torch.empty(len(grads))
    ops.grad_sumsq_(sumsq, grads, backend=backend)
    expected = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(sumsq.double(), expected, rtol=1e-6, atol=0)


def test_counting_sees_reads_and_calls_of_our_kernels():
    grad = torch.ones(3)

    def step():
        ops.grad_sumsq_(torch.zeros(1), grad)
        (grad * 2).sum().item()

    assert bench_host.counts(CPU, step) == (4, 1)  # zeros, the kernel, a product, a sum


@pytest.mark.parametrize(
    "key", [key for key in bench_host.RIVALS if key[0] in ("Lomo", "torch SGD")]
)
def test_every_rival_makes_the_step(key):
    model = bench_host.Model(5, torch.device("cpu"))
    before = [p.detach().clone() for p in model.params]
    for grad in model.grads:
        grad.mul_(1000)  # above the norm to which it is clipped
    bench_host.RIVALS[key](model)()
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in model.grads]))
    scale = min(1.0, 1.0 / norm.item()) if "clip" in key[1] else 1.0
    for p, old, grad in zip(model.params, before, model.grads):
        torch.testing.assert_close(p.detach(), old - 1e-3 * scale * grad, rtol=0, atol=1e-8)
        assert not torch.equal(p, old)


def test_the_time_of_backward_alone_is_taken_off(monkeypatch):
    clock = [0.0]

    def lasting(seconds):
        def step():
            clock[0] += seconds

        return lambda model: step

    rivals = {("backward alone", ""): lasting(1e-5), ("Lomo", ""): lasting(7e-5)}
    monkeypatch.setattr(bench_host, "RIVALS", rivals)
    monkeypatch.setattr(bench_host.time, "perf_counter", lambda: clock[0])
    alone, ours = bench_host.rows(CPU, 6, seconds=0.0)
    assert (alone["p50_us"], ours["p50_us"]) == ("10.00", "70.00")
    assert (alone["per_tensor_us"], ours["per_tensor_us"]) == ("0.000", "10.000")


def test_rows(monkeypatch):
    """Every rival has a row; lomo-optim is not asked for what would take minutes."""
    monkeypatch.setattr(bench_host, "SQUARED", 5)
    rows = list(bench_host.rows(CPU, 6, seconds=0.0))
    assert [(r["what"], r["options"]) for r in rows] == list(bench_host.RIVALS)
    named = {(r["what"], r["options"]): r for r in rows}
    assert (
        "looks at all of them" in named["lomo-optim", ""]["note"]
        or "No module" in (named["lomo-optim", ""]["note"])
    )
    ours = named["Lomo", "clip_grad_norm"]
    assert float(ours["p50_us"]) > 0
    assert ours["host_reads"] == 0
    assert named["torch SGD", "foreach"]["launches"] > 0
