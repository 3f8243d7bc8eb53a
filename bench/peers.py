"""The same work by others: torch, and packages where they are installed; and what they published.

Those of a kernel take a `timing.Set` and the arguments of the work and give a function that does it
once; those of a training step take a model and give (optimizer or None, function of the loss). A
package that is missing raises ImportError, which becomes the note of its row.
"""

from typing import NamedTuple

import torch


def sequence(each, *, lr, weight_decay, clip_value, inv_scale, clip_coef, found_inf, **_):
    """What lomo-optim's hook does with every option on, kept on the device: eager, fp32 copies."""

    def run():
        for p, g in zip(*each):
            g32 = g.float()
            found_inf.masked_fill_(~g32.isfinite().all(), 1.0)
            g32.mul_(inv_scale).clamp_(-clip_value, clip_value).mul_(clip_coef)
            p.copy_(p.float().mul_(1 - lr * weight_decay).sub_(g32, alpha=lr))

    return run


def shortest(each, *, lr, weight_decay, clip_value, inv_scale, clip_coef, found_inf, **_):
    """The same in the fewest passes that we found: unscale and look for infinity in one, decay with
    the conversion, and the last product, sum and conversion in one."""
    decay = torch.full_like(inv_scale, 1 - lr * weight_decay)

    def run():
        for p, g in zip(*each):
            g32 = g.to(torch.float32, copy=True)
            torch._amp_foreach_non_finite_check_and_unscale_([g32], found_inf, inv_scale)
            g32.clamp_(-clip_value, clip_value)
            torch.addcmul(torch.mul(p, decay), g32, clip_coef, value=-lr, out=p)

    return run


def add(each, *, lr):
    def run():
        for p, g in zip(*each):
            p.add_(g, alpha=-lr)

    return run


def foreach(each, *, lr):
    return lambda: torch._foreach_add_(each.params, each.grads, alpha=-lr)


def _fused_sgd(params, grads, lr, grad_scale=None, found_inf=None):
    torch._fused_sgd_(
        params, grads, [], weight_decay=0.0, momentum=0.0, lr=lr, dampening=0.0, nesterov=False,
        maximize=False, is_first_step=False, grad_scale=grad_scale, found_inf=found_inf,
    )  # fmt: skip


def fused_sgd(each, *, lr, grad_scale=None, found_inf=None):
    """torch.optim.SGD(fused=True)'s kernel.

    Raises:
        RuntimeError: it does not do this work: torch 2.13's on the CPU writes no 16-bit parameter.
    """
    probe = torch.ones(256, dtype=each.params[0].dtype, device=each.params[0].device)
    _fused_sgd([probe], [torch.ones_like(probe)], 0.5)
    if not (probe == 0.5).all():
        raise RuntimeError("torch's kernel leaves these parameters as they are")
    return lambda: _fused_sgd(each.params, each.grads, lr, grad_scale, found_inf)


