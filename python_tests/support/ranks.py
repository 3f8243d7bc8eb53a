"""Several ranks: processes in a gloo group that run the bodies of tests, one test after the other.

    @ranks.on(2, 4)
    def test_something(world, option):  # runs on every rank; `world` is their number
        ...

The processes come from a fork server that has imported torch and nothing else happened to, and stay
alive for the next test: a start takes as long as many tests. After a failure they are replaced, and
the assertion shows the text of the rank that failed first.
"""

import datetime
import faulthandler
import functools
import gc
import importlib
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import connection

import pytest
import torch
import torch.distributed as dist
from poison import poison
from torch.utils._python_dispatch import TorchDispatchMode

LIMIT = 120  # seconds for one test
GRACE = 3  # seconds for the other ranks to end theirs, once one has failed

available = dist.is_available() and dist.is_gloo_available()
needed = pytest.mark.skipif(not available, reason="this build of torch has no gloo")


# -- on the side of pytest -------------------------------------------------------------------------


def on(*worlds):
    """Makes a test of a function that every rank runs with the same arguments."""

    def decorate(body):
        @needed
        @pytest.mark.parametrize("world", worlds, ids=lambda world: f"{world} ranks")
        @functools.wraps(body)
        def test(world, **arguments):
            run(world, body, **arguments)

        return test

    return decorate


def run(world, function, leaver=None, **arguments):
    """Calls a function of a module on all ranks, with their number; -> what each returned. The
    process of the rank `leaver` is ended once it has returned, and with it the pool."""
    if world not in _pools:
        _pools[world] = Pool(world)
    pool = _pools[world]
    try:
        results = pool.run(function, {"world": world, **arguments}, leaver)
    except BaseException:
        _pools.pop(world).kill()
        raise
    if leaver is not None:
        _pools.pop(world).kill()
    return results


class Pool:
    def __init__(self, world):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, self._folder.name, there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function, arguments, leaver):
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        results, failed, until = {}, None, time.monotonic() + LIMIT
        while len(results) < len(self._pipes):
            waited = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = connection.wait(waited, max(0.0, until - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    self._processes[rank].join(GRACE)
                    code = self._processes[rank].exitcode
                    kind, value = "failed", f"its process has ended, exit code {code}"
                results[rank] = value
                if rank == leaver:
                    self._processes[rank].kill()
                if kind == "skipped":
                    pytest.skip(value)
                if kind == "failed" and failed is None:
                    failed, until = rank, min(until, time.monotonic() + GRACE)
        if failed is not None:
            pytest.fail(f"rank {failed} of {len(self._pipes)}:\n{results[failed]}", pytrace=False)
        late = [rank for rank in range(len(self._pipes)) if rank not in results]
        if late:
            pytest.fail(f"ranks {late} did not end within {LIMIT} seconds", pytrace=False)
        return [results[rank] for rank in range(len(self._pipes))]

    def kill(self):
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_pools = {}  # number of ranks -> Pool


# -- on the side of a rank -------------------------------------------------------------------------


def _serve(rank, world, folder, pipe):
    os.environ.update(  # as torchrun does
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
    )  # fmt: skip
    faulthandler.enable()  # what ends the process shows where it was, in pytest's captured output
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=LIMIT),
    )  # fmt: skip
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:  # pytest has ended
            return
        pipe.send(_outcome(module, name, arguments))
        gc.collect()


def _outcome(module, name, arguments):
    if module not in sys.modules:
        importlib.import_module(module)
        gc.collect()
        gc.freeze()  # else most of a test's time goes into looks at what imports have made
    function = getattr(sys.modules[module], name)
    function = getattr(function, "__wrapped__", function)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("error")  # as pytest is told to
            poison(patch)
            return "done", function(**arguments)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException:
        return "failed", traceback.format_exc()


@functools.cache
def mesh(*shape):
    """The mesh of this shape: all ranks in one dimension, or `replicate` times `shard`."""
    names = ("shard",) if len(shape) == 1 else ("replicate", "shard")
    return dist.device_mesh.init_device_mesh("cpu", shape, mesh_dim_names=names)


def everywhere(value):
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(value):
    """Asserts that all ranks have the same value, to the bit."""
    values = everywhere(value)
    assert all(repr(other) == repr(values[0]) for other in values), values


class Messages(TorchDispatchMode):
    """Notes the collectives that start while it is entered, those of lomo_kernels itself apart.

    From the collective outwards, the stack tells: a frame of the package comes before one of the
    engine, or of a backward, inside which others than the package have called.
    """

    def __init__(self):
        super().__init__()
        self.ours, self.others = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in function.name():
            (self.ours if _is_ours() else self.others).append(str(function))
        return function(*args, **(kwargs or {}))


def _is_ours():
    frame = inspect.currentframe().f_back
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if "/lomo_kernels/" in file and "/python_tests/" not in file:
            return True
        if any(part in file for part in _OTHERS):
            return False
        frame = frame.f_back
    return False


_OTHERS = ("/torch/distributed/fsdp/", "/torch/autograd/", "/torch/distributed/checkpoint/")
