"""Refusals and warnings, each one sentence that names the way out."""

import gc
import logging
import math
import os
import warnings

import torch

from .choosing import size

logger = logging.getLogger("lomo_kernels")

_DDP = (
    "a model in DistributedDataParallel cannot release gradients in backward: hooks run before its "
    "all-reduce; shard the model itself with torch.distributed.fsdp.fully_shard, and make the "
    "optimizer afterwards"
)
_FSDP1 = (
    "a model in FullyShardedDataParallel (FSDP1) cannot release gradients in backward: hooks run "
    "before its reduction; use torch.distributed.fsdp.fully_shard (FSDP2), and make the optimizer "
    "afterwards"
)
_DEEPSPEED = (
    "belongs to DeepSpeed's ZeRO, which keeps gradients in buffers of its own: use "
    "torch.distributed.fsdp.fully_shard in its place, and make the optimizer afterwards"
)
PARTIAL = (
    "{name} or its gradient has the placement {placement}, a reduction over ranks that is still to "
    "be done and that an update cannot do: redistribute it to Shard or Replicate in the model"
)
COLUMNS = (
    "{name} has the placements {placements}, but the rule needs whole rows of a weight: shard its "
    "first dimension (Shard(0)), or take Lomo"
)
OLD_OFFLOAD = (
    "with torch {version} offloaded parameters get gradients in hooks whose copy to the host has "
    "not ended (pytorch#180666): use torch 2.13 or newer, or no CPUOffloadPolicy"
)
IGNORED = (
    "{name} is trained, but fully_shard leaves it alone (ignored_params), so that each rank would "
    "train its own: shard it too, or freeze it"
)
UNKNOWN_LEAVES = (
    "strategy='partial' limits its second backward to parameters that fully_shard gathers, and "
    "these are known only where the optimizer is made from the module, and each module that has a "
    "parameter runs its forward: pass the module, or take strategy='two_backward'"
)
FOREIGN_LEAVES = (
    "the loss depends on tensors that are not the optimizer's, and two backwards would give them "
    "their gradients twice: make the optimizer from the module, or take strategy='one_backward'"
)
JOINS_LATE = (
    "parameters join the optimizer of a sharded model between two steps: call step() before "
    "add_param_group()"
)
BROKEN_ENGINE = (
    "{name} has no gradient any more: an error ended a backward, after which fully_shard reduces "
    "nothing of that unit; start again from a checkpoint, with a new model and optimizer"
)
REPLACED_LATE = (
    "the parameters of the optimizer were replaced after its first step: make a new optimizer, and "
    "load its state_dict"
)
NOT_FORMED = (
    "torch.autograd.grad() asks for the gradient of a weight that compiled code has used, where "
    "factors take its place: call backward() and read `.grad`, or run the model uncompiled"
)
LATE_HOOK = (
    "a hook on a weight wants its gradient, but came after the forward of compiled code that forms "
    "none: register the hook before the forward"
)
UNWATCHED = (
    "compiled code offers the factors of a weight whose optimizer was removed between forward and "
    "backward, and nobody is there to form its gradient: run the forward again"
)


# -- models and parameters -------------------------------------------------------------------------


def refuse_wrapper(model):
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(_DDP)
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise TypeError(_FSDP1)


def refuse_engine(param, name):
    """Refuses parameters of engines that reduce gradients in a way no hook can follow."""
    if getattr(param, "_is_flat_param", False) or hasattr(param, "_fsdp_flattened"):
        raise TypeError(f"{name} is flattened: {_FSDP1}")
    if hasattr(param, "ds_id"):
        raise TypeError(f"{name} {_DEEPSPEED}")


def modules_with(params, kind):
    """The modules of a class that have one of the parameters (their ids); looked for among all
    objects, because no parameter tells."""
    return [
        each for each in gc.get_objects()
        # not isinstance(), which asks some objects for a class they pretend to have
        if issubclass(type(each), kind) and any(id(p) in params for p in each.parameters())
    ]  # fmt: skip


