"""Lomo and AdaLomo on sharded parameters: several ranks against one process, and against torch."""

import contextlib
import logging
import math
import time
import weakref
from contextlib import nullcontext

import pytest
import ranks
import shards
import torch
import torch.distributed as dist
from drivers import by_backward, by_fused_backward, by_held_gradients, by_scaled_loop
from shards import (
    CLIP,
    LR,
    VOCABULARY,
    WIDTH,
    batch,
    check_close,
    check_moved,
    check_same,
    check_still,
    whole,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_kernels import AdaLomo, Lomo, LossScale

pytestmark = pytest.mark.slow

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NEVER = 1e9  # a largest norm that clips nothing: the coefficient is 1


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


DRIVERS = [by_backward, by_fused_backward, by_scaled_loop, by_held_gradients]
GLOBAL = {"clip_grad_norm": CLIP}
CLIPS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "value": {"clip_grad_value": 1e-3},
    "tensor norm": {"clip_grad_norm": 0.1, "norm": "tensor"},
    "tensor norm, value, decay": {
        "clip_grad_norm": 0.1, "norm": "tensor", "clip_grad_value": 0.01, "weight_decay": 0.1,
    },
    "global norm": GLOBAL,
    "global norm, value, decay": {**GLOBAL, "clip_grad_value": 0.01, "weight_decay": 0.1},
}  # fmt: skip
STRATEGIES = {
    "auto": {"strategy": "auto", "factor_budget": 2**30},
    "immediate": {"strategy": "immediate"},
    "one_backward": {"strategy": "one_backward"},
    "two_backward": {"strategy": "two_backward"},
    "partial": {"strategy": "partial", "factor_budget": 4_000},
    "partial, nothing waits": {"strategy": "partial", "factor_budget": 0},
    "partial, everything waits": {"strategy": "partial", "factor_budget": 2**30},
}
GLOBAL_STRATEGIES = [name for name in STRATEGIES if name != "immediate"]
HOW = {
    "plain": {},
    "tensor norm": CLIPS["tensor norm"],
    **{name: {**GLOBAL, **STRATEGIES[name]} for name in GLOBAL_STRATEGIES if "," not in name},
}
FEW = ("plain", "one_backward", "partial")  # of HOW, where all would tell no more


def combinations():
    """Clipping, strategy and driver that go together."""
    for clip, options in CLIPS.items():
        is_global = "global" in clip
        for strategy in STRATEGIES:
            if is_global and strategy == "immediate":
                continue
            if not is_global and strategy not in ("auto", "immediate", "one_backward"):
                continue  # without a global norm these are as auto
            if "tensor" in clip and strategy == "one_backward":
                continue
            plain = clip in HOW or clip == "global norm"
            for drive in DRIVERS if plain and "," not in strategy else DRIVERS[:1]:
                announced = drive in (by_backward, by_fused_backward, by_held_gradients)
                if is_global and not announced and strategy not in ("auto", "one_backward"):
                    continue  # one backward cannot know the norm
                yield pytest.param(
                    {**options, **STRATEGIES[strategy]}, drive,
                    id=f"{clip}-{strategy}-{drive.__name__}",
                )  # fmt: skip


def torch_s(options):
    """What torch's own parts have to know of them."""
    return {k: v for k, v in options.items() if k not in ("strategy", "factor_budget")}


def by_columns(param):
    """The engine shards the last dimension only where the ranks' parts are even."""
    return Shard(param.ndim - 1 if param.shape[-1] % 4 == 0 else 0)


# -- the numbers -----------------------------------------------------------------------------------


@ranks.on(2)
@pytest.mark.parametrize(("options", "drive"), list(combinations()))
def test_is_clipping_and_sgd(world, options, drive):
    """Every rank has a batch of its own: the mean, clipped, as one process would."""
    check_is_sgd(world, options, drive)


@ranks.on(4)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if "," not in name])
def test_is_clipping_and_sgd_on_four_ranks(world, strategy):
    clip = CLIPS["plain" if strategy == "immediate" else "global norm"]
    check_is_sgd(world, {**clip, **STRATEGIES[strategy]})
    if strategy in ("auto", "immediate"):
        check_is_sgd(world, {**CLIPS["tensor norm, value, decay"], **STRATEGIES[strategy]})


def check_is_sgd(world, options, drive=by_backward, steps=3, batches=None, atol=1e-7, **model):
    """`model`: as for shards.sharded."""
    of_one = {k: v for k, v in model.items() if k not in ("engine", "mesh")}
    want, norms = shards.in_one_process(batches or world, steps, torch_s(options), **of_one)
    model = shards.sharded(**model)
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **options)
    for step in range(steps):
        drive(optimizer, model(batch(step, dist.get_rank())))
        assert all(p.grad is None for p in model.parameters())
        if "clip_grad_norm" in options:
            assert optimizer.last_grad_norm == pytest.approx(norms[step], rel=1e-6)
            ranks.agree(optimizer.last_grad_norm)
    check_moved(start, whole(model))
    check_close(whole(model), want, atol)
    return optimizer


