"""Sees the uses of an optimizer's parameters, in forward and in backward.

Note [Watched parameters]
A parameter is watched by a hook and by its class. The hook runs when its gradient is complete in
`.grad`. The class is a subclass of the parameter's own whose `__torch_function__` sees every
operation that takes the parameter:
- operations of the table in operations.py become autograd functions that offer factors; any other
  operation runs as always, and the weight is known to be used elsewhere too;
- views that hold one expert of a weight, or all of them transposed, are of a class that does the
  same for operations which take them;
- reads and writes of `.grad` and `.data`, and hooks of others.
No module is changed, subclasses that scale or wrap the plain product work, the quantised or adapted
weight of a layer is left alone, checkpointing's recomputation is seen, and copies and saved files
hold plain parameters.
While torch.compile traces, operators of compiled.py take the place of products: see its Note.
Not seen: operators in C++ that take the weight without a call from Python. They leave an ordinary
gradient, which waits or is used as a whole.

The parameter itself carries the link to its Watch: the hook in its own dict of hooks. So no table
of ids can outlive a parameter, and torch.utils.swap_tensors, which refuses weak references, works.
"""

import functools
import sys
import weakref
from collections import defaultdict

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import CheckpointFunction

from .. import ops
from . import compiled, experts, notices, sharding
from .choosing import factors_are_smaller
from .gradient import Factors
from .operations import OPERATIONS, operation_of


