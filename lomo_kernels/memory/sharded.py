"""One of several devices that share a model's parameters, without the others."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn


@contextlib.contextmanager
def fake_devices(count):
    """A mesh of devices of which only this one exists; the messages of the others never arrive.

    Raises:
        RuntimeError: the process has a process group.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a plan for several devices cannot be made inside a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


def shard(model, mesh):
    """FSDP2, a unit for each layer and one for the rest, as its tutorial has it."""
    from torch.distributed.fsdp import fully_shard

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for layer in max(lists, key=lambda each: sum(p.numel() for p in each.parameters()), default=()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Release(torch.optim.Optimizer):
    """Frees each gradient when it is complete: what LOMO holds of sharded parameters."""

    def __init__(self, params):
        super().__init__(params, {})
        for group in self.param_groups:
            for param in group["params"]:
                param.register_post_accumulate_grad_hook(_free)

    def backward(self, loss):
        loss.backward()


def _free(param):
    param.grad = None