def refuse_ddp(params):
    """Refuses parameters (their ids) of a model that DistributedDataParallel has wrapped, before or
    after they came here; there is one in a process group alone."""
    if torch.distributed.is_initialized() and modules_with(
        params, torch.nn.parallel.DistributedDataParallel
    ):
        raise RuntimeError(_DDP)


def refuse_shape(name, param, state, value):
    """A state made for another shape: the parameter was resized."""
    raise RuntimeError(
        f"{name} has the shape {tuple(param.shape)}, but its state {state!r} was made for "
        f"{tuple(value.shape)}: it was resized after the optimizer was made, or the state comes "
        "from another model's checkpoint; make a new optimizer"
    )


def log_taking_over(kind):
    logger.warning(
        "this %s takes over parameters that another optimizer has trained until now: that one "
        "refuses to step", kind,
    )  # fmt: skip


FROZEN = (
    "all parameters of the optimizer are frozen (requires_grad is False), so nothing is trained: "
    "an adapter or a wrapper that was made after the optimizer does this; make the optimizer after "
    "it, from the parameters to train"
)
NOTHING = (
    "step() found no gradient, twice in a row: no backward has reached the optimizer's parameters "
    "since it was made; make it from the parameters of the model that runs"
)
TAKEN_OVER = (
    "the parameters of this optimizer were taken over by another one that was made later: use that "
    "one, or make a new one"
)
CANNOT_TAKE_BACK = (
    "zero_grad() came after a backward that has updated parameters: updates made in backward "
    "cannot be taken back. Freeze these parameters (requires_grad_(False)) while others train, run "
    "the backward under `with optimizer.accumulate():`, or pass clip_grad_norm, with which "
    "gradients wait for step()"
)


def refuse_graph(names):
    """The loss reaches no parameter of the optimizer."""
    raise RuntimeError(
        "the loss depends on none of the optimizer's parameters that are trained "
        f"({', '.join(names)}): make the optimizer from the parameters of the model that runs"
    )


def refuse_replaced(module, names, known):
    """Refuses parameters in whose place, under their names, the model has another one now that is
    not among the ids in `known`."""
    now = dict(module.named_parameters(remove_duplicate=False)) if names else {}
    names = [name for name in names if name in now and id(now[name]) not in known]
    if not names:
        return
    what, way = "load_state_dict(assign=True), resizing or wrapping does this", "afterwards"
    if hasattr(now[names[0]], "placements"):
        what = "fully_shard does this, and accelerator.prepare(model) without the optimizer"
        way = "after fully_shard, or call accelerator.prepare(model, optimizer)"
    raise RuntimeError(
        f"{', '.join(names[:3])} of the model was replaced by another parameter after the "
        f"optimizer was made ({what}), and is not trained: make the optimizer {way}"
    )


def explained(error):
    """A better text for an error of a backward that keeps its graph, or None."""
    text = str(error)
    if "use_reentrant" in text:
        return "the norm pass needs non-reentrant checkpointing: pass use_reentrant=False"
    if "donated buffers" in text:
        return (
            "two backwards need the buffers that compiled code gives away in the first: set "
            "torch._functorch.config.donated_buffer = False before the first forward of the "
            "compiled model, or take strategy='one_backward'"
        )
    return None


# -- readers of gradients --------------------------------------------------------------------------

_TORCH = os.path.dirname(torch.__file__) + os.sep
_COMPILERS = tuple(
    _TORCH + part
    for part in (
        "_dynamo", "_export", "_functorch", "_higher_order_ops", "_inductor", "_subclasses",
        "export", "fx", "jit",
    )
)  # fmt: skip

_FSDP2 = os.path.join(_TORCH, "distributed", "fsdp") + os.sep
_TRAINERS = "_has_mixed_mesh_grads"  # a function of transformers' Trainer


def is_engine(frame):
    """Whether it is FSDP2, which puts each reduced gradient into `.grad` and calls the hook."""
    return frame.f_code.co_filename.startswith(_FSDP2)


