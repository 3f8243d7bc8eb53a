"""Sees what a model does with its weights, and takes the factors of their gradients.

Note [Watched parameters]
A weight is watched by giving it a subclass of `torch.nn.Parameter` whose `__torch_function__` sees
every operation that takes the weight. `F.linear`, `torch.addmm(bias, x, weight)` (Conv1D of GPT-2)
and `F.embedding` become an autograd function that hands over the factors; any other operation runs
as it always does, and if it can be differentiated the weight is known to be used elsewhere too. So
nobody's module is changed, subclasses that scale or wrap the plain product work, what a quantised
or adapted layer does to its weight first is left alone, checkpointing's recomputation is seen, and
copies and saved files hold plain parameters.
Not seen: code that torch.compile has compiled, and operators in C++ that take the weight without
asking. Those leave an ordinary gradient, which is held and added.
"""

import contextlib
import functools
import sys
import weakref
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from .. import ops
from .linear import use


def unwatched(function):
    """For our own work on parameters: it is no use of them, and many small operations cost less."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    return call


class Seen:
    """What the forwards of a step did with one weight."""

    def __init__(self):
        self.products = 0  # not counting recomputation
        self.elsewhere = False  # used by another operation, or in an unknown way
        self.inputs = self.outputs = 0  # bytes of the factors
        self.shares = False  # its one input is also that of the product before
        self.recomputed = False  # a product's input is dropped and computed again in backward


class Watch:
    """The watched parameters of one optimizer.

    `on_product(param, use)` is called in backward for every product with a watched weight and
    answers whether it took the factors; if not, the gradient is formed as always. `on_read(frame)`
    is called when the gradient of a watched parameter is looked at, with the frame that does it.
    """

    def __init__(self, on_product, on_read):
        self._on_product = weakref.WeakMethod(on_product)
        self._on_read = weakref.WeakMethod(on_read)
        self._watched = {}
        self._weights = set()
        self._last_input = lambda: None
        self.seen = defaultdict(Seen)

    def watch_weights(self, params):
        """Takes the factors of those that are plain matrices."""
        for param in params:
            if id(param) in self._weights:
                continue
            if param.ndim != 2 or not param.numel() or not param.is_contiguous():
                continue
            if param.requires_grad and param.dtype in ops.DTYPES and self._watch(param):
                self._weights.add(id(param))

    def watch_reads(self, params):
        """Notices who looks at gradients: one parameter is enough, they look at all of them."""
        if not self._watched:
            next(filter(self._watch, params), None)

    def _watch(self, param):
        # Subclasses have reasons of their own (quantised, sharded); not our business.
        if (watched := _WATCHED.get(type(param))) is not None:
            param.__class__ = watched
            _OWNERS[id(param)] = weakref.ref(self)
            self._watched[id(param)] = param
        return id(param) in self._watched

    def read(self, frame):
        if (method := self._on_read()) is not None:
            method(frame if frame.f_code.co_name != "<listcomp>" else frame.f_back)

    def takes(self, param):
        return id(param) in self._weights and param.requires_grad

    def unwatch(self):
        for param in self._watched.values():
            param.__class__ = _plain_class(param)
            del _OWNERS[id(param)]
        self._watched.clear()
        self._weights.clear()
        self.seen.clear()

    def used_once(self, param):
        """Whether the forwards of this step used the weight in one product and nothing else."""
        seen = self.seen.get(id(param))
        return seen is not None and seen.products == 1 and not seen.elsewhere

    def waiting(self):
        """(param, bytes that a step keeps of it until the norm is known) for the weights that this
        step's forwards used, in the order of their first use: the factors, or the gradient where
        that is smaller."""
        alive = False  # the input, when the next weight shares it
        for key, seen in self.seen.items():
            if (param := self._watched.get(key)) is not None and self.takes(param):
                alive = alive and seen.shares
                factors = seen.inputs + seen.outputs
                if seen.elsewhere or factors >= param.nbytes:
                    yield param, param.nbytes
                else:
                    yield param, factors - (seen.inputs if alive else 0)
                    alive = True

    def to_wait(self):
        """As `waiting`, and whether it takes room beside that of the activations."""
        for param, size in self.waiting():
            seen = self.seen[id(param)]
            yield param, size, seen.recomputed or seen.elsewhere

    def take(self, param, left, right):
        method = self._on_product()
        return method is not None and method(param, use(left.detach(), right.detach()))

    def saw_product(self, param, given, output_bytes):
        """A product of the weight with `given`."""
        if torch._C._current_graph_task_id() != -1:  # in backward: recomputation
            return
        seen = self.seen[id(param)]
        seen.products += 1
        seen.inputs += given.nbytes
        seen.outputs += output_bytes
        seen.shares = seen.products == 1 and self._last_input() is given
        self._last_input = weakref.ref(given)
        # Non-reentrant checkpointing drops what forward saves through these hooks.
        seen.recomputed |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def saw_other(self, param):
        self.seen[id(param)].elsewhere = True


_OWNERS = {}  # id of a watched parameter, which its Watch keeps alive -> weak reference to that


class _Watched:
    """See Note [Watched parameters]."""

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.__class__ = _plain_class(self)
        return copied

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == _READ and isinstance(args[0], _Watched):
            _OWNERS[id(args[0])]().read(sys._getframe(1))
        if func in _ENGINE:
            # These run other people's code, so watching goes on inside: they get the places in the
            # graph in place of the parameters.
            kwargs = {k: _edges(v) for k, v in kwargs.items()}
            return func(*(_edges(a) for a in args), **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return func(*args, **kwargs)
            product = _PRODUCTS.get(func)
            result = NotImplemented if product is None else product(*args, **kwargs)
            if result is NotImplemented:
                result = func(*args, **kwargs)
                if any(_differentiable(r) for r in _flat(result)):
                    for param in _flat([*args, *kwargs.values()]):
                        if isinstance(param, _Watched) and (factors := _factors(param)) is not None:
                            factors.saw_other(param)
            return result


class _WatchedParameter(_Watched, torch.nn.Parameter):
    pass


class _WatchedFake(_Watched, FakeTensor):  # under FakeTensorMode parameters have no other class
    pass


_WATCHED = {torch.nn.Parameter: _WatchedParameter, FakeTensor: _WatchedFake}
_PLAIN = {torch.Tensor, *_WATCHED, *_WATCHED.values()}


def _plain_class(param):
    return next(plain for plain, watched in _WATCHED.items() if type(param) is watched)


_READ = torch.Tensor.grad.__get__
_ENGINE = {torch.autograd.backward, torch.autograd.grad}


def _edges(value):
    if isinstance(value, _Watched):
        with torch._C.DisableTorchFunctionSubclass():  # it takes a view, which is no use of it
            return torch.autograd.graph.get_gradient_edge(value)
    return type(value)(map(_edges, value)) if type(value) in (list, tuple) else value


def _flat(value):
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def _differentiable(value):
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _factors(param):
    """The Watch that takes its factors, or None."""
    if not isinstance(param, _Watched):
        return None
    watch = _OWNERS[id(param)]()
    return watch if watch is not None and watch.takes(param) else None


def _plain(x, weight):
    """Whether x times weight is an ordinary product."""
    return (
        type(x) in _PLAIN
        and x.layout is torch.strided
        and x.device == weight.device
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        and x.is_floating_point()
    )


def _autocast(tensor, device_type):
    if tensor is None or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _linear(input, weight, bias=None):
    factors = _factors(weight)
    if factors is None or not _plain(input, weight) or input.ndim == 0:
        return NotImplemented
    if isinstance(input, _Watched) or isinstance(bias, _Watched):
        return NotImplemented
    kind = input.device.type
    input = _autocast(input, kind)
    tokens = input.numel() // max(1, input.shape[-1])
    output_bytes = tokens * weight.shape[0] * input.element_size()
    factors.saw_product(weight, input, output_bytes)
    return _Linear.apply(input, weight, _autocast(bias, kind), factors, False)


def _addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    factors = _factors(mat2)
    if factors is None or not _plain(mat1, mat2) or isinstance(mat1, _Watched):
        return NotImplemented
    if beta != 1 or alpha != 1 or out is not None or input.ndim != 1 or isinstance(input, _Watched):
        return NotImplemented
    kind = mat1.device.type
    mat1 = _autocast(mat1, kind)
    factors.saw_product(mat2, mat1, mat1.shape[0] * mat2.shape[1] * mat1.element_size())
    return _Linear.apply(mat1, mat2, _autocast(input, kind), factors, True)


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
    sparse=False,
):  # fmt: skip
    factors = _factors(weight)
    if factors is None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if type(input) not in (torch.Tensor, FakeTensor):
        return NotImplemented
    factors.saw_product(weight, input, input.numel() * weight.shape[1] * weight.element_size())
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    return _Embedding.apply(input, weight, padding_idx, factors)


_PRODUCTS = {F.linear: _linear, torch.addmm: _addmm, F.embedding: _embedding}


def _no_autocast(device_type):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _purpose(ctx):
    """What this backward wants of the weight: "update", "grad" (`torch.autograd.grad`), or None."""
    accumulate = ctx.next_functions[1][0]
    try:
        return "update" if torch._C._will_engine_execute_node(accumulate) else None
    except RuntimeError:  # its way to say that torch.autograd.grad() wants this gradient
        return "grad"


def _take(ctx, left, right):
    factors = ctx.factors()
    return factors is not None and factors.take(ctx.weight, left, right)


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, or x @ weight + bias when the weight lies [in, out]."""

    @staticmethod
    def forward(ctx, x, weight, bias, factors, in_first):
        ctx.factors, ctx.in_first, ctx.weight = weakref.ref(factors), in_first, weight
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        w = weight.to(x.dtype)  # in an autocast region x is in its type already
        with _no_autocast(x.device.type):
            return torch.addmm(bias, x, w) if in_first else F.linear(x, w, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            w = weight.to(x.dtype)
            dx = (g @ (w.T if ctx.in_first else w)).view(x.shape)
        if ctx.needs_input_grad[1] and (purpose := _purpose(ctx)) is not None:
            left, right = (flat, g) if ctx.in_first else (g, flat)
            if purpose == "grad" or not _take(ctx, left, right):
                dw = (left.T @ right).to(ctx.weight.dtype)
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db, None, None


class _Embedding(torch.autograd.Function):
    """F.embedding: row number `ids` of the weight for each token."""

    @staticmethod
    def forward(ctx, ids, weight, padding_idx, factors):
        ctx.factors, ctx.padding_idx, ctx.weight = weakref.ref(factors), padding_idx, weight
        ctx.save_for_backward(ids)
        return torch.embedding(weight, ids, padding_idx)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        rows, padding = ctx.weight.shape[0], ctx.padding_idx
        if (purpose := _purpose(ctx)) is None:
            return None, None, None, None
        left, right = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        if padding >= 0:
            right = right.masked_fill((left == padding)[:, None], 0.0)
        dw = None
        if purpose == "grad" or not _take(ctx, left, right):
            dw = torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)
        return None, dw, None, None