ROUNDINGS = {
    "fp32": (F32, {}),
    "fp32, decay and value": (F32, {"weight_decay": 0.1, "clip_grad_value": 1e-3}),
    "bf16 stochastic": (BF16, {}),
    "bf16 split": (BF16, {"rounding": "split"}),
    "bf16 nearest": (BF16, {"rounding": "nearest"}),
    "fp16 nearest": (F16, {"loss_scale": None}),
    "fp16 stochastic": (F16, {"rounding": "stochastic", "loss_scale": 64.0}),
}


@ranks.on(2, 4)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_same_batch_gives_the_bits_of_one_process(world, rounding):
    dtype, options = ROUNDINGS[rounding]
    check_bits(dtype, options)


@ranks.on(2)
@pytest.mark.parametrize("strategy", GLOBAL_STRATEGIES)
@pytest.mark.parametrize("rounding", ["fp32", "bf16 split"])
def test_a_norm_that_clips_nothing_changes_no_bit(world, rounding, strategy):
    dtype, options = ROUNDINGS[rounding]
    check_bits(dtype, options, {"clip_grad_norm": NEVER, **STRATEGIES[strategy]})


@ranks.on(4)
@pytest.mark.parametrize("strategy", ["one_backward", "two_backward", "partial"])
def test_a_norm_that_clips_nothing_changes_no_bit_on_four_ranks(world, strategy):
    check_bits(BF16, {}, {"clip_grad_norm": NEVER, **STRATEGIES[strategy]})


@ranks.on(4)
@pytest.mark.parametrize("rounding", ["fp32", "bf16 stochastic", "bf16 split"])
def test_hsdp_gives_the_bits_of_one_process(world, rounding):
    dtype, options = ROUNDINGS[rounding]
    check_bits(dtype, options, mesh=(2, 2))


@ranks.on(2, 4)
def test_columns_of_a_shard_give_the_bits_of_one_process(world):
    engine = {"shard_placement_fn": by_columns}
    check_bits(F32, {}, engine=engine)
    check_bits(BF16, {"rounding": "split"}, engine=engine)


def check_bits(dtype, options, sharded_options=None, **sharding):
    one, many = shards.build(dtype), shards.sharded(dtype, **sharding)
    start = whole(one)
    first = Lomo(one, lr=LR, **options)
    second = Lomo(many, lr=LR, **options, **(sharded_options or {}))
    for step in range(3):
        first.backward(one(batch(step)))
        second.backward(many(batch(step)))
    check_moved(start, whole(many))
    check_same(whole(many), whole(one))
    check_lows(first, second, one, many)


def check_lows(first, second, one, many):
    """The 16 bits of an exact fp32 master that the weights do not have."""
    for (name, p), q in zip(one.named_parameters(), many.parameters(), strict=True):
        if "low" in first.state[p]:
            want, got = first.state[p]["low"], local(second.state[q]["low"])
            assert want.count_nonzero(), name
            assert torch.equal(got, local(of_rank(want, q))), name


def of_rank(tensor, param):
    """The part of a whole tensor that lies as the rank's part of the parameter does."""
    wide = tensor.to(torch.int32)  # no collective knows int16
    from_all = torch.distributed.tensor.distribute_tensor(
        wide, param.device_mesh, param.placements, src_data_rank=None
    )
    return from_all.to_local().to(tensor.dtype)


@ranks.on(2)
def test_a_second_run_gives_the_same_bits(world):
    ends = []
    for _ in range(2):
        model = shards.sharded(BF16)
        optimizer = Lomo(model, lr=LR, **GLOBAL, seed=5)
        for step in range(2):
            optimizer.backward(model(batch(step, dist.get_rank())))
        ends.append(whole(model))
    check_same(*ends)


# -- what the engine can do ------------------------------------------------------------------------

ENGINES = {
    "kept whole after forward": {"engine": {"reshard_after_forward": False}},
    "sharded after forward": {"engine": {"reshard_after_forward": True}},
    "tied": {"tied": True},
    "checkpoints": {"checkpointing": "non-reentrant"},
    "columns": {"engine": {"shard_placement_fn": by_columns}},
}
AT_FOUR = {
    "HSDP": {"mesh": (2, 2)},
    "HSDP, kept whole": {"mesh": (2, 2), "engine": {"reshard_after_forward": False}},
    "HSDP, tied, checkpoints": {"mesh": (2, 2), "tied": True, "checkpointing": "non-reentrant"},
    "copies alone": {"mesh": (4, 1)},
    "halves after forward": {"engine": {"reshard_after_forward": 2}},
}


@ranks.on(2)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("engine", ENGINES)
def test_engines(world, engine, how):
    check_is_sgd(world, HOW[how], steps=2, **ENGINES[engine])


