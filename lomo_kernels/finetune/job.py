"""One run, from its settings to its report."""

import contextlib
import hashlib
import math
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..integrations import weights
from ..integrations.sharding import shard
from ..memory import HeldBytes, measure, state_bytes
from ..optim import sharding
from . import adapters, checkpoint, data, ranks, report, signals, stepping
from .display import Display
from .examples import batch_of, batches
from .log import Log
from .report import Report
from .scoring import Score, score
from .settings import ADAPTERS, DEFAULT_STEPS, OURS, OURS_ALONE, Output, Settings
from .signals import StoppedError

BEST = "best"  # in the run's folder: the weights with the best score of the validation part


def run(
    settings: Settings,
    output: Output | None = None,
    display: Display | None = None,
    before: Score | None = None,
) -> Report:
    """Fine-tunes a model and scores it before and after.

    Args:
        settings: what to do.
        output: what is kept, None: nothing. A run that was cut short goes on from the newest
            checkpoint in `output.out`; a finished one is not repeated. `output.compare` is the
            command's to act on.
        display: where progress is shown.
        before: the score before training, where `evaluate` or another run of the same model and
            data has given it: it is not taken again.

    Returns:
        A Report.

    Raises:
        ModelError, DataError, OutputError: one sentence for the user.
        StoppedError: on SIGINT or SIGTERM, after the step in progress and a checkpoint.
    """
    display, output = display or Display(), output or Output()
    with ranks.joined(settings) as team, contextlib.ExitStack() as open_here:
        stepping.check(settings)
        adapters.check(settings)
        parts = data.read(settings)

        def claim():  # on the first rank
            if output.out is None:
                name = tempfile.TemporaryDirectory(prefix="lomo-kernels-")
                return Path(open_here.enter_context(name)), None
            out = Path(output.out)
            contents = _contents(settings, parts)
            open_here.enter_context(checkpoint.claimed(out, settings.identity(), contents))
            return out, report.read(out)

        folder, finished = team.first(claim)
        if finished is not None:
            display.say(f"{folder} holds this run already; nothing is left to do")
            return finished
        job = _job(settings, output, folder, parts, display, team, before)
        with signals.noted() as job.stop:
            return job.run(team.first(checkpoint.latest, folder))


def evaluate(settings: Settings, display: Display | None = None) -> Score:
    """The Score of a model as it is: that of `run` before training."""
    with ranks.joined(settings) as team:
        parts = data.read(settings)
        return _job(settings, Output(), None, parts, display or Display(), team).score("before", 0)


def _contents(settings, parts):
    """Digests of what a run reads, by the names a user knows it by."""

    def digest(*items):
        return hashlib.sha256("\n".join(map(repr, items)).encode()).hexdigest()

    return {
        f"the model {settings.model}": weights.digest(settings.model),
        f"what is trained on of {parts.name}": digest(*parts.train, *parts.validation),
        f"what is held out of {parts.name}": digest(*parts.held_out),
    }


def _job(settings, output, folder, parts, display, team, before=None):
    tokenizer = weights.load_tokenizer(settings.model)
    examples = data.tokenised(parts, settings, tokenizer)
    for line in examples.lines:
        display.say(line)
    display.say(f"loading {settings.model}")
    model = _load(settings, team, examples)
    return Job(settings, output, folder, team, model, tokenizer, examples, display, before)


def _load(settings, team, examples):
    load = settings.model, getattr(torch, settings.dtype), settings.checkpointing
    if settings.tensor_parallel > 1:
        parallel = settings.tensor_parallel
        return weights.load_parallel(*load, ranks=team.size, tensor_parallel=parallel).train()
    if team.size == 1 and not settings.is_sharded:
        model = adapters.added(settings, weights.load_model(*load), examples)
        return model.to(team.device).train()
    mesh = torch.distributed.init_device_mesh(torch.device(team.device).type, (team.size,))
    cut = {"units": settings.units, "offload": settings.offload}
    if team.size == 1:
        return shard(weights.load_model(*load), mesh, **cut).train()
    model = None

    def load_first():
        nonlocal model
        model = weights.load_model(*load)

    team.first(load_first)
    return weights.spread(model, team, mesh, checkpointing=settings.checkpointing, **cut).train()


