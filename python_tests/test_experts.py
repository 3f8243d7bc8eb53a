"""Weights with experts: factors of grouped products and of loops, against torch's own gradients."""

import copy
import io
import re

import models
import pytest
import torch
import torch.nn.functional as F
import ways
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lomo_kernels import AdaLomo, Lomo, ops
from lomo_kernels.ops import product_sumsq

EXPERTS, WIDTH, INNER = 4, 64, 96  # for 24 tokens factors are smaller than gradients
LR, CLIP, DECAY = 0.5, 0.05, 0.1
grouped_mm = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))
needs_grouped_mm = pytest.mark.skipif(grouped_mm is None, reason="this torch has no grouped_mm")


def grouped(x, weight, experts, in_first):
    ends = torch.bincount(experts, minlength=len(weight)).cumsum(0).int()
    return grouped_mm(x, weight if in_first else weight.transpose(-2, -1), offs=ends)


def loop(x, weight, experts, in_first):
    """In whose turn each expert is a number of a kind of its own."""
    out = x.new_zeros(len(x), weight.shape[2 if in_first else 1])
    for index in experts.unique():
        where = experts == index
        which = (index, int(index), int(index) - len(weight))[int(index) % 3]
        one = x[where] @ weight[which] if in_first else F.linear(x[where], weight[which])
        out = out.index_put((where.nonzero()[:, 0],), one.to(out.dtype))
    return out


HOWS = {"grouped": grouped, "loop": loop}
KINDS = [(how, in_first) for how in HOWS for in_first in (False, True)]


def kinds(chosen=KINDS):
    marks = {"grouped": needs_grouped_mm, "loop": ()}
    params = [pytest.param(*kind, marks=marks[kind[0]]) for kind in chosen]
    return pytest.mark.parametrize(("how", "in_first"), params)


every_kind, two_kinds = kinds(), kinds([("grouped", False), ("loop", True)])


class Mixture(nn.Module):
    """Each token goes to one expert, and none to the first; weights lie [experts, out, in], or
    [experts, in, out] where `in_first`."""

    def __init__(self, how, in_first, checkpointing=None):
        super().__init__()
        self.embedding = nn.Embedding(models.VOCABULARY, WIDTH)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) * 0.1)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.1)
        if in_first:
            self.up, self.down = (nn.Parameter(w.mT.contiguous()) for w in (self.up, self.down))
        self.head = nn.Linear(WIDTH, models.VOCABULARY)
        self.product, self.in_first = HOWS[how], in_first
        self.checkpointing = checkpointing

    def middle(self, x, experts):
        h = torch.tanh(self.product(x, self.up, experts, self.in_first))
        return x + self.product(h, self.down, experts, self.in_first)

    def forward(self, ids):
        experts, order = (1 + ids.flatten() % (EXPERTS - 1)).sort(stable=True)
        x = self.embedding(ids).flatten(0, 1)[order]
        if self.checkpointing is None:
            x = self.middle(x, experts)
        else:
            reentrant = self.checkpointing == "reentrant"
            x = checkpoint(self.middle, x, experts, use_reentrant=reentrant)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return self.head(x)[back].view(*ids.shape, -1)


def build(how, in_first, dtype=torch.float32, **options):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Mixture(how, in_first, **options).to(dtype)


def keep_factors(optimizer):
    """How many weights did so, by explain()."""
    return int(re.search(r"known (\d+) weights kept factors", optimizer.explain())[1])


# -- the same numbers as those of whole gradients --------------------------------------------------


@two_kinds
@ways.cases()
def test_every_way_to_step(case, how, in_first):
    """Experts without tokens decay as well."""
    model, expected = build(how, in_first), build(how, in_first)
    options = {"weight_decay": DECAY} if case.kind is Lomo else {}
    optimizer, theirs = case.make(model, **options), case.in_torch(expected, **options)
    for step in range(3):
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        norm = theirs.step()
        if optimizer.needs_norm and "clip_grad_norm" in case.way.options:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-6)
    case.agree(model, expected)
    if case.way.waits:
        assert keep_factors(optimizer) >= 2


