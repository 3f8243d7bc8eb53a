"""Everything that a machine with a GPU can prove, in three parts that end with a verdict each.

    python -m bench.gpu_suite [tests] [kernels] [training] [--minutes 8] [--out FOLDER] [--dry-run]

tests: every case that runs on the GPU, then the kernels under compute-sanitizer. kernels: the
benchmarks of each kernel. training: whole training steps beside the rivals. Each part first builds
with nvcc, unless that is done, and takes `--minutes` at most; without a name all three run. FOLDER
($OUT where that is set, else "suite") gets summary.txt, logs.tar.gz and the rows, which
`python -m bench --take FOLDER/<device>.csv` brings into bench/results. A step that fails or takes
too long does not keep the next from running; its last lines are printed, and the exit status tells.

Nothing is installed and nothing is downloaded: wheels of packages that are missing (lomo-optim) are
taken from the folder `wheels`. Without a GPU, or with --dry-run, a fake one is walked through: the
tests are collected, the benchmarks run on tiny tensors, the build takes nvcc where there is one.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from lomo_kernels import ops

ROOT = Path(__file__).parent.parent
PARTS = ("tests", "kernels", "training")
LEAST = 10  # seconds without which a step is not begun
SHOWN = 40  # last lines of a step that failed
# The tests whose cases are of the GPU. Those of the table of backends have them beside the CPU's.
TESTS = [function.__name__.removesuffix("_") for function in ops.OPERATIONS.values()]
PRODUCTS = [name for name in TESTS if name.startswith("product_")]
TABLE = [name for name in TESTS if name not in PRODUCTS]
OPTIMIZER = (
    "test_gpu.py",
    "test_measure.py::test_peak_is_that_of_the_cuda_allocator",
    "test_far_elements.py::test_on_the_gpu",
)
NATIVE = "cuda-native or (test_product and native)"
TRITON = "cuda-triton or cuda-reference or test_formats or (test_product and not native)"
# Parts of the names of our kernels, in C++ and in Triton: torch's are not looked at.
KERNELS = ("lomo", "ada_", "sumsq_", "sum_partials", "decide_kernel", "product_")
# initcheck does not see what kernels that it leaves out have written: touch.py has none of them.
SANITIZERS = ("memcheck", "racecheck", "initcheck")
TRAINING = ("train_step", "product_sumsq: LLaMA-7B, 32 layers, 512 tokens")
KERNEL_JOBS = (*ops.OPERATIONS, "host")


class Step(NamedTuple):
    """seconds: the most it may take. variables: added to its environment. shown: its last lines
    are printed though it went well."""

    name: str
    command: str
    seconds: int
    variables: dict = {}  # noqa: RUF012 - nobody writes it
    shown: int = 0

    def __str__(self):
        variables = "".join(f"{name}={value} " for name, value in self.variables.items())
        return f"{self.name}, up to {self.seconds} s: {variables}{self.command}"


def pytest(paths, cases, real, seconds=100):
    """A command that runs these cases, or on a fake GPU finds them. A session that takes too long
    ends by itself, so that it tells what has failed until then."""
    command = "python -m pytest -q -p no:cacheprovider "
    if real:
        command += "-rfE --tb short --maxfail 40 --durations 5 "
        if importlib.util.find_spec("pytest_timeout"):
            command += f"--timeout {seconds // 2} --session-timeout {seconds - 20} "
        if importlib.util.find_spec("xdist"):
            # Contexts and tensors past 2**31 elements share the GPU's memory.
            command += f"-n {min(12, os.cpu_count() or 1)} "
    else:
        command += "-p bench.fake_gpu --collect-only "
    if cases:
        command += f"-k {shlex.quote(cases)} "
    return command + " ".join(f"python_tests/{path}" for path in paths)


def files(*names):
    return [f"test_{name}.py" for name in names]


def tests(real):
    table, products = files(*TABLE), files(*PRODUCTS)
    for name, paths, cases, seconds in (
        ("native", table + products, NATIVE, 120),
        ("triton", [*table, *products, "test_formats.py"], TRITON, 200),
        ("gpu", OPTIMIZER, None, 100),
        ("compile", ["test_compile.py"], "cuda", 150),
    ):
        yield Step(name, pytest(paths, cases, real, seconds), seconds)
    yield Step("touch", "python -m bench.touch", 90)  # Triton compiles, which sanitizers slow down
    if real and shutil.which("compute-sanitizer"):
        names = ",".join(f"kns={part}" for part in KERNELS)
        for tool in SANITIZERS:
            command = (
                f"compute-sanitizer --tool {tool} --error-exitcode 1 --report-api-errors no "
                f"--target-processes all --kernel-name {names} python -m bench.touch"
            )
            yield Step(tool, command, 90, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def bench(name, only, out, real):
    jobs = " ".join(map(shlex.quote, only))
    command = f"python -m bench --out {shlex.quote(str(out))} --only {jobs}"
    command += "" if real else " --fake-gpu --largest 8192"
    return Step(name, command, 10_000, shown=60)


def steps(parts, architecture, out):
    """-> {part: its steps}. architecture: the GPU's as nvcc has it, such as "90"; None: none."""
    real = architecture is not None
    variables = {
        "LOMO_CUDA": "ON" if real else "AUTO", "LOMO_CUDA_ARCHS": f"{architecture or 90}-real"
    }  # fmt: skip
    found = {}
    for part in parts:
        if part == "tests":
            mine = list(tests(real))
        elif part == "kernels":
            mine = [bench(part, KERNEL_JOBS, out, real)]
        else:
            mine = [bench(part, TRAINING, out, real)]
        found[part] = [Step("build", "python -m bench.build", 240, variables), *mine]
    return found