class Reader:
    """Who reads `.grad`: the place in the code, and what kind of reader it is."""

    def __init__(self, frame):
        code = frame.f_code
        self._frame, self.file, self.line = frame, code.co_filename, frame.f_lineno
        inside = self.file.removeprefix(_TORCH)
        self._of_torch = inside != self.file
        # zero_grad() of modules and optimizers looks before it drops
        self.drops = self._of_torch and code.co_name == "zero_grad"
        # A compiler looks whether there is one; Trainer looks of which kind they are.
        self.needs_none = (
            self.file.startswith(_COMPILERS) or code.co_name == _TRAINERS or is_engine(frame)
        )
        self.clips = self._of_torch and inside.endswith("clip_grad.py")
        self.scales = self._of_torch and inside.endswith("grad_scaler.py")
        # Another optimizer of torch would miss an update; the rest of torch moves and copies.
        self.is_harmless = self._of_torch and not inside.startswith("optim")

    @property
    def place(self):
        return f"{self.file}:{self.line}"

    @property
    def clips_by_value(self):
        return "clip_value" in self._frame.f_locals

    @property
    def only_measures(self):
        """Trainer asks for an infinite norm when it only wants to log one."""
        return self._frame.f_locals.get("max_norm") == math.inf


class Formed:
    """Gradients that waited and were formed for a reader."""

    def __init__(self):
        self.count = self.nbytes = 0
        self.place = None

    def add(self, nbytes, place):
        self.count, self.nbytes, self.place = self.count + 1, self.nbytes + nbytes, place


class Told:
    """What one optimizer has said already: everything is said once."""

    def __init__(self):
        self._keys = set()

    def _first(self, key):
        first = key not in self._keys
        self._keys.add(key)
        return first

    def warn(self, text):
        if self._first(text):
            warnings.warn(text, stacklevel=4)

    def cannot_take_back(self, reader=None):
        if self._first("cannot_take_back"):
            if reader is None:
                warnings.warn(CANNOT_TAKE_BACK, stacklevel=4)
            else:
                warnings.warn_explicit(CANNOT_TAKE_BACK, UserWarning, reader.file, reader.line)

    def nothing_to_read(self, reader):
        """A reader finds None: the gradient was used in backward already."""
        if reader.scales:
            raise RuntimeError(
                "torch's GradScaler finds no gradients to unscale: the optimizer uses them in "
                "backward; switch it off and pass loss_scale to the optimizer, and begin again "
                "from the last checkpoint: updates may have been made from scaled gradients"
            )
        if reader.clips:
            if not reader.only_measures and self._first(reader.file):
                warnings.warn(
                    "clip_grad_norm_ or clip_grad_value_ (max_grad_norm of Trainer) found no "
                    "gradients and clipped nothing: the optimizer uses them in backward; pass "
                    "clip_grad_norm or clip_grad_value to the optimizer itself",
                    stacklevel=5,
                )
        elif not reader.is_harmless and self._first(reader.file):
            warnings.warn_explicit(
                f"{reader.place} reads the gradient of a parameter that the optimizer has used in "
                "backward and freed, and finds None: read it in a hook "
                "(register_post_accumulate_grad_hook), under `with optimizer.accumulate():`, or "
                "pass strategy='one_backward', with which gradients wait for step()",
                UserWarning, reader.file, reader.line,
            )  # fmt: skip

    def own_clip_decides(self, clip_grad_norm):
        if self._first("own_clip_decides"):
            logger.info(
                "clip_grad_norm_ found no gradients: the optimizer's own clip_grad_norm=%g decides",
                clip_grad_norm,
            )

    def formed(self, formed):
        if formed.count and self._first("formed"):
            logger.warning(
                "%d gradients that waited were formed because %s reads them: %s of memory",
                formed.count, formed.place, size(formed.nbytes),
            )  # fmt: skip

    def above_budget(self, nbytes, budget):
        if self._first("above_budget"):
            warnings.warn(
                f"a bare loss.backward() lets every gradient wait for the norm: {size(nbytes)} "
                f"beside the room of activations, above the factor_budget of {size(budget)}. Call "
                "optimizer.backward(loss), which needs less memory, or accept it with "
                "strategy='one_backward' or a larger factor_budget",
                stacklevel=2,
            )