@every_kind
@pytest.mark.parametrize(
    ("strategy", "batches"), [("one_backward", 1), ("one_backward", 2), ("two_backward", 1)]
)
def test_norms_by_gram_matrices(strategy, batches, how, in_first, monkeypatch):
    """Of each expert that has tokens, in the first of two backwards one weight after the other."""
    monkeypatch.setattr(product_sumsq, "TILE", 1)
    measured, run = [], ops.product_sumsq_

    def measure(sumsq, magnitude, products, **options):
        measured.append(len(products))
        run(sumsq, magnitude, products, **options)

    monkeypatch.setattr(ops, "product_sumsq_", measure)
    model, plain = build(how, in_first), build(how, in_first)
    optimizer = Lomo(model, LR, clip_grad_norm=CLIP, strategy=strategy)
    for step in range(batches):
        models.loss_of(plain, step).backward()
    if strategy == "two_backward":
        optimizer.backward(models.loss_of(model))
        assert measured.count(EXPERTS - 1) == 2
    else:
        for step in range(batches):
            models.loss_of(model, step).backward()
        optimizer.step()
        others = 2 if batches == 1 else 0  # embedding and head
        assert measured == [2 * (EXPERTS - 1) + others]
    norm = torch.stack([p.grad.double().norm() for p in plain.parameters()]).norm()
    assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-6)


@every_kind
@pytest.mark.parametrize("strategy", ["one_backward", "immediate"])
def test_the_same_bits(strategy, how, in_first):
    """The formula on whole gradients, each operation rounded on its own."""
    model, plain = build(how, in_first), build(how, in_first)
    optimizer = Lomo(model, LR, weight_decay=DECAY, strategy=strategy)
    models.loss_of(model).backward()
    optimizer.step()
    models.loss_of(plain).backward()
    decay = torch.tensor(1 - LR * DECAY).float()
    for ours, theirs in ((model.up, plain.up), (model.down, plain.down)):
        assert torch.equal(ours, theirs.detach() * decay - LR * theirs.grad)
    if strategy == "immediate":
        assert "4 weights were updated without one, and 0 that" in optimizer.explain()


@every_kind
@pytest.mark.parametrize("strategy", ["one_backward", "immediate"])
@pytest.mark.parametrize("rounding", ["stochastic", "split"])
def test_stochastic_bits_are_those_of_the_whole_tensor(rounding, strategy, how, in_first):
    """Of gradients that are products of the same factors, summed in fp32."""
    torch.manual_seed(5)
    shape = (WIDTH, INNER) if in_first else (INNER, WIDTH)
    start = torch.randn(EXPERTS, *shape).bfloat16()
    weight = nn.Parameter(start.clone())
    x, c = torch.randn(24, WIDTH).bfloat16(), torch.randn(24, INNER).bfloat16()
    experts = torch.tensor([0] * 9 + [2] * 15)
    optimizer = Lomo([weight], LR, strategy=strategy, rounding=rounding, weight_decay=DECAY, seed=7)
    whole, low = start.clone(), torch.zeros_like(start, dtype=torch.int16)
    left, right = (x, c) if in_first else (c, x)
    grad = torch.zeros_like(start, dtype=torch.float32)
    for expert in (0, 2):
        of = experts == expert
        grad[expert] = left[of].float().T @ right[of].float()
    for step in range(2):
        (HOWS[how](x, weight, experts, in_first) * c).sum().backward()
        optimizer.step()
        ops.lomo_update_(
            whole, grad, lr=LR, weight_decay=DECAY, rounding=rounding, low=low, seed=7, step=step,
            backend="reference",
        )  # fmt: skip
        assert torch.equal(weight, whole)
    if rounding == "split":
        assert torch.equal(optimizer.state[weight]["low"], low)


@two_kinds
@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
@ways.cases("immediate", "one_backward", "two_backward")
def test_checkpointing(case, checkpointing, how, in_first):
    if checkpointing == "reentrant" and case.way.announced:
        pytest.skip("a norm pass needs the other kind of checkpointing")
    model = build(how, in_first, checkpointing=checkpointing)
    expected = build(how, in_first)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        theirs.step()
    case.agree(model, expected)


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, how, in_first):
    """Loops multiply in 16 bits; grouped products ignore it, as in torch."""
    model, expected = build(how, in_first), build(how, in_first)
    optimizer = Lomo(model, LR, clip_grad_norm=CLIP, strategy="one_backward")
    with torch.autocast("cpu", dtype):
        loss, theirs = models.loss_of(model), models.loss_of(expected)
    loss.backward()
    optimizer.step()
    theirs.backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), CLIP)
    torch.optim.SGD(expected.parameters(), lr=LR).step()
    assert keep_factors(optimizer) >= 2
    # Whole gradients of loops are rounded to 16 bits before they are used.
    assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=2e-3)
    assert models.difference(model, expected) < LR * CLIP * 2e-3


