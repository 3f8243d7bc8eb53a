"""The main job: fine-tune every parameter of a pretrained causal language model."""

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import optim
from ..integrations import huggingface
from ..memory import HeldBytes, state_bytes
from . import checkpoint, data
from .display import Display
from .scoring import Score, score

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Display",
    "Report",
    "Settings",
    "StoppedError",
    "compare",
    "run",
]

OURS = optim.OPTIMIZERS
OPTIMIZERS = {  # default learning rates
    **{name: rule.finetune_lr for name, rule in OURS.items()},
    "sgd": 0.1,
    "adamw": 1e-4,
}
DEFAULT_STEPS = 32  # on the default data: about five minutes on two CPU cores
SCHEDULES = ("linear", "cosine", "constant")


class StoppedError(Exception):
    """Somebody asked to stop; what was done is in a checkpoint where there is an output folder."""


@dataclass(frozen=True)
class Settings:
    """What defines a run. Two runs with equal settings give equal weights, to the bit."""

    model: str = huggingface.DEFAULT_MODEL
    train: str | None = None
    held_out: str | None = None
    optimizer: str = "lomo"
    lr: float | None = None
    schedule: str = "linear"
    warmup: float = 0.1
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 4
    length: int = 128
    clip_grad_norm: float | None = 1.0
    norm: str = "global"
    strategy: str = "auto"
    clip_grad_value: float | None = None
    weight_decay: float = 0.0
    loss_scale: float | str | None = "auto"
    dtype: str = "float32"
    rounding: str = "auto"
    backend: str = "auto"
    device: str = "cpu"
    checkpointing: bool = False
    eval_size: int = 64
    seed: int = 0

    def __post_init__(self):
        _check(self.optimizer in OPTIMIZERS, "optimizer", f"one of {list(OPTIMIZERS)}", self)
        _check(self.schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}", self)
        _check(self.lr is None or 0 <= self.lr < math.inf, "lr", "a number of at least 0", self)
        _check(0 <= self.warmup <= 1, "warmup", "a fraction of the steps, 0 to 1", self)
        _check(
            self.epochs is None or 0 < self.epochs < math.inf,
            "epochs", "a number greater than 0", self,
        )  # fmt: skip
        _check(self.steps is None or self.steps > 0, "steps", "a whole number above 0", self)
        _check(self.batch_size > 0, "batch_size", "a whole number above 0", self)
        _check(self.length > 1, "length", "a whole number above 1", self)
        _check(self.eval_size > 0, "eval_size", "a whole number above 0", self)
        dtypes = ("float32", "bfloat16", "float16")
        _check(self.dtype in dtypes, "dtype", f"one of {dtypes}", self)
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).split("\n")[0]
            raise ValueError(f"device {self.device!r} cannot be used: {reason}") from error
        if self.lr is None:
            object.__setattr__(self, "lr", OPTIMIZERS[self.optimizer])


def _check(fine, name, wanted, settings):
    if not fine:
        raise ValueError(f"{name} must be {wanted}, got {getattr(settings, name)!r}")


@dataclass(frozen=True)
class Report:
    """What a run gave; `gradient_bytes` (gradients, or what waits in their place) and `state_bytes`
    are measured peaks."""

    optimizer: str
    before: Score
    after: Score
    loss: float
    steps: int
    skipped: int
    seconds: float
    gradient_bytes: int
    state_bytes: int