@ranks.on(4)
@pytest.mark.parametrize("how", FEW)
@pytest.mark.parametrize("engine", AT_FOUR)
def test_engines_on_four_ranks(world, engine, how):
    check_is_sgd(world, HOW[how], steps=2, **AT_FOUR[engine])


@ranks.on(2)
@pytest.mark.parametrize("how", ["plain", "tensor norm", "one_backward", "auto"])
def test_reentrant_checkpointing(world, how):
    check_is_sgd(world, HOW[how], steps=2, checkpointing="reentrant")


@ranks.on(2)
@pytest.mark.parametrize("how", ["two_backward", "partial"])
def test_two_backwards_need_the_other_checkpointing(world, how):
    model = shards.sharded(checkpointing="reentrant")
    optimizer, start = Lomo(model, lr=LR, **HOW[how]), whole(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.backward(model(batch(0, dist.get_rank())))
    check_still(start, whole(model))


@ranks.on(2)
@pytest.mark.parametrize("how", HOW)
def test_mixed_precision_is_torch_s_sgd_on_the_same_engine(world, how):
    engine = {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)}
    model, twin = shards.sharded(engine=engine), shards.sharded(engine=engine)
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    sgd = torch.optim.SGD(twin.parameters(), lr=LR)
    for step in range(2):
        optimizer.backward(model(batch(step, dist.get_rank())))
        twin.load_state_dict(twin.state_dict())
        twin(batch(step, dist.get_rank())).backward()
        shards.clip(twin.parameters(), **torch_s(HOW[how]))
        sgd.step()
        sgd.zero_grad()
    check_moved(start, whole(model))
    # A weight that differs in its last bit may round to another bf16 one in the second forward.
    check_close(whole(model), whole(twin), 1e-5)


@ranks.on(2)
@pytest.mark.parametrize("how", HOW)
def test_offload_to_the_host(world, how):
    check_is_sgd(
        world, HOW[how], steps=2, engine={"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    )


@ranks.on(2, 4)
@pytest.mark.parametrize("how", FEW)
def test_one_unit_alone(world, how):
    """fully_shard of the model, and of nothing inside it."""
    want, _ = shards.in_one_process(world, 2, torch_s(HOW[how]))
    model = fully_shard(shards.build(), mesh=ranks.mesh(world))
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    for step in range(2):
        optimizer.backward(model(batch(step, dist.get_rank())))
    check_moved(start, whole(model))
    check_close(whole(model), want, 1e-7)


def llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=30, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return transformers.LlamaForCausalLM(config)


@ranks.on(2)
@pytest.mark.parametrize("how", [*FEW, "two_backward"])
def test_a_llama_of_transformers(world, how):
    model, twin = llama(), llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=ranks.mesh(world))
    fully_shard(model, mesh=ranks.mesh(world))
    optimizer, start = Lomo(model, lr=LR, **HOW[how]), whole(model)
    sgd = torch.optim.SGD(twin.parameters(), lr=LR)
    model.train()
    for step in range(2):
        ids = batch(step, dist.get_rank())
        optimizer.backward(model(input_ids=ids, labels=ids).loss)
        for rank in range(world):
            ids = batch(step, rank)
            (twin(input_ids=ids, labels=ids).loss / world).backward()
        shards.clip(twin.parameters(), **torch_s(HOW[how]))
        sgd.step()
        sgd.zero_grad()
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin), 1e-7)


@ranks.on(2)
def test_groups_have_options_of_their_own(world):
    model, twin = shards.sharded(), shards.build()

    def grouped(m):
        large, small = [], []
        for p in m.parameters():
            (large if p.ndim > 1 else small).append(p)
        return [{"params": large, "lr": 0.2}, {"params": small, "lr": 0.05}]

    optimizer = Lomo(grouped(model), **GLOBAL)
    sgd = torch.optim.SGD(grouped(twin))
    start = whole(model)
    for step in range(2):
        optimizer.backward(model(batch(step, dist.get_rank())))
        for rank in range(world):
            (twin(batch(step, rank)) / world).backward()
        shards.clip(twin.parameters(), **GLOBAL)
        sgd.step()
        sgd.zero_grad()
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin), 1e-7)


@ranks.on(2)
@pytest.mark.parametrize("how", HOW)
def test_frozen_parameters_and_what_is_thawed(world, how):
    model, twin = shards.build(), shards.InOneProcess(shards.build(), world, **torch_s(HOW[how]))
    for m in (model, twin.model):
        m.blocks[0].requires_grad_(False)
        m.head.requires_grad_(False)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    shards.shard(model)
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    for step in range(2):
        optimizer.backward(model(batch(step, dist.get_rank())))
        norm = twin.step(step)
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    check_moved(start, whole(model), but=frozen)
    check_close(whole(model), whole(twin.model), 1e-7)
    for m in (model, twin.model):
        m.requires_grad_(True)
    optimizer.step()
    optimizer.backward(model(batch(2, dist.get_rank())))
    twin.step(2)
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin.model), 1e-7)


