"""The scalars that decide a step: one small tensor per device, read by the host only when asked."""

import math

import torch

from .. import ops
from .loss_scale import SkippedWarning

_PLACE = {name: place for place, name in enumerate(ops.DECISIONS)}


class DeviceScalars:
    """One step's scalars on one device, as one-element tensors for the kernels.

    Note [Two flags]
    Once a gradient is not finite, the rest of the step is skipped. A kernel that read and wrote one
    flag would skip some of its own blocks, depending on their timing. So there are two, and each
    update reads one (`skip`), writes the other (`found_inf`, also when it skips) and the next one
    swaps them: what an update does depends only on the updates before it.
    """

    def __init__(self, values, scaled, backend):
        self.values = values
        self._backend = backend
        scalars = values.unbind()
        self.inv_scale = scalars[_PLACE["inv_scale"]] if scaled else None
        self.clip_coef = None  # nothing is clipped until a norm was decided on
        self.total_norm = scalars[_PLACE["total_norm"]]
        self._clip_coef = scalars[_PLACE["clip_coef"]]
        self._own = None
        self._pair = (scalars[_PLACE["found_inf"]], scalars[_PLACE["skip"]])

    def next_flags(self):
        """(skip, found_inf) for the next update."""
        self._pair = self._pair[::-1]
        return self._pair

    @property
    def skip(self):
        """The flag that the next update will read."""
        return self._pair[1]

    @property
    def flags(self):
        return self.values[_PLACE["found_inf"] : _PLACE["skip"] + 1]

    def decide(self, sumsq=None, **options):
        ops.decide_(self.values, sumsq, backend=self._backend, **options)
        if options.get("max_norm") is not None:
            self.clip_coef = self._clip_coef

    def own_coefficient(self, sumsq, max_norm):
        """The clip coefficient of one tensor by its own norm, until the next call."""
        if self._own is None:  # beside the step's, whose norm is that of all tensors
            self._own = torch.zeros_like(self.values)
        ops.decide_(self._own, sumsq, max_norm=max_norm, backend=self._backend)
        return self._own[_PLACE["clip_coef"]]


