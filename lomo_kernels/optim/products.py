"""Operations whose weight gradient is a product of two factors: linear layers and embeddings.

What runs in the place of an operation (operations.py) when its weight is watched: a function that
applies an autograd function, which offers the factors in backward. It answers NotImplemented for
arguments that it does not know; the operation then runs as always.

`watch` is the Watch of the weight: `watch.saw_product(weight, input, output_bytes)` in forward, and
`watch.take(weight, left, right)` in backward, which says whether the factors are taken. It is None
while torch.compile traces: an operator of compiled.py is then what runs, for the entries that have
`is_compiled`.
"""

import contextlib
import weakref

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = {torch.Tensor, torch.nn.Parameter, FakeTensor}


def is_plain(x, weight):
    """Whether x times weight is an ordinary product, differentiated in the ordinary way."""
    return (
        type(x) in _PLAIN  # a watched parameter is not: it is a weight in two places
        and x.layout is torch.strided
        and x.device == weight.device
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
        and x.is_floating_point()
        and is_ordinary_autograd()
    )


def is_ordinary_autograd():
    """Outside torch.func and forward-mode AD, whose rules the functions here do not have."""
    return (
        not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def autocast(tensor, device_type):
    if tensor is None or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def linear(watch, input, weight, bias=None):
    if not is_plain(input, weight) or input.ndim == 0 or (bias is not None and bias.ndim != 1):
        return NotImplemented
    kind = input.device.type
    input = autocast(input, kind)
    if watch is None:
        return torch.ops.lomo.linear(input, weight, autocast(bias, kind), False)[0]
    tokens = input.numel() // max(1, input.shape[-1])
    watch.saw_product(weight, input, tokens * weight.shape[0] * input.element_size())
    return Linear.apply(input, weight, autocast(bias, kind), watch, False)


def addmm(watch, input, mat1, mat2, *, beta=1, alpha=1, out=None):
    if not is_plain(mat1, mat2) or beta != 1 or alpha != 1 or out is not None or input.ndim != 1:
        return NotImplemented
    kind = mat1.device.type
    mat1 = autocast(mat1, kind)
    if watch is None:
        return torch.ops.lomo.linear(mat1, mat2, autocast(input, kind), True)[0]
    watch.saw_product(mat2, mat1, mat1.shape[0] * mat2.shape[1] * mat1.element_size())
    return Linear.apply(mat1, mat2, autocast(input, kind), watch, True)


def embedding(
    watch, input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False,
    sparse=False,
):  # fmt: skip
    if max_norm is not None or scale_grad_by_freq or sparse or not is_ordinary_autograd():
        return NotImplemented
    if type(input) not in (torch.Tensor, FakeTensor):
        return NotImplemented
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    if watch is None:
        return torch.ops.lomo.embedding(input, weight, padding_idx)[0]
    watch.saw_product(weight, input, input.numel() * weight.shape[1] * weight.element_size())
    return _Embedding.apply(input, weight, padding_idx, watch)


def no_autocast(device_type):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def offer(ctx, left, right, experts=None):
    """What this backward wants of the weight: None: nothing; True: its gradient as a tensor; False:
    the factors were taken in its place. `experts`: whose, as in gradient.Factors."""
    accumulate = ctx.next_functions[1][0]
    try:
        if not torch._C._will_engine_execute_node(accumulate):
            return None
    except RuntimeError:  # the engine says in this way that torch.autograd.grad() wants it
        return True
    watch = ctx.watch()
    if watch is None:
        return True
    if torch.is_grad_enabled():  # create_graph: a second derivative may reach the weight as well
        watch.saw_other(ctx.weight)
        return True
    return not watch.take(ctx.weight, left, right, experts)


class Linear(torch.autograd.Function):
    """x @ weight.T + bias, or x @ weight + bias when the weight lies [in, out]; of one expert
    weight[expert] in its place.

    Its backward consists of differentiable operations, so that a gradient penalty may go through
    it once more.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, watch, in_first, expert=None):
        ctx.watch, ctx.in_first, ctx.weight = weakref.ref(watch), in_first, weight
        ctx.expert = expert
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        # in an autocast region x is in its type already
        w = (weight if expert is None else weight[expert]).to(x.dtype)
        with no_autocast(x.device.type):
            if not in_first:
                return F.linear(x, w, bias)
            return x @ w if bias is None else torch.addmm(bias, x, w)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            w = (weight if ctx.expert is None else weight[ctx.expert]).to(x.dtype)
            dx = (g @ (w.T if ctx.in_first else w)).view(x.shape)
        if ctx.needs_input_grad[1]:
            left, right = (flat, g) if ctx.in_first else (g, flat)
            if offer(ctx, left, right, ctx.expert):
                dw = (left.T @ right).to(ctx.weight.dtype)
                if ctx.expert is not None:
                    dw = torch.select_scatter(dw.new_zeros(ctx.weight.shape), dw, 0, ctx.expert)
        if ctx.needs_input_grad[2]:
            db = g.sum(0)
        return dx, dw, db, None, None, None


def without_padding(ids, right, padding):
    """The right factor of an embedding, whose padding row gets no gradient."""
    return right if padding < 0 else right.masked_fill((ids == padding)[:, None], 0.0)


class _Embedding(torch.autograd.Function):
    """F.embedding: row number `ids` of the weight for each token."""

    @staticmethod
    def forward(ctx, ids, weight, padding_idx, watch):
        ctx.watch, ctx.padding_idx, ctx.weight = weakref.ref(watch), padding_idx, weight
        ctx.save_for_backward(ids)
        return torch.embedding(weight, ids, padding_idx)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        rows, padding = ctx.weight.shape[0], ctx.padding_idx
        left, right = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])
        right = without_padding(left, right, padding)
        dw = None
        if offer(ctx, left, right):
            dw = torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)
        return None, dw, None, None
