"""Hugging Face Trainer and accelerate, neither patched, with transformers 5 on the CPU."""

import math

import models
import pytest
import torch

from lomo_kernels import AdaLomo, Lomo, LossScale

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from llamas import data, tiny_llama  # noqa: E402

# What transformers and accelerate themselves warn of is not ours to fail on.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LR = 0.1


def train(model, optimizer, folder, resume=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=4,
        num_train_epochs=2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=7,
        **options,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data(), optimizers=(optimizer, None)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_with_a_scheduler_equals_sgd(tmp_path):
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = Lomo(ours, lr=LR)
    trainer = train(ours, optimizer, tmp_path / "ours", save_strategy="no")
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    other = train(theirs, sgd, tmp_path / "sgd", save_strategy="no", max_grad_norm=0.0)
    assert models.difference(ours, theirs) < 1e-6
    assert models.difference(ours, tiny_llama()) > 1e-2
    assert trainer.state.global_step == other.state.global_step == 12
    assert optimizer.param_groups[0]["step"] == 12
    assert optimizer.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]


def test_trainer_takes_the_class_and_its_arguments(tmp_path):
    ours, theirs = tiny_llama(), tiny_llama()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=2, report_to=[], disable_tqdm=True,
        save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(
        ours, arguments, train_dataset=data(),
        optimizer_cls_and_kwargs=(Lomo, {"lr": LR, "clip_grad_norm": 0.01, "norm": "tensor"}),
    )  # fmt: skip
    trainer.train()
    assert models.difference(ours, theirs) > 0
    assert all(p.grad is None for p in ours.parameters())


@pytest.mark.parametrize("rounding", ["stochastic", "split"])
def test_a_resumed_trainer_is_the_uninterrupted_one(tmp_path, rounding):
    """Random bits, counters, learning rate and the low halves go through Trainer's checkpoint."""
    whole = tiny_llama(torch.bfloat16)
    train(
        whole, Lomo(whole, lr=LR, rounding=rounding), tmp_path, save_strategy="steps", save_steps=5
    )
    resumed = tiny_llama(torch.bfloat16)
    train(
        resumed, Lomo(resumed, lr=LR, rounding=rounding), tmp_path,
        resume=str(tmp_path / "checkpoint-5"), save_strategy="no",
    )  # fmt: skip
    assert models.same(resumed, models.snapshot(whole))


def test_trainer_with_adalomo_equals_adafactor(tmp_path):
    ours, theirs = tiny_llama(), tiny_llama()
    train(ours, AdaLomo(ours, lr=0.01), tmp_path / "ours", save_strategy="no")
    adafactor = transformers.Adafactor(theirs.parameters(), lr=0.01, relative_step=False,
                                       scale_parameter=True)  # fmt: skip
    train(theirs, adafactor, tmp_path / "theirs", save_strategy="no", max_grad_norm=0.0)
    assert models.difference(ours, theirs) < 1e-4
    assert models.difference(ours, tiny_llama()) > 1e-3


def test_a_resumed_trainer_with_adalomo_is_the_uninterrupted_one(tmp_path):
    whole, resumed = tiny_llama(torch.bfloat16), tiny_llama(torch.bfloat16)
    options = {"lr": 0.05, "clip_grad_norm": 1.0}
    train(whole, AdaLomo(whole, **options), tmp_path, save_strategy="steps", save_steps=5)
    train(
        resumed, AdaLomo(resumed, **options), tmp_path,
        resume=str(tmp_path / "checkpoint-5"), save_strategy="no",
    )  # fmt: skip
    assert models.same(resumed, models.snapshot(whole))


