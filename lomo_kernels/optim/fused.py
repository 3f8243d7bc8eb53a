"""What the optimizers share: hooks, the three ways to drive a step, clipping and loss scale."""

import contextlib
import itertools
import logging
import math
import weakref
from collections import Counter, defaultdict

import torch

from .. import ops
from . import refused
from .clipping import SquaredNorms
from .decisions import Decisions
from .linear import Cancellation, Pending, gram_is_cheaper, gram_sumsq, tokens_of
from .loss_scale import LossScale, asked
from .release import GradientRelease, taken
from .watching import Watch, unwatched

NORMS = ("global", "tensor")
STRATEGIES = ("auto", "one_backward", "two_backward", "partial", "immediate")
TOGETHER = 1 << 20  # bytes of a parameter up to which its held gradient is used with others

logger = logging.getLogger("lomo_kernels")


class _Step:
    """What is known of the step in progress; a new one for every step."""

    def __init__(self):
        self.updated = set()  # ids of the parameters whose gradient was used
        self.pending = {}  # id(param) -> Pending: gradients that wait
        self.kept = set()  # ids of those whose gradients wait in the first of two backwards
        self.products = Counter()  # "immediate": whether in backward -> how many weights
        self.second = None  # the parameters of the second backward, where it is for some only
        self.norm_known = False
        self.grad_norm = None
        self.devices = []  # the scalars on each of them, once the step is closed


class FusedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose updates happen inside backward, one parameter at a time.

    Subclasses give `update(params, grads, group, param_ids, scalars, first_row)`: of parameters of
    one group, device and dtype; or of one, of which grads holds the rows from first_row on, unless
    `whole_gradients` is set.

    Note [Strategies]
    A global norm must be known before the first update. Gradients can wait for it, most of them as
    the two factors that they are a product of (linear.py): one backward, and `step()` finds the
    norm and applies the updates. Or backward runs twice and no gradient waits, as in the paper. Or
    some wait, those of the layers nearest the input, and the second backward stops above them.
    While gradients wait nothing is written, so a second backward before `step()` adds to them.
    Without a global norm nothing has to wait: a gradient is used when it is complete, or
    ("immediate") never formed but in blocks, where its weight is used once in the step.
    """

    whole_gradients = False  # whether an update reads its gradient more than once

    def __init__(
        self, model_or_params, defaults, *, clip_grad_norm, norm, strategy, factor_budget,
        loss_scale, loss_scale_args, backend,
    ):  # fmt: skip
        self._ready = False  # the base class adds the first groups before the rest exists
        self.clip_grad_norm = _positive_or_none("clip_grad_norm", clip_grad_norm)
        self._loss_scale = asked(loss_scale, loss_scale_args)
        self._scale_was_asked = self._loss_scale not in (None, "auto")  # and not to be ignored
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
        if factor_budget is not None:
            if isinstance(factor_budget, bool) or not isinstance(factor_budget, int):
                got = type(factor_budget).__name__
                raise TypeError(f"factor_budget must be a number of bytes or None, got {got}")
            if factor_budget < 0:
                raise ValueError(f"factor_budget must be at least 0 bytes, got {factor_budget}")
        if strategy == "immediate" and self.whole_gradients:
            raise ValueError(
                f"strategy 'immediate' forms gradients in blocks alone, and {type(self).__name__} "
                "needs the whole of each: take another strategy"
            )
        if strategy == "immediate" and norm == "global" and clip_grad_norm is not None:
            raise ValueError(
                "strategy 'immediate' updates before a global norm can be known: take another "
                "strategy, norm='tensor', or no clip_grad_norm"
            )
        self.norm = norm
        self.strategy = strategy
        self.factor_budget = factor_budget
        self._backend = backend
        self._names = {}
        self._places = {}  # id(param) -> (index of its group, param_id)
        self._last = None
        self._holding = self._measuring = False
        self._norms = None
        self._watch = Watch(self._on_product, self._on_read)
        self._told = set()
        self._asked_for_ddp = not torch.distributed.is_available()
        self._cancellation = Cancellation()
        self._choice = self._report = None
        self._products = Counter()
        if isinstance(model_or_params, torch.nn.Module):
            refused.wrapper(model_or_params)
            self._names = {id(p): name for name, p in model_or_params.named_parameters()}
            model_or_params = model_or_params.parameters()
        super().__init__(model_or_params, {**defaults, "step": 0})
        self._decisions = self._new_decisions()
        self._scaling()
        self._step = _Step()
        self._ready = self._attached = True
        self._release = GradientRelease(self._on_gradient)
        self._attach(self._params())
        for take_off in (self._release.remove, self._watch.unwatch):
            weakref.finalize(self, take_off).atexit = False

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
            self._attach(group["params"])

    def _check_group(self, group):
        for key in ("lr", "weight_decay"):
            value = group[key]
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{key} must be a finite number of at least 0, got {value!r}")
        _positive_or_none("clip_grad_value", group["clip_grad_value"])
        rounding, seed = group["rounding"], group["seed"]
        if rounding != "auto" and rounding not in ops.ROUNDINGS:
            raise ValueError(f"rounding must be 'auto' or one of {ops.ROUNDINGS}, got {rounding!r}")
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
        if rounding == "split" and any(p.dtype is torch.float16 for p in group["params"]):
            raise ValueError("rounding 'split' is for bfloat16 parameters, got float16 ones")
        for param in group["params"]:
            name = self._names.get(id(param), "a parameter")
            refused.sharded(param, name)
            if param.requires_grad and param.dtype not in ops.DTYPES:
                raise TypeError(f"{name} must be float32, bfloat16 or float16, got {param.dtype}")
            ops.pick_backend(param.device, self._backend)
            if taken(param):
                raise ValueError(
                    f"{name} belongs to another optimizer already: call its remove() first"
                )

    def step(self, closure=None):
        """Closes the step: uses the gradients that were held back and advances the counters.

        After a backward that updated everything, and without one, there is nothing left to do, so
        calling it once more is harmless. `closure` is called first, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._finish()
        return loss

    @unwatched
    def _finish(self):
        held = [p for p in self._params() if p.grad is not None]
        if held or self._step.pending:
            self._update_held(held)
        if self._attached:
            self._attach(self._params())  # those that were frozen until now
        self._close()
        self._watch.seen.clear()

    @unwatched
    def zero_grad(self, set_to_none=True):
        """Drops gradients that were held back. What backward has already applied stays applied."""
        held = self._step.pending or any(p.grad is not None for p in self._params())
        self._close(abandon=bool(held))
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
        """One whole step: backward, once or twice as clipping and `strategy` need, and `step()`."""
        if self._global_norm:
            self.grad_norm(loss)
        self.fused_backward(loss)

    def grad_norm(self, loss):
        """The global norm of the gradients of `loss`, before the first update.

        With `clip_grad_norm` and norm="global" it also fixes the clip coefficient for the updates
        that follow, and whether they may write at all: a non-finite gradient anywhere skips the
        whole step. With one backward the gradients wait for `fused_backward` or `step()`, and the
        graph of `loss` is gone; otherwise the graph is kept.

        Returns:
            The total norm before clipping, a float32 tensor on the device (the host does not wait).
        """
        self._open_for_backward()
        if self._step.norm_known:
            self._close()  # a norm that no update followed
        choice = self._choose() if self._global_norm else "two_backward"
        if choice == "one_backward":
            with self._dropping_on_error():
                self.scale(loss).backward()
                self._norm_of_pending()
            return self._step.grad_norm
        if self._step.pending or any(p.grad is not None for p in self._params()):
            raise RuntimeError(
                "grad_norm() cannot add to gradients that are held: run every backward of the step "
                "under `with optimizer.accumulate():` and then step(), or call zero_grad() first"
            )
        inputs = [p for p in self._params() if p.requires_grad]
        self._norms = SquaredNorms(len(self._places))
        self._step.kept = self._kept() if choice == "partial" else set()
        self._measuring = True
        try:
            # Only our parameters: what others accumulate must not see this backward twice.
            torch.autograd.backward(self.scale(loss), retain_graph=True, inputs=inputs)
        except BaseException as error:
            self._step.updated.clear()
            self._drop()
            if "use_reentrant" in str(error):
                raise RuntimeError(
                    "the norm pass needs non-reentrant checkpointing: pass use_reentrant=False"
                ) from error
            raise
        finally:
            self._measuring = False
            self._step.updated.clear()
        if self._step.pending:
            self._step.second = [p for p in inputs if id(p) not in self._step.pending]
        self._norm_of_pending()
        return self._step.grad_norm

    def fused_backward(self, loss, lr=None):
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
        second = self._step.second
        if not (self._step.pending and self._step.norm_known) or second:
            with self._dropping_on_error():
                torch.autograd.backward(self.scale(loss), inputs=second)
        self.step()

    @contextlib.contextmanager
    def _dropping_on_error(self):
        """What an interrupted backward left waiting is dropped, what it has written stays."""
        try:
            yield
        except BaseException:
            self._drop()
            raise

    def _drop(self):
        self._close(abandon=True)
        self._watch.seen.clear()

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
        """Adds up the gradients of several backwards before they are used.

        They are held in `param.grad`, in the ordinary way and the memory of all gradients. The next
        backward outside adds to them and uses the sum; or `step()` does. With clip_grad_norm and
        norm="global" gradients wait for `step()` anyway, as factors where those are smaller (see
        `strategy`); with strategy="two_backward" run every backward of the step inside.
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
        self._watch.unwatch()

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
    def last_waiting_bytes(self):
        """Bytes of factors and gradients that waited for the norm at the end of the last backward.

        Beside activations that are not recomputed they do not raise the peak of a step: backward
        frees more than it keeps.
        """
        return self._report["bytes"] if self._report else 0

    def explain(self):
        """What the strategy is, why, and what waited for the norm in the last step: a text."""
        if not self._global_norm:
            text = "no global norm: each gradient is used in backward and freed at once"
            if self.strategy == "immediate":
                text += (
                    f"; in the last step {self._products[True]} weights were updated without one, "
                    f"and {self._products[False]} that are used more than once waited for step()"
                )
            return text
        lines = [f"strategy {self._choice[0]}: {self._choice[1]}"] if self._choice else []
        if self._report:
            r = self._report
            lines.append(
                f"until the norm was known {r['factored']} weights kept factors in place of "
                f"{_mib(r['factored_gradient_bytes'])} of gradients, {r['held']} parameters their "
                f"gradients, {_mib(r['held_bytes'])}; {_mib(r['bytes'])} in all"
            )
            if r["largest"]:
                lines.append(f"largest gradients held: {', '.join(r['largest'])}")
            lines.append(
                f"norms of what waited: {r['gram']} by Gram matrices, {r['blocks']} by blocks of "
                f"the gradient, {r['gradient']} of gradients"
            )
        return "\n".join(lines) or f"strategy {self.strategy}: no step was made yet"

    def would_wait(self):
        """After a forward, for those who plan: (name, bytes, whether beside the room of activations
        that backward frees) of what each matrix would keep until the norm is known, in the order
        of their use; bytes of what is not watched, and of the parameters that wait as they are."""
        listed = [(self._name(p), size, beside) for p, size, beside in self._watch.to_wait()]
        large = [p for p in self._params() if p.requires_grad and p.ndim > 1]
        small = [p for p in self._params() if p.requires_grad and p.ndim < 2]
        others = sum(p.nbytes for p in large if not self._watch.takes(p))
        return listed, others, sum(p.nbytes for p in small)

    def waiting_tensors(self):
        """The gradients and factors that wait for the norm now, for those who count memory."""
        return [t for pending in self._step.pending.values() for t in pending.tensors]

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
        """Whether the norm of all gradients is found before the first update."""
        wanted = self.clip_grad_norm is not None or self.strategy == "one_backward"
        return wanted and self.norm == "global"

    @property
    def _own_norms(self):
        """Whether each gradient is clipped by its own norm."""
        return self.clip_grad_norm is not None and self.norm == "tensor"

    @property
    def _immediate(self):
        return self.strategy == "immediate"

    def _waits(self, param):
        """Whether a gradient that arrives now waits for the norm; see Note [Strategies]."""
        if not self._global_norm or self._step.norm_known:
            return False
        if self._measuring:
            return id(param) in self._step.kept
        return self.strategy in ("auto", "one_backward")

    def _attach(self, params):
        params = list(params)
        self._release.attach(params)
        if self._global_norm or self._immediate:
            self._watch.watch_weights(params)
        self._watch.watch_reads(params)

    def _params(self):
        return (param for group in self.param_groups for param in group["params"])

    def _name(self, param):
        name = self._names.get(id(param))
        return name or f"parameter {self._places[id(param)][1]} of shape {tuple(param.shape)}"

    @unwatched
    def _open_for_backward(self):
        if self._step.updated:
            raise RuntimeError("the step before is not closed: call step() or zero_grad() first")
        if self._holding:
            raise RuntimeError("under accumulate() call loss.backward() itself")
        if not self._attached:
            raise RuntimeError("the hooks were removed: call loss.backward() and step()")
        self._attach(self._params())  # those that were frozen until now

    @unwatched
    def _choose(self):
        """How many backwards, from what the forwards of this step did."""
        if self.strategy != "auto":
            choice = self.strategy, "asked for"
        elif self._step.pending:
            choice = "one_backward", "gradients of this step wait already"
        else:
            # Without recomputation factors replace activations that backward is freeing.
            (listed, needed, _), budget = self.would_wait(), self._budget()
            needed += sum(size for _, size, beside in listed if beside)
            name, why = "one_backward", f"within the budget of {_mib(budget)}"
            if needed > budget:
                name = "partial" if self._kept() else "two_backward"
                why = f"above the budget of {_mib(budget)}"
            why = f"{_mib(needed)} would wait beside the room of activations, {why}"
            choice = name, why
        if self._choice is None or self._choice[0] != choice[0]:
            logger.info("strategy %s: %s", *choice)
        self._choice = choice
        return choice[0]

    def _budget(self):
        if self.factor_budget is not None:
            return self.factor_budget
        return sum(p.nbytes for p in self._params()) // 4

    def _kept(self):
        """Whose gradients wait in strategy "partial": what is small, and the weights that forward
        used first, as far as the budget goes. Backward comes to them last, so a second backward for
        the others ends above them."""
        left, kept = self._budget(), set()
        small = [p for p in self._params() if p.requires_grad and p.ndim < 2]
        first = [(p, size) for p, size in self._watch.waiting() if p.requires_grad]
        for param, size in [(p, p.nbytes) for p in small] + first:
            if size > left:
                break
            left -= size
            kept.add(id(param))
        return kept

    def _on_read(self, frame):
        """Somebody looks at `.grad`; between backward and step() there is nothing to see."""
        if self._step.updated or self._step.pending:
            refused.reader(frame, self.clip_grad_norm, self._told)

    @unwatched
    def _on_product(self, param, use):
        """In backward: a product's factors; whether they are taken in place of a gradient."""
        if self._immediate:
            return self._use_product(param, use)
        if self._waits(param):
            return self._keep_product(param, use)
        return self._measuring and self._measure_product(param, use)

    def _keep_product(self, param, use):
        pending = self._step.pending.get(id(param))
        before = 0 if pending is None else pending.nbytes
        if before + use.nbytes >= param.nbytes or (
            pending is not None and pending.grad is not None
        ):
            return False  # the gradient itself is not larger
        self._pending(param, use.right.device).uses.append(use)
        return True

    @torch.no_grad()
    def _use_product(self, param, use):
        """Updates the weight without its gradient, if nothing else in the graph needs it."""
        if self._holding or param.grad is not None or self._measuring:
            return False
        if not self._watch.used_once(param):
            self._refuse_second(param)
            return self._keep_product(param, use)
        self._refuse_second(param)
        self._step.updated.add(id(param))
        self._step.products[True] += 1
        pending = Pending(param)
        pending.uses.append(use)
        self._apply_pending(pending)
        return True

    def _pending(self, param, device):
        self._decisions_on(device)  # asks whether the loss was scaled
        return self._step.pending.setdefault(id(param), Pending(param))

    @torch.no_grad()
    def _measure_product(self, param, use):
        """In the first of two backwards: the norm from the factors, where that costs less."""
        device, param_id = use.right.device, self._places[id(param)][1]
        if not self._watch.used_once(param) or id(param) in self._step.updated:
            return False
        if not gram_is_cheaper(tokens_of([use]), *param.shape):
            return False
        taken = self._gram(device, param_id, [use])
        if taken:
            self._step.updated.add(id(param))
        return taken

    def _gram(self, device, param_id, uses):
        """Writes the squared norm of a product from Gram matrices, unless they cancel."""
        if not self._cancellation.trusts(param_id):
            return False
        total, magnitude = gram_sumsq(uses)
        if not self._cancellation.note(param_id, total, magnitude):
            return False
        decisions = self._decisions_on(device)
        if decisions.inv_scale is not None:
            total = total * decisions.inv_scale.double().square()
        decisions.skip.masked_fill_(~total.isfinite(), 1.0)
        self._norms.slots(device, param_id).copy_(total)
        return True

    @unwatched
    def _on_gradient(self, param):
        """The hook: `param.grad` is complete."""
        if not self._asked_for_ddp:
            self._asked_for_ddp = True
            refused.ddp(self._places)
        waits = self._waits(param) or (self._immediate and id(param) in self._step.pending)
        if self._holding and not waits:
            return
        grad, param.grad = param.grad, None
        if grad is None:  # its factors were taken, or nothing flowed into it
            return
        if waits:
            self._pending(param, grad.device).hold(grad)
        elif self._is_known(param):
            raise RuntimeError(
                "the gradients of this step are known and wait: call fused_backward(loss, lr) or "
                "step(), not another backward"
            )
        else:
            self._use(param, grad)

    def _is_known(self, param):
        """Whether this step has its gradient, or factors of it, from a backward before."""
        pending, second = self._step.pending, self._step.second
        if not self._global_norm or self._measuring or not pending:
            return False
        return second is None or id(param) in pending

    def _use(self, param, grad):
        """One gradient, in the backward that measures or in the one that updates."""
        self._refuse_second(param)
        self._decisions_on(grad.device)  # asks whether the loss was scaled
        if self._global_norm and not self._step.norm_known and not self._measuring:
            raise RuntimeError(
                f"with strategy={self.strategy!r} clip_grad_norm needs the norm of all gradients "
                "before the first update: call optimizer.backward(loss), or grad_norm(loss) and "
                "then fused_backward(loss, lr), or hold the gradients (`with optimizer."
                "accumulate(): loss.backward()`, then step()), or take another strategy"
            )
        self._step.updated.add(id(param))
        if self._measuring:
            self._measure(self._norms.slots(grad.device, self._places[id(param)][1]), grad)
        else:
            pending = Pending(param)
            pending.hold(grad)
            self._apply_pending(pending)

    def _refuse_second(self, param):
        if id(param) in self._step.updated:
            raise RuntimeError(
                f"{self._name(param)} received a second gradient in one step: call step() after "
                "each backward, or put the earlier ones of a step under "
                "`with optimizer.accumulate():`"
            )

    def _measure(self, out, grad):
        """Squared norm of a gradient, or of some."""
        decisions = self._decisions_on(out.device)
        ops.grad_sumsq_(
            out, grad, inv_scale=decisions.inv_scale, found_inf=decisions.skip,
            backend=self._backend,
        )  # fmt: skip

    def _apply(self, params, grads, clip_coef, first_row=0):
        places = [self._places[id(param)] for param in params]
        decisions = self._decisions_on(grads[0].device)
        skip, found_inf = decisions.next_flags()
        scalars = {
            "inv_scale": decisions.inv_scale,
            "clip_coef": clip_coef,
            "found_inf": found_inf,
            "skip": skip,
        }
        group = self.param_groups[places[0][0]]
        self.update(params, grads, group, [param_id for _, param_id in places], scalars, first_row)

    def _apply_pending(self, pending):
        device = pending.tensors[0].device
        coef = self._decisions_on(device).clip_coef
        if self._own_norms:
            if self._norms is None:
                self._norms = SquaredNorms(len(self._places))
            self._measure_pending(pending)
            sumsq = self._norms.slots(device, self._places[id(pending.param)][1])
            coef = self._decisions_on(device).own_coefficient(sumsq, self.clip_grad_norm)
        blocks = ((0, pending.whole()),) if self.whole_gradients else pending.blocks()
        for first_row, grad in blocks:
            self._apply([pending.param], [grad], coef, first_row)

    def _apply_together(self, pendings):
        """Gradients of one group, device and dtype that were held, small ones: few launches."""
        grads = [pending.grad for pending in pendings]
        coef = self._decisions_on(grads[0].device).clip_coef
        self._apply([pending.param for pending in pendings], grads, coef)

    def rounding_of(self, param, group):
        """How the group stores the parameter, and the int16 halves of it for "split"."""
        rounding, low = group["rounding"], None
        if rounding == "auto":
            rounding = "stochastic" if param.dtype is torch.bfloat16 else "nearest"
        if rounding == "split" and param.dtype is torch.bfloat16:
            state = self.state[param]
            if "low" not in state:
                state["low"] = torch.zeros_like(param, dtype=torch.int16)
            low = state["low"]
        return rounding, low

    @unwatched
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

    @torch.no_grad()
    def _update_held(self, held):
        """Everything that waits: for the norm, under `accumulate()`, or for want of a hook."""
        if self._global_norm and held and self._step.updated:
            raise RuntimeError(
                "clip_grad_norm needs the norm of all gradients before the first update, but "
                f"{self._name(held[0])} still holds one: run every backward of the step under "
                "`with optimizer.accumulate():`"
            )
        for param in held:
            grad, param.grad = param.grad, None
            if self._global_norm or id(param) in self._step.pending:
                self._pending(param, grad.device).hold(grad)
            else:
                self._use(param, grad)
        if self._global_norm and not self._step.norm_known:
            self._norm_of_pending()
        together = defaultdict(list)
        # Newest first: what backward made last lies in caches still.
        while self._step.pending:
            _, pending = self._step.pending.popitem()
            pending.check()
            param = pending.param
            self._step.updated.add(id(param))
            self._step.products[False] += self._immediate
            if param.nbytes <= TOGETHER and not pending.uses and not self._own_norms:
                key = (self._places[id(param)][0], pending.grad.device, param.dtype)
                together[key].append(pending)
            else:
                self._apply_pending(pending)
        for pendings in together.values():
            self._apply_together(pendings)

    @unwatched
    @torch.no_grad()
    def _norm_of_pending(self):
        """The norm of all gradients: of what was measured already, and of what waits."""
        if self._norms is None:
            self._norms = SquaredNorms(len(self._places))
        report = self._report = Counter()
        held, sizes, storages = [], [], {}
        for pending in self._step.pending.values():
            pending.check()
            param, grad = pending.param, pending.grad
            for tensor in pending.tensors:  # one input may feed several weights
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            if pending.uses:
                report["factored"] += 1
                report["factored_gradient_bytes"] += param.nbytes
                report[self._measure_pending(pending)] += 1
            else:
                held.append((self._places[id(param)][1], grad))
                report["held"] += 1
                report["held_bytes"] += grad.nbytes
                sizes.append((grad.nbytes, self._name(param)))
        self._measure_held(held)
        report["gradient"] = len(held)
        report["bytes"] = sum(storages.values())
        report["largest"] = [name for _, name in sorted(sizes, reverse=True)[:3]]
        self._cancellation.close()
        self._decide(self._norms)

    def _measure_held(self, held):
        """Squared norms of (parameter's number, gradient) pairs, of neighbours in one launch."""
        held.sort(key=lambda each: each[0])

        def neighbours(numbered):
            place, (param_id, grad) = numbered
            return grad.device, grad.dtype, param_id - place

        for (device, *_), run in itertools.groupby(enumerate(held), neighbours):
            ids, grads = zip(*(each for _, each in run))
            self._measure(self._norms.slots(device, ids[0], len(ids)), grads)

    def _measure_pending(self, pending):
        """Its squared norm, from factors where that costs less; says how it was found."""
        param, uses = pending.param, pending.uses
        device, param_id = pending.tensors[0].device, self._places[id(param)][1]
        if not uses:
            self._measure(self._norms.slots(device, param_id), pending.grad)
            return "gradient"
        small = pending.grad is None and gram_is_cheaper(tokens_of(uses), *param.shape)
        if small and self._gram(device, param_id, uses):
            return "gram"
        slot = self._norms.slots(device, param_id).zero_()
        part = torch.empty_like(slot)
        for _, grad in pending.blocks():
            self._measure(part, grad)
            slot += part
        return "blocks"

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
        self._last, self._products = step, step.products
        # Autocast keeps 16-bit copies of the weights for the block; they are of the old weights.
        torch.clear_autocast_cache()


def _positive_or_none(name, value):
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number greater than 0, or None, got {value!r}")
    return float(value)


def _mib(size):
    return f"{size / 2**20:.1f} MiB"
