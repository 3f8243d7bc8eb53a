"""One step of an optimizer, ours or torch's."""

import torch

from .settings import OURS


def make(settings, model):
    if settings.optimizer in OURS:
        return OURS[settings.optimizer](
            model,
            lr=settings.lr,
            clip_grad_norm=settings.clip_grad_norm,
            clip_grad_value=settings.clip_grad_value,
            weight_decay=settings.weight_decay,
            norm=settings.norm,
            strategy=settings.strategy,
            loss_scale=settings.loss_scale,
            rounding=settings.rounding,
            backend=settings.backend,
            seed=settings.seed,
        )
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    return optimizer(params, lr=settings.lr, weight_decay=settings.weight_decay)


def update(optimizer, params, loss, settings):
    """One step -> (gradient norm or None, whether the step was skipped)."""
    if settings.optimizer in OURS:
        optimizer.backward(loss)
        return optimizer.last_grad_norm, optimizer.last_step_skipped
    loss.backward()
    norm = None
    if settings.clip_grad_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(params, settings.clip_grad_norm)
        norm = getattr(norm, "full_tensor", lambda: norm)().item()  # a sum over ranks, to be done
    if settings.clip_grad_value is not None:
        torch.nn.utils.clip_grad_value_(params, settings.clip_grad_value)
    optimizer.step()
    optimizer.zero_grad()
    return norm, False
