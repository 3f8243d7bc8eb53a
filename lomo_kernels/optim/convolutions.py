"""Convolutions: products of the weight, a matrix [out, in * kernel], with the patches of the input.

The patches are larger than the input, and nothing else keeps them. So a convolution gives factors
only where they are smaller than its gradient: few positions, many channels. Groups, paddings by
name and inputs without a batch are left alone.
"""

import math
import weakref

import torch
import torch.nn.functional as F

from .choosing import factors_are_smaller
from .products import autocast, is_plain, no_autocast, offer


def convolution(dims):
    """What runs in the place of F.conv1d or F.conv2d."""

    def run(watch, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if not is_plain(input, weight) or input.ndim != dims + 2 or groups != 1:
            return NotImplemented
        if isinstance(padding, str):
            return NotImplemented
        stride, padding, dilation = (_each(n, dims) for n in (stride, padding, dilation))
        kind = input.device.type
        input = autocast(input, kind)
        sizes = zip(input.shape[2:], weight.shape[2:], stride, padding, dilation)
        positions = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
        tokens = len(input) * math.prod(positions) * input.element_size()  # bytes of a channel
        patches, output = tokens * weight[0].numel(), tokens * len(weight)
        if not factors_are_smaller(patches + output, weight.nbytes):
            return NotImplemented
        watch.saw_product(weight, input, output, copied=patches)
        options = stride, padding, dilation
        return _Convolution.apply(input, weight, autocast(bias, kind), watch, options)

    return run


def _each(number, dims):
    return [number] * dims if isinstance(number, int) else list(number) * (dims // len(number))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, watch, options):
        ctx.watch, ctx.weight, ctx.options = weakref.ref(watch), weight, options
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        with no_autocast(x.device.type):
            return torch.convolution(
                x, weight.to(x.dtype), bias, *options, False, [0] * len(options[0]), 1
            )

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        weight = ctx.weight if weight is None else weight

        def gradients(*wanted):
            return torch.ops.aten.convolution_backward(
                grad, x, weight.to(x.dtype), [len(weight)] if ctx.has_bias else None, *ctx.options,
                False, [0] * len(ctx.options[0]), 1, wanted,
            )  # fmt: skip

        with torch._C.DisableTorchFunctionSubclass():
            # before the weight may be updated
            dx, _, db = gradients(ctx.needs_input_grad[0], False, ctx.needs_input_grad[2])
            dw = None
            if ctx.needs_input_grad[1]:
                patches = _patches(x, weight.shape[2:], *ctx.options)
                if offer(ctx, _rows(grad.flatten(2)), _rows(patches)):
                    dw = gradients(False, True, False)[1].to(weight.dtype)
        return dx, dw, db, None, None


def _patches(x, kernel, stride, padding, dilation):
    """[batch, in * kernel, positions]"""
    if x.ndim == 3:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
        padding = (0, *padding)
    return F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))


def _rows(x):
    """[batch, channels, positions] -> [batch * positions, channels]"""
    return x.transpose(1, 2).flatten(0, 1).contiguous()