@ranks.on(2)
@pytest.mark.parametrize("how", FEW)
def test_a_parameter_that_no_loss_uses(world, how):
    model, twin = shards.build(), shards.build()
    for m in (model, twin):
        m.spare = nn.Linear(8, 5)
    twin = shards.InOneProcess(twin, world, **torch_s(HOW[how]))
    shards.shard(model)
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    for step in range(2):
        optimizer.backward(model(batch(step, dist.get_rank())))
        twin.step(step)
    after = whole(model)
    spare = ["spare.weight", "spare.bias"]
    check_moved(start, after, but=spare)
    want = whole(twin.model)
    for each in (after, want):  # which were made with other random numbers
        del each[spare[0]], each[spare[1]]
    check_close(after, want, 1e-7)


# -- one message a step ----------------------------------------------------------------------------

MESSAGES = {
    **{name: {**GLOBAL, **STRATEGIES[name]} for name in GLOBAL_STRATEGIES},
    "plain": {},
    "immediate": STRATEGIES["immediate"],
    "tensor norm": CLIPS["tensor norm"],
    "held without a clip": STRATEGIES["one_backward"],
    "loss scale": {"loss_scale": LossScale(1024.0)},
    "loss scale, global norm": {**GLOBAL, "loss_scale": LossScale(1024.0)},
}


@ranks.on(2)
@pytest.mark.parametrize("drive", DRIVERS[:2])
@pytest.mark.parametrize("how", MESSAGES)
def test_one_message_a_step(world, how, drive):
    check_messages(how, drive)


@ranks.on(4)
@pytest.mark.parametrize("how", ["plain", "loss scale", "one_backward", "two_backward", "partial"])
def test_one_message_a_step_on_four_ranks(world, how):
    check_messages(how, by_backward)


def check_messages(how, drive):
    model = shards.sharded()
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **MESSAGES[how])
    for step in range(3):
        with ranks.Messages() as messages:
            drive(optimizer, model(batch(step, dist.get_rank())))
        if how == "tensor norm":  # every tensor has a norm of its own
            assert 1 <= len(messages.ours) <= len(list(model.parameters())) + 1, messages.ours
        else:
            assert len(messages.ours) == 1, messages.ours
        assert messages.others  # those of the engine are seen, and are not ours
    check_moved(start, whole(model))


@ranks.on(2)
def test_what_happened_is_asked_without_a_message(world):
    """A rank may log alone."""
    model = shards.sharded()
    optimizer = Lomo(model, lr=LR, **GLOBAL, loss_scale=LossScale(1024.0))
    optimizer.backward(model(batch(0, dist.get_rank())))
    if dist.get_rank() == 0:
        with ranks.Messages() as messages:
            assert optimizer.last_grad_norm > CLIP
            assert not optimizer.last_step_skipped
            assert optimizer.loss_scale == 1024.0
            assert "strategy" in optimizer.explain()
        assert not messages.ours + messages.others
    dist.barrier()
    optimizer.backward(model(batch(1, dist.get_rank())))


@ranks.on(2)
def test_a_step_without_gradients_waits_for_nobody(world):
    model = shards.sharded()
    optimizer = Lomo(model, lr=LR, **GLOBAL)
    optimizer.backward(model(batch(0, dist.get_rank())))
    start = whole(model)
    if dist.get_rank() == 0:
        optimizer.step()
        optimizer.zero_grad()
    dist.barrier()
    check_still(start, whole(model))


# -- memory ----------------------------------------------------------------------------------------


