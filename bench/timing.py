"""Times of rivals on the same tensors: in turn, on cold and random data, beside the copy rate of
the same minutes.

Note [Cold data]: each rival has several sets of tensors, together more than three times the last
level of cache, and uses each set once before any again. There are at most `SETS` of them, so
tensors of less than a few hundred KB are in the cache all the same. On a GPU as much other memory
is read before a sample starts.

Note [Host time]: on a GPU the calls on all sets are captured into one CUDA graph, and a sample is
one replay between two events. What stops the host or hands it memory cannot be captured, and what
others wrote is not tried: it is timed between events as it is called. `host_us` is the wall time of
plain calls. On the CPU there is one time.
"""

import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from . import device, record

SETS, GPU_SETS = 64, 1024
CALLS = 2000  # of a sample on a GPU, at most: a graph of more takes long to make
ROUNDS = 25
# Bytes per second that the makers' data sheets give for device memory, by a part of torch's name.
SHEETS = {
    "H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "H100 PCIe": 2.0e12, "B200": 8.0e12,
    "A100-SXM4-80GB": 2.039e12, "A100 80GB PCIe": 1.935e12, "A100-SXM4-40GB": 1.555e12,
    "RTX 5090": 1.792e12, "RTX 4090": 1.008e12, "RTX 3090": 0.936e12, "L40S": 0.864e12,
}  # fmt: skip