def unwatched(function):
    """For the optimizer's own work on parameters: it is no use of them, and costs less."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    return call


class Usage:
    """What the forwards of a step did with one weight."""

    def __init__(self):
        self.products = 0  # not counting recomputation
        self.experts = set()  # that have a product of their own
        self.elsewhere = False  # used by another operation, or in an unknown way
        self.inputs = self.outputs = 0  # bytes of the factors
        self.shares = False  # its one input is also that of the product before
        # A product's input is not there until backward: it is computed again, or copied.
        self.beside = False


class Watch:
    """The parameters of one optimizer, and the hook on each of them.

    `owner` is the optimizer, held weakly: a model never keeps its optimizer alive. It is told

    - `on_gradient(param)`: in backward, `param.grad` is complete;
    - `on_factors(param, factors) -> bool`: whether factors are taken in place of the gradient;
    - `on_read(param, frame) -> bool`: `.grad` is read by `frame`; whether it reads as None;
    - `on_write(param, frame)`: `.grad` is assigned or deleted by `frame`;
    - `on_data(param, data)`: `.data` is read or assigned.
    """

    def __init__(self, owner):
        self.owner = weakref.ref(owner)
        self.usage = defaultdict(Usage)
        self._wants_factors = False
        self._params, self._handles = {}, {}  # by id, as long as they are attached
        self._matrices = set()
        self.recomputes = set()  # ids of weights whose inputs compiled code makes again in backward
        self._last_input = lambda: None
        _WATCHES.add(self)

    # -- which parameters --------------------------------------------------------------------------

    def attach(self, params):
        """Watches those that need a gradient and are not watched yet.

        Returns:
            The other optimizers that have watched one of them until now.
        """
        others = set()
        for param in params:
            if type(param) in _PLAIN_OF and id(param) in self._handles:
                continue  # swap_tensors and the like leave a plain class behind
            if not param.requires_grad or (
                id(param) in self._handles and type(param) not in _WATCHED
            ):
                continue
            if id(param) in self._handles:
                _link_hooks(param)
                self._handles.pop(id(param)).remove()
            if (other := watch_of(param)) is not None:
                others.add(other)
                continue
            self._attach(param)
            if _has_factors(param):
                self._matrices.add(id(param))
                self._mark(param)
        return others

    def _attach(self, param):
        self._params[id(param)] = param
        self._handles[id(param)] = param.register_post_accumulate_grad_hook(self)
        # Other subclasses have reasons of their own (quantised): only the hook is theirs.
        param.__class__ = _watched_class(type(param))

    @property
    def wants_factors(self):
        """Whether factors are looked for at all."""
        return self._wants_factors

    @wants_factors.setter
    def wants_factors(self, wants):
        if wants is not self._wants_factors:
            self._wants_factors = wants
            for key in self._matrices:
                self._mark(self._params[key])

    def _mark(self, param):
        """Tells code that is compiled from now on whether the weight gives factors."""
        if isinstance(param, _WatchedParameter):
            gives = self._wants_factors and not _others_look(param)
            param.__class__ = _WatchedWeight if gives else _WatchedParameter

    def come_last(self, param):
        """Another hook was added: it has to find `.grad` before this one takes it."""
        if (handle := self._handles.pop(id(param), None)) is not None:
            handle.remove()
            self._handles[id(param)] = param.register_post_accumulate_grad_hook(self)
            self._mark(param)

    def release(self, keep=()):
        """Leaves plain parameters behind, except those whose ids are in `keep`."""
        for key in [key for key in self._handles if key not in keep]:
            param = self._params.pop(key)
            self._handles.pop(key).remove()
            self._matrices.discard(key)
            self.recomputes.discard(key)
            self.usage.pop(key, None)
            _make_plain(param)

    @property
    def count(self):
        return len(self._handles)

    def takes(self, param):
        """Whether factors of this parameter are looked for."""
        return self.wants_factors and id(param) in self._matrices and param.requires_grad

    # -- what forward did --------------------------------------------------------------------------

    def saw_product(self, param, given, output_bytes, expert=None, copied=0):
        """A product of the weight, or of one expert of it, with `given`, or with a copy of it for
        the purpose, of so many bytes."""
        if torch._C._current_graph_task_id() != -1:  # in backward: recomputation
            return
        usage = self.usage[id(param)]
        usage.products += 1
        usage.experts.update([] if expert is None else [expert])
        usage.inputs += copied or given.nbytes
        usage.outputs += output_bytes
        usage.shares = usage.products == 1 and self._last_input() is given
        self._last_input = weakref.ref(given)
        # Non-reentrant checkpointing drops what forward saves through these hooks.
        is_packed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        usage.beside |= is_packed or copied > 0 or id(param) in self.recomputes

    def saw_other(self, param):
        if self.wants_factors and id(param) in self._matrices:
            self.usage[id(param)].elsewhere = True

    def used_once(self, param):
        """Whether the forwards of this step used the weight in one product, or in one for each of
        some experts, and nothing else."""
        usage = self.usage.get(id(param))
        if usage is None or usage.elsewhere or usage.products == 0:
            return False
        return usage.products == (len(usage.experts) or 1)

    def is_beside(self, param):
        """Whether the factors take memory beside that of the activations: also where forward was
        not seen, as reentrant checkpointing's."""
        usage = self.usage.get(id(param))
        return usage is None or usage.products == 0 or usage.beside or usage.elsewhere

    def waiting(self):
        """(param, bytes that a step keeps of it until the norm is known, whether that takes memory
        beside that of the activations) for the weights that this step's forwards used, in the order
        of their first use."""
        alive = False  # the input, when the next weight shares it
        for key, usage in self.usage.items():
            if (param := self._params.get(key)) is not None and self.takes(param):
                alive = alive and usage.shares
                factors, beside = usage.inputs + usage.outputs, usage.beside or usage.elsewhere
                if usage.elsewhere or not factors_are_smaller(factors, param.nbytes):
                    yield param, param.nbytes, beside
                else:
                    yield param, factors - (usage.inputs if alive else 0), beside
                    alive = True

    # -- told by hooks and by the watched class ----------------------------------------------------

    def __call__(self, param):
        if (owner := self.owner()) is not None:
            owner.on_gradient(param)

    @unwatched
    def take(self, param, left, right, experts=None, copies=None):
        """Whether the optimizer takes the factors of a gradient in its place. `copies`: see
        `receive`."""
        owner = self.owner()
        if owner is None or not self.takes(param) or _others_look(param):
            return False
        factors = Factors.of(left.detach(), right.detach(), experts)
        if copies is not None:
            factors = factors._replace(copies=copies)
        return owner.on_factors(param, factors)

    @unwatched
    def receive(self, param, left, right, copies, form):
        """The factors of a gradient that compiled code has not formed: what is not taken is formed
        and accumulated here, where the hook finds it.

        Args:
            copies: () -> left and right in memory of their own, which may be kept.
            form: () -> the gradient.
        """
        accumulate = torch.autograd.graph.get_gradient_edge(param).node
        try:
            if not torch._C._will_engine_execute_node(accumulate):
                return  # of backward(inputs=...)
        except RuntimeError:
            raise RuntimeError(notices.NOT_FORMED) from None
        with torch.no_grad():
            if self.take(param, left, right, copies=copies):
                return
            if param._backward_hooks and _others_look(param):
                raise RuntimeError(notices.LATE_HOOK)
            grad = form()
            param.grad = grad if param.grad is None else param.grad.add_(grad)


