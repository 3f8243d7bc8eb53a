"""What becomes of each gradient of a step.

Note [Fates]
A gradient arrives in backward as a tensor (`take`), or, for a watched weight, as the factors of one
(`offer`), which may be declined: autograd then forms the tensor. One of three things becomes of it:

          a tensor             factors
WAIT      added to the others  kept, where they are smaller than the gradient would be
MEASURE   its norm is noted    its norm is noted, where Gram matrices cost less
APPLY     used, and freed      used in blocks: strategy "immediate", a weight that was used once

A loop over experts brings a product for each; they are measured or applied when the last has come.

A strategy is the set of parameters whose gradients wait for the norm: all of them ("one_backward"),
none ("two_backward": a first backward measures them, a second one brings them again), or those
nearest the input ("partial"). Without a global norm a gradient waits only where "immediate" cannot
use it at once. While gradients wait nothing is written, so a further backward before `step()` adds
to them.
"""

import enum
import math
import weakref
from collections import Counter, defaultdict

import torch

from . import notices, sharding
from .gradient import Gradient
from .norms import Norms
from .waiting import Report, Waiting

Fate = enum.Enum("Fate", ("WAIT", "MEASURE", "APPLY"))
Phase = enum.Enum("Phase", ("OPEN", "MEASURING", "DECIDED"))
TOGETHER = 1 << 20  # bytes of a parameter up to which its gradient, if it waited, shares a launch


class Everything(set):
    """The set of all keys."""

    def __contains__(self, key):
        return True


