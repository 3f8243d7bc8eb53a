"""What torch.cuda leaves to its users: checks and captures after which all is as it was."""

import contextlib
import warnings

import torch

NAME = "cuda:0"  # of what is measured where there is a GPU; fake_gpu.py has another


def on_waits(mode):
    """What torch does when the host waits for a GPU: "default" (nothing), "warn" or "error"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says at the first call that it is a prototype
        torch.cuda.set_sync_debug_mode(mode)


@contextlib.contextmanager
def no_waits():
    """Inside, what makes the host wait for a GPU raises RuntimeError."""
    try:
        on_waits("error")
        yield
    finally:
        on_waits("default")


@contextlib.contextmanager
def capture(graph):
    """Captures what runs inside into a `torch.cuda.CUDAGraph`.

    Where that fails torch leaves its stream, its allocator and its generator in the middle of the
    capture, and whatever allocates or draws a number later fails too: they are put back.
    """
    stream, place = torch.cuda.current_stream(), torch.cuda.current_device()
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool):
            yield
    except BaseException:
        torch.cuda.set_stream(stream)
        for end in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            # RuntimeError: torch got as far as to end it itself
            with contextlib.suppress(RuntimeError, AttributeError):
                getattr(torch._C, end)(place, pool)
        generator = torch.cuda.default_generators[place]
        generator.graphsafe_set_state(generator.clone_state())
        raise