def variants(settings: Settings, names: Iterable[str]) -> list[Settings]:
    """The settings with other optimizers or adapters: "sgd", or "sgd=0.1" for a learning rate.

    Raises:
        ValueError: one cannot be made, before anything is loaded.
    """
    others = []
    for name in names:
        name, _, lr = name.partition("=")
        what = {"adapter": None, "optimizer": name}
        if name in ADAPTERS:
            keeps = name == "lora+lomo" and settings.optimizer in OURS
            what = {"adapter": name, "optimizer": settings.optimizer if keeps else None}
        if what["optimizer"] not in OURS and name != "lora+lomo":
            able = OURS_ALONE.items()
            what |= {key: can[0] for key, can in able if getattr(settings, key) not in can}
        others.append(replace(settings, **what, lr=float(lr) if lr else None))
        stepping.check(others[-1])
        adapters.check(others[-1])
    adapters.check_used([settings, *others])
    return others


def compare(
    settings: Settings, first: Report, names: Iterable[str], display: Display | None = None
) -> list[Report]:
    """Runs the same data with other optimizers, as `variants` takes them, and shows one table,
    beginning with the report `first`. Nothing of these runs is saved."""
    display, reports = display or Display(), [first]
    for other in variants(settings, names):
        left_out = [name for name in OURS_ALONE if getattr(other, name) != getattr(settings, name)]
        if left_out:
            display.say(f"{other.optimizer} has no {', '.join(left_out)}: left out")
        reports.append(run(other, display=display))
    display.table(reports)
    return reports


def _label(settings):
    """What a run is called beside others."""
    name, more = settings.adapter or settings.optimizer, ""
    if settings.adapter == "lora+lomo":
        name, more = f"lora+{settings.optimizer}", f", {settings.adapter_lr:g}"
    if settings.optimizer in OURS and settings.strategy != "auto":
        name += f" ({settings.strategy})"
    return f"{name}, lr {settings.lr:g}{more}"


def _bytes(params):
    """Of parameters; of sharded ones this rank's."""
    return sum(sharding.local(p).nbytes for p in params)