# -- what waits ------------------------------------------------------------------------------------


@every_kind
def test_what_waits_is_the_tokens_of_each_expert(how, in_first):
    model = build(how, in_first)
    optimizer = Lomo([model.up, model.down], LR, strategy="one_backward")
    loss = models.loss_of(model)
    would_wait = sum(each.nbytes for each in optimizer.would_wait()[1])
    loss.backward()
    optimizer.step()
    tokens = models.tokens().numel()
    ends = EXPERTS * 4 * 2 if how == "grouped" else 0
    assert would_wait == 2 * tokens * (WIDTH + INNER) * 4
    assert optimizer.last_waiting_bytes == would_wait + ends
    assert keep_factors(optimizer) == 2


@two_kinds
@ways.cases("one_backward", "auto")
def test_micro_batches_add_up_and_never_hold_more_than_gradients(case, how, in_first):
    model, expected = build(how, in_first), build(how, in_first)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    weights = [model.up, model.down]
    for count in (2, 12):
        for step in range(count):
            models.loss_of(model, step).backward()
            models.loss_of(expected, step).backward()
            waiting = {t.untyped_storage().data_ptr(): t for t in optimizer.waiting_tensors()}
            held = sum(t.untyped_storage().nbytes() for t in waiting.values())
            assert held <= sum(p.nbytes for p in model.parameters())
        optimizer.step()
        theirs.step()
        if case.kind is Lomo:
            assert (keep_factors(optimizer) >= 2) == (count == 2)
    case.agree(model, expected)
    assert all(p.grad is None for p in weights)


@needs_grouped_mm
@pytest.mark.parametrize(
    ("strategy", "reads"), [("one_backward", [2 * EXPERTS]), ("immediate", [EXPERTS, EXPERTS])]
)
def test_the_host_reads_where_tokens_end_once(strategy, reads, monkeypatch):
    """For all weights together where they wait."""
    seen, tolist = [], torch.Tensor.tolist

    def read(tensor):
        seen.extend([tensor.numel()] if tensor.dtype is torch.int64 else [])
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    model = build("grouped", False)
    optimizer = Lomo(model, LR, strategy=strategy)
    optimizer.backward(models.loss_of(model))
    assert seen == reads


class Largest(TorchDispatchMode):
    """Bytes of the largest result of an operation that is not a part of the tensors given."""

    def __init__(self, given):
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.given:
                    self.nbytes = max(self.nbytes, storage.nbytes())
        return result


@every_kind
@pytest.mark.parametrize("strategy", ["one_backward", "immediate"])
def test_no_gradient_exists_as_a_whole(strategy, how, in_first):
    model = build(how, in_first)
    optimizer = Lomo(model, LR, strategy=strategy)
    loss = models.loss_of(model)
    with Largest(model.parameters()) as largest:
        loss.backward()
        optimizer.step()
    assert largest.nbytes < model.up.nbytes / 2


# -- other uses of such a weight -------------------------------------------------------------------


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w * 2

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return 2 * g @ w.T, 2 * x.T @ g


