"""Everything that a machine with a GPU can prove, in one folder.

    python -m bench.gpu_suite [--minutes 9] [--out FOLDER] [--dry-run]

Builds with nvcc, runs the whole test suite on the device, the kernels under compute-sanitizer where
there is one, then the benchmarks in what is left of the time. FOLDER gets a log of each, the rows
and plots, and summary.txt. Without a GPU it says what it would do there and does the CPU's part. A
step that fails or takes too long does not keep the next from running; the exit status tells.
"""

import argparse
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
BENCH = 200  # seconds that the steps before it leave for the bench
TOUCH = "python -m bench.gpu_suite --touch"


class Step(NamedTuple):
    """seconds: the most it may take. variables: added to its environment."""

    name: str
    command: str
    seconds: int
    variables: dict = {}  # noqa: RUF012 - nobody writes it

    def __str__(self):
        variables = "".join(f"{name}={value} " for name, value in self.variables.items())
        return f"{self.name}, up to {self.seconds} s: {variables}{self.command}"


def steps(architecture, folder):
    """architecture: the GPU's as nvcc has it, such as "90"; None: there is no GPU."""
    build = {"LOMO_CUDA": "ON", "LOMO_CUDA_ARCHS": f"{architecture}-real"} if architecture else {}
    workers = ""
    if importlib.util.find_spec("xdist"):
        # Contexts and tensors past 2**31 elements share the GPU's memory.
        workers = f" -n {min(8, os.cpu_count() or 1)}"
    yield Step("build", "python -m pip install --no-deps --no-build-isolation -e .", 150, build)
    if architecture:
        yield Step("gpu tests", "python -m pytest -q -rs python_tests/test_gpu.py", 120)
    yield Step("tests", f"python -m pytest -q -rs{workers}", 240 if architecture else 1500)
    if architecture and shutil.which("compute-sanitizer"):
        for tool in ("memcheck", "racecheck"):
            yield Step(tool, f"compute-sanitizer --tool {tool} --error-exitcode 1 {TOUCH}", 60)
    else:
        yield Step("touch", TOUCH, 60)
    yield Step("bench", f"python -m bench --out {shlex.quote(str(folder))}", 10_000)


def run(step, log, seconds):
    """-> exit status; 124: it took too long and was killed, with what it had started."""
    command = [sys.executable if w == "python" else w for w in shlex.split(step.command)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **step.variables}, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124


def last_line(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:150] if lines else ""


def run_all(listed, folder, minutes):
    """-> whether all went well. The last step gets what is left of the time."""
    folder.mkdir(parents=True, exist_ok=True)
    start, lines, good = time.monotonic(), [], True
    for step in listed:
        left = 60 * minutes - (time.monotonic() - start)
        if step.name == "bench":
            step = step._replace(
                command=f"{step.command} --minutes {max(0.1, left / 60 - 0.7):.2f}"
            )
        print(step, flush=True)
        log = folder / f"{step.name.replace(' ', '_')}.log"
        begun = time.monotonic()
        kept = 0 if step.name == "bench" else BENCH
        status = run(step, log, max(1.0, min(step.seconds, left - kept)))
        good &= status == 0
        verdict = {0: "well", 124: "out of time"}.get(status, f"exit {status}")
        lines.append(
            f"{step.name:10}{verdict:12}{time.monotonic() - begun:7.0f} s  {last_line(log)}"
        )
        print(lines[-1], flush=True)
    (folder / "summary.txt").write_text("\n".join(lines) + "\n")
    return good


def touch():
    """Every native kernel once on sizes around its edges, for the sanitizers."""
    from lomo_kernels import ops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    sumsq = torch.zeros(3, device=device)
    for dtype in ops.DTYPES:
        sizes = (1, 257, 40_001)
        grads = [torch.randn(n, device=device, generator=generator).to(dtype) for n in sizes]
        params = [torch.randn_like(grad) for grad in grads]
        lows = [torch.zeros_like(p, dtype=torch.int16) for p in params]
        for rounding in ops.ROUNDINGS:
            split = rounding == "split"
            if split and dtype is not torch.bfloat16:
                continue
            options = {"rounding": rounding, "backend": "native"}
            for few in (slice(0, 3), slice(2, 3)):
                ops.lomo_update_(
                    params[few], grads[few], lr=0.1, low=lows[few] if split else None, **options
                )
            for grad, low in zip(grads[1:], lows[1:]):
                for shape in ((-1,), (1, grad.numel())):
                    of_shape = [t.view(shape) for t in (torch.randn_like(grad), grad, low)]
                    p, g, low = of_shape
                    ops.adalomo_update_(
                        p, g, ops.adalomo_state(p), lr=0.1, low=low if split else None, **options
                    )
        ops.grad_sumsq_(sumsq, grads, backend="native")
        decisions = torch.zeros(len(ops.DECISIONS), device=device)
        ops.decide_(decisions, sumsq, max_norm=1.0, backend="native")
        if not torch.isfinite(torch.cat([p.float() for p in params])).all():
            raise SystemExit(f"not finite in {dtype}")
    print(f"touched every kernel on {device}")


def architecture():
    if not torch.cuda.is_available():
        return None
    return "".join(map(str, torch.cuda.get_device_capability()))


def parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, help="budget; 9 on a GPU, 40 without one")
    parser.add_argument("--out", type=Path, default=Path("suite"), help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="only say what it would do")
    parser.add_argument("--touch", action="store_true", help=argparse.SUPPRESS)
    return parser


def main():
    options = parser().parse_args()
    if options.touch:
        return touch()
    folder, found = options.out.resolve(), architecture()
    if found is None:
        print("no GPU here; with one:")
        print("\n".join(f"  {step}" for step in steps("90", folder)))
    listed = list(steps(found, folder))
    if options.dry_run:
        print("here:")
        print("\n".join(f"  {step}" for step in listed))
        return 0
    minutes = options.minutes or (9 if found else 40)
    good = run_all(listed, folder, minutes)
    print(f"{folder}: {'all went well' if good else 'not all went well'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