@pytest.mark.parametrize("norm", [0.5, None])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_with_one_backward_equals_sgd(tmp_path, accumulation, norm):
    """Several of them before a step are one large batch."""
    ours, theirs = tiny_llama(), tiny_llama()
    options = {"save_strategy": "no", "gradient_accumulation_steps": accumulation}
    optimizer = Lomo(ours, lr=LR, clip_grad_norm=norm, strategy="one_backward")
    train(ours, optimizer, tmp_path / "ours", max_grad_norm=0.0, **options)
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    train(theirs, sgd, tmp_path / "sgd", max_grad_norm=norm or 0.0, **options)
    assert models.difference(ours, theirs) < 1e-6
    assert optimizer.last_grad_norm > 0.5  # clipping was at work, where it was asked for
    assert models.difference(ours, tiny_llama()) > 1e-2


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_norm_for_trainer_is_not_ignored_in_silence(tmp_path):
    model = tiny_llama()
    options = {"save_strategy": "no", "max_grad_norm": 1.0}
    with pytest.warns(UserWarning, match="found no gradients and clipped nothing") as caught:
        train(model, Lomo(model, lr=LR), tmp_path, **options)
    assert sum("clipped nothing" in str(w.message) for w in caught) == 1


def test_the_own_norm_decides_and_says_so_once(tmp_path, caplog):
    ours, theirs = tiny_llama(), tiny_llama()
    with caplog.at_level("INFO", logger="lomo_kernels"):
        for model, norm in ((ours, 1e-3), (theirs, 0.0)):
            train(
                model, Lomo(model, lr=LR, clip_grad_norm=0.5), tmp_path,
                save_strategy="no", max_grad_norm=norm,
            )  # fmt: skip
    assert models.same(ours, models.snapshot(theirs))
    said = [r.getMessage() for r in caplog.records if "own clip_grad_norm=0.5" in r.getMessage()]
    assert len(said) == 1


def test_accumulation_in_trainer_is_refused_with_a_way_out(tmp_path):
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="received a second gradient in one step"):
        train(model, Lomo(model, lr=LR), tmp_path, gradient_accumulation_steps=2)


def test_gradient_checkpointing_in_trainer(tmp_path):
    ours, theirs = tiny_llama(), tiny_llama()
    options = {"save_strategy": "no", "max_grad_norm": 0.0}
    train(
        ours, Lomo(ours, lr=LR), tmp_path / "ours", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, **options,
    )  # fmt: skip
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=LR), tmp_path / "sgd", **options)
    assert models.difference(ours, theirs) < 1e-6


def test_a_dynamic_scale_through_accelerate(tmp_path):
    ours = tiny_llama()
    rule = LossScale(64.0, growth_interval=2)
    optimizer = Lomo(ours, lr=LR, clip_grad_norm=1.0, loss_scale=rule)
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(data(), batch_size=4)
    model, _, loader = accelerator.prepare(ours, optimizer, loader)
    for step, batch in enumerate(loader):
        optimizer.backward(model(**batch).loss * (math.nan if step == 3 else 1.0))
        if step == 2:
            accelerator.save_state(tmp_path)
    assert optimizer.loss_scale == 128.0  # 64, 128, nan: 64, 128
    accelerator.load_state(tmp_path)
    assert optimizer.state_dict()["loss_scale"] == {
        "grad_scale": 128.0, "growth_tracker": 1.0, "stuck": 0.0,
    }  # fmt: skip


def test_accelerate_loop(tmp_path):
    """accelerate loads the optimizer's state when it wraps it, which replaces the group dicts."""
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = Lomo(ours, lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    accelerator = accelerate.Accelerator(cpu=True)
    loader = torch.utils.data.DataLoader(data(), batch_size=4)
    model, wrapped, loader, schedule = accelerator.prepare(ours, optimizer, loader, schedule)
    sgd = torch.optim.SGD(theirs.parameters(), lr=LR)
    for step, batch in enumerate(loader):
        accelerator.backward(model(**batch).loss)
        wrapped.step()
        schedule.step()
        wrapped.zero_grad()
        sgd.param_groups[0]["lr"] = LR / (1 + step)
        theirs(**batch).loss.backward()
        sgd.step()
        sgd.zero_grad()
        if step == 2:
            accelerator.save_state(tmp_path)
            middle = models.snapshot(ours)
    assert models.difference(ours, theirs) < 1e-6
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 7)

    accelerator.load_state(tmp_path)
    assert models.same(ours, middle)
    assert optimizer.param_groups[0]["step"] == 3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR / 4)