class Holder(torch.nn.Module):
    """A model of these tensors, without copying them."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors = torch.nn.ParameterList([torch.nn.Parameter(t) for t in tensors])

    def take(self, grads):
        for p, g in zip(self.tensors, grads):
            p.grad = g


def optimi_sgd(each, *, lr):
    import optimi

    held = Holder(each.params)
    optimizer = optimi.SGD(held.parameters(), lr=lr)

    def run():
        held.take(each.grads)
        optimizer.step()

    return run


def pytorch_optimizer_lomo(each, *, lr):
    import pytorch_optimizer

    held = Holder(each.params)
    norm = 1.0 if each.params[0].dtype is torch.float16 else None  # it asks for one there
    optimizer = pytorch_optimizer.LOMO(held, lr=lr, clip_grad_norm=norm)

    def run():
        held.take(each.grads)
        optimizer.grad_func(0)

    return run


def lomo_optim_update(each, *, lr, norm=False):
    """The hook of lomo-optim on gradients that are there; with its loss scale in float16."""
    import lomo_optim.lomo

    held = Holder(each.params)
    optimizer = lomo_optim.lomo.Lomo(held, lr=lr, clip_grad_norm=1.0 if norm else None)
    if each.params[0].dtype is torch.float16:
        optimizer.loss_scaler = lomo_optim.lomo.DynamicLossScaler(init_scale=1024)

    def run():
        if norm:
            optimizer.gather_norm, optimizer.grad_norms = True, []
            held.take(each.grads)
            optimizer.grad_func(0)
            total = torch.norm(torch.stack(optimizer.grad_norms), 2.0)
            optimizer.clip_coef = torch.clamp(1.0 / (total + 1e-6), max=1.0)
            optimizer.gather_norm = False
        held.take(each.grads)
        optimizer.grad_func(0)

    return run


def vector_norm(each):
    return lambda: [torch.linalg.vector_norm(g, dtype=torch.float32) for g in each.grads]


def foreach_norm(each):
    return lambda: torch._foreach_norm(each.grads, 2, dtype=torch.float32)


def float_norm(each):
    return lambda: [torch.norm(g.float(), 2.0) for g in each.grads]


def _adafactor(each, make):
    held = Holder(each.params)
    optimizer = make(held.parameters())

    def run():
        held.take(each.grads)
        optimizer.step()

    return run


def transformers_adafactor(each, *, lr):
    from transformers import Adafactor

    return _adafactor(
        each,
        lambda params: Adafactor(
            params, lr=lr, scale_parameter=True, relative_step=False, warmup_init=False
        ),
    )


def torch_adafactor(each, *, lr):
    return _adafactor(each, lambda params: torch.optim.Adafactor(params, lr=lr))


def lomo_optim_adalomo(each, *, lr):
    import lomo_optim

    if not each.params[0].is_cuda:
        raise RuntimeError("it puts its states on a GPU")
    held = Holder(each.params)
    optimizer = lomo_optim.AdaLomo(held, lr=lr)

    def run():
        held.take(each.grads)
        optimizer.grad_func(0)

    return run


# -- a training step -------------------------------------------------------------------------------


def kept(model, make, norm=None):
    """An optimizer that needs all gradients; clipped as torch does it."""
    optimizer = make(model.parameters())

    def step(loss):
        loss.backward()
        if norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def lomo_optim_step(model, *, lr, norm=None):
    import lomo_optim

    optimizer = lomo_optim.Lomo(model, lr=lr, clip_grad_norm=norm)

    def step(loss):
        if norm:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr)

    return None, step


def optimi_released(model, *, lr, kind="SGD"):
    """Each gradient is used in backward, unclipped."""
    import optimi

    optimizer = getattr(optimi, kind)(model.parameters(), lr=lr, gradient_release=True)
    optimi.prepare_for_gradient_release(model, optimizer)
    return None, torch.Tensor.backward


def flashoptim_released(model, *, lr, kind="FlashAdamW"):
    """Likewise; its master weights of 24 bits and quantized states, as it comes."""
    import flashoptim

    optimizer = getattr(flashoptim, kind)(model.parameters(), lr=lr)
    flashoptim.enable_gradient_release(model, optimizer)
    return None, torch.Tensor.backward


class Published(NamedTuple):
    """Others' own figures, on their machine: shown beside measured rows, never among them."""

    what: str
    options: str
    seconds: float
    peak: str


# arXiv 2606.22932 and its repository's README: a Llama-3.1-8B, batch 1, 512 tokens, all in bf16, no
# clipping; a step is the median of 20.
FORGE = (
    Published("FORGE", "AdamW", 0.1102, "48.36 GB"),
    Published("FORGE", "AdamW, int8 moments", 0.1550, "35.32 GB"),
    Published("AdamW", "fused", 0.1343, "60.08 GB"),
    Published("AdamW", "", 0.1671, "62.04 GB"),
    Published("bitsandbytes", "8-bit", 0.3163, "45.36 GB"),
)
FORGE_CASE = "Llama-3.1-8B, 512 tokens, FORGE's protocol"
FORGE_DEVICE = "one H200"
