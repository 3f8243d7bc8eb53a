"""The squared norm: declared order of additions, the same bits everywhere, right to rounding."""

import math

import cuda_on_cpu
import pytest
import torch
from backends import BF16, COUNTERS, F16, F32, SIZES, backends, random_bits, random_values, shifted

from lomo_kernels import ops

pytestmark = pytest.mark.filterwarnings(  # numpy, under Triton's interpreter
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)
ALL_BACKENDS = pytest.mark.parametrize("backend", backends(), ids=lambda b: b.id)
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
CHUNK, LANES = 16384, 2048


def run(backend, grads, inv_scale=None):
    device = backend.device if backend else "cpu"
    grads = [g.to(device) for g in grads]
    sumsq, found = torch.full((len(grads),), math.nan, device=device), torch.zeros(1, device=device)
    inv_scale = None if inv_scale is None else torch.tensor([inv_scale], device=device)
    name = backend.name if backend else "reference"
    ops.grad_sumsq_(sumsq, grads, inv_scale=inv_scale, found_inf=found, backend=name)
    return sumsq.cpu(), found.item()


def check(backend, grads, inv_scale=None):
    want, want_found = run(None, grads, inv_scale)
    with backend.active():
        got, found = run(backend, grads, inv_scale)
    assert torch.equal(got.view(torch.int32)[~want.isnan()], want.view(torch.int32)[~want.isnan()])
    assert torch.equal(got.isnan(), want.isnan())
    assert found == want_found
    return want, found


@ALL_BACKENDS
@DTYPES
@pytest.mark.parametrize("n", [*SIZES, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK + 321])
def test_equal_to_the_reference_in_every_bit(backend, dtype, n):
    check(backend, [random_values(n, dtype)])
    check(backend, [random_values(n, dtype) * 100], inv_scale=1 / 1024)
    check(backend, [random_bits(n, dtype)])


@ALL_BACKENDS
def test_more_chunks_than_lanes(backend):
    """The sum over chunks has more than one row too."""
    if backend.id == "triton-interpreter":  # 2,000 chunks would take it half a minute
        from lomo_kernels.ops import reference
        from lomo_kernels.ops.triton import grad_sumsq as kernels

        partials, total = torch.rand(2 * LANES + 5), torch.zeros(1)
        kernels.sum_partials_kernel[(1,)](partials, partials.numel(), total, LEVELS=11)
        padded = torch.nn.functional.pad(partials, (0, LANES - 5))
        assert total.item() == reference._add_in_order(padded.view(-1, LANES)).item()
    else:
        check(backend, [random_values(2 * CHUNK, BF16).repeat(LANES // 2 + 3)])


@ALL_BACKENDS
@DTYPES
@pytest.mark.parametrize("shift", [1, 4, 7])
def test_views_that_start_anywhere(backend, dtype, shift):
    grad = random_values(CHUNK + 5000, dtype)
    want, _ = run(None, [grad])
    with backend.active():
        got, _ = run(backend, [shifted(grad, shift, backend.device)])
    assert torch.equal(got, want)


@ALL_BACKENDS
def test_lists_of_every_size_and_dtype(backend):
    grads = [random_values(n % 50, BF16) for n in range(600 if "cuda" in backend.id else 60)]
    grads += [random_values(3 * CHUNK + 1, BF16), random_values(40, F32), random_values(9, F16)]
    one_by_one = torch.cat([run(None, [g])[0] for g in grads])
    want, _ = check(backend, grads)
    assert torch.equal(want, one_by_one)


def test_one_launch_and_counters_that_are_as_before():
    """Of a list with large and small gradients; what it leaves serves the next launch."""
    (backend,) = (b for b in backends() if b.id == "cuda_on_cpu")
    grads = [random_values(n, BF16) for n in (5 * CHUNK + 1, 40, 2 * CHUNK)]
    for _ in range(2):
        before = cuda_on_cpu.library().test_launches()
        check(backend, grads)
        assert cuda_on_cpu.library().test_launches() == before + 1
        assert not COUNTERS.any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_captured_and_on_two_streams():
    """Each stream and each graph has counters of its own."""
    grads = [random_values(n, BF16).cuda() for n in (500 * CHUNK + 1, 40, 200 * CHUNK)]
    want = torch.zeros(len(grads), device="cuda")
    ops.grad_sumsq_(want, grads, backend="native")
    found = [torch.zeros_like(want) for _ in range(4)]
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph, out in zip(graphs, found):
        with torch.cuda.graph(graph):
            ops.grad_sumsq_(out, grads, backend="native")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(5):
        for out in found:
            out.zero_()
        torch.cuda.synchronize()
        for stream, graph, out in zip(streams, [*graphs, None, None], found):
            with torch.cuda.stream(stream):
                if graph is None:
                    ops.grad_sumsq_(out, grads, backend="native")
                else:
                    graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, want) for out in found)


@DTYPES
def test_right_to_rounding(dtype):
    grad = random_values(300_000, dtype)
    want = (grad.double() ** 2).sum()
    # 8 + 11 additions in a chunk, then a tree of the chunks: each rounds by at most 2^-24
    assert abs(run(None, [grad])[0].double() - want) <= 40 * 2.0**-24 * want


def test_right_where_torch_s_norm_is():
    grad = torch.randn(100_000)
    assert run(None, [grad])[0].sqrt().item() == pytest.approx(grad.norm().item(), rel=1e-6)


@ALL_BACKENDS
@DTYPES
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("at", [0, 2047, CHUNK, CHUNK + 999])
def test_overflow_is_found_wherever_it_is(backend, dtype, bad, at):
    grad = random_values(CHUNK + 1000, dtype)
    assert check(backend, [grad])[1] == 0.0
    grad[at] = bad
    assert check(backend, [grad])[1] == 1.0


@ALL_BACKENDS
def test_overflow_of_the_sum_is_not_overflow_of_the_gradient(backend):
    total, found = check(backend, [torch.full((100,), 1e30, dtype=BF16)])
    assert total.isinf()
    assert found == 0.0


@ALL_BACKENDS
def test_any_layout(backend):
    """Dense layouts are read in memory order, others are copied first."""
    grad = torch.randn(8, 6, 5, 4)
    for layout in (grad.permute(2, 0, 3, 1), grad[:, ::2], torch.ones(()).expand(7, 9)):
        with backend.active():
            got, _ = run(backend, [layout])
        assert got.item() == pytest.approx((layout.double() ** 2).sum().item(), rel=1e-6)
