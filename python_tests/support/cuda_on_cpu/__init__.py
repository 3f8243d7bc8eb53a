"""Builds the extension module whose CUDA kernels run on the CPU (module.cpp in this folder)."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


def build(*flags):
    """Compiles module.cpp with extra flags, unless the same sources were compiled before."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the CUDA kernels cannot be compiled for the CPU")
    import pybind11

    command = [
        "g++", "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-shared", "-fPIC",
        "-fvisibility=default", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags,
        f"-I{HERE}", f"-I{pybind11.get_include()}", f"-I{_python_include()}",
        "-DLOMO_WITH_CUDA", "-DLOMO_LOOPS=loops_baseline", '-DLOMO_COMPILER="g++"',
        '-DLOMO_CUDA_COMPILER="g++"', '-DLOMO_CUDA_ARCHITECTURES="none: runs on the CPU"',
    ]  # fmt: skip
    digest = hashlib.sha256(" ".join(command).encode())
    for source in sorted([*CSRC.iterdir(), *HERE.glob("*.[ch]*")]):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"lomo_kernels_{os.getuid()}" / digest.hexdigest()[:16]
    target = folder / "_C.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{os.getpid()}.so"
        subprocess.run([*command, str(HERE / "module.cpp"), "-o", str(unfinished)], check=True)
        unfinished.rename(target)
    return target


def _python_include():
    import sysconfig

    return sysconfig.get_paths()["include"]


def load(path):
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def module():
    """The Python module, whose functions cuda_* work on CPU memory."""
    return load(build())


@functools.cache
def library():
    """The same file through ctypes, for the test_* functions."""
    return ctypes.CDLL(str(build()))