class Where(NamedTuple):
    """The device, its cache in bytes, the data sheet's rate or None, elements of a case at most."""

    device: torch.device
    cache: int
    sheet: float | None
    largest: int
    gpu: bool = False

    @classmethod
    def here(cls, largest=None):
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            sheet = next((rate for name, rate in SHEETS.items() if name in properties.name), None)
            room = min(2**29, properties.total_memory // 32)
            where = torch.device(device.NAME)
            return cls(where, properties.L2_cache_size, sheet, largest or room, True)
        return cls(torch.device("cpu"), _cpu_cache(), None, largest or 2**26)


def _cpu_cache():
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    sizes = [re.fullmatch(r"(\d+)K\s*", size) for size in sizes]
    return max((1024 * int(size[1]) for size in sizes if size), default=2**25)


class Set(NamedTuple):
    params: list
    grads: list


class Rival(NamedTuple):
    """bytes: what the job must move, whoever does it. make(set) -> function of no arguments.
    captured: whether it is known that a CUDA graph of it does the same again. flops: of matrix
    products."""

    what: str
    options: str
    bytes: int
    make: Callable
    captured: bool = False
    flops: int = 0


class Times(NamedTuple):
    """Microseconds of a call: samples; wall time; "graph", "events" or "clock"; the clocks of the
    device at work."""

    samples: list
    host: float
    how: str
    clocks: str = ""

    def quantile(self, q):
        return torch.tensor(self.samples, dtype=torch.float64).quantile(q).item()


def sets_of(case, where):
    """See Note [Cold data]; weights and gradients as large as those of a model at work."""
    kinds = ((case.shapes, case.dtype, 0.02), (case.grad_shapes, case.grad_dtype, 1e-3))
    size = sum(math.prod(shape) * dtype.itemsize for shapes, dtype, _ in kinds for shape in shapes)
    count = min(GPU_SETS if where.gpu else SETS, 1 + math.ceil(3 * where.cache / size))

    def tensors(shapes, dtype, deviation):
        numbers = [math.prod(shape) for shape in shapes]
        flat = torch.randn(sum(numbers), device=where.device).mul_(deviation).to(dtype)
        return [part.view(shape) for part, shape in zip(flat.split(numbers), shapes)]

    return [Set(*(tensors(*kind) for kind in kinds)) for _ in range(count)]


class CpuClock:
    how = "clock"

    def __init__(self, runs):
        self.runs, self.place, self.calls = runs, 0, 1
        for run in runs:
            run()
        once = self.sample()
        self.calls = max(1, min(1000, math.ceil(1000 / once)))  # a sample is 1 ms or more

    def sample(self):
        start = time.perf_counter()
        for _ in range(self.calls):
            self.runs[self.place]()
            self.place = (self.place + 1) % len(self.runs)
        return (time.perf_counter() - start) / self.calls * 1e6

    def host(self):
        return None


class GpuClock:
    def __init__(self, runs, rival, flush):
        size = rival.bytes
        self.runs = (runs * math.ceil(256e6 / max(size * len(runs), 4e6)))[:CALLS]
        self.flush, self.graph = flush, None
        for run in runs:  # compiles and allocates
            run()
        torch.cuda.synchronize()
        if rival.captured and not _stops_the_host(runs[0]):
            self.graph = self._capture()
        self.how = "graph" if self.graph is not None else "events"
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.sample()

    def _capture(self):
        graph = torch.cuda.CUDAGraph()
        try:
            with device.capture(graph):
                self._call()
        except RuntimeError:
            return None
        return graph

    def _call(self):
        for run in self.runs:
            run()

    def sample(self):
        start, end = self.events
        self.flush()
        start.record()
        self._call() if self.graph is None else self.graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / len(self.runs) * 1e3

    def host(self):
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / len(self.runs) * 1e6


def _stops_the_host(run):
    try:
        with device.no_waits():
            run()
    except RuntimeError:
        return True
    return False


def compare(where, case, rivals, seconds):
    """Yields (rival, Times, or the exception it met); the last rival is the copy, see `copy_of`."""
    rivals, sets, clocks, failed = [*rivals, copy_of(where)], sets_of(case, where), {}, {}
    flush = _flush(where) if where.gpu else None
    for i, rival in enumerate(rivals):
        try:
            of_its_own = i == len(rivals) - 1  # the copy has large tensors, beside small ones too
            runs = [rival.make(each) for each in sets[: 1 if of_its_own else None]]
            clocks[i] = GpuClock(runs, rival, flush) if where.gpu else CpuClock(runs)
        except Exception as error:  # a rival that cannot do this case is a row that says so
            failed[i] = error
    samples = {i: [] for i in clocks}
    end, order = time.perf_counter() + seconds, list(clocks)
    for round in range(ROUNDS):
        if round >= 3 and time.perf_counter() > end:
            break
        random.Random(round).shuffle(order)
        for i in order:
            samples[i].append(clocks[i].sample())
    speed = record.clocks_while(clocks[max(clocks)].sample) if clocks else ""
    for i, rival in enumerate(rivals):
        if i in failed:
            yield rival, failed[i]
        else:
            yield rival, Times(samples[i], clocks[i].host(), clocks[i].how, speed)


def copy_of(where):
    """A copy of half of the largest case: the rate that all others are held against."""
    numel = max(1, where.largest // 2)
    source = torch.randn(numel, device=where.device).to(torch.bfloat16)
    target = torch.empty_like(source)
    return Rival("copy", "", 4 * numel, lambda _: lambda: target.copy_(source))


def _flush(where):
    other = torch.ones(3 * where.cache // 4, device=where.device)
    return lambda: other.sum()


def rows(where, bench, case, rivals, seconds):
    """Rows of a case: every rival's times, and its rate beside the copy's."""
    found = list(compare(where, case, rivals, seconds))
    copy, times = found[-1]
    if isinstance(times, Exception):
        raise times
    copied = copy.bytes / times.quantile(0.5) * 1e6
    for rival, times in found:
        row = {
            "bench": bench, "case": case.name, "what": rival.what, "options": rival.options,
            "dtype": case.dtypes, "tensors": len(case.shapes or case.grad_shapes),
            "numel": case.numel, "bytes": rival.bytes, "flops": rival.flops or "",
        }  # fmt: skip
        if isinstance(times, Exception):
            yield {**row, "note": note(times)}
            continue
        rate = rival.bytes / times.quantile(0.5) * 1e6
        yield {
            **row,
            **{f"p{q}_us": f"{times.quantile(q / 100):.2f}" for q in (20, 50, 80)},
            "host_us": "" if times.host is None else f"{times.host:.2f}",
            "gb_per_s": f"{rate / 1e9:.2f}",
            "copy_gb_per_s": f"{copied / 1e9:.2f}",
            "of_copy": f"{rate / copied:.4f}",
            "of_sheet": "" if where.sheet is None else f"{rate / where.sheet:.4f}",
            "tflop_per_s": f"{rival.flops / times.quantile(0.5) / 1e6:.2f}" if rival.flops else "",
            "timed": times.how,
            "clocks": times.clocks,
        }


def note(error):
    """An exception as one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}"
