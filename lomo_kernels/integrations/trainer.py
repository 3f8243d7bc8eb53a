"""Hugging Face's Trainer, and those made from it, driving a `Lomo` or `AdaLomo`."""

import contextlib
import functools
import logging
import math
import weakref
from unittest import mock

import accelerate
import torch
import transformers

from .wrapped import unwrap

logger = logging.getLogger("lomo_kernels")


class LomoCallback(transformers.TrainerCallback):
    """Makes Trainer's arguments and logs mean with our optimizers what they mean with torch's.

    ::

        Trainer(model, args, optimizers=(Lomo(model, lr=0.05), None), callbacks=[LomoCallback()])

    - `max_grad_norm` becomes the optimizer's `clip_grad_norm` where it has none; Trainer does not
      clip besides. The optimizer's own goes first.
    - Each step is the optimizer's `backward(loss)`: the loss is scaled where the optimizer scales
      (float16), and `strategy` and `factor_budget` count. With `gradient_accumulation_steps` the
      gradients are added up as under `accumulate()`.
    - Logs have the true `grad_norm` (before clipping; none where no norm is found), `skipped_steps`
      (of this run, for gradients that were not finite) and `loss_scale`, where there is one. The
      device is asked once a step, as Trainer does for its `logging_nan_inf_filter`.

    Note [Replaced methods]
    A callback is given neither its trainer nor the accelerator. So, from `on_train_begin` to
    `on_train_end`, methods of Accelerator and Trainer are replaced: for a trainer whose optimizer
    has a callback here by what is said above, for any other by themselves. Those that clip, and
    look at every gradient to do so, look at none: that would form the gradients that wait. A
    change of the logs in `on_log` would come too late for `report_to`, whose callbacks stand first.
    """

    def __init__(self):
        self._wrapped = None  # the optimizer as the trainer has it
        self._optimizer = None
        self._from_trainer = None  # whose clip_grad_norm is max_grad_norm

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        _leave(self)  # an interrupted training has not
        self._wrapped, self._optimizer = optimizer, unwrap(optimizer)
        self._accumulates = args.gradient_accumulation_steps > 1
        self._skipped = 0
        self._take_norm(args.max_grad_norm)
        _enter(self)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._skipped += self._optimizer.last_step_skipped

    def on_train_end(self, args, state, control, **kwargs):
        _leave(self)

    def _take_norm(self, max_norm):
        ours = self._optimizer
        if ours.clip_grad_norm is None or ours is self._from_trainer:
            if max_norm and ours.strategy == "immediate" and ours.norm == "global":
                raise ValueError(
                    f"strategy 'immediate' cannot clip by the global norm of max_grad_norm="
                    f"{max_norm}: take max_grad_norm=0, another strategy, or norm='tensor'"
                )
            ours.clip_grad_norm = max_norm or None
            self._from_trainer = ours
            if max_norm:
                logger.info("the optimizer clips by max_grad_norm=%g, not Trainer", max_norm)
        elif max_norm and max_norm != ours.clip_grad_norm:
            logger.info(
                "the optimizer's own clip_grad_norm=%g decides, not max_grad_norm=%g",
                ours.clip_grad_norm, max_norm,
            )  # fmt: skip

    def _backward(self, original, accelerator, loss):
        if not self._accumulates:
            self._optimizer.backward(loss)
            return
        with self._optimizer.accumulate():
            original(accelerator, self._optimizer.scale(loss))

    def _extend(self, logs):
        if "learning_rate" not in logs:  # of an evaluation, or the summary at the end
            return
        logs.pop("grad_norm", None)
        norm, scale = self._optimizer.last_grad_norm, self._optimizer.loss_scale
        if norm is not None:
            logs["grad_norm"] = norm
        logs["skipped_steps"] = self._skipped
        if scale is not None:
            logs["loss_scale"] = scale


# -- see Note [Replaced methods] -------------------------------------------------------------------

_training = weakref.WeakSet()
_replaced = contextlib.ExitStack()


def _enter(callback):
    if not _training:
        _replaced.close()  # a callback is gone without the end of its training
        for owner, name, new in (
            (accelerate.Accelerator, "backward", _backward),
            (accelerate.Accelerator, "clip_grad_norm_", _clip_grad_norm_),
            (transformers.Trainer, "_has_mixed_mesh_grads", _has_mixed_mesh_grads),
            (transformers.Trainer, "log", _log),
        ):
            if (original := getattr(owner, name, None)) is None:
                continue  # transformers 5.0 does not look for gradients on several meshes
            replacement = functools.wraps(original)(functools.partialmethod(new, original))
            _replaced.enter_context(mock.patch.object(owner, name, replacement))
    _training.add(callback)


def _leave(callback):
    _training.discard(callback)
    if not _training:
        _replaced.close()


def _callback_of(optimizers):
    return next((c for c in _training if any(o is c._wrapped for o in optimizers)), None)


def _backward(accelerator, original, loss, **kwargs):
    callback = _callback_of(accelerator._optimizers)
    if callback is None:
        original(accelerator, loss, **kwargs)
    else:
        callback._backward(original, accelerator, loss)


def _clip_grad_norm_(accelerator, original, *args, **kwargs):
    if _callback_of(accelerator._optimizers) is None:
        return original(accelerator, *args, **kwargs)
    return torch.tensor(math.nan)  # not known before step(): `_log` puts it in


def _has_mixed_mesh_grads(trainer, original, model):
    return _callback_of([trainer.optimizer]) is None and original(trainer, model)


def _log(trainer, original, logs, *args, **kwargs):
    if (callback := _callback_of([trainer.optimizer])) is not None:
        callback._extend(logs)
    return original(trainer, logs, *args, **kwargs)
