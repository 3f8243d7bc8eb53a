"""LomoCallback: Trainer's arguments and logs mean what they mean with torch's SGD."""

import math
import subprocess
import sys

import models
import pytest
import torch

from lomo_kernels import AdaLomo, Lomo, LossScale
from lomo_kernels.integrations import unwrap

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

from llamas import data, tiny_llama  # noqa: E402

from lomo_kernels.integrations import LomoCallback  # noqa: E402

# What transformers and accelerate themselves warn of is not ours to fail on.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
LR = 0.1
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Spy(transformers.TrainerCallback):
    """What a callback that stands before ours is told, such as those of `report_to`."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def fit(model, optimizer, folder, callbacks=(), resume=None, kind=None, **options):
    options = {
        "max_steps": 4, "lr_scheduler_type": "linear", "warmup_steps": 1, "logging_steps": 1,
        "save_strategy": "no", **options,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, per_device_train_batch_size=4, report_to=[],
        disable_tqdm=True, seed=7, **options,
    )  # fmt: skip
    trainer = (kind or transformers.Trainer)(
        model, arguments, train_dataset=data(32), callbacks=list(callbacks),
        **(optimizer if isinstance(optimizer, dict) else {"optimizers": (optimizer, None)}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=LR, **options)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("dtype", "accumulation", "max_norm"),
    [
        (torch.float32, 1, 0.5),
        (torch.float32, 2, 0.5),
        (torch.float32, 1, 0.0),
        (torch.float32, 2, 0.0),
        (torch.bfloat16, 1, 0.5),
        (torch.bfloat16, 2, 0.0),
        (torch.float16, 1, 0.0),
        (torch.float16, 2, 0.5),
    ],
    ids=str,
)
def test_equals_sgd_in_the_same_trainer(tmp_path, dtype, accumulation, max_norm):
    ours, theirs = tiny_llama(dtype), tiny_llama(dtype)
    options = {"max_grad_norm": max_norm, "gradient_accumulation_steps": accumulation}
    optimizer = Lomo(ours, lr=LR, rounding="nearest")
    trainer = fit(ours, optimizer, tmp_path, [LomoCallback()], **options)
    other = fit(theirs, sgd(theirs), tmp_path, **options)
    assert models.difference(ours, theirs) < TOLERANCE[dtype]
    assert models.difference(ours, tiny_llama(dtype)) > 5e-3
    assert logged(trainer, "loss") == pytest.approx(logged(other, "loss"), rel=1e-3)
    norms = logged(other, "grad_norm") if max_norm else []
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-2)
    assert logged(trainer, "skipped_steps") == [0] * 4
    scales = [65536.0] * 4 if dtype is torch.float16 else []
    assert logged(trainer, "loss_scale") == scales


@pytest.mark.parametrize(
    ("strategy", "accumulation"),
    [("auto", 1), ("one_backward", 3), ("two_backward", 1), ("two_backward", 3), ("partial", 1)],
)
def test_every_strategy_through_trainer(tmp_path, strategy, accumulation):
    ours, theirs = tiny_llama(), tiny_llama()
    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": accumulation}
    optimizer = Lomo(ours, lr=LR, strategy=strategy, factor_budget=4000)
    trainer = fit(ours, optimizer, tmp_path, [LomoCallback()], **options)
    other = fit(theirs, sgd(theirs), tmp_path, **options)
    assert models.difference(ours, theirs) < 1e-6
    assert logged(trainer, "grad_norm") == pytest.approx(logged(other, "grad_norm"), rel=1e-5)
    assert optimizer.param_groups[0]["step"] == 4


def test_the_optimizer_may_be_made_by_trainer(tmp_path):
    """Trainer's groups: no decay for biases and norms."""
    ours, theirs = tiny_llama(), tiny_llama()
    options = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    fit(ours, {"optimizer_cls_and_kwargs": (Lomo, {"lr": LR})}, tmp_path, [LomoCallback()],
        **options)  # fmt: skip
    # SGD's own decay enters the gradient; Trainer makes the same groups for it, without any
    fit(theirs, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": LR})}, tmp_path,
        max_grad_norm=0.5)  # fmt: skip
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        decayed = (p - q).abs().max() > 1e-4
        assert decayed == ("norm" not in name), name


