"""Weight gradients that never exist: a matrix keeps the two factors of its gradient instead.

For `y = x @ W.T` the gradient is `dW = G.T @ X`, with G the gradient of y and X the input, one row
per token. The factors are all that a step needs: the norm comes from them (Gram matrices, or blocks
of dW that are squared and dropped) and so does the update (blocks of dW through the fused kernel).
Related: ghost norms and Book-Keeping (arXiv 2210.00038), and the split of backward into an input
and a weight half in zero-bubble pipelines (arXiv 2401.10241).

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
import weakref
from collections import defaultdict
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import ops

BLOCK = 1 << 23  # elements of dW that exist at a time, in fp32
TOKENS = 1024  # rows of a Gram matrix that exist at a time
# Gram matrices add up terms that cancel. Their relative error is about 2**-24 times this ratio of
# the sum of magnitudes to the sum; above it, blocks of dW are squared instead.
MAX_CANCELLATION = 256.0


class Use(NamedTuple):
    """One product with a weight [rows, cols]: its gradient is left.T @ right."""

    left: torch.Tensor  # [tokens, rows], or [tokens] row numbers of an embedding
    right: torch.Tensor  # [tokens, cols]
    versions: tuple

    @property
    def nbytes(self):
        return self.left.nbytes + self.right.nbytes


def use(left, right):
    return Use(left, right, (left._version, right._version))


def tokens_of(uses):
    return sum(u.right.shape[0] for u in uses)


def gram_is_cheaper(tokens, rows, cols):
    """Whether two Gram matrices [tokens, tokens] cost fewer FLOPs than dW [rows, cols]."""
    return tokens * (rows + cols) < rows * cols


def _precise(tensor):
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _matmul(a, b):
    """a @ b with fp32 accumulation and result; exact fp32 inputs on a CPU, where 16-bit is slow."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and _HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return _precise(a) @ _precise(b)


_HAS_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


def _left_gram(a, b):
    if a.left.ndim == 2 and b.left.ndim == 2:
        return _matmul(a.left, b.left.T)
    if a.left.ndim == 2:
        return _precise(a.left.index_select(1, b.left))
    if b.left.ndim == 2:
        return _precise(b.left.index_select(1, a.left)).T
    return a.left[:, None] == b.left[None, :]


@torch.no_grad()
def gram_sumsq(uses):
    """||sum of left.T @ right||^2 without the product -> (the sum, the sum of magnitudes).

    ||G.T X||^2 = sum((G G.T) * (X X.T)), in tiles of at most TOKENS rows and half of the symmetric
    matrix; embeddings, whose G is one-hot, and their cross terms with a tied head included. Matrix
    products in fp32 (fp64 for fp64 factors), sums in fp64.
    """
    parts = [
        Use(u.left[i : i + TOKENS], u.right[i : i + TOKENS], ())
        for u in uses
        for i in range(0, u.right.shape[0], TOKENS)
    ]
    total = torch.zeros(2, dtype=torch.float64, device=uses[0].right.device)
    for i, a in enumerate(parts):
        for b in parts[i:]:
            terms = _matmul(a.right, b.right.T).mul_(_left_gram(a, b))
            sums = (terms.sum(dtype=torch.float64), terms.abs_().sum(dtype=torch.float64))
            total.add_(torch.stack(sums), alpha=1.0 if a is b else 2.0)
    return total[0].clamp(min=0.0), total[1]


@torch.no_grad()
def product(uses, first, last, cols, out=None):
    """Rows [first, last) of the sum of left.T @ right, in fp32 (fp64 for fp64 factors)."""
    size = last - first
    if out is None:
        dtype = torch.promote_types(uses[0].right.dtype, torch.float32)
        out = uses[0].right.new_empty(size, cols, dtype=dtype)
    empty = True
    for u in uses:
        if u.left.ndim == 2:
            left = u.left[:, first:last].T
            if u.right.is_cuda and u.right.dtype is not torch.float32:
                part = _matmul(left, u.right)
            else:
                part = None
                out.addmm_(_precise(left), _precise(u.right), beta=0 if empty else 1)
        else:
            # A row that is not in this block is what the operator calls padding: left out.
            row = torch.where((u.left >= first) & (u.left < last), u.left - first, size)
            part = torch.ops.aten.embedding_dense_backward(
                _precise(u.right), row, size + 1, size, False
            )[:size]
        if part is not None:
            out.copy_(part) if empty else out.add_(part)
        empty = False
    return out


