import os

import pytest

# Tensors of tests are small, and threads on the same cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded

import torch
from poison import poison

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
    poison(monkeypatch)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a model that trains in a second; its tests ask for transformers themselves."""
    from finetuning import make_tiny

    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def questions(tmp_path_factory):
    """A file of questions that this model can learn."""
    from finetuning import make_questions

    return make_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl")