def run(step, log, seconds, variables):
    """-> exit status; 124: it took too long and was killed, with what it had started."""
    command = [sys.executable if w == "python" else w for w in shlex.split(step.command)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **variables, **step.variables}, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124


def last_lines(log, count):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return [line[:160] for line in lines[max(0, len(lines) - count) :]]


class Report:
    """What came of the steps: in a folder of at most two levels and a handful of files, whole
    after each step, because nobody knows which is the last."""

    def __init__(self, folder, real=True):
        self.folder, self.lines, self.failed = folder, [], []
        self.where = "" if real else " on a fake GPU"
        self.logs = Path(tempfile.mkdtemp(prefix="gpu_suite_"))
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, part, step):
        return self.logs / f"{part}_{step.name}.log"

    def add(self, part, step, verdict, seconds):
        log = self.log(part, step)
        last = last_lines(log, 1) if log.exists() else []
        name = f"{part} {step.name}"
        self.lines.append(f"{name:20}{verdict:12}{seconds:7.0f} s  {''.join(last)}".rstrip())
        if verdict != "well":
            self.failed.append(name)
        print(self.lines[-1], flush=True)
        if log.exists():
            shown = step.shown if verdict == "well" else max(SHOWN, step.shown)
            print("".join(f"  | {line}\n" for line in last_lines(log, shown)), end="", flush=True)
        self.save()

    def verdict(self):
        if not self.failed:
            return f"verdict: all went well{self.where}"
        return f"verdict: not all went well{self.where}: {', '.join(self.failed)}"

    def save(self):
        (self.folder / "summary.txt").write_text("\n".join([*self.lines, self.verdict()]) + "\n")
        with tarfile.open(self.folder / "logs.tar.gz", "w:gz") as archive:
            archive.add(self.logs, arcname="logs")

    def take_plots(self):
        """The plots are drawn again from the rows; here they would be too many files."""
        for plots in [path for path in self.folder.iterdir() if path.is_dir()]:
            shutil.copytree(plots, self.logs / plots.name, dirs_exist_ok=True)
            shutil.rmtree(plots)
        self.save()


def run_part(part, listed, report, minutes, variables):
    """Each step gets what it may take of the time that is left; the bench of a part, its last, all
    but what it takes to end."""
    end = time.monotonic() + 60 * minutes
    for step in listed:
        left = end - time.monotonic()
        if left < LEAST:
            report.add(part, step, "no time", 0)
            continue
        if step.command.startswith("python -m bench --out"):
            step = step._replace(
                command=f"{step.command} --minutes {max(0.1, left / 60 - 0.5):.2f}"
            )
        print(step, flush=True)
        begun = time.monotonic()
        status = run(step, report.log(part, step), min(step.seconds, left), variables)
        verdict = {0: "well", 124: "out of time"}.get(status, f"exit {status}")
        report.add(part, step, verdict, time.monotonic() - begun)
    report.take_plots()


def unpacked(folder):
    """A folder with the packages of the wheels in `folder`, which are of plain Python."""
    target = tempfile.mkdtemp(prefix="wheels_")
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    return target


def architecture():
    if not torch.cuda.is_available():
        return None
    return "".join(map(str, torch.cuda.get_device_capability()))


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all", metavar="PART"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="what a part may take")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "suite"),
        help="folder of the results",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="walk through on a fake GPU")
    return parser


def main():
    asked = parser()
    options = asked.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        asked.error(f"unknown part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    out, found = options.out.resolve(), None if options.dry_run else architecture()
    if found is None and not options.dry_run:
        print("torch sees no GPU here: a fake one is walked through")
    paths = [str(ROOT), unpacked(ROOT / "wheels"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    report = Report(out, found is not None)
    listed = steps(options.parts or PARTS, found, out)
    for part, mine in listed.items():
        run_part(part, mine, report, options.minutes, variables)
    print("\n".join([*report.lines, f"in {out}", report.verdict()]))
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
