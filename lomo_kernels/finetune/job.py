"""One run, from its settings to its report."""

import math
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..integrations import huggingface
from ..integrations.sharding import shard
from ..memory import HeldBytes, state_bytes
from . import checkpoint, data, ranks, report, signals, stepping
from .display import Display
from .report import Report
from .scoring import Score, score
from .settings import DEFAULT_STEPS, OURS
from .signals import StoppedError


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
    with ranks.joined(settings) as team:
        out = None if out is None else Path(out)
        return _run(settings, out, save_every, display or Display(), team)


def _run(settings, out, save_every, display, team):
    newest = None
    if out is not None:
        team.first(checkpoint.claim, out, settings.identity())
        if (finished := team.first(report.read, out)) is not None:
            display.say(f"{out} holds this run already; nothing is left to do")
            return finished
        newest = team.first(checkpoint.latest, out)
    display.say(f"loading {settings.model}")
    model, tokenizer = _load(settings, team)
    examples = data.load(
        settings.train, settings.held_out, tokenizer, length=settings.length, seed=settings.seed
    )
    display.say(examples.description)
    job = Job(settings, team, model, tokenizer, examples, display)
    with signals.noted() as stop:
        job.stop = stop
        return job.run(out, save_every, newest)


def _load(settings, team):
    dtype = getattr(torch, settings.dtype)
    load = settings.model, dtype, settings.checkpointing
    if settings.tensor_parallel > 1:
        model, tokenizer = huggingface.load_parallel(
            *load, ranks=team.size, tensor_parallel=settings.tensor_parallel
        )
        return model.train(), tokenizer
    if team.size == 1 and not settings.is_sharded:
        model, tokenizer = huggingface.load(*load)
        return model.to(team.device).train(), tokenizer
    kind = torch.device(team.device).type
    mesh = torch.distributed.init_device_mesh(kind, (team.size,))
    model = None

    def load_first():
        nonlocal model
        model, tokenizer = huggingface.load(*load)
        return tokenizer

    tokenizer = team.first(load_first)
    if team.size > 1:
        model = huggingface.spread(
            model, team, mesh, checkpointing=settings.checkpointing, offload=settings.offload
        )
    else:
        shard(model, mesh, offload=settings.offload)
    return model.train(), tokenizer


def compare(settings, first, names, display=None):
    """Runs the same data with other optimizers ("sgd", or "sgd=0.1" for a learning rate) and shows
    one table, beginning with the report `first`. Nothing of these runs is saved."""
    display = display or Display()
    reports = [first]
    for name in names:
        optimizer, _, lr = name.partition("=")
        other = replace(settings, optimizer=optimizer, lr=float(lr) if lr else None)
        reports.append(run(other, display=display))
    display.table(reports)
    return reports


class Job:
    """One run in progress."""

    def __init__(self, settings, team, model, tokenizer, examples, display):
        self.settings, self.team, self.model, self.tokenizer = settings, team, model, tokenizer
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
        self.optimizer = stepping.make(settings, model)
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
        torch.manual_seed(self.settings.seed + self.team.part)
        if newest is not None:
            first, path = newest
            self.progress = checkpoint.restore(
                path, self.team, self.model, self.optimizer, self.scheduler
            )
            self.display.say(f"going on after step {first} of {self.steps}")
        if self.progress["before"] is None:
            self.progress["before"] = asdict(self._score("before"))
        save_every = save_every or max(1, self.steps // 4)
        with self.display.steps(self.steps, first) as show:
            for step in range(first, self.steps):
                stop = self._step(step, show)
                done = step + 1
                if out is not None and (done % save_every == 0 or done == self.steps or stop):
                    self._save(out, done)
                if stop:
                    raise StoppedError(
                        f"stopped after step {done} of {self.steps}"
                        + (f"; the same command goes on from {out}" if out else "")
                    )
        after = self._score("after")
        result = self._report(after)
        self.held.remove()
        if out is not None:
            self._finish(out, result)
        return result

    def _step(self, step, show):
        """-> whether a rank was told to stop."""
        started = time.perf_counter()
        pad, team = self.tokenizer.pad_token_id, self.team
        examples, weight = team.of_batch(self._examples(step), pad)
        batch = data.batch_of(examples, pad, team.device)
        loss = self.model(**batch).loss * weight
        norm, skipped = stepping.update(self.optimizer, self.params, loss, self.settings)
        self.scheduler.step()
        tokens = int(batch["attention_mask"].sum())
        value, tokens, stop = team.sum(loss.item(), tokens, bool(self.stop))
        value /= team.parts
        progress = self.progress
        progress["losses"].append(value)
        progress["skipped"] += skipped
        seconds = time.perf_counter() - started
        progress["seconds"] += seconds
        waiting = getattr(self.optimizer, "last_waiting_bytes", 0)
        progress["gradients"] = max(progress["gradients"], self.held.peak, waiting)
        progress["states"] = max(progress["states"], state_bytes(self.optimizer))
        scale = self.optimizer.loss_scale if self.settings.optimizer in OURS else None
        show(step + 1, value, norm, tokens / seconds, scale, progress["skipped"])
        return stop

    def _examples(self, step):
        epoch, place = divmod(step, self.per_epoch)
        size, seed = self.settings.batch_size, self.settings.seed
        indices = data.batches(len(self.data.train), size, seed, epoch)[place]
        return [self.data.train[i] for i in indices]

    def _score(self, name):
        def progress(steps):
            for step in self.display.track(steps, f"score {name}"):
                if self.team.any(self.stop):
                    raise StoppedError("stopped while scoring; the same command goes on")
                yield step

        held_out = self.data.held_out[: self.settings.eval_size]
        result = score(
            self.model, self.data, held_out, batch_size=2 * self.settings.batch_size,
            pad=self.tokenizer.pad_token_id, team=self.team, progress=progress,
        )  # fmt: skip
        self.display.say(f"{name} training: {result} on {result.count} held-out "
                         f"{'tokens' if result.name == 'perplexity' else 'questions'}")  # fmt: skip
        return result

    def _save(self, out, step):
        checkpoint.save(
            out, step, self.team, self.model, self.optimizer, self.scheduler, self.progress
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

    def _finish(self, out, result):
        """The checkpoint of the last step is there until the result is."""
        weights = huggingface.gathered(self.model)
        self.team.first(self._write, out, result, weights)

    def _write(self, out, result, weights):
        partial = out / "model.partial"
        for folder in (partial, out / "model"):
            shutil.rmtree(folder, ignore_errors=True)
        huggingface.save(partial, self.model, self.tokenizer, weights)
        partial.rename(out / "model")
        report.write(out, result, self.progress["losses"])
        for path in out.glob("checkpoint-*"):
            shutil.rmtree(path)
