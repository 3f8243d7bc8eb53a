"""One step of an optimizer, ours or torch's."""

import torch

from .settings import OURS


def check(settings):
    """Finds out whether an optimizer can be made of the settings, on a parameter of one element.

    Raises:
        ValueError: what the optimizer says.
    """
    dtype = getattr(torch, settings.dtype)
    param = torch.nn.Parameter(torch.zeros(1, dtype=dtype, device=settings.device))
    try:
        make(settings, [param])
    except (TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def make(settings, model_or_params):
    """The optimizer of a run."""
    if settings.optimizer in OURS:
        return OURS[settings.optimizer](
            model_or_params,
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
    params = model_or_params
    if isinstance(model_or_params, torch.nn.Module):
        params = [p for p in model_or_params.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.AdamW
    return optimizer(params, lr=settings.lr, weight_decay=settings.weight_decay)


def update(optimizer, params, losses, settings):
    """One step from the losses of its micro-batches, whose sum is the step's: each is made when it
    is asked for. -> (loss, gradient norm or None, whether the step was skipped)"""
    ours, values = settings.optimizer in OURS, []
    for loss in losses:
        values.append(loss.detach())
        if not ours:
            loss.backward()
        elif settings.gradient_accumulation == 1:
            optimizer.backward(loss)
        else:
            with optimizer.accumulate():
                optimizer.scale(loss).backward()
    loss = torch.stack(values).sum().item()
    if ours:
        if settings.gradient_accumulation > 1:
            optimizer.step()
        return loss, optimizer.last_grad_norm, optimizer.last_step_skipped
    norm = None
    if settings.clip_grad_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(params, settings.clip_grad_norm)
        norm = getattr(norm, "full_tensor", lambda: norm)().item()  # a sum over ranks, to be done
    if settings.clip_grad_value is not None:
        torch.nn.utils.clip_grad_value_(params, settings.clip_grad_value)
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm, False
