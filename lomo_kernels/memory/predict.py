"""The memory of a training step of a transformers model that is not there."""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from ..integrations import peft, shapes
from ..integrations.common import ModelError
from ..integrations.sharding import shard
from ..optim.choosing import Waits, chosen, default_budget
from . import optimizers, sharded
from .fake import fake_step
from .held import state_bytes
from .recorder import Recorder
from .timeline import extended, layer_regions, summarise

TRACED = 3  # and one more: see Note [More layers]
DATA_DEPENDENT = DataDependentOutputException, DynamicOutputShapeException


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
    units: str = "layer"
    offload: str | None = None
    options: tuple = ()  # (name, value) of the optimizer
    adapter: str | None = None
    adapter_options: tuple = ()  # (name, value) of the adapter

    @property
    def name(self):
        """What is trained, by what."""
        if self.adapter == "lora+lomo":
            return f"lora+{self.optimizer}"
        return self.adapter or self.optimizer

    @property
    def is_sharded(self):
        return self.shards > 1 or self.offload is not None

    @property
    def chooses(self):
        """Whether the optimizer's strategy depends on the size of the whole model."""
        options = dict(self.options)
        clips = options.get("clip_grad_norm") is not None and options.get("norm") != "tensor"
        return clips and options.get("strategy", "auto") in ("auto", "partial")


def predict(config, job, progress=lambda text: None):
    """A `timeline.Summary` of one step in its steady state (states exist) of the whole model."""
    progress("counting parameters")
    layers = shapes.layers_of(config)
    if layers is None or not _alike(config, layers):
        progress("tracing the whole model")
        return _together([traced(config, job)])

    def regions(count, **options):
        progress(f"tracing {count} of {layers} layers")
        changed = replace(job, options=tuple({**dict(job.options), **options}.items()))
        return traced(shapes.with_layers(config, count), changed, count)

    progress("asking what would wait for the norm")
    wait = _Wait.of(config, job, layers) if job.chooses else None
    options = {} if wait is None else {"strategy": wait.strategy}
    if wait is not None and wait.everything:
        options["factor_budget"] = 1 << 62
    if wait is None or wait.strategy != "partial" or wait.everything:
        if layers <= TRACED + 1:
            return _together([regions(layers, **options)])
        counts = TRACED, TRACED + 1
        return _together([regions(n, **options) for n in counts], layers - TRACED)
    kept = wait.kept_layers
    if not 2 <= kept <= layers - 4:
        return _together([regions(layers, **options)])
    pairs = (5, 2), (6, 2), (6, 3)
    traces = [regions(n, **options, factor_budget=wait.budget(n, k)) for n, k in pairs]
    return _together(traces, layers - 5, kept - 2)


def _together(traces, *steps):
    """`extended`, of the device and of the host."""
    device, host = zip(*traces)
    found = extended(device, *steps)
    return found if host[0] is None else replace(found, host=extended(host, *steps))


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
            would_wait(shapes.with_layers(config, n), job) for n in (1, 2)
        )
        others += (layers - 2) * (others - less)
        vectors = sum(each.nbytes for each in few)
        layer = sum(each.nbytes for each in more) - vectors
        places = [i for i, each in enumerate(listed) if _has_number(each.name)]
        first, last = (places[0], places[-1] + 1) if places else (0, 0)
        every = listed[:first] + listed[first:last] * layers + listed[last:]
        every = [each._replace(key=i) for i, each in enumerate(every)]
        options, small = dict(job.options), vectors + (layers - 1) * layer
        if (budget := options.get("factor_budget")) is None:
            size = parameters(config) * getattr(torch, job.dtype).itemsize
            if job.is_sharded:  # what would wait is each parameter's part
                size = others + sum(each.nbytes for each in every) + small
            budget = default_budget(size)
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


@contextlib.contextmanager
def _fake_model(config, job):
    """-> (a model without values, sharded as the job says; the device where it runs)."""
    device = sharded.HOST if job.offload is None else sharded.BESIDE_HOST
    with contextlib.ExitStack() as stack:
        enter, mesh = stack.enter_context, None
        if job.is_sharded:
            mesh = enter(sharded.fake_devices(job.shards, device))
        enter(fake_step(job.device))
        enter(shapes.without_values())
        with device:
            model = model_of(config, job)
        yield model if mesh is None else sharded_as(job, model, mesh), device


def would_wait(config, job):
    """`FusedOptimizer.would_wait` of a model."""
    with _fake_model(config, job) as (model, device):
        (optimizer, *_), _ = optimizers.make(job.optimizer, model, dict(job.options))
        # an optimizer of parameters knows no names, and after forward a sharded model has others
        names = {id(param): name for name, param in model.named_parameters()}
        loss_of(model, job, device)
        few, listed, others = optimizer.would_wait()
        return few, [each._replace(name=names[each.key]) for each in listed], others


def traced(config, job, layers=None):
    """Summaries of the regions of the step, by Note [More layers], on the device and, None without
    offload, in host memory. Without `layers` the whole step is one region."""
    regions = (lambda place: ((),)) if layers is None else layer_regions(layers)
    with _fake_model(config, job) as (model, device):
        try:
            recorder = record(model, job, device)
        except DATA_DEPENDENT as error:
            raise ModelError(
                f"the model's code looks at the values of a tensor ({error.func}), and a plan has "
                "none: take a newer transformers, whose experts do not"
            ) from error
        host = None if job.offload is None else summarise(recorder, regions, "host")
        return summarise(recorder, regions), host


def record(model, job, device=None):
    """The Recorder of a step of a model, fake or real, that begins with its states in place."""
    several, step = optimizers.make(job.optimizer, model, dict(job.options))
    while True:
        before = sum(map(state_bytes, several))
        with Recorder(model, several, device) as recorder:
            step(loss_of(model, job, device))
        if sum(map(state_bytes, several)) == before:
            return recorder


def sharded_as(job, model, mesh):
    return shard(model, mesh, units=job.units, offload=job.offload is not None)


def model_of(config, job):
    dtype = getattr(torch, job.dtype)
    kind = shapes.kind_of(config)
    model = shapes.from_config(config, dtype, job.checkpointing, job.attention, kind)
    options = dict(job.adapter_options)
    if job.adapter is None:
        return model
    if job.adapter == "prefix":
        return peft.with_prefix(model, [0] * options["prefix_tokens"])
    return peft.with_lora(
        model, rank=options["lora_rank"], dropout=options["lora_dropout"],
        targets=options["lora_targets"], frozen=job.adapter == "lora",
    )  # fmt: skip


def loss_of(model, job, device=None):
    """Of tokens alone; a decoder beside an encoder has as many as that.

    Raises:
        ModelError: the model does not run on them.
    """
    device = device or next(model.parameters()).device
    tokens = torch.zeros(job.batch, job.sequence, dtype=torch.long, device=device)
    batch = {"input_ids": tokens, "labels": tokens}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = tokens
    try:
        return model(**batch).loss
    except DATA_DEPENDENT:
        raise
    except Exception as error:  # anywhere in the model's own code
        raise ModelError(
            f"this {model.config.model_type} model does not run on tokens alone: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _alike(config, layers):
    """Whether the model is made of layers that have as many parameters each."""
    one, two, every = (parameters(shapes.with_layers(config, n)) for n in (1, 2, layers))
    return every == one + (layers - 1) * (two - one)


def parameters(config):
    """How many there are; tied ones once."""
    key = config.to_json_string(use_diff=False)
    if key not in _COUNTED:
        with torch.device("meta"):
            kind = shapes.kind_of(config)
            model = shapes.from_config(config, torch.bfloat16, kind=kind)
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
