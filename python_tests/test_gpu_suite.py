"""The suite of a machine with a GPU: its steps, what it brings back, its course on a fake one."""

import functools
import itertools
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from bench import (
    __main__ as bench,
)
from bench import (
    bench_product_sumsq,
    fake_gpu,
    gpu_suite,
    record,
    suite,
    timing,
    touch,
)
from bench import (
    build as bench_build,
)
from lomo_kernels import ops

ROOT = Path(__file__).parent.parent
CPU = timing.Where(torch.device("cpu"), 2**12, None, 2**26)


def python(code):
    return f"python -c {shlex.quote(code)}"


def test_the_suite_goes_on_after_a_failure_and_kills_what_hangs(tmp_path, capsys):
    listed = [
        gpu_suite.Step("good", python("print(1)"), 60),
        gpu_suite.Step(
            "bad", python("for i in range(99): print('line', i)\nraise SystemExit(3)"), 60
        ),
        gpu_suite.Step("hangs", python("import time; time.sleep(600)"), 1),
        gpu_suite.Step("sees", python("import os; print(os.environ['X'])"), 60, {"X": "seen"}),
    ]
    report = gpu_suite.Report(tmp_path)
    gpu_suite.run_part("tests", listed, report, 5, {})
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line[20:32].strip() for line in lines[:-1]] == ["well", "exit 3", "out of time", "well"]
    assert lines[-1] == "verdict: not all went well: tests bad, tests hangs"
    printed = capsys.readouterr().out
    assert "line 59\n  | line 60" in printed  # the last forty
    assert "line 58\n" not in printed
    assert "  | 1\n" not in printed  # what went well is one line
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert archive.extractfile("logs/tests_sees.log").read() == b"seen\n"


def test_a_step_without_time_is_not_begun(tmp_path):
    report = gpu_suite.Report(tmp_path)
    gpu_suite.run_part("tests", [gpu_suite.Step("late", python("1"), 60)], report, 0.1, {})
    assert "no time" in report.lines[0]
    assert report.failed == ["tests late"]


def test_results_are_few_files(tmp_path):
    report = gpu_suite.Report(tmp_path)
    (tmp_path / "nvidia_h100.csv").write_text("")
    (tmp_path / "nvidia_h100").mkdir()
    (tmp_path / "nvidia_h100" / "speed.png").write_text("")
    report.take_plots()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "logs.tar.gz", "nvidia_h100.csv", "summary.txt"
    ]  # fmt: skip
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert "logs/nvidia_h100/speed.png" in archive.getnames()


def test_what_the_suite_would_do_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: name)
    found = gpu_suite.steps(gpu_suite.PARTS, "90", tmp_path)
    names = {part: [step.name for step in listed] for part, listed in found.items()}
    assert names == {
        "tests": [
            "build",
            "native",
            "triton",
            "gpu",
            "compile",
            "touch",
            "memcheck",
            "racecheck",
            "initcheck",
        ],
        "kernels": ["build", "kernels"],
        "training": ["build", "training"],
    }
    build, *_, initcheck = found["tests"]
    assert build.variables == {"LOMO_CUDA": "ON", "LOMO_CUDA_ARCHS": "90-real"}
    assert "LOMO_CUDA=ON" in str(build)
    assert initcheck.variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert "--report-api-errors no" in initcheck.command
    assert "--kernel-name kns=lomo,kns=ada_" in initcheck.command
    for step in itertools.chain(*found.values()):
        assert "fake" not in step.command


def test_the_sanitizers_look_at_every_kernel_of_ours():
    sources = [*(ROOT / "csrc").glob("*.cuh"), *(ROOT / "lomo_kernels/ops/triton").glob("*.py")]
    pattern = r"__global__.*?(\w+_kernel)\(|def (\w+_kernel)\("
    names = {
        a or b for path in sources for a, b in re.findall(pattern, path.read_text(), re.DOTALL)
    }
    assert {"lomo_update_kernel", "decide_kernel", "product_tiles_kernel"} <= names
    for name in names:
        assert any(part in name for part in gpu_suite.KERNELS), name


def test_the_jobs_of_the_parts_are_all_jobs():
    jobs = suite.chosen(bench.JOBS, CPU)
    told = suite.chosen(bench.JOBS, CPU, (*gpu_suite.KERNEL_JOBS, *gpu_suite.TRAINING))
    assert [job.name for job in jobs] == [job.name for job in told]
    names = [job.name for job in bench_product_sumsq.jobs(CPU._replace(gpu=True))]
    assert any(gpu_suite.TRAINING[1] in name for name in names)


def collected(paths, cases):
    """The cases that would run on a GPU."""
    _, *command = shlex.split(gpu_suite.pytest(paths, cases, real=False))
    command = [sys.executable, *command]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return {line for line in result.stdout.splitlines() if "::" in line}