def steps_of(settings, examples):
    """-> (steps of a run, steps of a pass over the examples)."""
    per_epoch = -(-examples // (settings.batch_size * settings.gradient_accumulation))
    if settings.steps is not None:
        return settings.steps, per_epoch
    if settings.epochs is None and settings.train is None and settings.task is None:
        return DEFAULT_STEPS, per_epoch
    return max(1, round((settings.epochs or 1.0) * per_epoch)), per_epoch


class Job:
    """One run in progress. `folder` is `output.out`, or one for the time of the run."""

    def __init__(self, settings, output, folder, team, model, tokenizer, examples, display, before):
        self.settings, self.output, self.folder = settings, output, folder
        self.team, self.model, self.tokenizer = team, model, tokenizer
        self.data, self.display = examples, display
        self.stop, self.log = [], Log(None)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.steps, self.per_epoch = steps_of(settings, len(examples.train))
        self.held = HeldBytes(self.params)  # before the optimizer: its hooks come first
        self.optimizers = adapters.optimizers(settings, model)
        self.optimizer, *self.beside = self.optimizers
        groups = [group for each in self.beside for group in each.param_groups]
        self.beside_bytes = _bytes(p for group in groups for p in group["params"])
        schedule = torch.optim.lr_scheduler.LambdaLR
        self.schedulers = [schedule(each, self._rate) for each in self.optimizers]
        self.progress = {
            "before": None if before is None else asdict(before), "losses": [], "skipped": 0,
            "seconds": 0.0, "gradients": 0, "states": 0, "activations": 0, "best": None,
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

    def run(self, newest):
        first = 0
        if newest is not None:
            first, path = newest
            self.progress = checkpoint.restore(
                path, self.team, self.model, self.optimizers, self.schedulers
            )
            self.display.say(f"going on after step {first} of {self.steps}")
        with contextlib.closing(self._log(first)) as self.log:
            if self.progress["before"] is None:
                self.progress["before"] = asdict(self.score("before", 0))
            with self.display.steps(self.steps, first) as show:
                for step in range(first, self.steps):
                    self._step(step, show)
                    self._after_step(step + 1)
            best_step = self._take_best()
            after = self.score("after", self.steps)
        result = self._report(after, best_step)
        self.held.remove()
        if self.output.out is not None:
            self.team.first(self._finish, result, weights.gathered(self.model))
        return result

    def _log(self, first):
        if not self.team.is_first:
            return Log(None)
        if self.output.log is not None:
            return Log(Path(self.output.log), first, board=True)
        return Log(self.folder if self.output.out is not None else None, first)

    def _step(self, step, show):
        started = time.perf_counter()
        settings, progress, team = self.settings, self.progress, self.team
        # Dropout of a step does not depend on where a run began, or goes on.
        torch.manual_seed((settings.seed * 1_000_003 + step) * team.parts + team.part)
        micro = self._batches(step)
        rate = self.schedulers[0].get_last_lr()[0]
        with self._measured(step):
            loss, norm, skipped = stepping.update(
                self.optimizer, self.params, self._losses(micro), settings
            )
            for optimizer in self.beside:
                if not skipped:
                    optimizer.step()
                optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        tokens = sum(int(batch["attention_mask"].sum()) for batch, _ in micro)
        loss, tokens = team.sum(loss, tokens)
        loss /= team.parts
        progress["losses"].append(loss)
        progress["skipped"] += skipped
        seconds = time.perf_counter() - started
        progress["seconds"] += seconds
        waiting = getattr(self.optimizer, "last_waiting_bytes", 0) + self.beside_bytes
        progress["gradients"] = max(progress["gradients"], self.held.peak, waiting)
        progress["states"] = max(progress["states"], sum(map(state_bytes, self.optimizers)))
        speed = tokens / seconds
        scale = self.optimizer.loss_scale if settings.optimizer in OURS else None
        show(step + 1, loss, norm, speed, scale, progress["skipped"])
        self.log.add(
            step + 1, loss=loss, lr=rate, gradient_norm=norm, tokens_per_second=speed,
            loss_scale=scale, skipped=progress["skipped"],
        )  # fmt: skip

    @contextlib.contextmanager
    def _measured(self, step):
        """Notes the activations of the second step, whose states exist, or of the only one."""
        if step != min(1, self.steps - 1):
            yield
            return
        with measure(self.model, *self.optimizers) as measured:
            yield
        self.progress["activations"] = measured.maxima["activations"]

    def _batches(self, step):
        """This rank's part of the micro-batches of a step, each with the factor of its loss: so
        the mean over the ranks is that over all tokens of a step, as one large batch has it."""
        epoch, place = divmod(step, self.per_epoch)
        size, seed = self.settings.batch_size, self.settings.seed
        together = size * self.settings.gradient_accumulation
        indices = batches(len(self.data.train), together, seed, epoch)[place]
        examples = [self.data.train[i] for i in indices]
        team, pad = self.team, self.tokenizer.pad_token_id
        parts = [team.of_batch(examples[i : i + size]) for i in range(0, len(examples), size)]
        total = sum(tokens for _, _, tokens in parts)
        return [
            (batch_of(mine, pad, team.device), team.parts * tokens / total)
            for mine, tokens, _ in parts
        ]

    def _losses(self, micro):
        for batch, factor in micro:
            with self._autocast():
                loss = self.model(**batch).loss
            yield loss if factor == 1 else loss * factor

    def _autocast(self):
        device = torch.device(self.team.device).type
        return torch.autocast(device, torch.bfloat16, enabled=self.settings.autocast)

    def _after_step(self, done):
        settings, last = self.settings, done == self.steps
        stop = self.team.any(self.stop)
        if settings.eval_every and (done % settings.eval_every == 0 or last):
            self._choose(done)
        if self.output.out is not None:
            save_every = self.output.save_every or max(1, self.steps // 4)
            if done % save_every == 0 or last or stop:
                self._save(done)
        if stop:
            raise StoppedError(
                f"stopped after step {done} of {self.steps}"
                + (f"; the same command goes on from {self.folder}" if self.output.out else "")
            )

    def _choose(self, done):
        """Keeps the weights if the validation part has never been scored better."""
        found, best = self.score("validation", done), self.progress["best"]
        if best is None or found.is_better_than(Score(**best["score"])):
            checkpoint.save_weights(self.folder, BEST, self.team, self.model)
            self.progress["best"] = {"step": done, "score": asdict(found)}

    def _take_best(self):
        """Puts the best weights into the model. -> of which step they are."""
        best = self.progress["best"]
        if best is None or best["step"] == self.steps:
            return self.steps
        self.display.say(f"the weights of step {best['step']} are the best of the validation part")
        checkpoint.load_weights(self.folder / BEST, self.team, self.model)
        return best["step"]

    def score(self, name, step):
        def progress(steps):
            for each in self.display.track(steps, f"score {name}"):
                if self.team.any(self.stop):
                    raise StoppedError("stopped while scoring; the same command goes on")
                yield each

        examples = self.data.validation if name == "validation" else self.data.held_out
        with self._autocast():
            result = score(
                self.model, examples, measures=self.data.measures, rule=self.settings.score,
                batch_size=2 * self.settings.batch_size, pad=self.tokenizer.pad_token_id,
                team=self.team, progress=progress,
            )  # fmt: skip
        low, high = result.interval
        when = f"{name} training" if name != "validation" else f"validation after step {step}"
        self.display.say(f"{when}: {result} on {result.count} held-out "
                         f"{'tokens' if result.name == 'perplexity' else 'questions'}, 95 % "
                         f"interval {low:.3f} to {high:.3f}")  # fmt: skip
        values = {result.name: result.value, **result.more}
        part = "validation" if name == "validation" else "held_out"
        self.log.add(step, **{f"{part}/{key}": value for key, value in values.items()})
        return result

    def _save(self, step):
        checkpoint.save(
            self.folder, step, self.team, self.model, self.optimizers, self.schedulers,
            self.progress, max(1, self.output.keep),
        )  # fmt: skip

    def _report(self, after, best_step):
        progress = self.progress
        last = progress["losses"][-max(1, len(progress["losses"]) // 10) :]
        return Report(
            optimizer=_label(self.settings),
            before=Score(**progress["before"]),
            after=after,
            loss=sum(last) / len(last),
            steps=self.steps,
            skipped=progress["skipped"],
            seconds=progress["seconds"],
            trainable=sum(p.numel() for p in self.params),
            parameter_bytes=_bytes(self.model.parameters()),
            gradient_bytes=progress["gradients"],
            state_bytes=progress["states"],
            activation_bytes=progress["activations"],
            best_step=best_step,
        )

    def _finish(self, result, gathered):
        """The checkpoint of the last step is there until the result is."""

        def write(folder):
            adapters.save(self.settings, folder, self.model, self.tokenizer, gathered)

        checkpoint.save_model(self.folder, "model", write)
        with checkpoint.writing(self.folder):
            report.write(self.folder, result, self.progress["losses"])
            checkpoint.drop(self.folder, self.output.keep)
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
