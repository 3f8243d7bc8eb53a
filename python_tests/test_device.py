"""Checks and captures on a GPU end well when they fail: torch.cuda's functions are replaced."""

import contextlib
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from bench import device

HERE = Path(__file__).parent


@pytest.fixture
def modes(monkeypatch):
    """What the mode was set to, by a function that warns as torch's does, before it sets."""
    seen = []

    def set_mode(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)
        seen.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return seen


def test_the_check_for_waits_ends_whatever_happens(modes):
    """Warnings are errors here: torch's own must not leave the check on."""

    def waits():
        assert modes == ["error"]
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"), device.no_waits():
        waits()
    assert modes == ["error", "default"]


def test_the_check_for_waits_ends_where_it_cannot_begin(monkeypatch):
    seen = []

    def set_mode(mode):
        seen.append(mode)
        if mode == "error":
            raise RuntimeError("no GPU")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(RuntimeError, match="no GPU"), device.no_waits():
        raise AssertionError("never here")
    assert seen == ["error", "default"]


@pytest.mark.parametrize("ended", [False, True])
def test_a_capture_that_fails_is_taken_back(monkeypatch, ended):
    """ended: torch ends the pool itself before it fails, and a second time is an error."""
    done = []

    @contextlib.contextmanager
    def graph(of, pool):
        yield
        raise RuntimeError("the capture was invalidated")

    def end(place, pool):
        done.append((place, pool))
        if ended:
            raise RuntimeError("not currently recording to this pool")

    generator = types.SimpleNamespace(
        clone_state=lambda: "copy", graphsafe_set_state=lambda state: done.append(state)
    )
    for name, fake in {
        "current_stream": lambda: "stream", "current_device": lambda: 3, "graph": graph,
        "graph_pool_handle": lambda: "pool", "set_stream": done.append,
        "default_generators": {3: generator},
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", end, raising=False)
    with pytest.raises(RuntimeError, match="invalidated"), device.capture("graph"):
        pass
    assert done == ["stream", (3, "pool"), (3, "pool"), "copy"]


LOST = """
import pytest, torch

def test_breaks_the_gpu(monkeypatch):
    def lost(*_):
        raise RuntimeError("an illegal memory access was encountered")

    torch.cuda.is_initialized = lambda: True
    torch.cuda.set_sync_debug_mode = lost

def test_after_it():
    torch.cuda.is_initialized = lambda: False
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_gpu_ends_its_process_alone(tmp_path, workers):
    (tmp_path / "conftest.py").write_text((HERE / "conftest.py").read_text())
    (tmp_path / "test_lost.py").write_text(LOST)
    arguments = ["-q", "-p", "no:cacheprovider", tmp_path]
    if workers:
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
        arguments += ["-n", "1"]
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, text=True,
        env={**ours, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE / 'support'}"},
    )  # fmt: skip
    assert result.returncode != 0
    if workers:
        assert "crashed while running" in result.stdout
        assert "1 failed, 2 passed" in result.stdout.splitlines()[-1]  # it passed, then was lost
    else:
        assert "the GPU is lost to this process: an illegal memory access" in result.stdout