def _link_hooks(param):
    """swap_tensors gives a parameter another tensor inside, and leaves the dict of hooks behind
    without a link from it; the assignment makes one."""
    if (hooks := param._post_accumulate_grad_hooks) is not None:
        param._post_accumulate_grad_hooks = None
        param._post_accumulate_grad_hooks = hooks


def watch_of(param):
    """The Watch of a parameter, or None."""
    for hook in (param._post_accumulate_grad_hooks or {}).values():
        if type(hook) is Watch:
            return hook if hook.owner() is not None else None
    return None


_WATCHES: weakref.WeakSet = weakref.WeakSet()


def _watched(key):
    """(Watch, parameter) of the parameter with this id."""
    for watch in list(_WATCHES):
        if (param := watch._params.get(key)) is not None:
            return watch, param
    raise RuntimeError(notices.UNWATCHED)


# The operators get tensors alone.
compiled.watch_of, compiled.watched = watch_of, _watched


def observes(hook):
    """Marks a hook that counts a gradient if there is one, and needs none to be formed."""
    hook.only_observes = True
    return hook


def _others_look(param):
    """Whether hooks of others want to see the gradient."""
    hooks = [*(param._backward_hooks or {}).values(), *param._post_accumulate_grad_hooks.values()]
    return any(type(h) is not Watch and not getattr(h, "only_observes", False) for h in hooks)


def _has_factors(param):
    """Whether it may be the weight of a product: a plain matrix, or what is one in memory."""
    return (
        type(param) in _PLAIN_OF
        and not sharding.is_sharded(param)  # its gradient is a sum over ranks
        and param.ndim > 1
        and param.numel() > 0
        and param.is_contiguous()
        and (param.dtype in ops.DTYPES)
    )


# -- the watched class -----------------------------------------------------------------------------


