"""One of several devices that share a model's parameters, without the others."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist

# Fake tensors pretend to be on CPUs. Where parameters live in host memory, the device beside it is
# another one, so that what crosses the bus is copied, and counted apart.
HOST, BESIDE_HOST = torch.device("cpu"), torch.device("cpu", 1)


@contextlib.contextmanager
def fake_devices(count, device=HOST):
    """A mesh of devices of which only this one exists; the messages of the others never arrive.

    Args:
        count: how many there are, 1 or more.
        device: what FSDP2 takes this one for.

    Raises:
        RuntimeError: the process has a process group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp._fully_shard import _fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan for several devices cannot be made inside a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        with mock.patch.object(_fully_shard, "_get_device_from_mesh", return_value=device):
            yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()