class ReducedGradients(TorchDispatchMode):
    """Bytes of what reduce-scatters gave, and of what was made of these, while they are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.units = {}, 0, []

    @property
    def now(self):
        return sum(self.alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace == "c10d" and "reduce_scatter" in function.name():
            output = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
            storage = output.untyped_storage()
            self.units.append(storage.nbytes())
            self.alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, storage._cdata)
            self.peak = max(self.peak, self.now)
        return result


def padded_units(model, world):
    """Bytes of the gradients of each unit on one rank."""
    units = {}
    for name, p in model.named_parameters():
        unit = name.split(".")[1] if name.startswith("blocks.") else "rest"
        rows = -(-p.shape[0] // world)
        units[unit] = units.get(unit, 0) + rows * p[0].numel() * p.element_size()
    return units


@ranks.on(2, 4)
@pytest.mark.parametrize("how", ["plain", "immediate", "two_backward", "one_backward", "partial"])
def test_bytes_of_gradients(world, how):
    budget = 8_000
    options = {"plain": {}, "immediate": STRATEGIES["immediate"]}.get(how)
    if options is None:
        options = {**GLOBAL, "strategy": how, "factor_budget": budget}
    model = shards.sharded(depth=8)
    units = padded_units(shards.build(depth=8), world)
    limits = {"one_backward": sum(units.values()), "partial": budget + max(units.values())}
    limit = limits.get(how, max(units.values()))
    optimizer, start = Lomo(model, lr=LR, **options), whole(model)
    for step in range(2):
        with ReducedGradients() as reduced:
            optimizer.backward(model(batch(step, dist.get_rank())))
        assert max(reduced.units) == max(units.values())  # all of them are seen
        assert 0 < reduced.peak <= limit, (reduced.peak, limit)
        assert reduced.now == 0
        if how == "one_backward":
            assert reduced.peak > 0.9 * sum(units.values())
        if how == "partial":
            assert reduced.peak > max(units.values())  # something waits
            assert 0 < optimizer.last_waiting_bytes <= limit
    check_moved(start, whole(model))


@ranks.on(2)
@pytest.mark.parametrize("how", ["plain", "immediate", "one_backward"])
def test_bytes_that_wait_after_a_backward(world, how):
    """No copies: what waits are the reduced gradients themselves."""
    options = {**STRATEGIES, "plain": {}}[how]
    model = shards.sharded(depth=8)
    optimizer = Lomo(model, lr=LR, **options)
    with ReducedGradients() as reduced:
        model(batch(0, dist.get_rank())).backward()
        waiting = {t.untyped_storage()._cdata: t for t in optimizer.waiting_tensors()}
        nbytes = sum(t.untyped_storage().nbytes() for t in waiting.values())
        if how == "one_backward":
            assert nbytes == reduced.now == sum(padded_units(shards.build(depth=8), world).values())
        else:
            assert nbytes == reduced.now == 0
        waiting.clear()
    optimizer.step()
    assert reduced.now == 0
    assert not optimizer.waiting_tensors()


@ranks.on(2)
@pytest.mark.parametrize(("share", "strategy"), [(0.75, "one_backward"), (0.25, "partial")])
def test_auto_counts_local_bytes(world, share, strategy):
    """Budgets between what one rank has and what all of them have."""
    model = shards.sharded(depth=8)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    optimizer = Lomo(model, lr=LR, **GLOBAL, factor_budget=int(share * nbytes))
    optimizer.backward(model(batch(0, dist.get_rank())))
    assert optimizer.explain().startswith(f"strategy {strategy}:")


# -- overflow and loss scales ----------------------------------------------------------------------


@contextlib.contextmanager
def spoiled(model, by, value=math.inf):
    """What rank `by` computes gives the last row of the embedding, which the last rank that has one
    of its rows owns, a gradient that is not finite."""

    def spoil(module, args, out):
        where = args[0] == VOCABULARY - 1
        if dist.get_rank() == by:
            out.register_hook(lambda grad: grad.masked_fill(where.unsqueeze(-1), value))

    handle = model.embedding.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def step_spoiled(optimizer, model, step, by=0, value=math.inf, drive=by_backward):
    with spoiled(model, by, value):
        loss = model(batch(step, dist.get_rank()))
    drive(optimizer, loss)


KINDS = {"Lomo": (Lomo, LR), "AdaLomo": (AdaLomo, 1e-2)}


@ranks.on(2)
@pytest.mark.parametrize("strategy", GLOBAL_STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_on_one_rank_stops_all(world, kind, strategy):
    check_overflow(kind, strategy)


@ranks.on(4)
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("strategy", ["one_backward", "two_backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_on_one_of_four_ranks_stops_all(world, kind, strategy, value):
    check_overflow(kind, strategy, value)


def check_overflow(kind, strategy, value=math.inf):
    cls, lr = KINDS[kind]
    model = shards.sharded()
    rule = LossScale(1024.0, backoff_factor=0.25)
    optimizer = cls(model, lr, **GLOBAL, **STRATEGIES[strategy], loss_scale=rule)
    optimizer.backward(model(batch(0, dist.get_rank())))
    start, state = whole(model), states(optimizer)
    step_spoiled(optimizer, model, 1, value=value)
    check_still(start, whole(model))
    assert_same_states(states(optimizer), state)
    assert optimizer.last_step_skipped
    assert optimizer.loss_scale == 256.0
    ranks.agree(optimizer.loss_scale)
    optimizer.backward(model(batch(2, dist.get_rank())))
    assert not optimizer.last_step_skipped
    assert optimizer.loss_scale == 256.0
    check_moved(start, whole(model))


def states(optimizer):
    return [
        {k: local(v).clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
        for state in (optimizer.state[p] for g in optimizer.param_groups for p in g["params"])
    ]


def assert_same_states(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in other)


@ranks.on(2, 4)
@pytest.mark.parametrize("options", [{}, CLIPS["tensor norm"]], ids=["plain", "tensor norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_overflow_without_a_global_norm_never_gets_into_weights(world, kind, options):
    """Each rank stops where it meets it; all of them know afterwards."""
    cls, lr = KINDS[kind]
    model = shards.sharded()
    optimizer = cls(model, lr, **options, loss_scale=LossScale(1024.0))
    step_spoiled(optimizer, model, 0)
    after = whole(model)
    assert all(p.isfinite().all() for p in after.values())
    assert torch.equal(after["embedding.weight"][-1], shards.build().embedding.weight[-1])
    assert optimizer.last_step_skipped
    assert optimizer.loss_scale == 512.0
    ranks.agree((optimizer.last_step_skipped, optimizer.loss_scale))
    optimizer.backward(model(batch(1, dist.get_rank())))
    assert not optimizer.last_step_skipped
    check_moved(after, whole(model))


@ranks.on(2, 4)
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_of_its_own_stops_a_tensor_on_all_ranks_or_on_none(world, kind, value):
    cls, lr = KINDS[kind]
    model = shards.sharded()
    optimizer = cls(model, lr, **CLIPS["tensor norm"], weight_decay=0.1)
    before = {name: local(p).detach().clone() for name, p in model.named_parameters()}
    step_spoiled(optimizer, model, 0, value=value)
    assert optimizer.last_step_skipped
    moved = {
        name: not torch.equal(local(p), before[name])
        for name, p in model.named_parameters()
        if local(p).numel()
    }
    together = {}
    for of_rank in ranks.everywhere(moved):
        for name, value in of_rank.items():
            together.setdefault(name, set()).add(value)
    assert {len(values) for values in together.values()} == {1}, together
    assert together["embedding.weight"] == {False}
    assert {True} in together.values()


@ranks.on(2)
@pytest.mark.parametrize("drive", DRIVERS)
@pytest.mark.parametrize("how", ["plain", "tensor norm", "one_backward"])
def test_the_scale_is_gradscaler_s(world, how, drive):
    """Overflows of one rank and of the other, by chance."""
    rule = {"growth_factor": 2.0, "backoff_factor": 0.25, "growth_interval": 2}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, **rule)
    twin = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([twin], lr=0.0)
    model = shards.sharded()
    optimizer = Lomo(
        model, lr=0.01, **HOW[how], loss_scale=LossScale(1024.0, **rule, min_scale=1e-6)
    )
    overflows = [None, None, 0, None, 1, 1, None, None, None, 0, None]
    for step, by in enumerate(overflows):
        if by is None:
            drive(optimizer, model(batch(step, dist.get_rank())))
        else:
            step_spoiled(optimizer, model, step, by, drive=drive)
        assert optimizer.last_step_skipped == (by is not None)
        twin.grad = torch.full_like(twin, 1.0 if by is None else math.inf)
        scaler.scale(torch.zeros(1))
        scaler.step(sgd)
        scaler.update()
        assert optimizer.loss_scale == scaler.get_scale()
        ranks.agree(optimizer.loss_scale)


@ranks.on(2)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("scale", [128.0, LossScale(256.0, growth_interval=1)], ids=str)
def test_a_scale_that_is_a_power_of_two_changes_no_bit(world, scale, how):
    ends, norms = [], []
    for loss_scale in (None, scale):
        model = shards.sharded()
        start = whole(model)
        optimizer = Lomo(model, lr=LR, **HOW[how], loss_scale=loss_scale)
        for step in range(3):
            optimizer.backward(model(batch(step, dist.get_rank())))
            norms.append(optimizer.last_grad_norm)
        ends.append(whole(model))
        check_moved(start, ends[-1])
    check_same(*ends)
    assert norms[:3] == norms[3:]
    assert optimizer.loss_scale == (128.0 if scale == 128.0 else 2048.0)


@ranks.on(2)
def test_auto_scales_the_loss_of_fp16(world):
    model = shards.sharded(F16)
    optimizer, start = Lomo(model, lr=LR), whole(model)
    assert optimizer.loss_scale == 65536.0
    for step in range(3):
        optimizer.backward(model(batch(step, dist.get_rank())))
        ranks.agree((optimizer.loss_scale, optimizer.last_step_skipped))
    assert not optimizer.last_step_skipped
    check_moved(start, whole(model))


# -- gradients that add up, and who looks at them --------------------------------------------------


@ranks.on(2)
@pytest.mark.parametrize("how", HOW)
def test_accumulation(world, how):
    """Four micro-batches; without a global norm the last is outside and uses the sum."""
    check_accumulation(world, how)


@ranks.on(4)
@pytest.mark.parametrize("how", FEW)
def test_accumulation_on_four_ranks(world, how):
    check_accumulation(world, how)


def check_accumulation(world, how):
    twin = shards.InOneProcess(shards.build(), world, **torch_s(HOW[how]))
    model = shards.sharded()
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    for step in range(2):
        micro = range(4 * step, 4 * step + 4)
        inside = len(micro) if how in ("two_backward", "partial") else 3
        for i, each in enumerate(micro):
            with optimizer.accumulate() if i < inside else nullcontext():
                (model(batch(each, dist.get_rank())) / 4).backward()
        optimizer.step()
        norm = twin.step(*micro)
        if "clip_grad_norm" in HOW[how]:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin.model), 1e-7)


@ranks.on(2)
@pytest.mark.parametrize("how", ["plain", "one_backward", "two_backward"])
def test_gradients_that_the_engine_does_not_reduce_yet(world, how):
    """set_requires_gradient_sync(False): the engine's own way to accumulate."""
    twin = shards.InOneProcess(shards.build(), world, **torch_s(HOW[how]))
    model = shards.sharded()
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **HOW[how])
    for step in range(2):
        model.set_requires_gradient_sync(False)
        (model(batch(2 * step, dist.get_rank())) / 2).backward()
        model.set_requires_gradient_sync(True)
        last = model(batch(2 * step + 1, dist.get_rank())) / 2
        if how == "two_backward":
            with optimizer.accumulate():
                last.backward()
        else:
            last.backward()
        optimizer.step()
        twin.step(2 * step, 2 * step + 1)
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin.model), 1e-7)


