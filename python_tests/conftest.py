import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes on the same cores: threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import torch
from poison import poison

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the Triton kernels are defined


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)