class Step:
    """The step in progress; a new one for every step, so that nothing of a dropped step stays.

    phase: OPEN, until a first of two backwards is MEASURING or the norm is DECIDED.
    keeps: ids of the parameters whose gradients wait.
    used: ids of those whose gradient this backward has measured or applied.
    known: ids of those whose gradients are in the norm and wait for their update.
    to_come: the parameters whose gradients a second backward brings; None: no backward has run.
    others: tensors that are not the optimizer's and get their gradients in that second backward.
    wrote: whether an update was launched.
    """

    def __init__(self, optimizer, keeps):
        self._optimizer = weakref.proxy(optimizer)  # hooks never keep it alive
        self.phase = Phase.OPEN
        self.keeps = keeps
        self.waiting = Waiting()
        self._arriving = Waiting()  # factors of experts, until those of all have come
        self.used, self.known, self.to_come = set(), set(), None
        self.others, self.is_partial = [], False
        self.wrote = False
        self.look_above = 0  # bytes that wait, from which on they are compared with the budget
        self.is_announced = False  # whether the optimizer knew of the backward before it began
        self.shown = set()  # ids of parameters whose gradient a reader has in `.grad`
        self.formed = notices.Formed()
        self.scalars = optimizer.scalars
        self.norms = Norms(
            optimizer.numbers, self.scalars, optimizer.cancellation, optimizer.backend_name
        )
        self.grad_norm = self.report = None
        self.products = Counter()  # "immediate": whether in backward -> how many weights
        self.devices = []  # the scalars on each device, once the step is closed

    def fate(self, param):
        if id(param) in self.keeps:
            return Fate.WAIT
        return Fate.MEASURE if self.phase is Phase.MEASURING else Fate.APPLY

    @property
    def is_decided(self):
        return self.phase is Phase.DECIDED

    @property
    def is_empty(self):
        """Whether no gradient has arrived."""
        arrived = self.waiting or self._arriving or self.used or self.wrote
        return not arrived and self.phase is Phase.OPEN

    # -- two doors ---------------------------------------------------------------------------------

    def offer(self, param, factors, once, in_blocks):
        """The factors of a gradient; says whether they are taken in its place.

        Args:
            once: whether forward used the weight in this product alone.
            in_blocks: whether an update may be made of them at once.
        """
        fate = self.fate(param)
        once = once or id(param) in self._arriving
        if fate is Fate.APPLY:
            if not in_blocks:
                return False
            self._refuse_second(param)
            if once and factors.is_part:
                return self._arriving.add_factors(param, factors)
            if once:
                self._arrives(param, factors.right.device)
                self.products[True] += 1
                self.apply(Gradient(param, factors=[factors]))
                return True
            self.keeps.add(id(param))  # the rest of its gradient is to come
        if fate is Fate.MEASURE:
            if id(param) in self.used or not once:
                return False
            if factors.is_part:
                return self._arriving.add_factors(param, factors)
            gradient = Gradient(param, factors=[factors])
            taken = bool(self.norms.measure_products([(self._number(param), gradient)]))
            self.used.update([id(param)] if taken else [])
            return taken
        self.scalars.on(factors.right.device)  # asks whether the loss was scaled
        return self.waiting.add_factors(param, factors)

    def take(self, param, grad, fate=None):
        """The gradient, complete: beside the parts that came as factors. None: there are no others
        than these, if any."""
        fate = self.fate(param) if fate is None else fate
        if (gradient := self._arriving.drop(param)) is None:
            if grad is None:
                return
            gradient = Gradient(param, grad)
        elif grad is not None:
            gradient.add(grad)
        if fate is Fate.WAIT:
            self.scalars.on(grad.device)  # asks whether the loss was scaled
            self.waiting.add(param, grad, all_wait=isinstance(self.keeps, Everything))
        elif id(param) in self.known:
            raise RuntimeError(
                "the gradients of this step are known and wait: call fused_backward(loss, lr) or "
                "step(), not another backward"
            )
        else:
            self._arrives(param, gradient.device)
            if fate is Fate.MEASURE:
                self.norms.measure(self._number(param), gradient)
            else:
                self.products[True] += bool(gradient.factors)
                self.apply(gradient)

    def _arrives(self, param, device):
        """A gradient that is measured or applied now."""
        self._refuse_second(param)
        self.scalars.on(device)  # asks whether the loss was scaled
        if self._optimizer.needs_norm and self.phase is Phase.OPEN:
            raise RuntimeError(
                f"with strategy={self._optimizer.strategy!r} clip_grad_norm needs the norm of all "
                "gradients before the first update: call optimizer.backward(loss), or "
                "grad_norm(loss) and then fused_backward(loss, lr), or hold the gradients (`with "
                "optimizer.accumulate(): loss.backward()`, then step()), or take another strategy"
            )
        self.used.add(id(param))

    def _refuse_second(self, param):
        if id(param) in self.used:
            raise RuntimeError(
                f"{self._optimizer.name_of(param)} received a second gradient in one step: call "
                "step() after each backward, or put the earlier ones of a step under "
                "`with optimizer.accumulate():`; if there was one backward, an operation that the "
                "optimizer cannot see or count uses this weight too: take "
                "strategy='one_backward'"
            )

    def _number(self, param):
        return self._optimizer.numbers[id(param)]

    # -- others look at gradients ------------------------------------------------------------------

    @property
    def is_over(self):
        """Whether gradients came and all of them were dropped again."""
        return not (self.waiting or self.used or self.is_empty)

    def read(self, param, reader):
        """`param.grad` is read: a gradient that waits is formed there; says whether the reader gets
        None all the same."""
        optimizer = self._optimizer
        waits, used = id(param) in self.waiting, id(param) in self.used
        if reader.drops:
            if used and self.wrote:
                optimizer.told.cannot_take_back(reader)
            self.waiting.drop(param)
            self.used.discard(id(param))
            return False
        if reader.needs_none:
            return False
        if reader.scales and (waits or self.used):
            optimizer.told.nothing_to_read(reader)
        if reader.clips and optimizer.clip_grad_norm is not None and not reader.clips_by_value:
            if not reader.only_measures:
                optimizer.told.own_clip_decides(optimizer.clip_grad_norm)
            return True
        if waits:
            self._show(param, reader)
        elif used and param.grad is None:
            optimizer.told.nothing_to_read(reader)
        return False

    def _show(self, param, reader):
        gradient = self.waiting.drop(param)
        gradient.check()
        if param.grad is not None:  # a hook looks at a further micro-batch
            gradient.add(sharding.local(param.grad))
        param.grad = sharding.like(gradient.whole(param.dtype), param)
        self.shown.add(id(param))
        self.formed.add(param.grad.nbytes, reader.place)

    # -- from what arrived to updates --------------------------------------------------------------

    def measuring(self, keeps):
        self.phase, self.keeps, self.is_partial = Phase.MEASURING, keeps, bool(keeps)

    def measured(self, params):
        """The first of two backwards is over; `params`: all that have gradients."""
        self.used.clear()
        self.to_come = [p for p in params if id(p) not in self.waiting]

    @torch.no_grad()
    def decide(self, max_norm):
        """The norm of all gradients, measured and waiting, and the scalars that follow from it."""
        self.waiting.check()
        found = self.waiting.measure(self.norms, self._optimizer.numbers)
        self.report = Report(self.waiting, found, self._optimizer.name_of)
        if sumsq := self.norms.tensors():  # else no parameter had a gradient
            self.grad_norm = self.scalars.decide(sumsq, max_norm)
            # From now on nothing waits for the norm, and the same gradients do not come again.
            self.phase, self.keeps = Phase.DECIDED, set()
            if self.to_come is None:
                self.known, self.to_come = Everything(), []
            else:
                self.known = set(self.waiting)

    @torch.no_grad()
    def apply_all(self):
        """Updates from everything that waits."""
        optimizer, together = self._optimizer, defaultdict(list)
        self.waiting.read_ends()
        largest = TOGETHER if optimizer.ranks is None else math.inf  # messages are shared as well
        # Newest first: what backward made last lies in caches still.
        while self.waiting:
            _, gradient = self.waiting.popitem()
            gradient.check()
            param = gradient.param
            self.used.add(id(param))
            self.products[False] += 1
            if param.nbytes <= largest and not gradient.factors and not optimizer.own_norms:
                group = optimizer.group_of[id(param)]
                together[group, gradient.device, param.dtype] += gradient.pieces()
            else:
                self.apply(gradient)
        if together:
            self._update(
                [
                    (pieces, scalars, scalars.clip_coef)
                    for (_, device, _), pieces in together.items()
                    for scalars in [self.scalars.on(device)]
                ]
            )

    def apply(self, gradient):
        if torch.is_grad_enabled():  # a backward with create_graph; the context costs microseconds
            with torch.no_grad():
                self.apply(gradient)
            return
        scalars = self.scalars.on(gradient.device)
        coef = scalars.clip_coef
        if self._optimizer.own_norms:
            number = self._number(gradient.param)
            self.norms.measure(number, gradient)
            slot = self.norms.slots(gradient.device, number)
            if self._optimizer.ranks is not None:
                slot = self._optimizer.ranks.agree_on(gradient.param, slot, scalars.skip)
            coef = scalars.own_coefficient(slot, self._optimizer.clip_grad_norm)
        if self._optimizer.takes_products and gradient.factors and gradient.dense is None:
            self.wrote = True
            group, scalars = self._group_and_scalars(gradient.param, scalars, coef)
            self._optimizer.update_product(
                gradient.by_product(), group, self._number(gradient.param), scalars
            )
            return
        for piece in gradient.pieces(self._optimizer.whole_gradients):
            self._update([([piece], scalars, coef)])

    def _update(self, calls):
        """Of (pieces of one group, device and dtype; scalars of the device; clip coefficient)."""
        self.wrote = True
        optimizer, ranks, updates = self._optimizer, self._optimizer.ranks, []
        for pieces, scalars, coef in calls:
            if ranks is not None:
                pieces = [p._replace(first=ranks.part(p.param).offset) for p in pieces]
            group, scalars = self._group_and_scalars(pieces[0].param, scalars, coef)
            numbers = [optimizer.numbers[id(piece.param)] for piece in pieces]
            updates.append((pieces, group, numbers, scalars))
        optimizer.update_all(updates)

    def _group_and_scalars(self, param, scalars, coef):
        """What a rule is told beside the gradients; the flags are those of one update."""
        skip, found_inf = scalars.next_flags()
        return self._optimizer.param_groups[self._optimizer.group_of[id(param)]], {
            "inv_scale": scalars.inv_scale, "clip_coef": coef, "found_inf": found_inf, "skip": skip,
        }  # fmt: skip