def test_adalomo_equals_adafactor_with_trainers_clipping(tmp_path):
    ours, theirs = tiny_llama(), tiny_llama()
    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2}
    trainer = fit(ours, AdaLomo(ours, lr=0.01), tmp_path, [LomoCallback()], **options)
    adafactor = transformers.Adafactor(
        theirs.parameters(), lr=0.01, relative_step=False, scale_parameter=True
    )
    other = fit(theirs, adafactor, tmp_path, **options)
    assert models.difference(ours, theirs) < 1e-4
    assert models.difference(ours, tiny_llama()) > 1e-3
    assert logged(trainer, "grad_norm") == pytest.approx(logged(other, "grad_norm"), rel=1e-4)
    assert logged(trainer, "loss_scale") == [2.0**10] * 4


class Faint(transformers.Trainer):
    """Most gradients of its loss are less than float16's smallest number."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * 1e-6


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_of_a_float16_model_is_scaled(tmp_path, accumulation):
    options = {
        "max_grad_norm": 0.0, "gradient_accumulation_steps": accumulation, "kind": Faint,
        "max_steps": 2,
    }  # fmt: skip
    ours, unscaled = tiny_llama(torch.float16), tiny_llama(torch.float16)
    theirs = tiny_llama(torch.float16).float()  # the same weights
    trainer = fit(ours, Lomo(ours, lr=LR * 1e6), tmp_path, [LomoCallback()], **options)
    other = torch.optim.SGD(theirs.parameters(), lr=LR * 1e6)
    fit(theirs, other, tmp_path, **options)
    fit(unscaled, Lomo(unscaled, lr=LR * 1e6, loss_scale=None), tmp_path, [LomoCallback()],
        **options)  # fmt: skip
    assert models.difference(ours, theirs) < 5e-4
    assert models.difference(unscaled, theirs) > 5e-3
    assert logged(trainer, "loss")[0] < 1e-5  # as it is, not as it was scaled


class Faulty(transformers.Trainer):
    """A loss that is not a number in the third step."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * math.nan if self.state.global_step == 2 else loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipped_steps_and_the_scale_are_logged(tmp_path, accumulation):
    model, options = tiny_llama(), {"gradient_accumulation_steps": accumulation, "kind": Faulty}
    optimizer = Lomo(model, lr=LR, loss_scale=LossScale(64.0, growth_interval=2))
    trainer = fit(model, optimizer, tmp_path, [LomoCallback()], **options)

    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    weight = torch.nn.Parameter(torch.ones(1))
    scales, other = [], torch.optim.SGD([weight], lr=LR)
    for step in range(4):
        scaler.scale((weight * (math.nan if step == 2 else 1.0)).sum()).backward()
        scaler.step(other)
        scaler.update()
        other.zero_grad()
        scales.append(scaler.get_scale())
    assert logged(trainer, "loss_scale") == scales
    assert logged(trainer, "skipped_steps") == [0, 0, 1, 1]
    norms = logged(trainer, "grad_norm")
    assert [math.isfinite(norm) for norm in norms] == [True, True, False, True]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("dtype", "own"), [(torch.float16, None), (torch.float32, 0.5)], ids=str)
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, dtype, own):
    def make():
        model, scale = tiny_llama(dtype), LossScale(256.0, growth_interval=2)
        rounding = "stochastic" if dtype is torch.float16 else "nearest"
        return model, Lomo(model, lr=LR, clip_grad_norm=own, loss_scale=scale, rounding=rounding)

    options = {"max_grad_norm": 0.5, "max_steps": 6, "gradient_accumulation_steps": 2}
    saving = {"save_strategy": "steps", "save_steps": 3}
    (whole, optimizer), (resumed, again) = make(), make()
    fit(whole, optimizer, tmp_path, [LomoCallback()], **options, **saving)
    checkpoint = str(tmp_path / "checkpoint-3")
    trainer = fit(resumed, again, tmp_path, [LomoCallback()], checkpoint, **options, **saving)
    assert models.same(resumed, models.snapshot(whole))
    assert again.loss_scale == optimizer.loss_scale == 2048.0
    assert len(logged(trainer, "grad_norm")) == 6  # three of them from the checkpoint


def test_callbacks_that_stand_before_see_the_same_logs(tmp_path):
    spy, model = Spy(), tiny_llama(torch.float16)
    trainer = fit(model, Lomo(model, lr=LR), tmp_path, [spy, LomoCallback()])
    history = [{k: v for k, v in e.items() if k != "step"} for e in trainer.state.log_history]
    assert spy.logs == history
    assert {"grad_norm", "skipped_steps", "loss_scale"} <= set(spy.logs[0])


