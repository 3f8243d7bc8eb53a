"""The memory of a training step of a transformers model that is not there."""

import contextlib
from dataclasses import dataclass, replace

import torch

from ..integrations import huggingface
from ..optim.choosing import Waits, chosen, default_budget
from . import optimizers, sharded
from .fake import fake_step
from .recorder import Recorder
from .timeline import extended, layer_regions, summarise, whole

TRACED = 3  # and one more: see Note [More layers]


@dataclass(frozen=True)
class Job:
    """A training step: what its memory depends on; `plan` says what the fields are."""

    optimizer: str = "lomo"
    dtype: str = "bfloat16"
    batch: int = 1
    sequence: int = 512
    checkpointing: str | None = None
    attention: str | None = None
    device: str = "cuda"
    shards: int = 1
    options: tuple = ()  # (name, value) of the optimizer

    @property
    def chooses(self):
        """Whether the optimizer's strategy depends on the size of the whole model."""
        options = dict(self.options)
        clips = options.get("clip_grad_norm") is not None and options.get("norm") != "tensor"
        return clips and options.get("strategy", "auto") in ("auto", "partial")


def predict(config, job, progress=lambda text: None):
    """A `timeline.Summary` of one step in its steady state (states exist) of the whole model."""
    layers = huggingface.layers_of(config)
    if layers is None or not _alike(config, layers):
        progress("tracing the whole model")
        return whole(traced(config, job, layers or 0).values())

    def regions(count, **options):
        progress(f"tracing {count} of {layers} layers")
        changed = replace(job, options=tuple({**dict(job.options), **options}.items()))
        return traced(huggingface.with_layers(config, count), changed, count)

    wait = _Wait.of(config, job, layers) if job.chooses else None
    options = {} if wait is None else {"strategy": wait.strategy}
    if wait is not None and wait.everything:
        options["factor_budget"] = 1 << 62
    if wait is None or wait.strategy != "partial" or wait.everything:
        if layers <= TRACED + 1:
            return whole(regions(layers, **options).values())
        counts = TRACED, TRACED + 1
        return extended([regions(n, **options) for n in counts], layers - TRACED)
    kept = wait.kept_layers
    if not 2 <= kept <= layers - 4:
        return whole(regions(layers, **options).values())
    pairs = (5, 2), (6, 2), (6, 3)
    traces = [regions(n, **options, factor_budget=wait.budget(n, k)) for n, k in pairs]
    return extended(traces, layers - 5, kept - 2)


@dataclass(frozen=True)
class _Wait:
    """What waits for the norm in a whole model, told from a few of its layers."""

    strategy: str
    everything: bool  # whether all that has factors may wait
    kept_layers: int
    inside: tuple  # bytes of what waits of a layer's matrices
    before: int  # and of those before the layers
    small: tuple  # bytes of vectors outside the layers, and of one layer
    room: int

    @classmethod
    def of(cls, config, job, layers):
        """By the optimizer's own rule (optim/choosing.py), on the sizes of all layers."""
        (few, listed, less), (more, _, others) = (
            _would_wait(huggingface.with_layers(config, n), job) for n in (1, 2)
        )
        others += (layers - 2) * (others - less)
        vectors = sum(each.nbytes for each in few)
        layer = sum(each.nbytes for each in more) - vectors
        places = [i for i, each in enumerate(listed) if _has_number(each.name)]
        first, last = (places[0], places[-1] + 1) if places else (0, 0)
        every = listed[:first] + listed[first:last] * layers + listed[last:]
        every = [each._replace(key=i) for i, each in enumerate(every)]
        options = dict(job.options)
        if (budget := options.get("factor_budget")) is None:
            budget = default_budget(parameters(config) * getattr(torch, job.dtype).itemsize)
        small = vectors + (layers - 1) * layer
        choice = chosen(
            options.get("strategy", "auto"),
            [Waits("small", "", small, True)],
            every,
            others,
            budget,
            once=job.checkpointing == "reentrant",
        )
        inside = tuple(each.nbytes for each in listed[first:last])
        before = sum(each.nbytes for each in listed[:first])
        room = budget - small - before
        return cls(
            choice.strategy if choice.strategy != "two_backward" else "partial",
            len(choice.keeps) == len(every) + 1,
            room // sum(inside) if room >= 0 and inside else -1,
            inside, before, (vectors - layer, layer), room,
        )  # fmt: skip

    def budget(self, layers, kept):
        """With which so many layers wait in a model of so many, and the same part of one more."""
        left, part = self.room % sum(self.inside), 0
        for size in self.inside:
            if size > left - part:
                break
            part += size
        small = self.small[0] + layers * self.small[1]
        return small + self.before + kept * sum(self.inside) + part