ENDS = torch.tensor([5, 5, 11, 20], dtype=torch.int32)  # and 4 rows of no expert
USES = {
    "an expert twice": lambda x, w: x @ w[1] + torch.tanh(x) @ w[1],
    "two experts": lambda x, w: x @ w[1] + x @ w[-1],
    "transposed and whole": lambda x, w: F.linear(x, w.mT[0]) + x @ w[0],
    "scaled": lambda x, w: x @ (w[2] * 2.0) + x @ w[2],
    "a range": lambda x, w: (x @ w[1:3]).sum(0),
    "a mask": lambda x, w: (x @ w[torch.tensor(True)] + x @ w[True]).sum((0, 1)) + x @ w[1],
    "a list": lambda x, w: x @ w[[0, 2]].sum(0) + x @ w[1],
    "two numbers": lambda x, w: x * w[1, :, 0] + (x @ w[1])[:, :1],
    "einsum": lambda x, w: torch.einsum("ti,eio->to", x, w),
    "iteration": lambda x, w: sum(x @ each for each in w),
    "a function": lambda x, w: Twice.apply(x, w[3]),
    "a function of all": lambda x, w: Twice.apply(x, w.transpose(1, 2)[0].T) + x @ w[1],
    "left": lambda x, w: (w[0] @ torch.ones(w.shape[2], 1)).T * x,
    "a vector": lambda x, w: x[0] @ w[1] + x @ w[1],
    "a batch": lambda x, w: x.view(2, -1, x.shape[1]) @ w[1],
    "a bias": lambda x, w: F.linear(x, w[1].T) + F.linear(x, w.mT[1], w[0, 0]),
    "chunks": lambda x, w: torch.cat([F.linear(x, c) for c in w[0].T.chunk(2)], -1),
    "transposed otherwise": lambda x, w: x @ w.transpose(0, 1)[:, 1],
    "no tokens": lambda x, w: (x[:0] @ w[1]).sum() + x @ w[0],
    "in place": lambda x, w: x @ w[1].clone().mul_(2) + x @ w[0],
}
GROUPED_USES = {
    "rows of no expert": lambda x, w: grouped_mm(x, w, offs=ENDS)[:20],
    "mT": lambda x, w: grouped_mm(grouped_mm(x, w, offs=ENDS), w.mT, offs=ENDS)[:20],
    "grouped and a loop": lambda x, w: grouped_mm(x, w, offs=ENDS)[:20] + x[:20] @ w[1],
    "grouped twice": lambda x, w: sum(
        grouped_mm(x, w, offs=e)[:20] for e in (ENDS, ENDS // 2 + 10)
    ),
    "all tokens to each": lambda x, w: grouped_mm(x.expand(4, *x.shape), w).sum(0),
    "grouped otherwise": lambda x, w: (
        grouped_mm(
            x[:, :4].contiguous(), w.transpose(0, 1), offs=torch.arange(1, 65).clamp(max=20).int()
        )[:20]
        + x[:20] @ w[1]
    ),
    "grouped and scaled": lambda x, w: grouped_mm(x, w, offs=ENDS)[:20] + x[:20] @ (w[1] * 2.0),
    "by no expert": lambda x, w: grouped_mm(x.detach(), w, offs=0 * ENDS)[:0].sum() + x,
}
every_use = pytest.mark.parametrize(
    "use",
    [pytest.param(use, id=name) for name, use in USES.items()]
    + [pytest.param(u, id=name, marks=needs_grouped_mm) for name, u in GROUPED_USES.items()],
)


@every_use
@pytest.mark.parametrize("strategy", ["one_backward", "immediate", "two_backward"])
def test_other_uses_get_their_whole_gradient(strategy, use):
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(4, WIDTH, INNER) * 0.1)
    plain = nn.Parameter(weight.detach().clone())
    x = torch.randn(24, WIDTH, requires_grad=True)
    theirs = x.detach().clone().requires_grad_()
    clip = 1e9 if strategy == "two_backward" else None
    optimizer = Lomo([weight], 0.1, clip, strategy=strategy)
    use(theirs, plain).square().sum().backward()
    loss = use(x, weight).square().sum()
    if strategy == "two_backward":
        optimizer.backward(loss)
        assert optimizer.last_grad_norm == pytest.approx(
            plain.grad.double().norm().item(), rel=1e-6
        )
    else:
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(x.grad[:20], theirs.grad[:20])  # further rows are of no expert
    want = plain.detach() - 0.1 * plain.grad
    torch.testing.assert_close(weight.detach(), want, rtol=1e-6, atol=1e-5)


@two_kinds
def test_second_derivatives(how, in_first):
    """A penalty on the gradient of the input goes through the product once more."""
    grads = []
    for watched in (True, False):
        model = build(how, in_first)
        if watched:
            optimizer = Lomo(model, LR, strategy="one_backward")
        x = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
        experts = torch.arange(24) // 6
        y = model.middle(x, experts).square().sum()
        (dx,) = torch.autograd.grad(y, x, create_graph=True)
        dx.square().sum().backward()
        grads.append([model.up.grad, model.down.grad])
        if watched:
            optimizer.zero_grad()
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs)


