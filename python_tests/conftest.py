import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes on the same cores: threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import torch

from bench.device import on_waits

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernels are defined


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def sound_gpu():
    """A test that fails leaves the next ones a GPU without torch's check for synchronizations.

    An error inside a kernel stays with its process, where every later test would fail of it: this
    one ends, and with pytest-xdist a new one takes over.
    """
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        on_waits("default")
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"the GPU is lost to this process: {error}", returncode=1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that nobody wrote reads as NaN, so that a missing write cannot pass by luck."""

    def poisoned(tensor):
        if tensor.dtype.is_floating_point:
            tensor.detach().fill_(float("nan"))  # checkpointing of torch 2.11 makes a leaf
        return tensor

    def poison(name):
        real = getattr(torch, name)

        def empty(*args, **kwargs):
            return poisoned(real(*args, **kwargs))

        monkeypatch.setattr(torch, name, empty)

    poison("empty")
    poison("empty_like")
    real_new_empty = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        return poisoned(real_new_empty(self, *args, **kwargs))

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