def test_an_evaluation_is_logged_as_it_is(tmp_path):
    ours = tiny_llama()
    kind = type("Evaluating", (transformers.Trainer,), {
        "get_eval_dataloader": lambda self, dataset=None: self.get_test_dataloader(data(8)),
    })  # fmt: skip
    trainer = fit(ours, Lomo(ours, lr=LR), tmp_path, [LomoCallback()], kind=kind)
    trainer.evaluate()
    evaluation = trainer.state.log_history[-1]
    assert "eval_loss" in evaluation
    assert "skipped_steps" not in evaluation


@pytest.mark.parametrize(
    ("own", "of_trainer", "used", "said"),
    [
        (None, 0.25, 0.25, "clips by max_grad_norm=0.25, not Trainer"),
        (0.5, 0.25, 0.5, "own clip_grad_norm=0.5 decides, not max_grad_norm=0.25"),
        (0.5, 0.0, 0.5, None),
        (None, 0.0, None, None),
    ],
)
def test_one_norm_clips_and_one_line_says_which(tmp_path, caplog, own, of_trainer, used, said):
    ours, theirs = tiny_llama(), tiny_llama()
    optimizer = Lomo(ours, lr=LR, clip_grad_norm=own)
    with caplog.at_level("INFO", logger="lomo_kernels"):
        fit(ours, optimizer, tmp_path, [LomoCallback()], max_grad_norm=of_trainer)
    fit(theirs, sgd(theirs), tmp_path, max_grad_norm=used or 0.0)
    assert optimizer.clip_grad_norm == used
    assert models.difference(ours, theirs) < 1e-6
    lines = [r.getMessage() for r in caplog.records if "grad_norm" in r.getMessage()]
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines)


def test_a_second_training_takes_its_own_norm(tmp_path):
    """What the first one took over is not the optimizer's own."""
    ours, theirs = tiny_llama(), tiny_llama()
    for model, optimizer, callbacks in (
        (ours, Lomo(ours, lr=LR), [LomoCallback()]),
        (theirs, sgd(theirs), []),
    ):
        trainer = fit(model, optimizer, tmp_path, callbacks, max_grad_norm=0.5)
        trainer.args.max_grad_norm = 0.1
        trainer.train()
    assert models.difference(ours, theirs) < 1e-6


