"""What cannot work with gradients that are used in backward, and who looks for them in vain."""

import gc
import logging
import math
import warnings

import torch

logger = logging.getLogger("lomo_kernels")

_DDP = (
    "a model in DistributedDataParallel cannot release gradients in backward: hooks run before its "
    "all-reduce; give the model itself and train on one device"
)
_FSDP1 = (
    "a model in FullyShardedDataParallel (FSDP1) cannot release gradients in backward: hooks run "
    "before its reduction; train on one device"
)


def wrapper(model):
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(_DDP)
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise TypeError(_FSDP1)


def sharded(param, name):
    if type(param).__module__.startswith("torch.distributed.tensor"):
        raise TypeError(f"{name} is sharded ({type(param).__name__}): not supported yet")
    if getattr(param, "_is_flat_param", False):
        raise TypeError(f"{name} is flattened: {_FSDP1}")


def ddp(params):
    """Refuses parameters (their ids) of a model that DistributedDataParallel has wrapped, before or
    after they came here: nothing tells but the wrapper, which is looked for in a process group."""
    if not torch.distributed.is_initialized():
        return
    for found in gc.get_objects():
        # not isinstance(), which asks some objects for a class they pretend to have
        if issubclass(type(found), torch.nn.parallel.DistributedDataParallel) and any(
            id(p) in params for p in found.parameters()
        ):
            raise RuntimeError(_DDP)


def reader(frame, clip_grad_norm, told):
    """`frame` reads gradients that were used already: torch's clipping is told once (`told` keeps
    to whom something was said), GradScaler is refused."""
    file = frame.f_code.co_filename
    if file.endswith("grad_scaler.py"):
        raise RuntimeError(
            "torch's GradScaler finds no gradients to unscale: the optimizer uses them in "
            "backward; switch it off and pass loss_scale to the optimizer, and begin again "
            "from the last checkpoint: updates may have been made from scaled gradients"
        )
    # Trainer asks for an infinite norm when it only wants to log one.
    if not file.endswith("clip_grad.py") or frame.f_locals.get("max_norm") == math.inf:
        return
    if file in told:
        return
    told.add(file)
    if clip_grad_norm is not None:
        logger.info(
            "clip_grad_norm_ found no gradients: the optimizer's own clip_grad_norm=%g decides",
            clip_grad_norm,
        )
        return
    warnings.warn(
        "clip_grad_norm_ or clip_grad_value_ (max_grad_norm of Trainer) found no gradients and "
        "clipped nothing: the optimizer uses them in backward; pass clip_grad_norm or "
        "clip_grad_value to the optimizer itself",
        stacklevel=2,
    )
