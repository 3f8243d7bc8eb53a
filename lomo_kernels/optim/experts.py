"""Products of weights with experts, [experts, ., .]: all in one grouped product, or one by one.

A loop takes the matrix of one expert, `weight[expert]`; a grouped product may take all of them
transposed, `weight.transpose(-2, -1)`. These views of the weight are told apart from other tensors
(watching.py), so that an operation with one of them counts as a product of the weight.
See gradient.py, Note [Experts].
"""

import weakref

import torch

from .gradient import Ends
from .products import Linear, autocast, is_plain, offer

# -- views -----------------------------------------------------------------------------------------


def _one(weight, index):
    is_number = type(index) is int
    if type(index) is torch.Tensor and index.ndim == 0 and not index.is_floating_point():
        is_number = index.dtype not in (torch.bool, torch.uint8)  # which are masks
    number = int(index) if is_number else len(weight)
    return number % len(weight) if -len(weight) <= number < len(weight) else None


def _all(weight, *dims):
    return ALL if not dims or sorted(dim % 3 for dim in dims) == [1, 2] else None


ALL = "all"
# What takes a view -> the expert that it is of; ALL: all, transposed; None: it is of another kind.
VIEWS = {
    torch.Tensor.__getitem__: _one,
    torch.Tensor.transpose: _all,
    torch.Tensor.mT.__get__: _all,
}

# -- one expert ------------------------------------------------------------------------------------


def linear(watch, input, view, bias=None):
    return _product(watch, input, view, bias, False)


def matmul(watch, input, view):
    return _product(watch, input, view, None, True)


def _product(watch, input, view, bias, in_first):
    weight = view.weight
    if not is_plain(input, weight) or input.ndim < 2 or (bias is not None and bias.ndim != 1):
        return NotImplemented
    kind = input.device.type
    input = autocast(input, kind)
    cols = view.shape[1 if in_first else 0]
    tokens = input.numel() // max(1, input.shape[-1])
    watch.saw_product(weight, input, tokens * cols * input.element_size(), view.expert)
    return Linear.apply(input, weight, autocast(bias, kind), watch, in_first, view.expert)


# -- all experts -----------------------------------------------------------------------------------

GROUPED_MM = getattr(torch, "_grouped_mm", None)  # what F.grouped_mm calls


def grouped(run, is_transposed):
    """What runs in the place of `run`, a grouped product of an input [tokens, in] that is sorted by
    expert with weights [experts, in, out], or with a transposed view of them."""

    def product(watch, input, weight, offs=None, bias=None, out_dtype=None):
        of = weight.weight if is_transposed else weight
        if offs is None or bias is not None or out_dtype is not None:
            return NotImplemented
        if not is_plain(input, of) or input.ndim != 2 or input.dtype is not of.dtype:
            return NotImplemented
        if of.ndim != 3 or (input.is_cuda and torch.cuda.is_current_stream_capturing()):
            return NotImplemented  # the host has to know where the tokens of each expert end
        watch.saw_product(of, input, len(input) * weight.shape[2] * input.element_size())
        return _Grouped.apply(input, of, offs, watch, run, is_transposed)

    return product


class _Grouped(torch.autograd.Function):
    """x[of expert e] @ weight[e], or weight[e].T, for all experts at once."""

    @staticmethod
    def forward(ctx, x, weight, offs, watch, run, is_transposed):
        ctx.watch, ctx.weight = weakref.ref(watch), weight
        ctx.run, ctx.is_transposed = run, is_transposed
        ctx.save_for_backward(x, offs, weight if ctx.needs_input_grad[0] else None)
        return run(x, weight.transpose(-2, -1) if is_transposed else weight, offs=offs)

    @staticmethod
    def backward(ctx, grad):
        x, offs, weight = ctx.saved_tensors
        g, dx, dw = grad.contiguous(), None, None
        with torch._C.DisableTorchFunctionSubclass():
            if ctx.needs_input_grad[0]:
                w = weight if ctx.is_transposed else weight.transpose(-2, -1)
                dx = ctx.run(g, w, offs=offs)
            if ctx.needs_input_grad[1]:
                left, right = (g, x) if ctx.is_transposed else (x, g)
                if offer(ctx, left, right, ends := Ends(offs, len(x))):
                    dw = _gradient(ctx.run, left, right, ends)
        return dx, dw, None, None, None, None


def _gradient(run, left, right, ends):
    if run is GROUPED_MM:
        return run(left.T, right, offs=ends.tensor)
    grad = left.new_zeros(len(ends.tensor), left.shape[1], right.shape[1])
    for expert, (start, end) in enumerate(ends.spans):
        grad[expert].addmm_(left[start:end].T, right[start:end])
    return grad