def test_trainer_looks_at_no_gradient(tmp_path, monkeypatch):
    """Those that wait would be formed for it, all at once."""

    def look(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", look)
    monkeypatch.setattr(transformers.trainer, "has_mixed_dtensor", look, raising=False)
    model = tiny_llama()
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    fit(model, Lomo(model, lr=LR), tmp_path, [LomoCallback()], **options)
    with pytest.raises(AssertionError):  # what is replaced here is what others are clipped by
        fit(model, sgd(model), tmp_path, **options)


METHODS = [
    (accelerate.Accelerator, "backward"),
    (accelerate.Accelerator, "clip_grad_norm_"),
    (transformers.Trainer, "_has_mixed_mesh_grads"),
    (transformers.Trainer, "log"),
]


def test_nothing_stays_replaced(tmp_path):
    before = [getattr(owner, name) for owner, name in METHODS]
    model = tiny_llama()
    fit(model, Lomo(model, lr=LR), tmp_path, [LomoCallback()])
    assert [getattr(owner, name) for owner, name in METHODS] == before


def test_an_interrupted_training_can_be_begun_again(tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_substep_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    before = [getattr(owner, name) for owner, name in METHODS]
    ours, theirs = tiny_llama(), tiny_llama()
    callback, optimizer = LomoCallback(), Lomo(ours, lr=LR)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    with pytest.raises(KeyboardInterrupt):
        fit(ours, optimizer, tmp_path, [callback, Interrupt()], **options)
    optimizer.zero_grad()
    fit(ours, optimizer, tmp_path, [callback], **options)
    fit(theirs, sgd(theirs), tmp_path, **options)
    assert models.difference(ours, theirs) < 1e-6
    assert [getattr(owner, name) for owner, name in METHODS] == before


def test_another_trainer_meanwhile_is_left_alone(tmp_path):
    inner, alone = tiny_llama(), tiny_llama()

    class Nested(transformers.TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            self.trainer = fit(inner, sgd(inner), tmp_path, max_grad_norm=0.5)

    ours, theirs, nested = tiny_llama(), tiny_llama(), Nested()
    fit(ours, Lomo(ours, lr=LR), tmp_path, [LomoCallback(), nested])
    fit(theirs, sgd(theirs), tmp_path)
    other = fit(alone, sgd(alone), tmp_path, max_grad_norm=0.5)
    assert models.same(inner, models.snapshot(alone))
    assert logged(nested.trainer, "grad_norm") == logged(other, "grad_norm")
    assert models.difference(ours, theirs) < 1e-6


def test_two_trainers_with_callbacks_at_once(tmp_path):
    inner, theirs = tiny_llama(), tiny_llama()

    class Nested(transformers.TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            fit(inner, Lomo(inner, lr=LR), tmp_path, [LomoCallback()], max_grad_norm=0.1)

    ours = tiny_llama()
    fit(ours, Lomo(ours, lr=LR), tmp_path, [LomoCallback(), Nested()], max_grad_norm=0.5)
    fit(theirs, sgd(theirs), tmp_path, max_grad_norm=0.5)
    assert models.difference(ours, theirs) < 1e-6
    again = tiny_llama()
    fit(again, sgd(again), tmp_path, max_grad_norm=0.1)
    assert models.difference(inner, again) < 1e-6


def test_another_optimizer_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(TypeError, match="must be lomo_kernels' Lomo or AdaLomo, got torch's SGD"):
        fit(model, sgd(model), tmp_path, [LomoCallback()])


def test_what_can_know_no_norm_takes_none_over(tmp_path):
    model = tiny_llama()
    optimizer = Lomo(model, lr=LR, strategy="immediate")
    with pytest.raises(ValueError, match="take max_grad_norm=0, another strategy"):
        fit(model, optimizer, tmp_path, [LomoCallback()], max_grad_norm=1.0)
    theirs = tiny_llama()
    fit(model, optimizer, tmp_path, [LomoCallback()], max_grad_norm=0.0)
    fit(theirs, sgd(theirs), tmp_path, max_grad_norm=0.0)
    assert models.difference(model, theirs) < 1e-6


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def adapted():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
            return peft.get_peft_model(tiny_llama(), config)

    ours, theirs = adapted(), adapted()
    fit(ours, Lomo(ours, lr=1.0), tmp_path, [LomoCallback()], max_grad_norm=0.1)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    fit(theirs, torch.optim.SGD(trained, lr=1.0), tmp_path, max_grad_norm=0.1)
    assert models.difference(ours, theirs) < 1e-6
    assert models.difference(ours, adapted()) > 1e-2
    assert models.same(ours.unload(), models.snapshot(tiny_llama()))


def test_what_trainer_ignores_beside_an_optimizer(tmp_path):
    """learning_rate, weight_decay, optim and its arguments are for an optimizer of Trainer's."""
    plain, ignoring = tiny_llama(), tiny_llama()
    fit(plain, Lomo(plain, lr=LR), tmp_path, [LomoCallback()])
    ignored = {
        "learning_rate": 123.0, "weight_decay": 0.5, "optim": "lomo", "optim_args": "clip=3",
        "adam_beta1": 0.1,
    }  # fmt: skip
    fit(ignoring, Lomo(ignoring, lr=LR), tmp_path, [LomoCallback()], **ignored)
    assert models.same(ignoring, models.snapshot(plain))


def test_unwrap_finds_the_optimizer(tmp_path):
    model = tiny_llama()
    optimizer = Lomo(model, lr=LR)
    assert unwrap(optimizer) is optimizer
    trainer = fit(model, optimizer, tmp_path, [LomoCallback()], max_steps=1)
    assert trainer.optimizer is not optimizer
    assert not hasattr(trainer.optimizer, "explain")
    assert unwrap(trainer.optimizer) is optimizer
    assert unwrap(trainer.optimizer).last_grad_norm == logged(trainer, "grad_norm")[0]


def test_without_transformers_the_rest_is_there():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['accelerate'] = None\n"
        "import torch, lomo_kernels, lomo_kernels.integrations as integrations\n"
        "optimizer = lomo_kernels.Lomo(torch.nn.Linear(2, 2))\n"
        "assert integrations.unwrap(optimizer) is optimizer\n"
        "try:\n    integrations.LomoCallback\n"
        "except ImportError:\n    pass\nelse:\n    raise AssertionError\n"
        "assert not hasattr(integrations, 'other')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
