"""What the optimizers share: a torch optimizer whose updates happen inside backward."""

import contextlib
import logging
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import notices, sharding
from .arguments import check_group, check_strategy, positive_or_none
from .choosing import Choice, Waits, chosen, default_budget
from .gradient import Piece
from .gram import Cancellation
from .graph import graph_of
from .loss_scale import LossScale, LossScaler, asked
from .scalars import StepScalars
from .step import Everything, Fate, Step
from .watching import Watch, unwatched

logger = logging.getLogger("lomo_kernels")


class _State(defaultdict):
    """The state of all parameters. It is never false: where torch.distributed.checkpoint finds no
    state it makes a step of gradients that are zero, to have some. The question makes the state in
    place of that step, for all the rest of torch.distributed.checkpoint looks at it."""

    def __init__(self, optimizer, state=()):
        super().__init__(dict, state)
        self._make = weakref.WeakMethod(optimizer._make_states)

    def __bool__(self):
        self._make()()
        return True


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose updates happen inside backward, one parameter at a time.

    A subclass is a rule: `update(pieces, group, numbers, scalars)`, with pieces (gradient.py) of
    parameters of one group, device and dtype, the numbers of these parameters, and the scalars
    inv_scale, clip_coef, found_inf and skip, one-element tensors on the device or None. It may also
    have `update_product(pieces, group, number, scalars)`, for a gradient that is a sum of products
    of factors (ops.product_update_): a piece for the weight or for each of its experts, with the
    factors as `pairs`.
    What becomes of a gradient: step.py, Note [Fates]. Sharded parameters: sharding.py, Note
    [Shards].
    """

    whole_gradients = False  # whether an update needs each gradient in one piece
    takes_products = False  # whether there is an `update_product`
    whole_rows = False  # whether a sharded parameter must be cut along its first dimension
    must_scale = True  # whether a bare loss.backward() is a mistake where a scale was asked for
    dtypes: tuple[torch.dtype, ...] = (*ops.DTYPES, torch.float64)
    gather_norm = False  # lomo_optim's loops read it

    def __init__(
        self, model_or_params, defaults, *, clip_grad_norm, norm, strategy, factor_budget,
        loss_scale, loss_scale_args, backend,
    ):  # fmt: skip
        self._ready = False  # the base class adds the first groups before the rest exists
        self._clip_grad_norm = positive_or_none("clip_grad_norm", clip_grad_norm)
        self._loss_scale = asked(loss_scale, loss_scale_args)
        self._scale_was_asked = self._loss_scale not in (None, "auto")
        check_strategy(
            type(self).__name__, norm, strategy, factor_budget, clip_grad_norm, self.whole_gradients
        )
        self.norm = norm
        self.strategy = strategy
        self.factor_budget = factor_budget
        self.backend_name = backend
        self.numbers, self.group_of = {}, {}  # id(param) -> its number; index of its group
        self._names, self._module = {}, lambda: None
        self.ranks = self._leaves = None  # where a parameter is sharded
        self._holding = self._announced = self._taken_over = False
        self._failed = False  # whether an error ended a backward of a sharded model
        self._watch = Watch(self)
        self.told = notices.Told()
        self._reached = False  # whether a backward has ever reached a parameter
        self._empty_steps, self._arrived = 0, 0  # steps without gradients; gradients of the last
        self._asked_for_ddp = not torch.distributed.is_available()
        self.cancellation = Cancellation()
        self._last = self._choice = self._report = None
        self._products = Counter()
        if isinstance(model_or_params, torch.nn.Module):
            notices.refuse_wrapper(model_or_params)
            self._module = weakref.ref(model_or_params)
            self._names = {id(p): name for name, p in model_or_params.named_parameters()}
            model_or_params = model_or_params.parameters()
        super().__init__(model_or_params, {**defaults, "step": 0})
        self.state = _State(self)
        self._look_for_shards()
        self.scalars = self._new_scalars()
        self._step = self._new_step()
        self._scaling()
        self._ready = self._attached = True
        self._attach()
        weakref.finalize(self, self._watch.release).atexit = False

    def _look_for_shards(self):
        params = list(unwatched(self._params)())
        if not any(map(sharding.is_sharded, params)):
            return
        for param in sharding.ignored(params):
            raise TypeError(notices.IGNORED.format(name=self.name_of(param)))
        self.ranks = sharding.Ranks(params, self.name_of)
        if self._leaves is not None:
            self._leaves.remove()
            self._leaves = None
        if (module := self._module()) is not None:
            self._leaves = sharding.Leaves(module, params)
            weakref.finalize(self, self._leaves.remove).atexit = False

    # -- torch.optim.Optimizer ---------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as torch does; its parameters are released in backward from now on.

        Raises:
            RuntimeError: in the middle of a step of sharded parameters.
        """
        if self._ready and self.ranks is not None and not self._step.is_empty:
            raise RuntimeError(notices.JOINS_LATE)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        self._names |= zip(map(id, group["params"]), group.get("param_names", ()))
        try:
            self._check_group(group)
        except (TypeError, ValueError, RuntimeError):
            self.param_groups.pop()
            raise
        self._number_group(len(self.param_groups) - 1)
        if self._ready:
            self._parameters_changed()

    def _number_group(self, index):
        """Gives the parameters of a group the next numbers."""
        for param in self.param_groups[index]["params"]:
            self.group_of[id(param)] = index
            self.numbers[id(param)] = len(self.numbers)

    def _parameters_changed(self):
        self._look_for_shards()
        self.scalars.ranks, self.scalars.anchor = self.ranks, next(self._params())
        if self._step.is_empty:  # else its gradients wait for their update
            self._step = self._new_step()
        if self._attached:
            self._attach()

    @unwatched
    def _adopt(self):
        """Takes the parameters that others (accelerate) have put in the place of ours."""
        params = list(self._params())
        if all(id(p) in self.numbers for p in params):
            return
        started = any(group["step"] for group in self.param_groups) or not self._step.is_empty
        if started or len(params) != len(self.numbers):
            raise RuntimeError(notices.REPLACED_LATE)
        self.state.clear()
        names = [self._names.get(key) for key in self.numbers]
        self._watch.release()
        self.numbers, self.group_of = {}, {}
        for index in range(len(self.param_groups)):
            self._number_group(index)
        self._names = {key: name for key, name in zip(self.numbers, names) if name is not None}
        for group in self.param_groups:
            self._check_group(group)
        self._parameters_changed()
        logger.info("the parameters were replaced: the optimizer trains the new ones")

    def _check_group(self, group):
        check_group(group)
        for param in group["params"]:
            name = self._names.get(id(param), "a parameter")
            notices.refuse_engine(param, name)
            sharding.check(param, name, self.whole_rows)
            if param.requires_grad and param.dtype not in self.dtypes:
                known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
                raise TypeError(f"{name} must be one of {known}, got {param.dtype}")
            ops.pick_backend(param.device, self.backend_name, param.dtype)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Closes the step: uses the gradients that wait or were accumulated, advances the counters.

        After a backward that updated everything, and without one, there is nothing left to do, so
        calling it once more is harmless. `closure` is called first, as in torch.

        Raises:
            RuntimeError: a parameter of the model was replaced or resized since the optimizer was
                made; another optimizer has taken over.
        """
        self._refuse_if_taken_over()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._finish()
        return loss

    @unwatched
    def _finish(self):
        self._adopt()
        accumulated = [p for p in self._params() if p.grad is not None]
        if self._step.is_empty and not accumulated:
            self._no_gradient()
        if accumulated or self._step.waiting:
            self._apply_all(accumulated)
        if self._attached:
            self._attach()  # parameters that were frozen until now
        used = self._step.used
        self._close()
        self._forget_forwards()
        if used and len(used) != self._arrived and self._attached:
            self._arrived = len(used)
            self._refuse_replaced([p for p in self._trained() if id(p) not in used])

    def _apply_all(self, accumulated):
        """Gradients that wait for the norm, and those in `.grad`: accumulated under `accumulate()`,
        shown to a reader, or of a parameter without a hook."""
        step = self._step
        unknown = [p for p in accumulated if id(p) not in step.known]
        if self.needs_norm and unknown and step.used:
            raise RuntimeError(
                "clip_grad_norm needs the norm of all gradients before the first update, but "
                f"{self.name_of(unknown[0])} still holds one: run every backward of the step "
                "under `with optimizer.accumulate():`"
            )
        if self.needs_norm and not step.is_decided:
            self._compare_with_budget(last=True)
        for param in accumulated:
            grad = self._taken(param)
            waits = self.needs_norm or id(param) in step.waiting
            step.take(param, grad, Fate.WAIT if waits else Fate.APPLY)
        if self.needs_norm and not step.is_decided:
            self._decide()
        step.apply_all()

    def _taken(self, param):
        """`.grad`, out of the parameter; of a sharded one this rank's part."""
        grad, param.grad = param.grad, None
        return grad if self.ranks is None else sharding.local_gradient(grad, param, self.name_of)

    @unwatched
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops gradients that wait or were accumulated. Updates made in backward stay."""
        self._adopt()
        if self._step.wrote:
            self.told.cannot_take_back()
        dropped = self._step.waiting or any(p.grad is not None for p in self._params())
        self._close(abandon=bool(dropped))
        super().zero_grad(set_to_none)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left of a step: no gradient waits or is accumulated, none was used
        since the last step(), no norm was decided, and no `accumulate()` is open."""
        return (
            self._step.is_empty
            and not self._holding
            and not self.scalars.is_open
            and all(p.grad is None for p in unwatched(self._params)())
        )

    @unwatched
    def state_dict(self) -> dict[str, Any]:
        """As torch; with dynamic loss scaling also `loss_scale`, for which the device is asked.

        State is whole before the first step, too, and that of a sharded parameter is sharded alike
        (DTensor), so that `torch.distributed.checkpoint` saves it and loads it on another number of
        ranks. The low halves of rounding "split" are given as bfloat16, a view of their bits, as no
        collective moves int16.
        """
        self._adopt()
        self._make_states()
        state = super().state_dict()
        for index, param in enumerate(self._params()):
            if param in self.state:
                state["state"][index] = {
                    name: self._saved(name, value, param)
                    for name, value in self.state[param].items()
                }
        if isinstance(self._scaling(), LossScale):
            state["loss_scale"] = self.scalars.state()
            for group in state["param_groups"]:  # torch.distributed.checkpoint keeps these alone
                group["loss_scale"] = dict(state["loss_scale"])
        return state

    @unwatched
    def _make_states(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    self.make_state(param, group)

    def _saved(self, name, value, param):
        if name == "low":
            value = value.view(torch.bfloat16)
        return sharding.like(value, param) if self._is_cut(name, param) else value

    def _is_cut(self, name, param):
        """Whether a state has the parts that its parameter has."""
        return name == "low"

    @unwatched
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch, but state keeps its dtype: torch would cast it to the parameter's."""
        self._adopt()
        super().load_state_dict(state_dict)
        in_groups = [group.pop("loss_scale", None) for group in self.param_groups]
        saved = state_dict.get("loss_scale", in_groups[0])
        if isinstance(self._scaling(), LossScale) and saved is not None:
            self.scalars.set(saved["grad_scale"], saved["growth_tracker"], saved["stuck"])
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for index, param in zip(indices, self._params()):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor):
                    value = sharding.local(value).to(sharding.local(param).device, copy=True)
                    self.state[param][key] = value.view(torch.int16) if key == "low" else value

    def __setstate__(self, state):
        super().__setstate__(state)
        self.state = _State(self, self.state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def __getstate__(self):
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled: its hooks belong to the model's "
            "parameters; save state_dict() and load it into a new optimizer"
        )

    # -- driving a step ----------------------------------------------------------------------------

    def backward(self, loss: Tensor) -> None:
        """One whole step: backward, once or twice as clipping and `strategy` need, and `step()`.

        Raises:
            RuntimeError: the loss depends on no parameter of the optimizer; the step before is not
                closed; another optimizer has taken over.
        """
        if self.needs_norm:
            self.grad_norm(loss)
        self.fused_backward(loss)

    def grad_norm(self, loss: Tensor) -> Tensor | None:
        """The global norm of the gradients of `loss`, before the first update.

        With `clip_grad_norm` and norm="global" it also fixes the clip coefficient for the updates
        that follow, and whether they may write at all: a non-finite gradient anywhere skips the
        whole step. With one backward the gradients wait for `fused_backward` or `step()`, and the
        graph of `loss` is gone; otherwise the graph is kept.

        Returns:
            The total norm before clipping, a float32 tensor on the device (the host does not wait).
        """
        self._open_for_backward()
        if self._step.is_decided:
            self._close()  # a norm that no update followed
        keeps = self._choose(loss) if self.needs_norm else set()
        with self._own_backward():
            if keeps is None:
                self.scale(loss).backward()
            else:
                self._first_backward(loss, keeps)
            self._decide()
            if not self._step.is_decided:
                self._refuse_if_unreachable(loss)
        return self._step.grad_norm

    def _first_backward(self, loss, keeps):
        step = self._step
        if step.waiting or any(p.grad is not None for p in unwatched(self._params)()):
            raise RuntimeError(
                "grad_norm() cannot add to gradients that are held: run every backward of the step "
                "under `with optimizer.accumulate():` and then step(), or call zero_grad() first"
            )
        trained = self._trained()
        inputs = self._leaves_in(loss, keeps)
        step.measuring(keeps)
        try:
            # Only the optimizer's parameters: others would accumulate their gradients twice.
            torch.autograd.backward(self.scale(loss), retain_graph=True, inputs=inputs)
        except RuntimeError as error:
            if (better := notices.explained(error)) is not None:
                raise RuntimeError(better) from error
            raise
        step.measured(trained)

    def _leaves_in(self, loss, keeps):
        """Inputs of the first of two backwards; None: all leaves of the graph. For a second one
        that is limited (`keeps`) also the leaves that are not the optimizer's: tensors that other
        optimizers train, or whose gradient a user looks at."""
        trained = self._trained()
        if self.ranks is None or (self._leaves is not None and self._leaves.know(trained)):
            own = self._leaves_of(trained)
            if keeps:  # otherwise the second backward is a whole one
                ids = {id(leaf) for leaf in own} | self.numbers.keys()
                leaves = unwatched(graph_of)(loss).leaves
                self._step.others = [leaf for key, leaf in leaves.items() if key not in ids]
            return own
        if keeps:
            raise RuntimeError(notices.UNKNOWN_LEAVES)
        graph = unwatched(graph_of)(loss)
        if len(graph.leaves) > len(trained):
            raise RuntimeError(notices.FOREIGN_LEAVES)
        return None

    def _leaves_of(self, params):
        return list(params) if self._leaves is None else self._leaves.of(params)

    @unwatched
    def _decide(self):
        self._step.decide(self.clip_grad_norm if self.needs_norm else None)
        self._report = self._step.report
        self.cancellation.close()

    def fused_backward(self, loss: Tensor, lr: float | None = None) -> None:
        """Backward with every update inside it, then `step()`.

        After a `grad_norm(loss)` that left gradients waiting there is no second backward for them:
        only their updates.

        Args:
            loss: a scalar tensor; multiplied by `loss_scale` here.
            lr: sets the learning rate of every group; None keeps each group's own.
        """
        if lr is not None:
            for group in self.param_groups:
                group["lr"] = lr
        self._open_for_backward()
        if self._everything_was_dropped():
            self._close(abandon=True)
        step = self._step
        if step.to_come is None:
            with self._own_backward():
                self.scale(loss).backward()
                if self._nothing_came():
                    self._refuse_if_unreachable(loss)
        elif step.to_come or step.others:
            with self._own_backward():
                # Where nothing waits it is a whole one, as if there had been no first.
                limited = step.is_partial
                inputs = self._leaves_of(step.to_come) + step.others if limited else None
                torch.autograd.backward(self.scale(loss), inputs=inputs)
        self.step()

    @unwatched
    def _nothing_came(self):
        return self._step.is_empty and all(p.grad is None for p in self._params())

    @unwatched
    def _everything_was_dropped(self):
        """Whether gradients whose norm is known were dropped (zero_grad() of the model)."""
        step = self._step
        left = step.waiting or step.to_come or any(p.grad is not None for p in self._params())
        return step.is_decided and not left

    @unwatched
    def _refuse_if_unreachable(self, loss):
        """No gradient came: fine where the graph holds the parameters, whose gradient is then
        undefined, or where a part of the graph cannot be seen."""
        trained, graph = self._trained(), graph_of(loss)
        leaves = self._leaves_of(trained)
        if not graph.repeats and not any(id(leaf) in graph.leaves for leaf in leaves):
            self._refuse_replaced(trained)
            notices.refuse_graph([self.name_of(p) for p in trained[:3]])

    def _no_gradient(self):
        """A step() to which no gradient came: often an extra call, sometimes a mistake. A loop may
        make one every time, so only the first, second, fourth ... is looked into."""
        self._empty_steps += 1
        if not self._attached or self._empty_steps & (self._empty_steps - 1):
            return
        trained = self._trained()
        self._refuse_replaced(trained)
        if not trained:
            self.told.warn(notices.FROZEN)
        elif not self._reached and self._empty_steps == 2:
            self.told.warn(notices.NOTHING)

    def _refuse_replaced(self, params):
        if (module := self._module()) is None:
            return
        names = [self._names[id(p)] for p in params if id(p) in self._names]
        gathered = set() if self._leaves is None else self._leaves.ids()
        notices.refuse_replaced(module, names, self.numbers.keys() | gathered)
        if self._failed and (left := self._leaves.left_in(module, names)):
            raise RuntimeError(notices.BROKEN_ENGINE.format(name=left[0]))

    def _refuse_if_taken_over(self):
        if self._taken_over:
            raise RuntimeError(notices.TAKEN_OVER)

    @contextlib.contextmanager
    def _own_backward(self):
        """After an error the gradients that wait are dropped; updates stay."""
        self._announced = True
        try:
            yield
        except BaseException:
            self._failed = self._leaves is not None
            self._drop()
            raise
        finally:
            self._announced = False

    def _drop(self):
        self._close(abandon=True)
        self._forget_forwards()

    def _forget_forwards(self):
        """What the forwards of a step did with the parameters."""
        self._watch.usage.clear()
        if self._leaves is not None:
            self._leaves.close()

    def scale(self, loss: Tensor) -> Tensor:
        """loss * loss_scale, for `opt.scale(loss).backward()`; the updates divide by it again."""
        scaling = self._scaling()
        if scaling is None:
            return loss
        if self.scalars.is_open and not self.scalars.scaled:
            raise RuntimeError(
                "this step has used gradients of a loss that was not scaled: call step() first"
            )
        self.scalars.scaled = True
        if not isinstance(scaling, LossScale):
            return loss * scaling
        self.scalars.open()
        return loss * self.scalars.scale(loss.device)

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Adds up the gradients of several backwards before they are used.

        They are accumulated in `param.grad`, in the ordinary way and the memory of all gradients.
        The next backward outside adds to them and uses the sum; or `step()` does. With
        clip_grad_norm and norm="global" gradients wait for `step()` anyway, as factors while those
        are smaller (see `strategy`); with strategy="two_backward" run every backward of the step
        inside.
        """
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def remove(self) -> None:
        """Takes the hooks off the model. `step()` then updates from `param.grad`, as in torch."""
        self._attached = False
        self._watch.release()
        if self._leaves is not None:
            self._leaves.remove()

    # -- what happened -----------------------------------------------------------------------------

    @property
    def backend(self) -> str:
        """Name of the backend that updates the first parameter's device."""
        first = next(self._params())
        module = ops.pick_backend(first.device, self.backend_name, first.dtype)
        return module.__name__.rpartition(".")[2]

    @property
    def last_step_skipped(self) -> bool:
        """Whether a non-finite gradient made the last step skip its updates; asks the device.

        All or nothing after a norm pass (`grad_norm`, or held gradients and a global norm): nothing
        at all was written. Otherwise the parameters that backward reached before the non-finite
        gradient are updated, the elements with a non-finite gradient never.
        """
        devices = [] if self._last is None else self._last.devices
        return any(bool(device.flags.any()) for device in devices)

    @property
    def last_grad_norm(self) -> float | None:
        """Total norm before clipping in the last step, where one was computed; asks the device."""
        norm = None if self._last is None else self._last.grad_norm
        return None if norm is None else float(norm)

    @property
    def last_waiting_bytes(self) -> int:
        """Bytes of factors and gradients that waited for the norm at the end of the last backward.

        Beside activations that are not recomputed they do not raise the peak of a step: backward
        frees more than it keeps.
        """
        return self._report.nbytes if self._report else 0

    def explain(self) -> str:
        """A text: the strategy, its reason, and the gradients that waited in the last step."""
        if not self.needs_norm:
            text = "no global norm: each gradient is used in backward and freed at once"
            if self.strategy == "immediate":
                text += (
                    f"; in the last step {self._products[True]} weights were updated without one, "
                    f"and {self._products[False]} that are used more than once waited for step()"
                )
            return text
        lines = []
        if self._choice:
            lines.append(f"strategy {self._choice.strategy}: {self._choice.why}")
        if self._report:
            lines += self._report.lines()
        return "\n".join(lines) or f"strategy {self.strategy}: no step was made yet"

    @unwatched
    def would_wait(self, loss: Tensor | None = None) -> tuple[list[Waits], list[Waits], int]:
        """After a forward: the bytes that a step would keep until the norm is known.

        Args:
            loss: leaves out weights that its graph does not hold. None: a weight that no watched
                operation used counts as one whose gradient is whole (functions in C++ and autograd
                functions are not seen).

        Returns:
            Lists of `choosing.Waits` of vectors and scalars, and of the weights of watched
            operations in the order of their use; bytes of all other gradients.
        """
        trained = self._trained()
        if self.ranks is not None:
            return self._would_wait_sharded(trained)
        small = [Waits(id(p), self.name_of(p), p.nbytes, True) for p in trained if p.ndim < 2]
        listed = [
            Waits(id(p), self.name_of(p), nbytes, beside)
            for p, nbytes, beside in self._watch.waiting()
        ]
        seen = {each.key for each in listed}
        others = [p for p in trained if p.ndim > 1 and id(p) not in seen]
        if loss is not None and others:
            graph = graph_of(loss)
            others = [p for p in others if graph.repeats or id(p) in graph.leaves]
        return small, listed, sum(p.nbytes for p in others)

    def _would_wait_sharded(self, trained):
        """Whole gradients, reduced: each as large as the largest part that a rank has of it, so
        that all ranks choose alike. None is listed where a backward cannot be limited."""
        waits = {
            id(p): Waits(id(p), self.name_of(p), self.ranks.part(p).nbytes, True) for p in trained
        }
        if self._leaves is None or not self._leaves.know(trained):
            return [], [], sum(each.nbytes for each in waits.values())
        small = [waits.pop(id(p)) for p in trained if p.ndim < 2]
        listed = [waits.pop(key) for key in self._leaves.used() if key in waits]
        return small, listed, sum(each.nbytes for each in waits.values())

    def waiting_tensors(self) -> list[Tensor]:
        """The gradients and factors that wait for the norm now."""
        return self._step.waiting.tensors

    @property
    def loss_scale(self) -> float | None:
        """The factor of the next loss, None without scaling; asks the device if it is dynamic."""
        scaling = self._scaling()
        if isinstance(scaling, LossScale):
            return self.scalars.state()["grad_scale"]
        return scaling

    @property
    def clip_grad_norm(self) -> float | None:
        """The largest norm, or None; may be changed between steps."""
        return self._clip_grad_norm

    @clip_grad_norm.setter
    def clip_grad_norm(self, max_norm: float | None) -> None:
        max_norm = positive_or_none("clip_grad_norm", max_norm)
        check_strategy(
            type(self).__name__, self.norm, self.strategy, self.factor_budget, max_norm,
            self.whole_gradients,
        )  # fmt: skip
        if not self._step.is_empty:
            raise RuntimeError("clip_grad_norm changes between steps: call step() first")
        self._clip_grad_norm = max_norm
        self._step = self._new_step()
        if self._attached:
            self._attach()

    @property
    def loss_scaler(self) -> LossScaler | None:
        """lomo_optim's name of the loss scaling: None without one, else an object with
        `has_overflow_serial` and `loss_scale`."""
        return None if self._scaling() is None else LossScaler(self)

    @property
    def clip_coef(self) -> Any:
        """The clip coefficient of a norm that is known and not used yet, else None; asks the
        device."""
        if not self._step.is_decided or not self.needs_norm:
            return None
        return self.scalars.clip_coef

    @property
    def found_inf(self) -> bool:
        """Whether the step in progress, or else the last one, met a gradient that is not finite;
        asks the device."""
        if self.scalars.is_open:
            return self.scalars.found_inf
        return self.last_step_skipped

    # -- inside ------------------------------------------------------------------------------------

    @property
    def needs_norm(self) -> bool:
        """Whether the norm of all gradients is found before the first update."""
        wanted = self.clip_grad_norm is not None or self.strategy == "one_backward"
        return wanted and self.norm == "global"

    @property
    def own_norms(self) -> bool:
        """Whether each gradient is clipped by its own norm."""
        return self.clip_grad_norm is not None and self.norm == "tensor"

    def name_of(self, param: Tensor) -> str:
        name = self._names.get(id(param))
        return name or f"parameter {self.numbers[id(param)]} of shape {tuple(param.shape)}"

    def _new_step(self):
        everything = self.needs_norm and self.strategy in ("auto", "one_backward")
        return Step(self, Everything() if everything else set())

    def _params(self):
        return (param for group in self.param_groups for param in group["params"])

    def _trained(self):
        return [param for param in self._params() if param.requires_grad]

    @unwatched
    def _attach(self):
        """Watches every parameter that needs a gradient, and no other."""
        watch = self._watch
        watch.wants_factors = self.needs_norm or self.strategy == "immediate"
        others = watch.attach(self._params())
        for other in others:
            other.owner().give_up()
            notices.log_taking_over(type(self).__name__)
        if others:
            watch.attach(self._params())
        if watch.count > len(self.numbers):  # groups were edited
            watch.release(keep={id(p) for p in self._params()})

    def give_up(self) -> None:
        """Another optimizer takes over the parameters."""
        self._taken_over = True
        self._drop()
        self.remove()

    @unwatched
    def _open_for_backward(self):
        self._refuse_if_taken_over()
        self._adopt()
        if self._step.used:
            raise RuntimeError("the step before is not closed: call step() or zero_grad() first")
        if self._holding:
            raise RuntimeError("under accumulate() call loss.backward() itself")
        if not self._attached:
            raise RuntimeError("the hooks were removed: call loss.backward() and step()")
        if not self._trained():
            raise RuntimeError(notices.FROZEN)
        self._attach()  # parameters that were frozen until now

    @unwatched
    def _choose(self, loss):
        """Ids of the parameters whose gradients wait through the first of two backwards; None: one
        backward is enough."""
        if self.strategy == "auto" and self._step.waiting:
            choice = Choice("one_backward", "gradients of this step wait already", frozenset())
        else:
            choice = self._chosen(loss)
        if self._choice is None or self._choice.strategy != choice.strategy:
            logger.info("strategy %s: %s", choice.strategy, choice.why)
        self._choice = choice
        return None if choice.strategy == "one_backward" else choice.keeps

    def _chosen(self, loss):
        if self.strategy not in ("auto", "partial"):  # sizes do not matter
            return chosen(self.strategy, [], [], 0, 0)
        needs = *self.would_wait(loss), self._budget()
        choice = chosen(self.strategy, *needs)
        if self.strategy == "auto" and choice.strategy != "one_backward":  # costs a look at it
            choice = chosen(self.strategy, *needs, once=graph_of(loss).repeats)
        return choice

    def _budget(self):
        if self.factor_budget is not None:
            return self.factor_budget
        if self.ranks is not None:
            return default_budget(sum(self.ranks.part(p).nbytes for p in self._params()))
        return default_budget(sum(p.nbytes for p in self._params()))

    # -- told by the watch -------------------------------------------------------------------------

    @unwatched
    def on_read(self, param, frame):
        """`.grad` is read; says whether it reads as None."""
        if self._step.is_empty and param.grad is None:
            return False
        reader = notices.Reader(frame)
        hidden = self._step.read(param, reader)
        if reader.drops and self._step.is_over and not self._holding:
            self._close(abandon=not self._step.wrote)
        return hidden

    @unwatched
    def on_write(self, param, frame):
        """`.grad` is assigned or deleted: the gradient that waits is dropped."""
        if not notices.is_engine(frame):
            self._step.waiting.drop(param)

    def on_data(self, param, data):
        """`.data` is read (`data` is what the reader has) or assigned (None)."""

    @unwatched
    def on_factors(self, param, factors):
        """In backward: the factors of a gradient; whether they are taken in its place."""
        self._reached = True
        if param.grad is not None:  # accumulated or shown: autograd adds to it
            return False
        in_blocks = self.strategy == "immediate" and not self._holding
        taken = self._step.offer(param, factors, self._watch.used_once(param), in_blocks)
        self._compare_with_budget()
        return taken

    @unwatched
    def on_gradient(self, param):
        """In backward: `param.grad` is complete."""
        if not self._asked_for_ddp:
            self._asked_for_ddp = True
            notices.refuse_ddp(self.numbers)
        self._reached = True
        if id(param) in self._step.shown:  # the reader's tensor stays, and grows as in torch
            return
        if self._holding and self._step.fate(param) is not Fate.WAIT:
            return
        grad = self._taken(param)
        self._step.take(param, grad)
        if grad is not None:  # else its factors were taken, or nothing flowed into it
            self._compare_with_budget()

    def _compare_with_budget(self, last=False):
        """A bare loss.backward() leaves no choice of a strategy: "auto" says so once. Compared are
        the state above the budget, every doubling of it, and the last before the norm is known."""
        step = self._step
        if step.waiting.nbytes <= step.look_above and not last:
            return
        announced = self._announced or self._holding or not self._attached
        if step.is_announced or announced or self.strategy != "auto" or not self.needs_norm:
            step.is_announced, step.look_above = True, math.inf
            return
        budget, bound = self._budget(), step.waiting.nbytes
        step.look_above = budget if bound <= budget else 2 * bound
        if (nbytes := step.waiting.beside(self._watch)) > budget:
            self.told.above_budget(nbytes, budget)

    # -- for rules ---------------------------------------------------------------------------------

    def update(
        self,
        pieces: list[Piece],
        group: dict[str, Any],
        numbers: list[int],
        scalars: dict[str, Any],
    ) -> None:
        """The rule itself: writes `piece.tensor` by `piece.grad` for each of the pieces.

        Args:
            pieces: parameters, or parts of them, of one group.
            group: its options, and "step".
            numbers: of the parameters, for random bits.
            scalars: inv_scale, clip_coef, found_inf and skip, as `ops.lomo_update_` takes them.
        """
        raise NotImplementedError

    def update_all(self, updates: Iterable[tuple[Any, ...]]) -> None:
        """The updates of what waited; a rule whose ranks exchange sums in them does so at once."""
        for update in updates:
            self.update(*update)

    def make_state(self, param: Tensor, group: dict[str, Any]) -> None:
        """Makes the state of a parameter that has none yet: zeros."""
        self.rounding_of(param, group)

    def rounding_of(self, param: Tensor, group: dict[str, Any]) -> tuple[Any, Tensor | None]:
        """How the group stores the parameter, and the int16 halves of it for "split"."""
        rounding, low = group["rounding"], None
        if rounding == "auto":
            rounding = "stochastic" if param.dtype is torch.bfloat16 else "nearest"
        if rounding == "split" and param.dtype is torch.bfloat16:
            state = self.state[param]
            if "low" not in state:
                state["low"] = torch.zeros_like(sharding.local(param), dtype=torch.int16)
            low = state["low"]
            if low.shape != sharding.local(param).shape:
                notices.refuse_shape(self.name_of(param), param, "low", low)
        return rounding, low

    @unwatched
    def _scaling(self):
        """The loss scaling in force: None, a number, or a LossScale."""
        if self._loss_scale == "auto":
            if self.scalars.is_open or not any(
                p.requires_grad and p.dtype is torch.float16 for p in self._params()
            ):
                return None
            self._loss_scale = LossScale()
            self.scalars = self._new_scalars()
            self._step = self._new_step()
        return self._loss_scale

    def _new_scalars(self):
        scale, rule = self._loss_scale, None
        if isinstance(scale, LossScale):
            scale, rule = scale.init_scale, scale
        elif not isinstance(scale, float):
            scale = 1.0
        wide = any(p.dtype is torch.float64 for p in self._params())
        return StepScalars(
            scale, rule, self.backend_name,
            anchor=next(self._params()),
            must_scale=self._scale_was_asked and self.must_scale,
            dtype=torch.float64 if wide else torch.float32, ranks=self.ranks,
        )  # fmt: skip

    @torch.no_grad()
    def _close(self, abandon=False):
        step = self._step
        if self.scalars.scaled and not (step.used or step.wrote or step.is_decided or abandon):
            return  # a scaled loss waits for its backward
        sumsq = step.norms.tensors()
        used = bool(step.used) or step.wrote
        step.devices = self.scalars.close(sumsq, counts=used, abandon=abandon)
        self._step = self._new_step()
        self.told.formed(step.formed)
        if not used:
            return
        if sumsq:
            step.grad_norm = step.devices[0].total_norm
        for group in self.param_groups:
            group["step"] += 1
        self._last, self._products = step, step.products
        # Autocast keeps 16-bit copies of the weights for the block; they are of the old weights.
        torch.clear_autocast_cache()