HELD = {"one_backward": STRATEGIES["one_backward"], "accumulate": {}}


def gather(optimizer, how, loss):
    """A backward after which gradients are there for who looks."""
    with optimizer.accumulate() if how == "accumulate" else nullcontext():
        loss.backward()


@ranks.on(2, 4)
@pytest.mark.parametrize("how", HELD)
def test_readers_see_the_gradients_and_the_step_uses_what_they_wrote(world, how):
    twin = shards.build()
    for rank in range(world):
        (twin(batch(0, rank)) / world).backward()
    model = shards.sharded()
    optimizer, start = Lomo(model, lr=LR, **HELD[how]), whole(model)
    gather(optimizer, how, model(batch(0, dist.get_rank())))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.grad.placements == p.placements
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-8)
        p.grad.mul_(0.5)
        q.grad.mul_(0.5)
    torch.optim.SGD(twin.parameters(), lr=LR).step()
    optimizer.step()
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin), 1e-7)


@ranks.on(2, 4)
@pytest.mark.parametrize("how", HELD)
def test_torch_s_clipping_of_gradients_that_are_held(world, how):
    want, norms = shards.in_one_process(world, 2, GLOBAL)
    model = shards.sharded()
    optimizer, start = Lomo(model, lr=LR, **HELD[how]), whole(model)
    for step in range(2):
        gather(optimizer, how, model(batch(step, dist.get_rank())))
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        assert norm.item() == pytest.approx(norms[step], rel=1e-6)
        ranks.agree(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    check_moved(start, whole(model))
    check_close(whole(model), want, 1e-7)


@ranks.on(2)
def test_torch_s_clipping_where_the_optimizer_s_own_decides(world):
    want, norms = shards.in_one_process(world, 2, GLOBAL)
    model = shards.sharded()
    optimizer, start = Lomo(model, lr=LR, **GLOBAL, factor_budget=2**30), whole(model)
    records = []
    logger, handler = logging.getLogger("lomo_kernels"), logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        for step in range(2):
            model(batch(step, dist.get_rank())).backward()
            assert nn.utils.clip_grad_norm_(model.parameters(), CLIP / 2) == 0
            optimizer.step()
            assert optimizer.last_grad_norm == pytest.approx(norms[step], rel=1e-6)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert sum("the optimizer's own clip_grad_norm=0.5 decides" in text for text in records) == 1
    check_moved(start, whole(model))
    check_close(whole(model), want, 1e-7)


@ranks.on(2)
def test_readers_of_gradients_that_were_used(world):
    model = shards.sharded()
    optimizer = Lomo(model, lr=LR)
    model(batch(0, dist.get_rank())).backward()
    with pytest.warns(UserWarning, match="found no gradients and clipped nothing"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.warns(UserWarning, match="reads the gradient of a parameter that"):
        assert model.head.weight.grad is None
    optimizer.step()


def by_optimizer(optimizer, model):
    optimizer.zero_grad()


def by_module(optimizer, model):
    model.zero_grad()


def one_by_one(optimizer, model):
    for p in model.parameters():
        p.grad = None


@ranks.on(2)
@pytest.mark.parametrize("drop", [by_optimizer, by_module, one_by_one])
@pytest.mark.parametrize("how", ["auto", "one_backward", "accumulate"])
def test_gradients_that_are_dropped(world, how, drop):
    """The next step is as if they had not been; and a rank that drops them waits for nobody."""
    options = {} if how == "accumulate" else HOW[how]
    model = shards.sharded()
    start = whole(model)
    optimizer = Lomo(model, lr=LR, **options)
    twin = shards.InOneProcess(shards.build(), world, **torch_s(options))
    gather(optimizer, how, model(batch(7, dist.get_rank())))
    if dist.get_rank() == 0:
        drop(optimizer, model)
    dist.barrier()
    if dist.get_rank() != 0:
        drop(optimizer, model)
    check_still(start, whole(model))
    optimizer.step()
    check_still(start, whole(model))
    optimizer.backward(model(batch(0, dist.get_rank())))
    twin.step(0)
    check_moved(start, whole(model))
    check_close(whole(model), whole(twin.model), 1e-7)


# -- errors ----------------------------------------------------------------------------------------


class RefusedError(Exception):
    pass


class Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        raise RefusedError


def fails_first(model):
    """Backward fails before the engine has reduced anything."""
    return model.head.register_forward_hook(lambda module, args, out: Refuse.apply(out))


def fails_last(model):
    """Backward fails after everything was reduced."""

    def refuse(param):
        raise RefusedError

    return model.embedding.weight.register_post_accumulate_grad_hook(refuse)


@ranks.on(2)
@pytest.mark.parametrize("fails", [fails_first, fails_last])
@pytest.mark.parametrize("how", ["plain", "tensor norm", "auto", "two_backward", "partial"])
def test_an_error_in_backward_on_every_rank(world, how, fails):
    """The step is dropped. The engine itself needs a new model then: after such an error it reduces
    no gradients of its outermost unit, for torch's SGD either."""
    model = shards.sharded()
    optimizer = Lomo(model, lr=LR, **HOW[how])
    start = whole(model)
    fails(model)
    loss = model(batch(0, dist.get_rank()))
    with pytest.raises(RefusedError):
        optimizer.backward(loss)
    optimizer.zero_grad()  # as torch's, it leaves what the failed backward has put into `.grad`
    assert optimizer.is_clean
    model.reshard()
    if optimizer.needs_norm:
        now = {n: p.full_tensor() for n, p in sharded_parameters(model)}
        check_still({n: start[n] for n in now}, now)
    check_is_sgd(world, HOW[how], steps=1)  # no rank has messages left that another waits for


def sharded_parameters(model):
    return [(name, p) for name, p in model.named_parameters() if isinstance(p, DTensor)]


@ranks.on(2)
def test_the_step_after_an_error_in_backward_says_that_the_engine_is_broken(world):
    model = shards.sharded()
    optimizer = Lomo(model, lr=LR)
    handle = fails_first(model)
    with pytest.raises(RefusedError):
        optimizer.backward(model(batch(0)))
    handle.remove()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="start again from a checkpoint"):
        optimizer.backward(model(batch(0)))


def fail_alone(world, fails, options):
    """Rank 1 fails and leaves; -> the kind of error, and the seconds until then."""
    model = shards.sharded()
    optimizer = Lomo(model, lr=LR, **options)
    optimizer.backward(model(batch(0, dist.get_rank())))
    if dist.get_rank() == 1:
        fails(model)
    loss = model(batch(1, dist.get_rank()))
    dist.barrier()
    begin = time.monotonic()
    try:
        optimizer.backward(loss)
    except RefusedError:
        return "refused", time.monotonic() - begin
    except RuntimeError as error:
        return str(error), time.monotonic() - begin
    return "no error", time.monotonic() - begin


@ranks.needed
@pytest.mark.parametrize("fails", [fails_first, fails_last])
@pytest.mark.parametrize("how", ["plain", "auto", "two_backward"])
def test_an_error_on_one_rank_keeps_no_other_waiting(fails, how):
    """The rank that fails exchanges nothing on its way out, and would wait for those that do not
    know of it; these are told by the end of its connections."""
    (told, _), (kind, seconds) = ranks.run(2, fail_alone, 1, fails=fails, options=HOW[how])
    assert kind == "refused"
    assert seconds < ranks.LIMIT / 2
    assert "Connection" in told


@ranks.on(2)
def test_remove_leaves_the_model_as_it_was(world):
    model = shards.sharded()

    def hooks():
        before = [len(module._forward_pre_hooks) for module in model.modules()]
        return before, [type(p) for p in model.parameters()]

    start = hooks()
    optimizer = Lomo(model, lr=LR, clip_grad_norm=CLIP)
    optimizer.backward(model(batch(0)))
    assert hooks() != start
    optimizer.remove()
    assert hooks() == start


@ranks.on(2)
def test_a_group_joins_between_two_steps(world):
    model, twin = shards.sharded(), shards.sharded()
    optimizer = Lomo(model.blocks.parameters(), LR, CLIP, strategy="one_backward")
    sgd = torch.optim.SGD(twin.blocks.parameters(), lr=LR)
    start = whole(model)
    optimizer.backward(model(batch(0, dist.get_rank())))
    twin(batch(0, dist.get_rank())).backward()
    shards.clip(twin.blocks.parameters(), **GLOBAL)
    sgd.step()
    twin.zero_grad()
    model.zero_grad()
    for each, m in ((optimizer, model), (sgd, twin)):
        each.add_param_group({"params": m.head.parameters()})
    optimizer.backward(model(batch(1, dist.get_rank())))
    twin(batch(1, dist.get_rank())).backward()
    shards.clip([*twin.blocks.parameters(), *twin.head.parameters()], **GLOBAL)
    sgd.step()
    check_close(whole(model), whole(twin), 1e-7)
    assert not torch.equal(whole(model)["head.weight"], start["head.weight"])
    model(batch(2, dist.get_rank())).backward()
    with pytest.raises(RuntimeError, match=r"call step\(\) before add_param_group"):
        optimizer.add_param_group({"params": model.score.parameters()})
    optimizer.step()  # what waits is not lost
    assert optimizer.is_clean
