"""Builds `lomo_kernels._C` with cmake into this tree, for this Python, where pip cannot write.

    python -m bench.build

LOMO_CUDA and LOMO_CUDA_ARCHS are read as pip's build reads them.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).parent.parent


def commands(cmake, folder):
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    yield [
        cmake, "-S", ROOT, "-B", folder, *generator, "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    yield [cmake, "--build", folder, "--parallel"]
    yield [cmake, "--install", folder, "--prefix", ROOT]


def main():
    beside = Path(sys.executable).parent
    cmake = shutil.which("cmake") or shutil.which("cmake", path=beside)
    if cmake is None:
        return f"cmake is neither on PATH nor in {beside}"
    for command in commands(cmake, ROOT / "build" / sys.implementation.cache_tag):
        subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
