"""A GPU that is not there: the course of a measurement on one, walked through on the CPU.

Tensors are the CPU's and times mean nothing; `install` is for a process that does nothing else. As
a plugin of pytest (`-p bench.fake_gpu`, with `--collect-only`) it shows what would run on a GPU.
"""

import contextlib
import time
import types

import torch

from . import device

NAME = "fake GPU"
PROPERTIES = types.SimpleNamespace(
    name=NAME, total_memory=80 * 2**30, L2_cache_size=2**14, multi_processor_count=1,
    major=9, minor=0,
)  # fmt: skip


class Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def query(self):
        return True

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return max(1.0, (end.at - self.at) * 1e3)


class Graph:
    """What ran while it was captured is not run again."""

    def replay(self):
        pass


@contextlib.contextmanager
def capture(graph, pool=None):
    yield


def _nothing(*_, **__):
    return None


GENERATOR = types.SimpleNamespace(clone_state=_nothing, graphsafe_set_state=_nothing)


FAKES = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda _=None: NAME,
    "get_device_capability": lambda _=None: (9, 0),
    "get_device_properties": lambda _=None: PROPERTIES,
    "max_memory_allocated": lambda _=None: 2**30,
    "memory_allocated": lambda _=None: 2**30,
    "graph_pool_handle": lambda: (0, 0),
    "current_stream": lambda _=None: None,
    "is_current_stream_capturing": lambda: False,
    "Event": Event,
    "CUDAGraph": Graph,
    "graph": capture,
    "default_generators": (GENERATOR,),
    **dict.fromkeys(
        ("synchronize", "empty_cache", "set_sync_debug_mode", "reset_peak_memory_stats",
         "set_per_process_memory_fraction", "set_stream"),
        _nothing,
    ),
}  # fmt: skip


def install():
    for name, fake in FAKES.items():
        setattr(torch.cuda, name, fake)
    device.NAME = "cpu"


def pytest_configure(config):
    if not config.option.collectonly:
        raise SystemExit("a fake GPU runs no test: --collect-only is missing")
    install()
