"""What only a GPU can show of the optimizer: no wait of the host, a captured graph, two devices."""

import copy

import models
import pytest
import torch

from lomo_kernels import Lomo, ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKENDS = pytest.mark.parametrize("backend", ["native", "triton"])


def on_gpu(dtype=torch.bfloat16):
    return models.build(dtype).cuda()


def loss_of(model, ids):
    logits = model(ids)[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@BACKENDS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_grad_norm": 0.1},
        {"clip_grad_norm": 0.1, "norm": "tensor", "loss_scale": 64.0},
        {"clip_grad_value": 0.01, "weight_decay": 0.1, "rounding": "split"},
    ],
    ids=str,
)
def test_a_step_never_makes_the_host_wait(backend, options):
    model, ids = on_gpu(), models.tokens().cuda()
    optimizer = Lomo(model, lr=0.1, backend=backend, **options)
    optimizer.backward(loss_of(model, ids))  # compiles and allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.backward(loss_of(model, ids))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not optimizer.last_step_skipped


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
def test_an_update_can_be_captured_in_a_graph(backend):
    p = torch.randn(100_000, device="cuda", dtype=torch.bfloat16)
    g = torch.randn_like(p)
    want = p.clone()
    ops.lomo_update_(p, g, lr=0.0, backend=backend)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.lomo_update_(p, g, lr=0.1, backend=backend)
    for _ in range(3):
        graph.replay()
        ops.lomo_update_(want, g, lr=0.1, backend="reference")
    assert torch.equal(p, want)


@BACKENDS
def test_the_device_of_the_tensor_not_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p, g = torch.ones(1000, device="cuda:1"), torch.ones(1000, device="cuda:1")
    with torch.cuda.device(0):
        ops.lomo_update_(p, g, lr=1.0, backend=backend)
        assert torch.cuda.current_device() == 0
    assert p.count_nonzero() == 0