class _Watched:
    """See Note [Watched parameters]."""

    def __repr__(self, **options):
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.detach().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                plain = torch.nn.Parameter(plain, self.requires_grad)
            return plain.__repr__(**options)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _ENGINE:
            # These run other people's code, so watching goes on inside: they get the places in the
            # graph in place of the parameters.
            kwargs = {k: _edges(v) for k, v in kwargs.items()}
            return func(*(_edges(a) for a in args), **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                return _traced(func, args, kwargs)
            if (seen := _SEEN.get(func)) is not None:
                return seen(func, *args, **kwargs)
            if torch._C._is_tracing():
                return func(*args, **kwargs)
            if not torch.is_grad_enabled():
                if _in_autograd_function():
                    _saw_other(args, kwargs)
                return func(*args, **kwargs)
            for other in (_product, _view):
                if (result := other(func, args, kwargs)) is not NotImplemented:
                    return result
            result = func(*args, **kwargs)
            if any(isinstance(r, torch.Tensor) and r.grad_fn is not None for r in _flat(result)):
                _saw_other(args, kwargs)
            return result


class _WatchedParameter(_Watched, torch.nn.Parameter):
    def __new__(cls, data=None, requires_grad=True):
        return torch.nn.Parameter(data, requires_grad)  # as `type(param)(data)` in offloading tools

    # torch.nn.Parameter(param) marks what `detach` below returns: the mark makes it plain.
    _is_param = property(lambda self: False, lambda self, value: _make_plain(self))


class _WatchedWeight(_WatchedParameter):
    """Gives factors in compiled code. torch compiles again when a weight's class has changed."""


class _WatchedTensor(_Watched, torch.Tensor):
    def __deepcopy__(self, memo):
        if id(self) not in memo:
            with torch._C.DisableTorchFunctionSubclass():
                copied = self.detach().clone().requires_grad_(self.requires_grad)
                if self.grad is not None:
                    copied.grad = self.grad.clone()
            memo[id(self)] = copied
        return memo[id(self)]


class _WatchedFake(_Watched, FakeTensor):  # under FakeTensorMode parameters have no other class
    pass


_WATCHED = {
    torch.nn.Parameter: _WatchedParameter,
    torch.Tensor: _WatchedTensor,
    FakeTensor: _WatchedFake,
}
_PLAIN_OF = {watched: plain for plain, watched in _WATCHED.items()}
_PLAIN_OF[_WatchedWeight] = torch.nn.Parameter


def _watched_class(kind):
    if kind not in _WATCHED and kind is sharding.dtensor():  # which is imported when it is needed
        _WATCHED[kind] = type("_WatchedDTensor", (_Watched, kind), {})
        _PLAIN_OF[_WATCHED[kind]] = kind
    return _WATCHED.get(kind, kind)


def _make_plain(param):
    param.__class__ = _PLAIN_OF.get(type(param), type(param))


class _View(_Watched):
    """A view of a `weight` with experts; `expert`: of which, as experts.VIEWS says. For autograd it
    is like any other view, so whoever does not look at the class uses the weight as always."""

    def __reduce_ex__(self, protocol):
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)


class _TensorView(_View, torch.Tensor):
    pass


class _FakeView(_View, FakeTensor):
    pass


_VIEWS = {torch.Tensor: _TensorView, FakeTensor: _FakeView}


def _view(func, args, kwargs):
    """The view of a weight that is told from other tensors; NotImplemented: it is another one."""
    kind = experts.VIEWS.get(func)
    if kind is None or kwargs or not isinstance(args[0], _Watched) or isinstance(args[0], _View):
        return NotImplemented
    weight, *where = args
    watch = watch_of(weight) if weight.ndim == 3 else None
    if watch is None or not watch.takes(weight) or (expert := kind(weight, *where)) is None:
        return NotImplemented
    view = func(weight, *where)
    view.__class__ = _VIEWS[type(view)]
    view.weight, view.expert = weight, expert
    return view


def _product(func, args, kwargs):
    """What an operation of the table gives for a watched weight, else NotImplemented."""
    operation = operation_of(func)
    given = None if operation is None else operation.weight(args, kwargs)
    if not isinstance(given, _Watched):
        return NotImplemented
    weight, run = given, operation.whole
    if isinstance(given, _View):
        weight = given.weight
        run = operation.transposed if given.expert is experts.ALL else operation.expert
    watch = watch_of(weight)
    if run is None or watch is None or not watch.takes(weight):
        return NotImplemented
    return run(watch, *args, **kwargs)


