"""Lightning's Trainer, with automatic and manual optimization."""

import models
import pytest
import torch

from lomo_kernels import Lomo
from lomo_kernels.integrations import unwrap

lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")

# What Lightning itself warns of is not ours to fail on.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LR = 0.1


class Module(lightning.LightningModule):
    def __init__(self, optimizer, dtype=torch.float32, factor=1.0):
        super().__init__()
        self.model = models.build(dtype, tied=True)
        self.factor, self.optimizer_of = factor, optimizer

    def configure_optimizers(self):
        optimizer = self.optimizer_of(self.model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def loss(self, ids):
        logits = self.model(ids)[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        return loss * self.factor

    def training_step(self, ids, index):
        return self.loss(ids)


class Scaling(Module):
    def training_step(self, ids, index):
        return unwrap(self.optimizers()).scale(self.loss(ids))


class Manual(Module):
    """As Lightning's documentation writes it."""

    automatic_optimization = False
    max_norm = None

    def training_step(self, ids, index):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(ids))
        if self.max_norm is not None:
            self.clip_gradients(
                optimizer, gradient_clip_val=self.max_norm, gradient_clip_algorithm="norm"
            )
        optimizer.step()
        self.lr_schedulers().step()


class OwnBackward(Module):
    automatic_optimization = False

    def training_step(self, ids, index):
        optimizer = self.optimizers()
        unwrap(optimizer).backward(self.loss(ids))
        optimizer.step()  # of nothing: Lightning counts its steps here
        self.lr_schedulers().step()


def fit(module, folder, checkpoint=None, **options):
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(folder),
        **{"max_epochs": 1, **options},
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(models.tokens(batch=28), batch_size=4)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def lomo(**options):
    return lambda model: Lomo(model, lr=LR, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR)


@pytest.mark.parametrize(("accumulation", "norm"), [(1, None), (1, 0.5), (3, 0.5)])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_automatic_optimization_equals_sgd(tmp_path, accumulation, norm, precision):
    options = {"accumulate_grad_batches": accumulation, "precision": precision}
    ours, theirs = Module(lomo(clip_grad_norm=norm)), Module(sgd)
    trainer = fit(ours, tmp_path, **options)
    other = fit(theirs, tmp_path, gradient_clip_val=norm, **options)
    # under autocast torch rounds weight gradients to bfloat16, and ours stay float32
    assert models.difference(ours, theirs) < (1e-6 if precision == "32-true" else 1e-3)
    assert models.difference(ours, Module(sgd)) > 5e-3
    assert trainer.global_step == other.global_step == -(-7 // accumulation)
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["lr"] == other.optimizers[0].param_groups[0]["lr"]
    assert optimizer.param_groups[0]["step"] == trainer.global_step


@pytest.mark.parametrize("norm", [None, 0.5])
@pytest.mark.parametrize("kind", [Manual, OwnBackward])
def test_manual_optimization_equals_sgd(tmp_path, kind, norm):
    ours, theirs = kind(lomo(clip_grad_norm=norm)), Manual(sgd)
    theirs.max_norm = norm
    trainer, other = fit(ours, tmp_path), fit(theirs, tmp_path)
    assert models.difference(ours, theirs) < 1e-6
    assert models.difference(ours, Module(sgd)) > 5e-3
    assert trainer.global_step == other.global_step == 7


def test_a_float16_model_whose_loss_is_scaled(tmp_path):
    faint = 1e-6  # most gradients are less than float16's smallest number

    def large(optimizer):
        return lambda model: optimizer(
            model if optimizer is Lomo else model.parameters(), LR / faint
        )

    ours, plain = (kind(large(Lomo), torch.float16, faint) for kind in (Scaling, Module))
    theirs = Module(large(torch.optim.SGD), torch.float16, faint).float()  # the same weights
    for module in (ours, theirs, plain):
        fit(module, tmp_path, accumulate_grad_batches=1)
    assert models.difference(ours, theirs) < 5e-3
    assert models.difference(plain, theirs) > 1e-2


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    """Random bits, counters and learning rates go through Lightning's checkpoint."""
    options = {"clip_grad_norm": 0.5, "rounding": "stochastic"}
    whole, resumed = (Module(lomo(**options), torch.bfloat16) for _ in range(2))
    checkpoint = str(tmp_path / "middle.ckpt")
    fit(whole, tmp_path, max_epochs=1).save_checkpoint(checkpoint)
    fit(resumed, tmp_path, checkpoint, max_epochs=2)
    uninterrupted = Module(lomo(**options), torch.bfloat16)
    trainer = fit(uninterrupted, tmp_path, max_epochs=2)
    assert models.same(resumed, models.snapshot(uninterrupted))
    assert not models.same(resumed, models.snapshot(whole))
    assert trainer.optimizers[0].param_groups[0]["step"] == 14


def test_unwrap_finds_the_optimizer(tmp_path):
    """Lightning's wrapper is an instance of the class that it wraps."""
    found = []

    class Asking(Module):
        def training_step(self, ids, index):
            found.append(self.optimizers())
            return super().training_step(ids, index)

    trainer = fit(Asking(lomo()), tmp_path)
    wrapper, (optimizer,) = found[0], trainer.optimizers
    assert isinstance(wrapper, Lomo)
    assert wrapper is not optimizer
    assert unwrap(wrapper) is optimizer