@pytest.mark.slow
def test_the_suite_runs_every_case_of_the_gpu_once():
    """Whole files beside what the steps choose from them."""
    table = gpu_suite.files(*gpu_suite.TABLE)
    mixed = [*gpu_suite.files(*gpu_suite.PRODUCTS), "test_formats.py"]
    native = collected(table + mixed[:-1], gpu_suite.NATIVE)
    triton = collected(table + mixed, gpu_suite.TRITON)
    assert not native & triton
    every = collected(table + mixed, None)
    of_cpu = re.compile(rf"/({'|'.join(table)})::(?!.*cuda-)")
    assert native | triton == {case for case in every if not of_cpu.search(case)}
    assert 2000 < len(native | triton) < 5000


def test_wheels_are_packages_on_the_path(tmp_path):
    with zipfile.ZipFile(tmp_path / "some-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some/__init__.py", "x = 1")
        wheel.writestr("some-1.0.dist-info/METADATA", "Name: some")
    folder = Path(gpu_suite.unpacked(tmp_path))
    assert (folder / "some" / "__init__.py").read_text() == "x = 1"
    assert (folder / "some-1.0.dist-info").is_dir()


def test_results_go_to_the_folder_of_the_environment(monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere")
    assert gpu_suite.parser().parse_args([]).out == Path("/somewhere")
    monkeypatch.delenv("OUT")
    assert gpu_suite.parser().parse_args([]).out == Path("suite")
    assert gpu_suite.parser().parse_args(["--out", "here"]).out == Path("here")


@pytest.mark.slow
def test_a_dry_run_of_the_suite_walks_the_course_on_a_fake_gpu(tmp_path, monkeypatch, capsys):
    """Its bench, by two jobs; the rest of the part is left out."""
    monkeypatch.setattr(
        gpu_suite,
        "KERNEL_JOBS",
        (
            "grad_sumsq: LLaMA-65B norm 8192, bfloat16",
            "product_update",
        ),
    )
    real = gpu_suite.steps
    monkeypatch.setattr(
        gpu_suite, "steps", lambda *args: {part: each[1:] for part, each in real(*args).items()}
    )
    arguments = ["kernels", "--dry-run", "--minutes", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_suite", *arguments])
    assert gpu_suite.main() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fake_gpu.csv", "logs.tar.gz", "summary.txt"
    ]  # fmt: skip
    rows = record.load(tmp_path / "fake_gpu.csv")
    assert {r["timed"] for r in rows} == {"graph", "events"}
    assert {r["device"] for r in rows} == {fake_gpu.NAME}
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "verdict: all went well on a fake GPU"
    assert "norm's pass over 180 M elements and more, of the copy rate" in printed


def test_a_part_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "everything"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert (
        "unknown part everything: choose from tests, kernels, training" in capsys.readouterr().err
    )


def test_the_build_by_cmake():
    configure, build, install = bench_build.commands("cmake", Path("folder"))
    assert f"-DPython_EXECUTABLE={sys.executable}" in configure
    assert build[:3] == ["cmake", "--build", Path("folder")]
    assert install[-2:] == ["--prefix", ROOT]


def test_touch_runs_every_native_kernel(monkeypatch, capsys):
    """Triton's are run by the table of backends; its interpreter takes minutes for these sizes, but
    for those of products."""
    monkeypatch.setattr(touch, "backends", lambda device: ["native"])
    touch.main()
    printed = capsys.readouterr().out
    for name in ("updates", "norms", "decisions", "adalomo"):
        assert f"{name} of native on" in printed
    assert "product" not in printed


def test_touch_has_every_operation():
    assert touch.RUNS.keys() == ops.OPERATIONS.keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
def test_touch_runs_triton_s_kernels_of_products():
    if torch.cuda.is_available():
        pytest.skip("a step of the suite, on a GPU")
    check = functools.partial(touch.check, torch.device("cpu"), "triton")
    for run in touch.product_updates, touch.product_norms:
        run(check, touch.FEW)
    with pytest.raises(AssertionError, match="not close"):
        touch.product_updates(lambda *a, close, **k: check(*a, close=1e-9, **k), touch.FEW[1:])


def wrong(param, grad, *, backend, lr):
    ops.lomo_update_(param, grad, lr=lr if backend == "reference" else 2 * lr)


def test_touch_sees_what_is_not_the_reference():
    values = touch.numbers(9), touch.numbers(9)
    with pytest.raises(AssertionError, match="wrong on native is not the reference"):
        touch.check(torch.device("cpu"), "native", wrong, *values, lr=0.1)


def test_touch_keeps_places_and_what_is_shared():
    """A view that is misaligned here is on the device, and an input of several weights is one."""
    odd, shared = touch.numbers(5, dtype=torch.bfloat16, shift=3), touch.numbers(2, 3)
    there = touch.moved(([odd, shared], {"again": shared}), "cpu", {})
    assert there[0][0].storage_offset() == 3
    assert torch.equal(there[0][0], odd)
    assert there[0][1] is there[1]["again"] is not shared
