"""What only a GPU can show of the optimizer: no wait of the host, a captured graph, two devices."""

import contextlib
import copy
import itertools
import warnings

import models
import pytest
import test_experts as experts
import torch

from bench.device import capture, no_waits
from lomo_kernels import Lomo, LossScale, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKENDS = pytest.mark.parametrize("backend", ["native", "triton"])


def on_gpu(dtype=torch.bfloat16, **options):
    """Wide enough for weights to keep factors at 24 tokens."""
    return models.build(dtype, **{"width": 128, **options}).cuda()


def loss_of(model, ids):
    logits = model(ids)[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@BACKENDS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_grad_norm": 0.1},
        {"clip_grad_norm": 0.1, "strategy": "two_backward"},
        {"clip_grad_norm": 0.1, "strategy": "partial", "factor_budget": 100_000},
        {"strategy": "immediate"},
        {"clip_grad_norm": 0.1, "norm": "tensor", "strategy": "immediate"},
        {"clip_grad_norm": 0.1, "norm": "tensor", "loss_scale": 64.0},
        {"loss_scale": "dynamic"},
        {"clip_grad_norm": 0.1, "loss_scale": LossScale(64.0, growth_interval=1)},
        {"clip_grad_value": 0.01, "weight_decay": 0.1, "rounding": "split"},
    ],
    ids=str,
)
def test_a_step_never_makes_the_host_wait(backend, options):
    model, ids = on_gpu(tied=True), models.tokens().cuda()
    optimizer = Lomo(model, lr=0.1, backend=backend, **options)
    optimizer.backward(loss_of(model, ids))  # compiles and allocates
    torch.cuda.synchronize()
    with no_waits():
        for _ in range(2):
            optimizer.backward(loss_of(model, ids))
    assert not optimizer.last_step_skipped


@BACKENDS
@pytest.mark.parametrize("strategy", ["one_backward", "two_backward", "immediate"])
@pytest.mark.parametrize("how", ["grouped", "loop"])
def test_experts(how, strategy, backend):
    """Against whole gradients, which are rounded to bfloat16; one expert has no tokens."""
    model, ids = experts.build(how, False, torch.bfloat16).cuda(), models.tokens().cuda()
    plain = copy.deepcopy(model)
    clip = None if strategy == "immediate" else 1e3
    optimizer = Lomo(
        model, 0.5, clip, strategy=strategy, rounding="nearest", weight_decay=0.1, backend=backend
    )
    optimizer.backward(loss_of(model, ids))
    loss_of(plain, ids).backward()
    grads = [p.grad.double() for p in plain.parameters()]
    if clip is not None:
        norm = torch.stack([grad.norm() for grad in grads]).norm().item()
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=5e-3)
    for p, q, grad in zip(model.parameters(), plain.parameters(), grads, strict=True):
        want = q.detach().double() * (1 - 0.5 * 0.1) - 0.5 * grad
        torch.testing.assert_close(p.detach().double(), want, rtol=2**-8, atol=1e-3)


@BACKENDS
def test_backends_give_the_weights_of_the_reference(backend):
    model = on_gpu()
    other = copy.deepcopy(model)
    ids = models.tokens().cuda()
    for m, name in ((model, backend), (other, "reference")):
        optimizer = Lomo(m, lr=0.1, clip_grad_norm=0.1, backend=name)
        for _ in range(3):
            optimizer.backward(loss_of(m, ids))
    assert models.same(model, models.snapshot(other))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy", ["one_backward", "two_backward", "partial"])
def test_the_norm_is_that_of_torch(backend, dtype, strategy):
    """From factors, in fp32, and from the gradients that autograd has rounded."""
    model, ids = on_gpu(dtype, tied=True), models.tokens().cuda()
    other = copy.deepcopy(model).float()
    loss_of(other, ids).backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1).item()
    optimizer = Lomo(
        model, lr=0.1, clip_grad_norm=0.1, strategy=strategy, factor_budget=100_000, loss_scale=8.0,
        backend=backend,
    )  # fmt: skip
    optimizer.backward(loss_of(model, ids))
    assert optimizer.last_grad_norm == pytest.approx(
        norm, rel=1e-5 if dtype is torch.float32 else 1e-2
    )


