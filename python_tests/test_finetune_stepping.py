"""One step of each optimizer of the command: what it is made of, and torch's own clipping."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

from lomo_kernels import finetune
from lomo_kernels.finetune import stepping

OPTIONS = {
    "lr": 0.25, "clip_grad_norm": 0.5, "clip_grad_value": 0.125, "weight_decay": 0.0625,
    "norm": "tensor", "strategy": "one_backward", "loss_scale": 32.0, "rounding": "nearest",
    "backend": "reference", "seed": 7,
}  # fmt: skip


@pytest.mark.parametrize("name", stepping.OURS)
def test_ours_are_made_of_the_settings(name, monkeypatch):
    seen = {}
    monkeypatch.setitem(stepping.OURS, name, lambda params, **options: seen.update(options))
    stepping.make(finetune.Settings(optimizer=name, **OPTIONS), [])
    assert seen == OPTIONS


@pytest.mark.parametrize(
    "clip",
    [
        {"clip_grad_norm": 2.0},
        {"clip_grad_norm": None, "clip_grad_value": 35.0},
        {"clip_grad_norm": 45.0, "clip_grad_value": 35.0},
        {"clip_grad_norm": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_torch_s_optimizers_are_clipped_as_in_torch(name, clip):
    """Gradients of norm 50, then of norm 1; each is the sum of two micro-batches."""
    settings = finetune.Settings(optimizer=name, lr=0.25, weight_decay=0.125, **clip)
    param, twin = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    optimizer, plain = stepping.make(settings, [param]), kind([twin], lr=0.25, weight_decay=0.125)
    for gradient in (torch.tensor([30.0, 40.0]), torch.tensor([0.6, -0.8])):
        losses = ((param * gradient).sum() / 2 for _ in range(2))
        want = (param * gradient).sum().item()
        loss, norm, skipped = stepping.update(optimizer, [param], losses, settings)
        assert (loss, skipped) == (want, False)
        twin.grad = gradient.clone()
        if settings.clip_grad_norm is None:
            assert norm is None
        else:
            assert norm == pytest.approx(gradient.norm().item())
            torch.nn.utils.clip_grad_norm_([twin], settings.clip_grad_norm)
        if settings.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_([twin], settings.clip_grad_value)
        plain.step()
        assert torch.equal(param, twin)
        assert param.grad is None