def _traced(func, args, kwargs):
    """The operation as torch.compile or torch.export traces it."""
    # The flag itself: in traced code is_exporting() is always True with torch 2.11.
    if not compiled.AVAILABLE or torch.compiler._is_exporting_flag or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    if (operation := OPERATIONS.get(func)) is not None and operation.is_compiled:
        weight = operation.weight(args, kwargs)
        if isinstance(weight, _WatchedWeight) and weight.requires_grad:
            result = operation.whole(None, *args, **kwargs)
            if result is not NotImplemented:
                return result
    result = func(*args, **kwargs)
    if isinstance(result, torch.Tensor) and result.requires_grad:
        for weight in _flat([*args, *kwargs.values()]):
            if isinstance(weight, _WatchedWeight):
                with torch.no_grad():
                    torch.ops.lomo.saw_other(weight)
    return result


def _saw_other(args, kwargs):
    for param in _flat([*args, *kwargs.values()]):
        if isinstance(param, _View):
            param = param.weight
        if isinstance(param, _Watched):
            if (watch := watch_of(param)) is not None:
                watch.saw_other(param)
            else:
                _make_plain(param)  # what swap_tensors left in a temporary


def _flat(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


_APPLY = torch.autograd.Function.apply.__func__.__code__


def _in_autograd_function():
    """Whether the forward of an autograd function is running, which uses its arguments without
    gradients. Checkpointing's own is not meant: its backward runs the operations again. Nor is that
    of compiled code, whose uses were seen when it was traced."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code is _APPLY:
            function = frame.f_locals["cls"]
            of_compiler = compiled.AVAILABLE and function.__module__.startswith("torch._functorch.")
            return not of_compiler and function is not CheckpointFunction
        frame = frame.f_back
    return False


# -- reads and writes that are of no operation -----------------------------------------------------


def _owner(param):
    watch = watch_of(param) if isinstance(param, _Watched) else None
    return None if watch is None else watch.owner()


def _read_grad(func, param, *args):
    frame = sys._getframe(2)
    if (owner := _owner(param)) is not None:
        if frame.f_code.co_name in ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>"):
            frame = frame.f_back
        if owner.on_read(param, frame):
            return None
    return func(param, *args)


def _saw_if_in_function(param):
    """An autograd function may detach its weight, and differentiate in its forward."""
    if _in_autograd_function():
        _saw_other((param,), {})


def _write_grad(func, param, *args):
    if (owner := _owner(param)) is not None:
        owner.on_write(param, sys._getframe(2))
    return func(param, *args)


def _data(func, param, *args):
    _saw_if_in_function(param)
    data = func(param, *args)
    if (owner := _owner(param)) is not None:
        owner.on_data(param, data)
    return data


def _add_hook(func, param, *args, **kwargs):
    handle = func(param, *args, **kwargs)
    if (watch := watch_of(param)) is not None:
        watch.come_last(param)
    return handle


def _detach(func, param, *args, **kwargs):
    _saw_if_in_function(param)
    detached = func(param, *args, **kwargs)
    if sys._getframe(2).f_code is _NEW_PARAMETER:  # which wants the type of its argument back
        return torch.Tensor._make_subclass(type(param), detached, False)
    return detached


_NEW_PARAMETER = torch.nn.Parameter.__new__.__code__
_SEEN = {
    torch.Tensor.grad.__get__: _read_grad,
    torch.Tensor.grad.__set__: _write_grad,
    torch.Tensor.grad.__delete__: _write_grad,
    torch.Tensor.data.__get__: _data,
    torch.Tensor.data.__set__: _data,
    torch.Tensor.register_hook: _add_hook,
    torch.Tensor.register_post_accumulate_grad_hook: _add_hook,
    torch.Tensor.detach: _detach,
}
_ENGINE = {torch.autograd.backward, torch.autograd.grad}


def _edges(value):
    if isinstance(value, _Watched):
        with torch._C.DisableTorchFunctionSubclass():  # it takes a view, which is no use of it
            return torch.autograd.graph.get_gradient_edge(value)
    return type(value)(map(_edges, value)) if type(value) in (list, tuple) else value