class Pending:
    """What a step has so far of one weight's gradient: products, and a held gradient or none."""

    def __init__(self, param):
        self.param = param
        self.uses = []
        self.grad = None

    @property
    def tensors(self):
        grad = [] if self.grad is None else [self.grad]
        return grad + [tensor for u in self.uses for tensor in (u.left, u.right)]

    @property
    def nbytes(self):
        return sum(tensor.nbytes for tensor in self.tensors)

    def hold(self, grad):
        self.grad = grad if self.grad is None else self.grad + grad

    def check(self):
        for u in self.uses:
            if (u.left._version, u.right._version) != u.versions:
                raise RuntimeError(
                    "an activation or its gradient was changed in place after backward had used "
                    "it, and before step(): the weight's gradient can no longer be formed; use "
                    "strategy='two_backward'"
                )

    def blocks(self):
        """(first row, rows of the gradient) one after the other, in one workspace."""
        if not self.uses:
            yield 0, self.grad
            return
        rows, cols = self.param.shape
        size = max(1, min(rows, BLOCK // max(1, cols)))
        workspace = self.uses[0].right.new_empty(size, cols, dtype=torch.float32)
        for first in range(0, rows, size):
            last = min(first + size, rows)
            block = product(self.uses, first, last, cols, workspace[: last - first])
            if self.grad is not None:
                block += self.grad[first:last]
            yield first, block


class Cancellation:
    """Which weights' Gram matrices cannot be trusted, found out without making the host wait.

    On a CPU at once; on a GPU from the last step whose figures have arrived, so that a weight which
    begins to cancel is measured by blocks one or two steps later.
    """

    def __init__(self):
        self._heavy = set()
        self._found = defaultdict(list)  # device -> [(param_id, ratio)]
        self._arriving = []

    def trusts(self, param_id):
        return param_id not in self._heavy

    def note(self, param_id, total, magnitude):
        """-> whether to use `total` now."""
        ratio = magnitude / total
        if ratio.device.type == "cpu":
            if ratio > MAX_CANCELLATION:  # not for NaN
                self._heavy.add(param_id)
            return self.trusts(param_id)
        self._found[ratio.device].append((param_id, ratio))
        return True

    def close(self):
        for device, found in self._found.items():
            ids, ratios = zip(*found)
            host = torch.empty(len(ids), dtype=torch.float64, pin_memory=True)
            host.copy_(torch.stack(ratios), non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._arriving.append((event, ids, host))
        self._found.clear()
        waiting = []
        for event, ids, host in self._arriving:
            if event.query():
                self._heavy.update(i for i, r in zip(ids, host.tolist()) if r > MAX_CANCELLATION)
            else:
                waiting.append((event, ids, host))
        self._arriving = waiting


class Seen:
    """What the forwards of a step did with one weight."""

    def __init__(self):
        self.products = 0  # not counting recomputation
        self.elsewhere = False  # used by another operation, or in an unknown way
        self.tokens = 0
        self.recomputed = False  # a product's input is dropped and computed again in backward


class Factors:
    """Watches weights and takes the factors of their gradients.

    `on_product(param, use)` is called in backward for every product with a watched weight and
    answers whether it took the factors; if not, the gradient is formed as always.
    """

    def __init__(self, on_product):
        self._on_product = weakref.WeakMethod(on_product)
        self._watched = {}
        self.seen = defaultdict(Seen)

    def watch(self, params):
        for param in params:
            # Subclasses have reasons of their own (quantised, sharded); not our business.
            if type(param) is not torch.nn.Parameter or param.ndim != 2 or not param.numel():
                continue
            if param.requires_grad and param.dtype in ops.DTYPES and param.is_contiguous():
                param.__class__ = _Watched
                _OWNERS[id(param)] = weakref.ref(self)
                self._watched[id(param)] = param

    def watches(self, param):
        return id(param) in self._watched

    def unwatch(self):
        for param in self._watched.values():
            param.__class__ = torch.nn.Parameter
            del _OWNERS[id(param)]
        self._watched.clear()
        self.seen.clear()

    def used_once(self, param):
        """Whether the forwards of this step used the weight in one product and nothing else."""
        seen = self.seen.get(id(param))
        return seen is not None and seen.products == 1 and not seen.elsewhere

    def bytes_to_wait(self):
        """Bytes that this step's products keep until the norm is known, beside activations that are
        recomputed anyway: for each weight its factors, or its gradient where that is smaller."""
        total = 0
        for key, seen in self.seen.items():
            if seen.recomputed and (param := self._watched.get(key)) is not None:
                factors = seen.tokens * sum(param.shape) * param.element_size()
                total += min(factors, param.nbytes)
        return total

    def take(self, param, left, right):
        method = self._on_product()
        return method is not None and method(param, use(left.detach(), right.detach()))

    def saw_product(self, param, tokens):
        if torch._C._current_graph_task_id() != -1:  # in backward: recomputation
            return
        seen = self.seen[id(param)]
        seen.products += 1
        seen.tokens += tokens
        # Non-reentrant checkpointing drops what forward saves through these hooks.
        seen.recomputed |= torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def saw_other(self, param):
        self.seen[id(param)].elsewhere = True


_OWNERS = {}  # id of a watched parameter, which its Factors keeps alive -> weak reference to those


def watched(param):
    """Whether some optimizer takes this parameter's factors."""
    return id(param) in _OWNERS


class _Watched(torch.nn.Parameter):
    """See Note [Watched parameters]."""

    def __deepcopy__(self, memo):
        copied = super().__deepcopy__(memo)
        copied.__class__ = torch.nn.Parameter
        return copied

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
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
                        if type(param) is _Watched and (factors := _factors(param)) is not None:
                            factors.saw_other(param)
            return result


_ENGINE = {torch.autograd.backward, torch.autograd.grad}


def _edges(value):
    if type(value) is _Watched:
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
    """The Factors that watch it, if its gradient is wanted."""
    if type(param) is not _Watched or not param.requires_grad:
        return None
    return _OWNERS[id(param)]()


def _plain(x, weight):
    """Whether x times weight is an ordinary product."""
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter, _Watched)
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
    if type(input) is _Watched or type(bias) is _Watched:
        return NotImplemented
    factors.saw_product(weight, input.numel() // max(1, input.shape[-1]))
    kind = input.device.type
    return _Linear.apply(_autocast(input, kind), weight, _autocast(bias, kind), factors, False)


def _addmm(input, mat1, mat2, *, beta=1, alpha=1, out=None):
    factors = _factors(mat2)
    if factors is None or not _plain(mat1, mat2) or type(mat1) is _Watched:
        return NotImplemented
    if beta != 1 or alpha != 1 or out is not None or input.ndim != 1 or type(input) is _Watched:
        return NotImplemented
    factors.saw_product(mat2, mat1.shape[0])
    kind = mat1.device.type
    return _Linear.apply(_autocast(mat1, kind), mat2, _autocast(input, kind), factors, True)


def _embedding(
    input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
    sparse=False,
):  # fmt: skip
    factors = _factors(weight)
    if factors is None or max_norm is not None or scale_grad_by_freq or sparse:
        return NotImplemented
    if type(input) is not torch.Tensor:
        return NotImplemented
    factors.saw_product(weight, input.numel())
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