@BACKENDS
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_scale_falls_and_grows_on_the_device(backend, clip):
    model, ids = on_gpu(torch.float16), models.tokens().cuda()
    rule = LossScale(2.0**30, growth_interval=2)
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=clip, loss_scale=rule, backend=backend)
    scales = []
    for _ in range(40):
        scales.append(optimizer.loss_scale)
        optimizer.backward(loss_of(model, ids))
        assert optimizer.loss_scale in (scales[-1] / 2, scales[-1], scales[-1] * 2)
        assert (optimizer.loss_scale < scales[-1]) == optimizer.last_step_skipped
    assert scales[5] == 2.0**25
    assert any(b == 2 * a for a, b in itertools.pairwise(scales))


def test_the_warning_at_the_floor_does_not_wait():
    model, ids = on_gpu(), models.tokens().cuda()
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, loss_scale=LossScale(1.0))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(30):
            with no_waits() if step > 0 else contextlib.nullcontext():
                optimizer.backward(loss_of(model, ids) * float("nan"))
            torch.cuda.synchronize()
    messages = [str(w.message) for w in seen]
    assert sum("10 steps in a row were skipped" in m for m in messages) == 1


def test_the_scalars_of_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    parameters = [torch.nn.Parameter(torch.ones(100, device=f"cuda:{k}")) for k in (0, 1)]
    rule = LossScale(64.0, growth_interval=1)
    optimizer = Lomo(parameters, lr=1.0, clip_grad_norm=1.0, loss_scale=rule)
    optimizer.backward(parameters[0].sum() + parameters[1].sum().to("cuda:0"))
    assert optimizer.last_grad_norm == pytest.approx(200**0.5)
    assert torch.equal(parameters[0].cpu(), parameters[1].cpu())
    assert optimizer.loss_scale == 128.0
    optimizer.backward(parameters[0].sum() + (parameters[1] * float("inf")).sum().to("cuda:0"))
    assert optimizer.last_step_skipped
    assert optimizer.loss_scale == 64.0


@BACKENDS
def test_an_update_can_be_captured_in_a_graph(backend):
    p = torch.randn(100_000, device="cuda", dtype=torch.bfloat16)
    g = torch.randn_like(p)
    want = p.clone()
    ops.lomo_update_(p, g, lr=0.0, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        ops.lomo_update_(p, g, lr=0.1, backend=backend)
    for _ in range(3):
        graph.replay()
        ops.lomo_update_(want, g, lr=0.1, backend="reference")
    assert torch.equal(p, want)


@pytest.mark.parametrize("strategy", ["one_backward", "two_backward"])
def test_a_whole_step_can_be_captured_in_a_graph(strategy):
    """Forward, backward, norm and updates; rounding to nearest, because a replay has no number."""
    model, ids = on_gpu(), models.tokens().cuda()
    other = copy.deepcopy(model)
    options = {"lr": 0.1, "clip_grad_norm": 0.1, "rounding": "nearest", "strategy": strategy}
    optimizer, eager = Lomo(model, **options), Lomo(other, **options)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.backward(loss_of(model, ids))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        optimizer.backward(loss_of(model, ids))
    for _ in range(3):
        eager.backward(loss_of(other, ids))
    for _ in range(2):
        graph.replay()
        eager.backward(loss_of(other, ids))
    assert models.same(model, models.snapshot(other))


def test_a_capture_that_fails_leaves_torch_as_it_was():
    stream, ones = torch.cuda.current_stream(), torch.ones(1000, device="cuda")
    for _ in range(2):
        with pytest.raises(RuntimeError), capture(torch.cuda.CUDAGraph()):
            ones.sum().item()
        assert torch.cuda.current_stream() == stream
        assert torch.randn(1000, device="cuda").isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        ones.add_(1)
    graph.replay()
    assert ones.sum() == 2000


def test_what_makes_the_host_wait_is_an_error():
    ones = torch.ones(9, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        ones.sum().item()
    assert torch.cuda.get_sync_debug_mode() == 0


@BACKENDS
def test_norms_of_several_dtypes_do_not_make_the_host_wait(backend):
    grads = [torch.ones(9, device="cuda", dtype=d) for d in (torch.bfloat16, torch.float32)] * 2
    sumsq = torch.zeros(4, device="cuda")
    ops.grad_sumsq_(sumsq, grads, backend=backend)  # compiles and allocates
    with no_waits():
        ops.grad_sumsq_(sumsq, grads, backend=backend)
    assert sumsq.tolist() == [9.0] * 4


@BACKENDS
def test_the_device_of_the_tensor_not_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p, g = torch.ones(1000, device="cuda:1"), torch.ones(1000, device="cuda:1")
    with torch.cuda.device(0):
        ops.lomo_update_(p, g, lr=1.0, backend=backend)
        assert torch.cuda.current_device() == 0
    assert p.count_nonzero() == 0
