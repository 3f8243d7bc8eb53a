"""What a run would do and need, without its weights."""

import os

from .. import memory
from ..integrations import weights
from . import adapters, data, ranks, stepping
from .display import Display
from .job import steps_of
from .settings import Settings


def dry_run(settings: Settings, display: Display) -> memory.Plan:
    """Shows examples, tokens, steps and the memory of each kind, and stops there.

    Returns:
        The memory.Plan of one backward of the longest examples.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    ranks.check(settings, world)
    stepping.check(settings)
    adapters.check(settings)
    parts = data.read(settings)
    examples = data.tokenised(parts, settings, weights.load_tokenizer(settings.model))
    for line in examples.lines:
        display.say(line)
    steps, per_epoch = steps_of(settings, len(examples.train))
    sizes = [len(e.prompt) + len(e.completion) for e in examples.train]
    trained = sum(len(e.completion) if e.trained is None else sum(e.trained)
                  for e in examples.train)  # fmt: skip
    together = settings.batch_size * settings.gradient_accumulation
    display.say(
        f"{steps} steps of {together} examples, {per_epoch} a pass; {sum(sizes):,} tokens a pass, "
        f"{trained:,} of them trained; the longest example has {max(sizes):,}"
    )
    processes = world // settings.tensor_parallel
    cut = {"sharding": settings.sharding, "units": settings.units}
    if world == 1 and settings.sharding == "fsdp2" and not settings.offload:
        cut = {}
        display.say("the plan is without sharding: one process gathers a unit at a time besides")
    clips = settings.clip_grad_norm if settings.norm == "global" else None
    plan = memory.plan(
        weights.load_config(settings.model),
        optimizer=settings.optimizer, adapter=settings.adapter, **adapters.planned(settings),
        clip_grad_norm=clips, strategy=settings.strategy,
        rounding=settings.rounding, dtype=settings.dtype,
        batch=-(-settings.batch_size // processes), sequence=max(sizes),
        checkpointing="non_reentrant" if settings.checkpointing else None,
        device="cpu" if settings.device == "cpu" and not settings.offload else "cuda",
        devices=processes, **cut, offload="cpu" if settings.offload else None,
    )  # fmt: skip
    size = memory.report.size
    kinds = ", ".join(f"{name} {size(count)}" for name, count in plan.maxima.items())
    display.say(f"memory of a step, the most of each kind: {kinds}; together {size(plan.peak)}")
    if plan.host_peak is not None:
        display.say(f"host memory of each process: {size(plan.host_peak)}")
    if settings.tensor_parallel > 1:
        display.say("the plan is without tensor_parallel, which takes a part of the parameters and "
                    "of what their gradients and states need")  # fmt: skip
    if settings.autocast:
        display.say("the plan is for float32 throughout: autocast keeps activations in half of it")
    if settings.gradient_accumulation > 1:
        display.say("between the backwards of a step all gradients are held: the parameters' size "
                    "is the most they need")  # fmt: skip
    return plan
