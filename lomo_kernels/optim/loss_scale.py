"""Loss scaling: the arguments for it, and a warning when it cannot help."""

import ctypes
import math
import warnings
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

STUCK = 10  # skipped steps in a row at the floor of a dynamic scale that make a warning
IN_A_ROW = 15  # and of a scale that stays


@dataclass(frozen=True)
class LossScale:
    """Dynamic loss scaling with `torch.amp.GradScaler`'s names, defaults and behaviour.

    A step with a gradient that is not finite multiplies the scale by `backoff_factor`, but not to
    below `min_scale` (which GradScaler has not); `growth_interval` other steps in a row multiply it
    by `growth_factor`, unless that is infinite.

    Raises:
        ValueError: which field, what was wanted, what came.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    min_scale: float = 1.0

    def __post_init__(self):
        largest = torch.finfo(torch.float32).max
        for name, low, high in (
            ("growth_factor", 1, math.inf),
            ("backoff_factor", 0, 1),
            ("min_scale", 0, largest),
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low < value < high:
                raise ValueError(f"{name} must be greater than {low} and less than {high:g}, "
                                 f"got {value!r}")  # fmt: skip
        scale, interval = self.init_scale, self.growth_interval
        if not isinstance(scale, (int, float)) or not self.min_scale <= scale <= largest:
            raise ValueError(
                f"init_scale must be a float32 number of at least min_scale={self.min_scale}, "
                f"got {scale!r}"
            )
        if not isinstance(interval, int) or not 1 <= interval <= 2**24:
            raise ValueError(f"growth_interval must be an integer in [1, 2**24], got {interval!r}")


def asked(loss_scale, loss_scale_args):
    """Lomo's two arguments -> None, a number, a LossScale, or "auto"."""
    if loss_scale_args:
        if loss_scale != "auto":
            raise ValueError(
                f"give loss_scale or loss_scale_args, not both; got loss_scale={loss_scale!r} and "
                f"loss_scale_args={loss_scale_args!r}"
            )
        return _from_lomo_optim(dict(loss_scale_args))
    if loss_scale is None or loss_scale == "auto" or isinstance(loss_scale, LossScale):
        return loss_scale
    if loss_scale == "dynamic":
        return LossScale()
    if not isinstance(loss_scale, (int, float)) or not 0 < loss_scale < math.inf:
        raise ValueError(
            "loss_scale must be a finite number greater than 0, 'auto', 'dynamic', a LossScale or "
            f"None, got {loss_scale!r}"
        )
    return float(loss_scale)


def _from_lomo_optim(arguments):
    """The arguments of lomo_optim's DynamicLossScaler; our own defaults for the rest."""
    fields = {}
    for name, field in (
        ("init_scale", "init_scale"),
        ("scale_factor", "growth_factor"),
        ("scale_window", "growth_interval"),
        ("min_scale", "min_scale"),
    ):
        if name in arguments:
            fields[field] = arguments.pop(name)
    if "growth_factor" in fields:
        fields["backoff_factor"] = 1 / fields["growth_factor"]
    if arguments.get("delayed_shift") == 1:  # no delay, and then hysteresis has no meaning
        del arguments["delayed_shift"]
    if "delayed_shift" not in arguments:
        arguments.pop("consecutive_hysteresis", None)
    if arguments.get("raise_error_at_min_scale") is False:
        del arguments["raise_error_at_min_scale"]
    if arguments:
        name, value = next(iter(arguments.items()))
        raise ValueError(
            f"loss_scale_args cannot take {name}={value!r}: taken are init_scale, scale_factor, "
            "scale_window, min_scale, delayed_shift=1 and raise_error_at_min_scale=False (a "
            "warning comes instead)"
        )
    return LossScale(**fields)


class SkippedWarning:
    """Warns once when steps are skipped one after the other and no loss scale can help: at the
    floor of a dynamic one (`rule`, a LossScale), or without one (None). Never waits for a GPU."""

    def __init__(self, rule):
        self._limit, self._cause = IN_A_ROW, "and the loss scale stays as it is"
        self._advice = "pass loss_scale='dynamic' if the parameters are float16"
        if rule is not None:
            self._limit = STUCK
            self._cause = f"with the loss scale at its minimum of {rule.min_scale:g}"
            self._advice = "train in bfloat16"
        self._copy = self._event = None
        self._done = False

    def look(self, count):
        """`count`: a one-element tensor, the skipped steps in a row. On a GPU the value seen is
        that of an earlier step."""
        if self._done or isinstance(count, FakeTensor):
            return
        if count.device.type == "cpu":
            found = _on_the_host(count)
        elif torch.cuda.is_current_stream_capturing():
            return
        elif self._event is None:
            found, self._event = 0, torch.cuda.Event()
            self._copy = torch.zeros((), pin_memory=True)
            self._send(count)
        elif self._event.query():
            found = _on_the_host(self._copy)
            self._send(count)
        else:
            return
        if found >= self._limit:
            self._done = True
            warnings.warn(
                f"{self._limit} steps in a row were skipped {self._cause}: their gradients are "
                "not finite. Lower the learning rate, look for bad values in the data and the "
                f"loss, or {self._advice}",
                stacklevel=2,
            )

    def _send(self, count):
        self._copy.copy_(count, non_blocking=True)
        self._event.record(torch.cuda.current_stream(count.device))


def _on_the_host(scalar):
    """The value of a CPU tensor, without an operator of torch on the way of every step."""
    kind = ctypes.c_double if scalar.dtype is torch.float64 else ctypes.c_float
    return kind.from_address(scalar.data_ptr()).value


class LossScaler:
    """What lomo_optim's training loops read of `optimizer.loss_scaler`."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    @property
    def has_overflow_serial(self):
        """Whether this step, or the last one that was closed, met a gradient that is not finite;
        asks the device."""
        return self._optimizer.found_inf

    @property
    def loss_scale(self):
        """The factor of the next loss; asks the device if it is dynamic."""
        return self._optimizer.loss_scale