@every_kind
def test_who_looks_at_gradients_sees_them(how, in_first):
    """Readers, editors, hooks, and autograd.grad."""
    model, plain = build(how, in_first), build(how, in_first)
    optimizer = Lomo(model, LR, strategy="one_backward")
    model.down.register_hook(lambda grad: 2 * grad)
    loss = models.loss_of(model)
    (asked,) = torch.autograd.grad(loss, [model.up], retain_graph=True)
    loss.backward()
    models.loss_of(plain).backward()
    assert torch.equal(asked, plain.up.grad)
    assert torch.equal(model.up.grad, plain.up.grad)
    assert torch.equal(model.down.grad, 2 * plain.down.grad)
    model.up.grad.mul_(3)
    optimizer.step()
    assert torch.equal(model.up, plain.up.detach() - LR * (3 * plain.up.grad))
    before = model.up.detach().clone()
    models.loss_of(model).backward()
    model.up.grad = None
    optimizer.step()
    assert torch.equal(model.up, before)


@every_kind
def test_frozen_weights_and_those_of_others(how, in_first):
    model, plain = build(how, in_first), build(how, in_first)
    model.up.requires_grad_(False)
    optimizer = Lomo([model.up, *model.head.parameters()], LR, strategy="one_backward")
    models.loss_of(model).backward()
    models.loss_of(plain).backward()
    assert torch.equal(model.down.grad, plain.down.grad)
    optimizer.step()
    assert torch.equal(model.up, plain.up)
    model.up.requires_grad_(True)
    optimizer.step()
    model.zero_grad()
    models.loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model.up, plain.up)


@every_kind
def test_factors_that_were_overwritten_are_refused(how, in_first):
    model = build(how, in_first)
    optimizer = Lomo(model, LR, strategy="one_backward")
    models.loss_of(model).backward()
    for tensor in optimizer.waiting_tensors():
        if tensor.shape[0] != EXPERTS:
            tensor.zero_()
    with pytest.raises(RuntimeError, match="changed in place after backward"):
        optimizer.step()


@needs_grouped_mm
def test_ends_that_were_overwritten_are_refused():
    weight, x = nn.Parameter(torch.randn(4, WIDTH, INNER)), torch.randn(24, WIDTH)
    optimizer, ends = Lomo([weight], LR, strategy="one_backward"), ENDS.clone()
    grouped_mm(x, weight, offs=ends)[:20].sum().backward()
    ends += 1
    with pytest.raises(RuntimeError, match="changed in place after backward"):
        optimizer.step()