class StepScalars:
    """inv_scale, clip_coef, flags, norm and loss scale of an optimizer's steps.

    The first device (that of the first parameter) decides, with one launch of `ops.decide_`; what
    it decided is copied to the others. Each step has its own tensor, so that inv_scale stays as it
    is until the step's updates ran although the next scale is decided before, and so that what is
    asked about the last step does not change under the next one.

    Args:
        scale: of the loss; that of the first step where it is dynamic.
        rule: a LossScale where the scale is dynamic, else None.
        backend: name of the backend.
        anchor: the parameter whose device decides.
        must_scale: whether a loss that was not scaled is a mistake.
        dtype: of the scalars: float32, or float64 where a parameter is float64.
        ranks: the sharding.Ranks that decide together, or None.
    """

    def __init__(
        self, scale, rule, backend, anchor, must_scale=False, dtype=torch.float32, ranks=None
    ):
        self.rule, self.dtype = rule, dtype
        self.ranks = ranks
        self._backend, self.anchor, self._must_scale = backend, anchor, must_scale
        self._warning = SkippedWarning(rule)
        self.set(scale)

    def set(self, scale, growth_tracker=0, stuck=0):
        """The state from the host: at the beginning, and from a checkpoint."""
        self._host = {"grad_scale": scale, "growth_tracker": growth_tracker, "stuck": stuck}
        self._start = None
        self._begin()

    def _begin(self):
        self.scaled = False  # whether the loss of the step was multiplied by the scale
        self.decided = False
        self._devices = {}
        self._first = self._scale = self._out = None

    @property
    def is_open(self):
        return self._first is not None

    def open(self):
        """Begins a step, unless one has begun."""
        if self._first is not None:
            return
        first = self.anchor.device
        if self._start is None:
            # written by kernels, not copied from the host, which would wait
            self._start = torch.zeros(len(_PLACE), device=first, dtype=self.dtype)
            known = {"inv_scale": 1 / self._host["grad_scale"], "clip_coef": 1.0, **self._host}
            for name, value in known.items():
                if value:
                    self._start[_PLACE[name]].fill_(value)
        self._start = self._start.to(first, non_blocking=True)
        self._first = DeviceScalars(self._start, self.scaled, self._backend)
        self._devices[self._start.device] = self._first

    def on(self, device):
        """The scalars on a device; begins a step of a loss that was not scaled."""
        if not self.is_open:
            if self._must_scale and not self.scaled:
                scale = self.rule or self._host["grad_scale"]
                raise RuntimeError(
                    f"loss_scale={scale} was asked for, but this gradient comes from a "
                    "loss that was not scaled: call optimizer.scale(loss).backward() or "
                    "optimizer.backward(loss)"
                )
            self.open()
        if device not in self._devices:
            values = self._first.values.to(device, non_blocking=True)
            self._devices[device] = DeviceScalars(values, self.scaled, self._backend)
            if self._first.clip_coef is not None:
                self._devices[device].clip_coef = self._devices[device]._clip_coef
        return self._devices[device]

    def scale(self, device):
        """The factor of the loss, a tensor on its device, the same all through a step."""
        if self._scale is None:
            # a copy: autograd keeps it, and the flags beside it change while backward runs
            self._scale = self._first.values[_PLACE["grad_scale"]].clone()
        return self._scale.to(device, non_blocking=True)

    def decide(self, sumsq, max_norm=None):
        """Before the first update: from tensors of squared norms, any number of elements in all,
        to the norm, the clip coefficient and whether anything may be written at all, on every
        device; and to the loss scale of the next step.

        Returns:
            The norm, a one-element tensor on the first device.
        """
        self._decide(sumsq, max_norm, self.scaled or self.rule is None, self.ranks)
        self.decided = True
        results = slice(_PLACE["clip_coef"], _PLACE["total_norm"] + 1)
        for device in self._others():
            device.values[results].copy_(self._first.values[results], non_blocking=True)
            device.clip_coef = None if max_norm is None else device._clip_coef
        return self._first.total_norm

    def close(self, sumsq=(), counts=True, abandon=False):
        """Ends the step: decides its norm and flags, unless that is done, and the next loss scale.

        Args:
            sumsq: tensors of squared norms, where they are for the total norm alone.
            counts: False: the step used no gradient, so the scale stays, unless a norm has decided:
                loops that leave out the update after an overflow need the scale to fall.
            abandon: the step is dropped, on this rank perhaps alone: no other rank is asked, and
                where there are others the scale stays.

        Returns:
            The scalars of the step on each device, the first one first.
        """
        if not self.is_open:
            self._begin()
            return []
        if not self.decided:
            alone = self.ranks is not None and (abandon or not counts)
            adapts = counts and not alone and (self.scaled or self.rule is None)
            self._decide(list(sumsq), None, adapts, None if alone else self.ranks)
        devices, self._start = list(self._devices.values()), self._out
        self._warning.look(self._start[_PLACE["stuck"]])
        self._begin()
        return devices

    @property
    def clip_coef(self):
        """Of a step whose norm is known; asks the device."""
        coef = self._first.clip_coef
        return None if coef is None else float(coef)

    @property
    def found_inf(self):
        """Whether the open step met a gradient that is not finite; asks the device."""
        return any(bool(device.flags.any()) for device in self._devices.values())

    def state(self):
        """For a checkpoint; asks the device."""
        values = self._first.values if self.is_open else self._start
        if values is None:
            return dict(self._host)
        values = values.tolist()
        return {name: values[_PLACE[name]] for name in self._host}

    def _others(self):
        return [d for d in self._devices.values() if d is not self._first]

    def _decide(self, sumsq, max_norm, adapts, ranks):
        self._out = torch.empty_like(self._first.values)
        if ranks is None:
            sumsq = self._gather(sumsq)
            found_inf = self._gather([d.flags for d in self._others()])
        else:  # the squared norm of a parameter is on one device, and 0 on the others
            sumsq = sum(self._here(each) for each in sumsq) if sumsq else None
            flags = torch.stack([self._here(d.flags) for d in self._devices.values()])
            sumsq, found_inf = ranks.agree(sumsq, flags.amax(0))
        self._first.decide(
            sumsq,
            found_inf=found_inf,
            max_norm=max_norm,
            out=self._out,
            **(self._scale_rule() if adapts else {}),
        )

    def _scale_rule(self):
        rule = self.rule
        if rule is not None:
            return {
                "growth_factor": rule.growth_factor,
                "backoff_factor": rule.backoff_factor,
                "growth_interval": rule.growth_interval,
                "min_scale": rule.min_scale,
            }
        # A scale that stays: it is its own floor, so that `stuck` counts the skipped steps in a
        # row, and a growth factor that float32 rounds to 1 never changes it.
        return {
            "growth_factor": math.nextafter(1.0, 2.0),
            "growth_interval": 2**24,
            "min_scale": self._host["grad_scale"],
        }

    def _here(self, tensor):
        return tensor.to(self._first.values.device, non_blocking=True)

    def _gather(self, tensors):
        """All elements as one tensor on the first device; None without any."""
        tensors = [self._here(t).view(-1) for t in tensors]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors) if tensors else None