def _has_number(name):
    return any(part.isdigit() for part in name.split("."))


def _would_wait(config, job):
    with fake_step(job.device), huggingface.without_values():
        model = model_of(config, job)
        optimizer, _ = optimizers.make(job.optimizer, model, False, dict(job.options))
        loss_of(model, job)
        return optimizer.would_wait()


def traced(config, job, layers):
    """Summaries of the regions of the step, by Note [More layers]."""
    with contextlib.ExitStack() as stack:
        mesh = None
        if job.shards > 1:
            mesh = stack.enter_context(sharded.fake_devices(job.shards))
        stack.enter_context(fake_step(job.device))
        stack.enter_context(huggingface.without_values())
        model = model_of(config, job)
        if mesh is not None:
            sharded.shard(model, mesh)
        return summarise(record(model, job), layer_regions(layers))


def record(model, job):
    """The Recorder of a step of a model, fake or real, that begins with its states in place."""
    optimizer, step = optimizers.make(job.optimizer, model, job.shards > 1, dict(job.options))
    while True:
        had_states = bool(optimizer.state)
        with Recorder(model, optimizer) as recorder:
            step(loss_of(model, job))
        if had_states or not optimizer.state:
            return recorder


def model_of(config, job):
    dtype = getattr(torch, job.dtype)
    return huggingface.from_config(config, dtype, job.checkpointing, job.attention)


def loss_of(model, job):
    device = next(model.parameters()).device
    tokens = torch.zeros(job.batch, job.sequence, dtype=torch.long, device=device)
    return model(input_ids=tokens, labels=tokens).loss


def _alike(config, layers):
    """Whether the model is made of layers that have as many parameters each."""
    one, two, every = (parameters(huggingface.with_layers(config, n)) for n in (1, 2, layers))
    return every == one + (layers - 1) * (two - one)


def parameters(config):
    """How many there are; tied ones once."""
    key = config.to_json_string(use_diff=False)
    if key not in _COUNTED:
        with torch.device("meta"):
            model = huggingface.from_config(config, torch.bfloat16)
        _COUNTED[key] = sum(param.numel() for param in model.parameters())
    return _COUNTED[key]


_COUNTED = {}  # configuration -> parameters


def largest(name, job, needs, memory, highest=1 << 20):
    """The largest value of `batch` or `sequence` for which `needs(job)` is at most `memory`, at
    most `highest`; 0 if there is none.

    Bytes grow about linearly, so a straight line through what is known says where to look next;
    where it is no help, the middle does.
    """
    known = {}

    def excess(value):
        if value not in known:
            known[value] = needs(replace(job, **{name: value})) - memory
        return known[value]

    if excess(1) > 0:
        return 0
    low, high = 1, max(2, getattr(job, name))
    while excess(high) <= 0:
        if high >= highest:
            return highest
        low, high = high, min(highest, 4 * high)
    turn = 0
    while high - low > 1:
        slope = (excess(high) - excess(low)) / (high - low)
        guess = low - excess(low) / slope
        # On either side of the line's answer in turn, so that both ends close in on it.
        middle = int(guess) + turn % 2 if turn % 4 < 2 else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        low, high = (middle, high) if excess(middle) <= 0 else (low, middle)
        turn += 1
    return low
