"""Plans of sharded and offloaded steps, against steps of two ranks and sizes counted by hand."""

import time

import pytest
import ranks
import torch.distributed as dist
from test_plan import LLAMA, agree

from lomo_kernels.memory.predict import Job, model_of, predict, record, sharded_as
from lomo_kernels.memory.timeline import summarise, whole

WORLD = 2
CLIPPED = {"clip_grad_norm": 1.0}
OPTIONS = {
    "unclipped": {"clip_grad_norm": None},
    "auto": CLIPPED,
    "one_backward": {**CLIPPED, "strategy": "one_backward"},
    "two_backward": {**CLIPPED, "strategy": "two_backward"},
    "partial": {**CLIPPED, "strategy": "partial"},
    "split": {**CLIPPED, "rounding": "split"},
}


def as_job(optimizer="lomo", **more):
    options = tuple(more.pop("options", {}).items())
    fields = {"dtype": "bfloat16", "batch": 2, "sequence": 24, "device": "cpu", "shards": WORLD}
    return Job(optimizer, **{**fields, **more}, options=options)


def measured_on(world, config, job):
    model = sharded_as(job, model_of(config, job), ranks.mesh(world))
    with pytest.MonkeyPatch.context() as patch:
        for name in MESSAGES:
            if hasattr(dist, name):
                patch.setattr(dist, name, and_let_go(getattr(dist, name)))
        return whole(summarise(record(model, job)).values())


# What FSDP2 and the optimizer call, with the names of torch 2.13 and those before.
MESSAGES = (
    "all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "reduce_scatter_tensor"
)  # fmt: skip


def and_let_go(send):
    """A thread of gloo's lets a message's tensors go some time after the message has come."""

    def call(*args, **kwargs):
        result = send(*args, **kwargs)
        time.sleep(0.002)
        return result

    return call


def measured(config, job):
    first, *_ = ranks.run(WORLD, measured_on, config=config, job=job)
    return first


@ranks.needed
@pytest.mark.parametrize(
    ("units", "checkpointing"), [("layer", None), ("fine", None), ("fine", "non_reentrant")]
)
@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_need_what_is_planned(name, checkpointing, units):
    job = as_job(options=OPTIONS[name], checkpointing=checkpointing, units=units)
    agree(predict(LLAMA, job), measured(LLAMA, job))
