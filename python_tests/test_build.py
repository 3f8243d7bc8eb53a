"""The build as a user meets it: sdist, wheel, with and without nvcc, and what it says."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lomo_kernels

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what git has or would take, without anything that a build left behind."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: its clean files cannot be told from built ones")
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    target = tmp_path_factory.mktemp("source")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def environment(**changes):
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("LOMO_", "CUDA", "PYTHONPATH"))
    }
    return {**kept, **changes}


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """An sdist, and a wheel that was built from it in an isolated environment without torch."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--quiet", "--outdir", folder, source],
        check=True, env=environment(LOMO_CUDA="OFF"), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def files(folder, *rooms):
    """Names of the files in these rooms of a folder."""
    return {
        str(path.relative_to(folder))
        for room in rooms
        for path in ((folder / room).rglob("*") if (folder / room).is_dir() else [folder / room])
        if path.is_file()
    }


def test_sdist_holds_what_the_build_needs_and_no_tests(built, source):
    with tarfile.open(built[0]) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    made = {
        name for name in names if re.match(r"PKG-INFO$|setup\.cfg$|lomo_kernels\.egg-info/", name)
    }
    assert names - made == files(
        source, "lomo_kernels", "csrc", "docs", "examples", "CHANGELOG.md", "CMakeLists.txt",
        "LICENSE",
        "MANIFEST.in", "README.md", "pyproject.toml", "setup.py",
    )  # fmt: skip


def test_the_version_is_the_one_that_the_changelog_begins_with(built):
    version = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert lomo_kernels.__version__ == version
    assert [path.name.split("-")[1].removesuffix(".tar.gz") for path in built] == [version] * 2


def test_wheels_are_for_the_pythons_that_are_named_and_are_tried_alike():
    project = (ROOT / "pyproject.toml").read_text()
    build = re.search('^build = "(.*)"', project, re.MULTILINE)[1]
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert build.split() == [f"cp{version.replace('.', '')}-*" for version in named]
    assert f'requires-python = ">={named[0]}"' in project
    script = (ROOT / ".ci" / "wheels").read_text()
    tests, ours = (
        re.findall(r"pytest (python_tests/[^\n\"]*)", text) for text in (project, script)
    )
    assert len(tests) == 1
    assert tests == ours
    assert all((ROOT / name).is_file() for name in tests[0].split())


def test_wheel_holds_the_package_alone(built, source):
    """It was built from the sdist: nothing of the package is lost on the way."""
    with zipfile.ZipFile(built[1]) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    (module,) = (name for name in names if re.match(r"lomo_kernels/_C\..*so$", name))
    (about,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    package = {name for name in names if not name.startswith(f"{about}/")}
    assert package == files(source, "lomo_kernels") | {module}


def test_wheel_installs_and_its_doctor_is_content(built, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
         "--target", tmp_path, built[1]],
        check=True, env=environment(),
    )  # fmt: skip
    printed = doctor(tmp_path)
    assert "native on cpu           runs" in printed
    assert "cuda compiler           none: built without CUDA" in printed
    tag = built[1].stem.split("-", 2)[2]
    assert f"installed as            built from source, {tag}\n" in printed
    (wheel,) = tmp_path.glob("*.dist-info/WHEEL")  # auditwheel writes there what a wheel runs on
    wheel.write_text(wheel.read_text().replace("-linux_", "-manylinux_2_28_"))
    tag = tag.replace("-linux_", "-manylinux_2_28_")
    assert f"installed as            wheel {tag}\n" in doctor(tmp_path)


def doctor(folder):
    """What it says of the package in a folder."""
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from lomo_kernels.cli import main; sys.exit(main())",
         "doctor"],
        cwd=folder, capture_output=True, text=True, env=environment(PYTHONPATH=str(folder)),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def configure(folder, *options, **variables):
    """CMake's configure step alone: (exit code, output)."""
    import pybind11

    if (cmake := shutil.which("cmake")) is None:
        pytest.skip("cmake is not on PATH")
    result = subprocess.run(
        [cmake, "-S", ROOT, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options],
        capture_output=True, text=True, env=environment(**variables),
    )  # fmt: skip
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def path_without_nvcc(folder):
    """A PATH on which everything but nvcc is found."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("cmake", "c++", "g++", "gcc", "cc", "make", "ninja", "ld", "as", "ar", "ranlib"):
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    return str(tools)


def test_without_nvcc(tmp_path):
    path = path_without_nvcc(tmp_path)
    code, printed = configure(tmp_path / "auto", PATH=path)
    assert code == 0, printed
    assert "no nvcc on PATH or through CUDA_HOME, building for the CPU only" in printed
    code, printed = configure(tmp_path / "on", PATH=path, LOMO_CUDA="ON")
    assert code != 0
    assert "LOMO_CUDA=ON, but no nvcc was found on PATH or through CUDA_HOME" in printed


def test_nvcc_through_cuda_home(tmp_path):
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if nvcc is None or not (Path(home) / "bin" / "nvcc").exists():
        pytest.skip("no CUDA toolkit with a bin/nvcc is installed")
    code, printed = configure(
        tmp_path / "home", PATH=path_without_nvcc(tmp_path), CUDA_HOME=home, LOMO_CUDA="ON",
        LOMO_CUDA_ARCHS="90",
    )  # fmt: skip
    assert code == 0, printed
    assert f"lomo_kernels: {home}/bin/nvcc for 90" in printed


def test_a_wrong_choice_is_refused(tmp_path):
    code, printed = configure(tmp_path, LOMO_CUDA="MAYBE")
    assert code != 0
    assert "LOMO_CUDA must be AUTO, ON or OFF, got 'MAYBE'" in printed


def test_the_module_needs_no_driver_and_no_cuda_library():
    """cudart is static: what is not linked cannot be missing on a machine without a driver."""
    from lomo_kernels import _C

    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in linked
    assert "torch" not in linked
