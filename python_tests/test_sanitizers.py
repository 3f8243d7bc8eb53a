"""The C++ loops and the CUDA kernel bodies under AddressSanitizer and UBSan."""

import os
import re
import subprocess
import sys

import cuda_on_cpu
import pytest

from lomo_kernels import _C

pytestmark = pytest.mark.slow


def run(*arguments):
    library = cuda_on_cpu.build(*cuda_on_cpu.SANITIZE)
    runtimes = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in runtimes):
        pytest.skip(f"g++ has no sanitizer runtime installed: {runtimes}")
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        # Fibers share no stack with the thread: what ASan would say about returning is wrong there.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return subprocess.run(
        [sys.executable, cuda_on_cpu.HERE / "sanitized.py", library, *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def test_every_entry_point_is_run():
    text = (cuda_on_cpu.HERE / "sanitized.py").read_text()
    names = [f"{place}_{name}" for name in _C.arguments for place in ("cpu", "cuda")]
    assert "cuda_lomo_update" in names
    assert [name for name in names if not re.search(rf"\bC\.{name}\b", text)] == []


def test_no_bad_access_and_no_undefined_behaviour():
    result = run()
    assert result.returncode == 0, result.stderr
    assert "no error" in result.stdout
    assert "ERROR" not in result.stderr


def test_an_overrun_would_have_been_seen():
    result = run("--overrun")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr


def test_a_divergent_barrier_would_have_been_seen():
    assert cuda_on_cpu.library().test_divergent_barrier() == 1