def run(settings, out=None, save_every=None, display=None):
    """Fine-tunes a model and scores it before and after.

    Args:
        settings: what to do.
        out: folder for checkpoints and the result (`model/` is what transformers loads). A run that
            was cut short goes on from the newest checkpoint there; a finished one is not repeated.
        save_every: steps between checkpoints; default a quarter of the run.
        display: where progress is shown.

    Returns:
        A Report.

    Raises:
        huggingface.ModelError, data.DataError, checkpoint.ResumeError: one sentence for the user.
        StoppedError: on SIGINT or SIGTERM, after the step in progress and a checkpoint.
    """
    display = display or Display()
    out = None if out is None else Path(out)
    newest = None
    if out is not None:
        checkpoint.claim(out, asdict(settings))
        if (out / "result.json").exists():
            display.say(f"{out} holds this run already; nothing is left to do")
            return _read_report(out / "result.json")
        newest = checkpoint.latest(out)
    source = settings.model if newest is None else str(newest[1])
    display.say(f"loading {settings.model if newest is None else newest[1].name}")
    model, tokenizer = huggingface.load(
        source, getattr(torch, settings.dtype), settings.checkpointing
    )
    model.to(settings.device).train()
    examples = data.load(
        settings.train, settings.held_out, tokenizer, length=settings.length, seed=settings.seed
    )
    display.say(examples.description)
    job = _Job(settings, model, tokenizer, examples, display)
    with _signals() as stop:
        job.stop = stop
        return job.run(out, save_every, newest)


def compare(settings, report, names, display=None):
    """Runs the same data with other optimizers ("sgd", or "sgd=0.1" for a learning rate) and shows
    one table, beginning with `report`. Nothing of these runs is saved."""
    display = display or Display()
    reports = [report]
    for name in names:
        optimizer, _, lr = name.partition("=")
        other = replace(settings, optimizer=optimizer, lr=float(lr) if lr else None)
        reports.append(run(other, display=display))
    display.table(reports)
    return reports


