"""What the optimizers share: hooks, the three ways to drive a step, clipping and loss scale."""

import contextlib
import math
import weakref

import torch

from .. import ops
from .clipping import SquaredNorms
from .decisions import Decisions
from .loss_scale import LossScale, asked
from .release import GradientRelease

NORMS = ("global", "tensor")
STRATEGIES = ("auto", "two_backward")


class _Step:
    """What is known of the step in progress; a new one for every step."""

    def __init__(self):
        self.updated = set()  # ids of the parameters whose gradient was used
        self.norm_known = False
        self.grad_norm = None
        self.devices = []  # the scalars on each of them, once the step is closed


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose updates happen inside backward, one parameter at a time.

    Subclasses give `update_param(param, grad, group, param_id, scalars)`.
    """

    def __init__(
        self, model_or_params, defaults, *, clip_grad_norm, norm, strategy, loss_scale,
        loss_scale_args, backend,
    ):  # fmt: skip
        self._ready = False  # the base class adds the first groups before the rest exists
        self.clip_grad_norm = _positive_or_none("clip_grad_norm", clip_grad_norm)
        self._loss_scale = asked(loss_scale, loss_scale_args)
        self._scale_was_asked = self._loss_scale not in (None, "auto")
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        self.norm = norm
        self.strategy = strategy
        self._backend = backend
        self._names = {}
        self._places = {}  # id(param) -> (index of its group, param_id)
        self._last = None
        self._holding = self._measuring = False
        self._norms = None
        if isinstance(model_or_params, torch.nn.Module):
            _refuse_wrapper(model_or_params)
            self._names = {id(p): name for name, p in model_or_params.named_parameters()}
            model_or_params = model_or_params.parameters()
        super().__init__(model_or_params, {**defaults, "step": 0})
        self._decisions = self._new_decisions()
        self._scaling()
        self._step = _Step()
        self._ready = self._attached = True
        self._release = GradientRelease(self._on_gradient)
        self._release.attach(self._params())
        weakref.finalize(self, self._release.remove).atexit = False

    # -- torch.optim.Optimizer ---------------------------------------------------------------------

    def add_param_group(self, param_group):
        """Adds a group as torch does; its parameters are released in backward from now on."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        for param in group["params"]:
            self._places[id(param)] = (len(self.param_groups) - 1, len(self._places))
        if self._ready and self._attached:
            self._release.attach(group["params"])

    def _check_group(self, group):
        for key in ("lr", "weight_decay"):
            value = group[key]
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{key} must be a finite number of at least 0, got {value!r}")
        _positive_or_none("clip_grad_value", group["clip_grad_value"])
        for param in group["params"]:
            name = self._names.get(id(param), "a parameter")
            if type(param).__module__.startswith("torch.distributed.tensor"):
                raise TypeError(f"{name} is sharded ({type(param).__name__}): not supported yet")
            if param.requires_grad and param.dtype not in ops.DTYPES:
                raise TypeError(f"{name} must be float32, bfloat16 or float16, got {param.dtype}")
            ops.pick_backend(param.device, self._backend)

    def step(self, closure=None):
        """Closes the step: uses the gradients that were held back and advances the counters.

        After a backward that updated everything, and without one, there is nothing left to do, so
        calling it once more is harmless. `closure` is called first, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [p for p in self._params() if p.grad is not None]
        if held:
            self._update_held(held)
        if self._attached:
            self._release.attach(self._params())  # those that were frozen until now
        self._close()
        return loss

    def zero_grad(self, set_to_none=True):
        """Drops gradients that were held back. What backward has already applied stays applied."""
        self._close(abandon=any(p.grad is not None for p in self._params()))
        super().zero_grad(set_to_none)

    def state_dict(self):
        """As torch; with dynamic loss scaling also `loss_scale`, for which the device is asked."""
        state = super().state_dict()
        if isinstance(self._scaling(), LossScale):
            state["loss_scale"] = self._decisions.state()
        return state

    def load_state_dict(self, state_dict):
        """As torch, but state keeps its dtype: torch would cast it to the parameter's."""
        super().load_state_dict(state_dict)
        if isinstance(self._scaling(), LossScale) and "loss_scale" in state_dict:
            saved = state_dict["loss_scale"]
            self._decisions.set(saved["grad_scale"], saved["growth_tracker"], saved["stuck"])
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(indices, self._params()):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[param][key] = value.to(param.device, copy=True)

    def __setstate__(self, state):
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def __getstate__(self):
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: its hooks belong to the model's "
            "parameters; save state_dict() and load it into a new optimizer"
        )

    # -- driving a step ----------------------------------------------------------------------------

    def backward(self, loss):
        """One whole step: the norm pass if clipping needs one, backward with updates, `step()`."""
        if self._global_norm:
            self.grad_norm(loss)
        self.fused_backward(loss)

    def grad_norm(self, loss):
        """The first of LOMO's two backwards: the global norm, each gradient freed at once.

        With `clip_grad_norm` and norm="global" it also fixes the clip coefficient for the backward
        that follows, and whether that one may write at all: a non-finite gradient anywhere skips
        the whole step. The graph of `loss` is kept.

        Returns:
            The total norm before clipping, a float32 tensor on the device (the host does not wait).
        """
        self._open_for_backward()
        if self._step.norm_known:
            self._close()  # a norm that no backward followed
        if any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "grad_norm() cannot add to gradients that are held: run every backward of the step "
                "under `with optimizer.accumulate():` and then step(), or call zero_grad() first"
            )
        inputs = [p for p in self._params() if p.requires_grad]
        self._norms = SquaredNorms(len(self._places))
        self._measuring = True
        try:
            # Only our parameters: what others accumulate must not see this backward twice.
            torch.autograd.backward(self.scale(loss), retain_graph=True, inputs=inputs)
        except BaseException as error:
            self._step.updated.clear()
            self._close(abandon=True)
            if "use_reentrant" in str(error):
                raise RuntimeError(
                    "the norm pass needs non-reentrant checkpointing: pass use_reentrant=False"
                ) from error
            raise
        finally:
            self._measuring = False
            self._step.updated.clear()
        self._decide(self._norms)
        return self._step.grad_norm

    def fused_backward(self, loss, lr=None):
        """Backward with every update inside it, then `step()`.

        Args:
            loss: a scalar tensor; multiplied by `loss_scale` here.
            lr: sets the learning rate of every group; None keeps each group's own.
        """
        if lr is not None:
            for group in self.param_groups:
                group["lr"] = lr
        self._open_for_backward()
        try:
            self.scale(loss).backward()
        except BaseException:
            self._close(abandon=True)
            raise
        self.step()

    def scale(self, loss):
        """loss * loss_scale, for `opt.scale(loss).backward()`; the updates divide by it again."""
        scaling = self._scaling()
        if scaling is None:
            return loss
        if self._decisions.is_open and not self._decisions.scaled:
            raise RuntimeError(
                "this step has used gradients of a loss that was not scaled: call step() first"
            )
        self._decisions.scaled = True
        if not isinstance(scaling, LossScale):
            return loss * scaling
        self._decisions.open(next(self._params()).device)
        return loss * self._decisions.scale(loss.device)

    @contextlib.contextmanager
    def accumulate(self):
        """Holds the gradients of the backwards inside in `param.grad`, in the ordinary way.

        They take the memory of all gradients. The next backward outside adds to them and uses the
        sum; or `step()` does. With clip_grad_norm and norm="global", run every backward of the step
        inside and then call `step()`, which has all gradients for the norm.
        """
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def remove(self):
        """Takes the hooks off the model. `step()` then updates from `param.grad`, as in torch."""
        self._attached = False
        self._release.remove()

    # -- what happened -----------------------------------------------------------------------------

    @property
    def backend(self):
        """Name of the backend that updates the first parameter's device."""
        module = ops.pick_backend(next(self._params()).device, self._backend)
        return module.__name__.rpartition(".")[2]

    @property
    def last_step_skipped(self):
        """Whether a non-finite gradient made the last step skip its updates; asks the device.

        All or nothing after a norm pass (`grad_norm`, or held gradients and a global norm): nothing
        at all was written. Otherwise the parameters that backward reached before the non-finite
        gradient are updated, the elements with a non-finite gradient never.
        """
        devices = [] if self._last is None else self._last.devices
        return any(bool(device.flags.any()) for device in devices)

    @property
    def last_grad_norm(self):
        """Total norm before clipping in the last step, where one was computed; asks the device."""
        norm = None if self._last is None else self._last.grad_norm
        return None if norm is None else float(norm)

    @property
    def loss_scale(self):
        """The factor of the next loss, None without scaling; asks the device if it is dynamic."""
        scaling = self._scaling()
        if isinstance(scaling, LossScale):
            return self._decisions.state()["grad_scale"]
        return scaling

    # -- inside ------------------------------------------------------------------------------------

    @property
    def _global_norm(self):
        return self.clip_grad_norm is not None and self.norm == "global"

    def _params(self):
        return (param for group in self.param_groups for param in group["params"])

    def _name(self, param):
        name = self._names.get(id(param))
        return name or f"parameter {self._places[id(param)][1]} of shape {tuple(param.shape)}"

    def _open_for_backward(self):
        if self._step.updated:
            raise RuntimeError("the step before is not closed: call step() or zero_grad() first")
        if self._holding:
            raise RuntimeError("under accumulate() call loss.backward() itself")
        if not self._attached:
            raise RuntimeError("the hooks were removed: call loss.backward() and step()")
        self._release.attach(self._params())  # those that were frozen until now

    def _on_gradient(self, param):
        """The hook: `param.grad` is complete."""
        if self._holding:
            return
        grad, param.grad = param.grad, None
        if grad is None:
            raise RuntimeError(
                f"the gradient of {self._name(param)} was taken by another hook: does another "
                "optimizer still update this parameter? Call its remove() first"
            )
        self._use(param, grad)

    def _use(self, param, grad):
        if id(param) in self._step.updated:
            raise RuntimeError(
                f"{self._name(param)} received a second gradient in one step: call step() after "
                "each backward, or put the earlier ones of a step under "
                "`with optimizer.accumulate():`"
            )
        group_index, param_id = self._places[id(param)]
        decisions = self._decisions_on(grad.device)
        self._step.updated.add(id(param))
        if self._measuring:
            ops.grad_sumsq_(
                self._norms.slot(grad.device, param_id), grad, inv_scale=decisions.inv_scale,
                found_inf=decisions.skip, backend=self._backend,
            )  # fmt: skip
            return
        if self._global_norm and not self._step.norm_known:
            self._step.updated.discard(id(param))
            raise RuntimeError(
                "clip_grad_norm needs the norm of all gradients before the first update: call "
                "optimizer.backward(loss), or grad_norm(loss) and then fused_backward(loss, lr), "
                "or hold the gradients (`with optimizer.accumulate(): loss.backward()`, then "
                "step()), or clip each tensor by its own norm (norm='tensor')"
            )
        skip, found_inf = decisions.next_flags()
        clip_coef = decisions.clip_coef
        if self.clip_grad_norm is not None and self.norm == "tensor":
            clip_coef = self._own_coefficient(grad, param_id, decisions, skip)
        self.update_param(
            param,
            grad,
            self.param_groups[group_index],
            param_id,
            {
                "inv_scale": decisions.inv_scale,
                "clip_coef": clip_coef,
                "found_inf": found_inf,
                "skip": skip,
            },
        )

    def _own_coefficient(self, grad, param_id, decisions, found_inf):
        if self._norms is None:
            self._norms = SquaredNorms(len(self._places))
        sumsq = self._norms.slot(grad.device, param_id)
        ops.grad_sumsq_(
            sumsq, grad, inv_scale=decisions.inv_scale, found_inf=found_inf, backend=self._backend
        )
        return decisions.own_coefficient(sumsq, self.clip_grad_norm)

    def _scaling(self):
        """The loss scaling in force: None, a number, or a LossScale."""
        if self._loss_scale == "auto":
            if self._decisions.is_open or not any(
                p.requires_grad and p.dtype is torch.float16 for p in self._params()
            ):
                return None
            self._loss_scale = LossScale()
            self._decisions = self._new_decisions()
        return self._loss_scale

    def _new_decisions(self):
        scaling = self._loss_scale
        if isinstance(scaling, LossScale):
            return Decisions(scaling.init_scale, scaling, self._backend)
        return Decisions(scaling if isinstance(scaling, float) else 1.0, None, self._backend)

    def _decisions_on(self, device):
        if not self._decisions.is_open:
            if self._scale_was_asked and not self._decisions.scaled:
                raise RuntimeError(
                    f"loss_scale={self._loss_scale} was asked for, but this gradient comes from a "
                    "loss that was not scaled: call optimizer.scale(loss).backward() or "
                    "optimizer.backward(loss)"
                )
            self._decisions.open(next(self._params()).device)
        return self._decisions.on(device)

    def _update_held(self, held):
        """The gradients of `accumulate()`, and of parameters that had no hook yet."""
        if self._global_norm:
            if self._step.updated:
                raise RuntimeError(
                    "clip_grad_norm needs the norm of all gradients before the first update, but "
                    f"{self._name(held[0])} still holds one: run every backward of the step under "
                    "`with optimizer.accumulate():`"
                )
            self._norms = SquaredNorms(len(self._places))
            self._measuring = True
            try:
                for param in held:
                    self._use(param, param.grad)
            finally:
                self._measuring = False
                self._step.updated.clear()
            self._decide(self._norms)
        for param in held:
            grad, param.grad = param.grad, None
            self._use(param, grad)

    @torch.no_grad()
    def _decide(self, norms):
        """Turns squared norms into the coefficient and the skip of the updates to come."""
        if not norms.tensors():  # no parameter had a gradient
            return
        max_norm = self.clip_grad_norm if self._global_norm else None
        self._step.grad_norm = self._decisions.decide(norms.tensors(), max_norm)
        self._step.norm_known = True

    @torch.no_grad()
    def _close(self, abandon=False):
        step = self._step
        used = step.updated or step.norm_known
        if self._decisions.scaled and not used and not abandon:
            return  # a scaled loss waits for its backward
        self._step = _Step()
        sumsq = [] if self._norms is None else self._norms.tensors()
        self._norms = None
        step.devices = self._decisions.close(sumsq, counts=bool(step.updated))
        if not step.updated:
            return
        if sumsq:
            step.grad_norm = step.devices[0].total_norm
        for group in self.param_groups:
            group["step"] += 1
        self._last = step
        # Autocast keeps 16-bit copies of the weights for the block; they are of the old weights.
        torch.clear_autocast_cache()


def _positive_or_none(name, value):
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number greater than 0, or None, got {value!r}")
    return float(value)


def _refuse_wrapper(model):
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            "a model in DistributedDataParallel cannot release gradients in backward: hooks run "
            "before its all-reduce; give the model itself and train on one device"
        )