@every_kind
@pytest.mark.parametrize("clip", [None, CLIP])
def test_what_is_not_finite_is_not_written(clip, how, in_first):
    model = build(how, in_first)
    before = models.snapshot(model)
    options = {"clip_grad_norm": clip} if clip else {"strategy": "immediate"}
    optimizer = Lomo(model, LR, **options)
    loss = models.loss_of(model)
    loss = loss + float("nan") * model.middle(torch.randn(8, WIDTH), torch.arange(8) // 2).sum()
    loss.backward()
    optimizer.step()
    assert optimizer.last_step_skipped
    if clip:
        assert models.same(model, before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_an_error_between_two_experts_leaves_nothing_behind():
    """The second of a loop's gradients fails; the next step is a sound one."""
    model, plain = build("loop", True), build("loop", True)
    optimizer = Lomo(model, LR, strategy="immediate")

    def fail(grad):
        raise ArithmeticError

    first = torch.randn(6, WIDTH) @ model.up[1]
    first.register_hook(fail)
    with pytest.raises(ArithmeticError):
        (first[:, :WIDTH] @ model.up[3]).sum().backward()
    assert not optimizer.is_clean
    optimizer.zero_grad()
    assert optimizer.is_clean
    models.loss_of(model).backward()
    optimizer.step()
    models.loss_of(plain).backward()
    assert torch.equal(model.up, plain.up.detach() - LR * plain.up.grad)


def test_views_are_tensors_for_everyone_else():
    model = build("loop", True)
    optimizer = Lomo(model, LR, strategy="one_backward")
    plain = build("loop", True)
    one, all_ = model.up[1], model.up.transpose(1, 2)
    assert repr(one) == repr(plain.up[1].detach().requires_grad_())
    assert one.shape == (WIDTH, INNER)
    assert all_.stride() == (WIDTH * INNER, 1, INNER)
    assert torch.equal(all_, plain.up.mT)
    file = io.BytesIO()
    torch.save([one.detach(), one], file)
    file.seek(0)
    for loaded in torch.load(file, weights_only=True):
        assert type(loaded) is torch.Tensor
        assert torch.equal(loaded, plain.up[1])
    assert type(one.clone()) is torch.Tensor
    assert type(copy.deepcopy(model).up) is nn.Parameter
    with torch.no_grad():
        assert type(model.up[1]) is torch.Tensor
    with pytest.raises(IndexError):
        model.up[EXPERTS]
    optimizer.remove()
    assert type(model.up[1]) is torch.Tensor
    (torch.ones(2, WIDTH) @ one).sum().backward()  # a view that outlives the optimizer
    (torch.ones(2, WIDTH) @ plain.up[1]).sum().backward()
    assert torch.equal(model.up.grad, plain.up.grad)


def test_a_rule_with_a_state_sees_each_expert():
    """Pieces of a state are cut like the weight: test_rule.py's momentum."""
    from test_rule import Momentum

    for strategy in ("one_backward", "immediate"):
        model, plain = build("loop", False), build("loop", False)
        optimizer = Momentum(model, LR, strategy=strategy)
        sgd = torch.optim.SGD(plain.parameters(), LR, momentum=0.9)
        for step in range(3):
            models.loss_of(model, step).backward()
            models.loss_of(plain, step).backward()
            optimizer.step()
            sgd.step()
            sgd.zero_grad()
        assert models.difference(model, plain) < 1e-6


# -- transformers' mixtures ------------------------------------------------------------------------

SHAPE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXTURES = {
    "Mixtral": {"intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 32,
        "num_experts_per_tok": 4, "head_dim": 16,
    },
    "GptOss": {
        "intermediate_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
    },
}  # fmt: skip


def mixture(name, experts):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(transformers, f"{name}Config")(**SHAPE, **MIXTURES[name])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            if p.ndim == 3:
                nn.init.normal_(p, std=0.05)
    model.set_experts_implementation(experts)
    return model.float()


def loss_of(model, step=0):
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(step))
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("kind", [Lomo, AdaLomo])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_of_transformers(name, experts, kind):
    """Two clipped steps; the norm of the first against float64."""
    if experts == "grouped_mm" and grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    case = ways.Case(kind, ways.Way("one_backward", {"clip_grad_norm": 0.3}))
    model, expected = mixture(name, experts), mixture(name, experts)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
        loss_of(expected, step).backward()
        norm = torch.stack([p.grad.double().norm() for p in expected.parameters()]).norm()
        theirs.step()
        assert optimizer.last_grad_norm == pytest.approx(norm.item(), rel=1e-6)
        case.agree(model, expected)
    assert keep_factors(optimizer) >= 4 + 2
    largest = re.search("largest gradients held: (.*)", optimizer.explain())[1].split(", ")
    assert all(model.get_parameter(name).ndim < 3 for name in largest)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("name", MIXTURES)
def test_immediate_updates_of_mixtures_have_the_bits_of_whole_gradients(name, experts):
    if experts == "grouped_mm" and grouped_mm is None:
        pytest.skip("this torch has no grouped_mm")
    model, expected = mixture(name, experts), mixture(name, experts)
    Lomo(model, LR, strategy="immediate").backward(loss_of(model))
    loss_of(expected).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        if ours.ndim == 3:
            assert torch.equal(ours, theirs.detach() - LR * theirs.grad)


def test_the_operator_in_the_place_of_grouped_mm(monkeypatch):
    """transformers' own, for devices and types that torch has no grouped product for."""
    model, expected = mixture("Mixtral", "grouped_mm"), mixture("Mixtral", "grouped_mm")
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda input, weight, offs: False)
    optimizer = Lomo(model, LR, strategy="one_backward")
    loss_of(model).backward()
    optimizer.step()
    loss_of(expected).backward()
    assert keep_factors(optimizer) >= 4
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        if ours.ndim == 3:
            assert torch.equal(ours, theirs.detach() - LR * theirs.grad)