class _Job:
    """One run in progress."""

    def __init__(self, settings, model, tokenizer, examples, display):
        self.settings, self.model, self.tokenizer = settings, model, tokenizer
        self.data, self.display = examples, display
        self.stop = []
        self.params = [p for p in model.parameters() if p.requires_grad]
        per_epoch = -(-len(examples.train) // settings.batch_size)
        self.steps = settings.steps
        if settings.steps is None and settings.epochs is None and settings.train is None:
            self.steps = DEFAULT_STEPS
        elif settings.steps is None:
            self.steps = max(1, round((settings.epochs or 1.0) * per_epoch))
        self.per_epoch = per_epoch
        self.held = HeldBytes(self.params)  # before the optimizer: its hooks come first
        self.optimizer = _optimizer(settings, model)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.progress = {
            "before": None, "losses": [], "skipped": 0, "seconds": 0.0, "gradients": 0, "states": 0,
        }  # fmt: skip

    def _rate(self, step):
        """Learning rate of a step, counted from 0, as a fraction of its largest."""
        warmup = round(self.settings.warmup * self.steps)
        if step < warmup:
            return (step + 1) / warmup
        rest = (step - warmup) / max(1, self.steps - warmup)
        if self.settings.schedule == "linear":
            return 1 - rest
        return (1 + math.cos(math.pi * rest)) / 2 if self.settings.schedule == "cosine" else 1.0

    def run(self, out, save_every, newest):
        first = 0
        torch.manual_seed(self.settings.seed)
        if newest is not None:
            first, path = newest
            self.progress = checkpoint.restore(path, self.optimizer, self.scheduler)
            self.display.say(f"going on after step {first} of {self.steps}")
        if self.progress["before"] is None:
            self.progress["before"] = asdict(self._score("before"))
        save_every = save_every or max(1, self.steps // 4)
        with self.display.steps(self.steps, first) as show:
            for step in range(first, self.steps):
                self._step(step, show)
                done = step + 1
                if out is not None and (done % save_every == 0 or done == self.steps or self.stop):
                    self._save(out, done)
                if self.stop:
                    raise StoppedError(
                        f"stopped after step {done} of {self.steps}"
                        + (f"; the same command goes on from {out}" if out else "")
                    )
        after = self._score("after")
        report = self._report(after)
        self.held.remove()
        if out is not None:
            self._finish(out, report)
        return report

    def _step(self, step, show):
        started = time.perf_counter()
        examples = self._examples(step)
        batch = data.batch_of(examples, self.tokenizer.pad_token_id, self.settings.device)
        loss = self.model(**batch).loss
        norm, skipped = _update(self.optimizer, self.params, loss, self.settings)
        self.scheduler.step()
        value = loss.item()
        progress = self.progress
        progress["losses"].append(value)
        progress["skipped"] += skipped
        seconds = time.perf_counter() - started
        progress["seconds"] += seconds
        waiting = getattr(self.optimizer, "last_waiting_bytes", 0)
        progress["gradients"] = max(progress["gradients"], self.held.peak, waiting)
        progress["states"] = max(progress["states"], state_bytes(self.optimizer))
        tokens = int(batch["attention_mask"].sum())
        scale = self.optimizer.loss_scale if self.settings.optimizer in OURS else None
        show(step + 1, value, norm, tokens / seconds, scale, progress["skipped"])

    def _examples(self, step):
        epoch, place = divmod(step, self.per_epoch)
        size, seed = self.settings.batch_size, self.settings.seed
        indices = data.batches(len(self.data.train), size, seed, epoch)[place]
        return [self.data.train[i] for i in indices]

    def _score(self, name):
        def progress(steps):
            for step in self.display.track(steps, f"score {name}"):
                if self.stop:
                    raise StoppedError("stopped while scoring; the same command goes on")
                yield step

        held_out = self.data.held_out[: self.settings.eval_size]
        result = score(
            self.model, self.data, held_out, batch_size=2 * self.settings.batch_size,
            pad=self.tokenizer.pad_token_id, device=self.settings.device, progress=progress,
        )  # fmt: skip
        self.display.say(f"{name} training: {result} on {result.count} held-out "
                         f"{'tokens' if result.name == 'perplexity' else 'questions'}")  # fmt: skip
        return result

    def _save(self, out, step):
        checkpoint.save(
            out, step, self.model, self.tokenizer, self.optimizer, self.scheduler, self.progress
        )

    def _report(self, after):
        progress = self.progress
        last = progress["losses"][-max(1, len(progress["losses"]) // 10) :]
        name = self.settings.optimizer
        if name in OURS and self.settings.strategy != "auto":
            name += f" ({self.settings.strategy})"
        return Report(
            optimizer=f"{name}, lr {self.settings.lr:g}",
            before=Score(**progress["before"]),
            after=after,
            loss=sum(last) / len(last),
            steps=self.steps,
            skipped=progress["skipped"],
            seconds=progress["seconds"],
            gradient_bytes=progress["gradients"],
            state_bytes=progress["states"],
        )

    def _finish(self, out, report):
        """The checkpoint of the last step is there until the result is."""
        partial = out / "model.partial"
        for folder in (partial, out / "model"):
            shutil.rmtree(folder, ignore_errors=True)
        huggingface.save(partial, self.model, self.tokenizer)
        partial.rename(out / "model")
        record = {**asdict(report), "losses": self.progress["losses"]}
        temporary = out / "result.json.partial"
        temporary.write_text(json.dumps(record, indent=2) + "\n")
        temporary.rename(out / "result.json")
        for path in out.glob("checkpoint-*"):
            shutil.rmtree(path)


def _read_report(path):
    record = json.loads(path.read_text())
    record.pop("losses")
    return Report(**record | {key: Score(**record[key]) for key in ("before", "after")})


def _optimizer(settings, model):
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


def _update(optimizer, params, loss, settings):
    """One step -> (gradient norm or None, whether the step was skipped)."""
    if settings.optimizer in OURS:
        optimizer.backward(loss)
        return optimizer.last_grad_norm, optimizer.last_step_skipped
    loss.backward()
    norm = None
    if settings.clip_grad_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(params, settings.clip_grad_norm).item()
    if settings.clip_grad_value is not None:
        torch.nn.utils.clip_grad_value_(params, settings.clip_grad_value)
    optimizer.step()
    optimizer.zero_grad()
    return norm, False


@contextlib.contextmanager
def _signals():
    """SIGINT and SIGTERM fill a list, which the loop looks at between steps; a second one is as
    usual. In a thread, where signals cannot be caught, nothing changes."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
