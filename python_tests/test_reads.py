"""Who drops, edits or looks at gradients between backward and step() gets what torch gives."""

import contextlib
import copy
import logging
import math
import re
import warnings

import models
import pytest
import torch
import ways
from torch import nn

from lomo_kernels import AdaLomo, Lomo


@contextlib.contextmanager
def silence():
    """No warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def look(p):
    return p.grad


LOOKED = f"test_reads.py:{look.__code__.co_firstlineno + 1}"


def log_lines(caplog, level, part=""):
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == "lomo_kernels" and r.levelno == level and part in r.getMessage()
    ]


def gradients(model, *losses):
    """What plain backwards give, on a copy."""
    plain = copy.deepcopy(model)
    for loss_of in losses:
        loss_of(plain).backward()
    return [p.grad for p in plain.parameters()]


def assert_gradients(model, expected, scale=1.0):
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        if g is None:
            assert p.grad is None, name
        else:
            assert p.grad.dtype is p.dtype
            torch.testing.assert_close(
                p.grad, scale * g, rtol=1e-5, atol=1e-6 * scale * (1 + g.abs().amax().item())
            ) if g.numel() else None


# -- 1: dropping -----------------------------------------------------------------------------------


def each(model, drop):
    for p in model.parameters():
        drop(p)


def delete(p):
    del p.grad


DROPS = {
    "the model": lambda model, optimizer: model.zero_grad(),
    "the model, to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "the optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "the optimizer, to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "a torch optimizer": lambda model, optimizer: torch.optim.SGD(model.parameters()).zero_grad(),
    "None": lambda model, optimizer: each(model, lambda p: setattr(p, "grad", None)),
    "del": lambda model, optimizer: each(model, delete),
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS.keys())
@ways.cases()
def test_a_batch_is_dropped(case, drop):
    """Skip this batch: only the second one counts."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in (0, 2):
        before = models.snapshot(model)
        case.gather(optimizer, models.loss_of(model, step))
        drop(model, optimizer)
        assert models.same(model, before)
        case.gather(optimizer, models.loss_of(model, step + 1))
        optimizer.step()
        models.loss_of(expected, step + 1).backward()
        theirs.step()
        case.agree(model, expected)


@pytest.mark.parametrize("drop", ["the model", "a torch optimizer", "None", "del"])
@ways.cases(where=ways.waiting)
def test_nothing_is_written_when_the_only_batch_is_dropped(case, drop):
    model = ways.everything()
    optimizer = case.make(model, weight_decay=0.1)
    before = models.snapshot(model)
    models.loss_of(model).backward()
    DROPS[drop](model, optimizer)
    assert not optimizer.waiting_tensors()
    optimizer.step()
    assert models.same(model, before)
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("drop", ["the model", "None", "del"])
@ways.cases("auto", "one_backward")
def test_a_batch_whose_norm_is_known_is_dropped(case, drop):
    model, expected = models.build(), models.build()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    optimizer.grad_norm(models.loss_of(model, 0))
    DROPS[drop](model, optimizer)
    optimizer.fused_backward(models.loss_of(model, 1))
    models.loss_of(expected, 1).backward()
    norm = theirs.step()
    assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)
    case.agree(model, expected)


@pytest.mark.parametrize("drop", ["the model", "a torch optimizer", "None", "del"])
@ways.cases("auto", "one_backward unclipped", kinds=(Lomo,))
def test_dropping_forms_nothing(case, drop, caplog):
    model = models.build(width=64)
    optimizer = case.make(model)
    models.loss_of(model).backward()
    with models.LiveBytes() as live:
        DROPS[drop](model, optimizer)
    assert live.peak < min(p.nbytes for p in model.parameters() if p.ndim > 1)
    assert not log_lines(caplog, logging.WARNING)


PARTS = {
    "a module": lambda model: model.blocks[1].zero_grad(),
    "a matrix": lambda model: setattr(model.blocks[0].up.weight, "grad", None),
    "a vector": lambda model: delete(model.blocks[2].norm.bias),
    "another optimizer's": lambda model: torch.optim.AdamW(model.head.parameters()).zero_grad(),
}


@pytest.mark.parametrize("drop", PARTS.values(), ids=PARTS.keys())
@ways.cases(kinds=(Lomo,))
def test_only_what_was_named_is_dropped(case, drop):
    """It is not updated, and is not in the norm."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        case.gather(optimizer, models.loss_of(model, step))
        drop(model)
        optimizer.step()
        models.loss_of(expected, step).backward()
        drop(expected)
        norm = theirs.step()
        case.agree(model, expected)
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("name", ["embedding", "up", "experts", "gate"])
@ways.cases()
def test_an_assigned_gradient_replaces_what_waits(case, name):
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        case.gather(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        for m in (model, expected):
            p = getattr(m, name)
            p = p if isinstance(p, nn.Parameter) else p.weight
            p.grad = torch.full_like(p, 0.01 * (1 + step))
        optimizer.step()
        norm = theirs.step()
        case.agree(model, expected)
        if case.way.waits:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)


@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_an_assigned_gradient_is_added_to_by_the_next_backward(case):
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for m in (model, expected):
        models.loss_of(m, 0).backward()
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.01)
        models.loss_of(m, 1).backward()
    optimizer.step()
    theirs.step()
    case.agree(model, expected)


@ways.cases(where=ways.at_once)
def test_a_gradient_that_is_assigned_too_late_is_refused(case):
    """The one that backward made was used already: both together are nobody's wish."""
    model = ways.everything()
    optimizer = case.make(model)
    models.loss_of(model).backward()
    model.up.weight.grad = torch.ones_like(model.up.weight)
    after = models.snapshot(model)
    with pytest.raises(RuntimeError, match="second gradient"):
        optimizer.step()
    assert models.same(model, after)


@pytest.mark.parametrize("by", ["the model", "the optimizer", "a torch optimizer"])
@ways.cases(where=ways.at_once)
def test_what_is_written_cannot_be_dropped_and_one_warning_says_so(case, by):
    model = ways.everything()
    optimizer = case.make(model)
    models.loss_of(model, 0).backward()
    after = models.snapshot(model)
    with pytest.warns(UserWarning, match="cannot be taken back") as caught:
        DROPS[by](model, optimizer)
    assert len(caught) == 1
    assert models.same(model, after)
    with silence():
        models.loss_of(model, 1).backward()
        DROPS[by](model, optimizer)
        case.step(optimizer, models.loss_of(model, 2))
        DROPS[by](model, optimizer)


@ways.cases(where=ways.at_once, kinds=(Lomo,))
def test_zero_grad_of_what_was_not_written_is_silent(case):
    one, other = nn.Linear(8, 8), nn.Linear(8, 8)
    optimizer = case.make([*one.parameters(), *other.parameters()])
    one(torch.ones(2, 8)).sum().backward()
    with silence():
        other.zero_grad()
    optimizer.step()


@ways.cases()
def test_zero_grad_of_a_closed_step_is_silent(case, caplog):
    model = models.build()
    optimizer = case.make(model)
    with silence():
        for step in range(2):
            model.zero_grad()
            optimizer.zero_grad()
            case.step(optimizer, models.loss_of(model, step))
            optimizer.zero_grad()
            model.zero_grad()
            torch.optim.SGD(model.parameters()).zero_grad()
    assert not log_lines(caplog, logging.WARNING)


@ways.cases(kinds=(Lomo,))
def test_a_forward_between_zero_grad_and_backward(case):
    """The tutorial's order: outputs, zero_grad(), backward, step()."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(3):
        loss = models.loss_of(model, step)
        optimizer.zero_grad()
        case.step(optimizer, loss)
        models.loss_of(expected, step).backward()
        theirs.step()
        case.agree(model, expected)


def networks():
    """A generator and a discriminator."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        generator = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 32))
        discriminator = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 1))
    return generator, discriminator


def dcgan(net_g, net_d, optimizer_g, optimizer_d, steps=3):
    """The loop of torch's DCGAN tutorial, word for word."""
    criterion = nn.BCEWithLogitsLoss()
    draws = torch.Generator().manual_seed(5)
    for _ in range(steps):
        net_d.zero_grad()
        real = torch.randn(8, 32, generator=draws)
        label = torch.ones(8)
        output = net_d(real).view(-1)
        criterion(output, label).backward()
        noise = torch.randn(8, 16, generator=draws)
        fake = net_g(noise)
        label.fill_(0.0)
        output = net_d(fake.detach()).view(-1)
        criterion(output, label).backward()
        optimizer_d.step()
        net_g.zero_grad()
        label.fill_(1.0)
        output = net_d(fake).view(-1)
        criterion(output, label).backward()
        optimizer_g.step()


@ways.cases(where=ways.waiting)
def test_the_loop_of_the_dcgan_tutorial(case):
    """The discriminator gets gradients of the generator's loss, which the loop then drops."""
    ours, theirs = networks(), networks()
    dcgan(*ours, *(case.make(net) for net in ours))
    dcgan(*theirs, *(case.in_torch(net) for net in theirs))
    for a, b in zip(ours, theirs):
        case.agree(a, b)


@ways.cases(where=ways.at_once)
def test_the_loop_of_the_dcgan_tutorial_where_gradients_are_used_at_once(case):
    """Two backwards in a step of the discriminator: refused, in a sentence with the way out."""
    nets = networks()
    with pytest.raises(RuntimeError, match=r"second gradient in one step.*accumulate\(\)"):
        dcgan(*nets, *(case.make(net) for net in nets))


# -- 2: hooks of others ----------------------------------------------------------------------------


def halve(grad):
    return grad * 0.5


def halve_in_place(p):
    p.grad.mul_(0.5)


def halve_and_replace(p):
    p.grad = p.grad * 0.5


HOOKS = {
    "register_hook": lambda p: p.register_hook(halve),
    "post accumulate, in place": lambda p: p.register_post_accumulate_grad_hook(halve_in_place),
    "post accumulate, replaced": lambda p: p.register_post_accumulate_grad_hook(halve_and_replace),
}
WHEN = ["before the optimizer", "after the optimizer", "after forward"]


def train_with_hooks(case, hook, when, names, **options):
    """Two steps of both; the hooks may come late in the first."""
    model, expected = ways.everything(), ways.everything()

    def hang():
        for m in (model, expected):
            for name in names:
                hook(m.get_parameter(name))

    if when == WHEN[0]:
        hang()
    optimizer, theirs = case.make(model, **options), case.in_torch(expected)
    if when == WHEN[1]:
        hang()
    for step in range(2):
        losses = [models.loss_of(m, step) for m in (model, expected)]
        if when == WHEN[2] and step == 0:
            hang()
        case.step(optimizer, losses[0])
        losses[1].backward()
        norm = theirs.step()
        case.agree(model, expected)
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@ways.cases(kinds=(Lomo,))
def test_a_hook_s_edit_is_what_the_step_uses(case, hook, when):
    names = ["up.weight", "up.bias", "embedding.weight", "twice.weight", "experts", "gate"]
    train_with_hooks(case, hook, when, names)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@ways.cases(kinds=(AdaLomo,))
def test_a_hook_s_edit_is_what_adalomo_uses(case, hook):
    train_with_hooks(case, hook, WHEN[1], ["up.weight", "up.bias", "embedding.weight", "gate"])


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
@ways.cases(kinds=(Lomo,))
def test_an_edit_by_a_hook_on_every_parameter(case, hook):
    names = [n for n, p in ways.everything().named_parameters() if p.requires_grad]
    train_with_hooks(case, hook, WHEN[1], names)


class Looks:
    """A hook of any kind that keeps copies of what it sees."""

    def __init__(self, kind, p):
        self.seen = []
        if kind == "register_hook":
            p.register_hook(lambda grad: self.seen.append(grad.clone()))
        elif kind == "multi":
            torch.autograd.graph.register_multi_grad_hook(
                (p,), lambda grads: self.seen.append(grads[0].clone())
            )
        else:
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, p):
        assert p.grad is not None, "the hook was promised a gradient in param.grad"
        self.seen.append(p.grad.clone())


@pytest.mark.parametrize(("when", "scale"), [*((when, None) for when in WHEN), (WHEN[1], 64.0)])
@pytest.mark.parametrize("kind", ["register_hook", "post accumulate", "multi"])
@ways.cases(kinds=(Lomo,))
def test_a_hook_sees_the_gradient_of_a_plain_backward(case, kind, when, scale):
    """In the second backward of two as well; with a loss scale, multiplied by it."""
    model = ways.everything()
    names = ["up.weight", "up.bias", "embedding.weight", "experts", "gate"]
    looks = {}

    def hang():
        looks.update({name: Looks(kind, model.get_parameter(name)) for name in names})

    if when == WHEN[0]:
        hang()
    optimizer = case.make(model, loss_scale=scale)
    if when == WHEN[1]:
        hang()
    plain = ways.everything()
    models.loss_of(plain).backward()
    loss = models.loss_of(model)
    if when == WHEN[2]:
        hang()
    case.step(optimizer, loss)
    for name, look in looks.items():
        want = plain.get_parameter(name).grad * (scale or 1.0)
        assert look.seen, name
        for got in look.seen:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * (scale or 1.0))


@pytest.mark.parametrize("kind", ["register_hook", "post accumulate"])
@ways.cases(kinds=(Lomo,))
def test_a_hook_that_is_taken_off_is_forgotten(case, kind):
    """Factors are kept again: nobody looks any more."""
    model = models.build(width=64)
    optimizer = case.make(model)
    register = {
        "register_hook": lambda p: p.register_hook(halve),
        "post accumulate": lambda p: p.register_post_accumulate_grad_hook(halve_in_place),
    }[kind]
    handles = [register(p) for p in model.parameters()]
    case.step(optimizer, models.loss_of(model, batch=1))
    for handle in handles:
        handle.remove()
    case.step(optimizer, models.loss_of(model, batch=1))
    fresh = models.build(width=64)
    other = case.make(fresh)
    case.step(other, models.loss_of(fresh, batch=1))
    first_line = other.explain().splitlines()
    assert optimizer.explain().splitlines()[1:] == first_line[1:]


@ways.cases(kinds=(Lomo,))
def test_a_hook_and_two_micro_batches(case):
    """Each backward's part is edited, as in torch."""
    model, expected = models.build(width=64), models.build(width=64)
    for m in (model, expected):
        m.blocks[0].up.weight.register_hook(halve)
        m.head.weight.register_hook(halve)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        case.gather(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
    optimizer.step()
    theirs.step()
    case.agree(model, expected)


@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_a_hook_sees_the_sum_of_two_micro_batches(case):
    """As in torch, after the first one of which factors waited."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, seen = case.make(model), {}
    for m in (model, expected):
        models.loss_of(m, 0).backward()
        weight = m.blocks[0].up.weight
        weight.register_post_accumulate_grad_hook(lambda p, m=m: seen.update({m: p.grad.clone()}))
        models.loss_of(m, 1).backward()
    torch.testing.assert_close(seen[model], seen[expected], rtol=1e-5, atol=1e-6)
    optimizer.step()


@pytest.mark.parametrize("tied", [False, True])
@ways.cases()
def test_a_mask_trains_only_the_new_rows_of_an_embedding(case, tied):
    """Rows of words that were there stay to the bit."""
    model, expected = models.build(width=64, tied=tied), models.build(width=64, tied=tied)
    mask = torch.zeros(models.VOCABULARY, 1)
    mask[-8:] = 1.0
    for m in (model, expected):
        m.blocks.requires_grad_(False)
        m.head.requires_grad_(tied)
        m.embedding.weight.register_hook(lambda grad: grad * mask)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    old = model.embedding.weight[:-8].detach().clone()
    for step in range(3):
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        theirs.step()
    assert torch.equal(model.embedding.weight[:-8], old) or case.kind is AdaLomo
    assert not torch.equal(
        model.embedding.weight[-8:], models.build(width=64, tied=tied).embedding.weight[-8:]
    )
    case.agree(model, expected)


@ways.cases(kinds=(Lomo,))
def test_an_infinity_from_a_hook_skips_the_step(case):
    model = models.build(width=64)
    optimizer = case.make(model)
    weight = model.blocks[0].up.weight
    weight.register_hook(lambda grad: grad * math.inf)
    before = weight.detach().clone()
    case.step(optimizer, models.loss_of(model))
    assert optimizer.last_step_skipped
    assert torch.equal(weight, before)


# -- 3: reading gradients that wait ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@ways.cases(where=ways.waiting)
def test_a_gradient_that_waits_is_there_for_who_looks(case, dtype):
    model = ways.everything(dtype)
    optimizer = case.make(model, **({"loss_scale": None} if case.kind is Lomo else {}))
    plain = copy.deepcopy(model)
    models.loss_of(model).backward()
    models.loss_of(plain).backward()
    exact = dtype is torch.float32
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if q.grad is None:
            assert p.grad is None
            continue
        assert p.grad.dtype is dtype
        assert p.grad.shape == p.shape
        assert p.grad is p.grad
        if q.grad.numel():
            off = (p.grad.float() - q.grad.float()).abs().max()
            assert off <= (1e-6 if exact else 0.02) * q.grad.abs().max() + 1e-6
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scale", [64.0, "dynamic"])
@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_what_is_seen_is_multiplied_by_the_loss_scale(case, scale):
    """As with torch.amp.GradScaler before unscale_()."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model, loss_scale=scale), case.in_torch(expected)
    factor = optimizer.loss_scale
    want = gradients(model, models.loss_of)
    optimizer.scale(models.loss_of(model)).backward()
    assert_gradients(model, want, factor)
    optimizer.step()
    models.loss_of(expected).backward()
    theirs.step()
    case.agree(model, expected)


@ways.cases()
def test_only_looking_changes_nothing(case):
    """A loop that logs norms."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(3):
        case.gather(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        logged = [
            {n: p.grad.norm().item() for n, p in m.named_parameters() if p.grad is not None}
            for m in (model, expected)
        ]
        assert logged[0] == pytest.approx(logged[1], rel=1e-5, abs=1e-7)
        optimizer.step()
        norm = theirs.step()
        case.agree(model, expected)
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)


def adaptive_clipping(params, factor=0.01, eps=1e-3):
    """Brock et al., arXiv 2102.06171: rows of a gradient that are large beside the weight's."""
    for p in params:
        if p.grad is None or not p.numel():
            continue
        dims = tuple(range(1, p.ndim)) if p.ndim > 1 else ()
        keep = p.ndim > 1
        weight = torch.linalg.vector_norm(p.detach(), dim=dims or None, keepdim=keep)
        grad = torch.linalg.vector_norm(p.grad.detach(), dim=dims or None, keepdim=keep)
        largest = weight.clamp(min=eps) * factor
        clipped = p.grad * (largest / grad.clamp(min=1e-6))
        p.grad.detach().copy_(torch.where(grad > largest, clipped, p.grad))


EDITS = {
    "adaptive clipping": lambda params: adaptive_clipping(params),
    "in place": lambda params: [p.grad.mul_(0.3) for p in params if p.grad is not None],
    "through .data": lambda params: [p.grad.data.mul_(0.3) for p in params if p.grad is not None],
    "replaced": lambda params: [
        setattr(p, "grad", p.grad.sign() * 0.01) for p in params if p.grad is not None
    ],
    "foreach": lambda params: torch._foreach_mul_(
        [p.grad for p in params if p.requires_grad and p.numel() not in (0, 9)], 0.3
    ),
    "some dropped": lambda params: [
        setattr(p, "grad", None) for p in params if p.grad is not None and p.grad.abs().sum() > 1.0
    ],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
@ways.cases()
def test_an_edit_between_backward_and_step(case, edit):
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        case.gather(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        for m in (model, expected):
            edit(list(m.parameters()))
        optimizer.step()
        norm = theirs.step()
        case.agree(model, expected)
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)


@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_an_edit_with_a_loss_scale_and_a_clip_by_value(case):
    model, expected = ways.everything(), ways.everything()
    options = {"clip_grad_value": 0.01, "weight_decay": 0.1}
    optimizer = case.make(model, loss_scale=128.0, **options)
    theirs = case.in_torch(expected, **options)
    for step in range(2):
        optimizer.scale(models.loss_of(model, step)).backward()
        models.loss_of(expected, step).backward()
        for m in (model, expected):
            for p in m.parameters():
                if p.grad is not None:
                    p.grad.mul_(0.5)
        optimizer.step()
        theirs.step()
        case.agree(model, expected)


@ways.cases(where=ways.waiting)
def test_an_infinity_that_is_edited_away_is_none(case):
    """torch.nan_to_num_ on gradients before the step, as some loops do."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for m in (model, expected):
        models.spoiled_loss(m, math.inf, 1).backward()
        for p in m.parameters():
            torch.nan_to_num_(p.grad, nan=0.0, posinf=0.0, neginf=0.0)
    optimizer.step()
    theirs.step()
    assert not optimizer.last_step_skipped
    case.agree(model, expected)


@ways.cases(where=ways.waiting)
def test_a_look_between_two_backwards(case):
    """The second adds to what was seen and edited; who kept it sees the sum, as in torch."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    kept = {}
    for m in (model, expected):
        models.loss_of(m, 0).backward()
        for p in m.parameters():
            p.grad.mul_(0.5)
        kept[m] = m.head.weight.grad
        models.loss_of(m, 1).backward()
    assert kept[model] is model.head.weight.grad
    torch.testing.assert_close(kept[model], kept[expected])
    assert_gradients(model, [p.grad for p in expected.parameters()])
    optimizer.step()
    theirs.step()
    case.agree(model, expected)


@ways.cases("auto", "one_backward", "partial", kinds=(Lomo,))
def test_an_edit_after_the_norm_was_decided(case):
    """grad_norm() is where torch would clip; what comes after scales clipped gradients. With
    "partial" some gradients are there, the others come in the second backward."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model), case.in_torch(expected)
    loss = models.loss_of(model)
    norm = optimizer.grad_norm(loss)
    there = [p.grad is not None for p in model.parameters()]
    assert all(there) == case.way.waits
    assert any(there)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)
    optimizer.fused_backward(loss)
    models.loss_of(expected).backward()
    assert norm.item() == pytest.approx(theirs.clip(), rel=1e-5)
    for p, edited in zip(expected.parameters(), there):
        p.grad.mul_(0.5 if edited else 1.0)
    theirs.optimizer.step()
    case.agree(model, expected)


def zero_grad(p):
    return p.grad


@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_a_function_of_the_name_of_torch_s_may_look(case):
    model = models.build()
    optimizer = case.make(model)
    models.loss_of(model).backward()
    assert all(zero_grad(p) is not None for p in model.parameters())
    optimizer.step()


@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_a_gradient_that_was_formed_does_not_wait_beside_itself(case):
    """Read gradients take the memory of gradients, and not that of the factors as well."""
    model = models.build(width=64)
    optimizer = case.make(model)
    models.loss_of(model).backward()
    for p in model.parameters():
        assert p.grad is not None
    sizes = {t.untyped_storage().data_ptr(): t.nbytes for t in optimizer.waiting_tensors()}
    sizes.update({p.grad.untyped_storage().data_ptr(): p.grad.nbytes for p in model.parameters()})
    assert sum(sizes.values()) == sum(p.nbytes for p in model.parameters())


def _has_mixed_mesh_grads(layer):
    """As transformers' Trainer looks of which kind gradients are."""
    return any(type(p.grad) is tuple for p in layer.parameters())


GLANCES = {
    "compiler": lambda layer, x: torch.compile(lambda x: layer(x) + 1.0, backend="eager")(x),
    "Trainer": lambda layer, x: _has_mixed_mesh_grads(layer),
}


@pytest.mark.parametrize("glance", GLANCES.values(), ids=GLANCES.keys())
@ways.cases(where=ways.waiting, kinds=(Lomo,))
def test_who_only_glances_forms_nothing(case, glance, caplog):
    layer, x = nn.Linear(64, 64), torch.randn(4, 64)
    optimizer = case.make(layer)
    layer(x).square().sum().backward()
    waiting = [t.shape for t in optimizer.waiting_tensors()]
    glance(layer, x)
    assert [t.shape for t in optimizer.waiting_tensors()] == waiting
    optimizer.step()
    assert not log_lines(caplog, logging.WARNING)


@ways.cases(where=ways.waiting)
def test_one_line_in_the_log_names_the_reader_and_the_memory(case, caplog):
    model = models.build(width=256, depth=1)
    optimizer = case.make(model)
    with caplog.at_level(logging.INFO, logger="lomo_kernels"):
        for step in range(2):
            models.loss_of(model, step).backward()
            assert all(look(p) is not None for p in model.parameters())
            optimizer.step()
    (message,) = log_lines(caplog, logging.WARNING)
    assert LOOKED in message
    nbytes = sum(p.nbytes for p in model.parameters())
    assert f" {nbytes / 2**20:.1f} MiB" in message


def test_without_a_reader_there_is_no_line(caplog):
    model = models.build()
    optimizer = Lomo(model, clip_grad_norm=1.0, strategy="one_backward")
    with caplog.at_level(logging.INFO, logger="lomo_kernels"):
        models.loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not log_lines(caplog, logging.WARNING)


# -- 3: torch's own clipping -----------------------------------------------------------------------

TORCH_CLIPS = {
    "norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.1),
    "value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.003),
}


@pytest.mark.parametrize("clip", TORCH_CLIPS.values(), ids=TORCH_CLIPS.keys())
@pytest.mark.parametrize("accumulated", [False, True])
@ways.cases(where=lambda way: "clip_grad_norm" not in way.options)
def test_torch_s_clipping_works_where_gradients_wait_and_nobody_else_clips(case, clip, accumulated):
    if not accumulated and not case.way.waits:
        pytest.skip("these gradients are used in backward")
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        with optimizer.accumulate() if accumulated else contextlib.nullcontext():
            models.loss_of(model, step).backward()
        models.loss_of(expected, step).backward()
        got, want = clip(model), clip(expected)
        assert (got is None) == (want is None)
        if want is not None:
            assert got.item() == pytest.approx(want.item(), rel=1e-5)
        optimizer.step()
        theirs.step()
        case.agree(model, expected)


@ways.cases("auto", "one_backward")
def test_torch_s_clipping_by_norm_sees_nothing_where_the_optimizer_does_it(case, caplog):
    """And is told, once."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    with caplog.at_level(logging.INFO, logger="lomo_kernels"), silence():
        for step in range(3):
            models.loss_of(model, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), math.inf)  # which only measures
            assert step or not log_lines(caplog, logging.INFO, "clip_grad")
            assert TORCH_CLIPS["norm"](model).item() == 0.0
            optimizer.step()
            models.loss_of(expected, step).backward()
            theirs.step()
    case.agree(model, expected)
    assert not log_lines(caplog, logging.WARNING)
    assert len(log_lines(caplog, logging.INFO, "clip_grad")) == 1


@ways.cases("two_backward", kinds=(Lomo,))
def test_torch_s_clipping_between_two_backwards_is_told(case, caplog):
    model = models.build()
    optimizer = case.make(model)
    loss = models.loss_of(model)
    with caplog.at_level(logging.INFO, logger="lomo_kernels"), silence():
        optimizer.grad_norm(loss)
        assert TORCH_CLIPS["norm"](model).item() == 0.0
        optimizer.fused_backward(loss)
    assert len(log_lines(caplog, logging.INFO, "clip_grad")) == 1


@ways.cases("auto", "one_backward")
def test_torch_s_clipping_by_value_beside_the_optimizer_s_by_norm(case):
    """Nobody else does it, so it is done; the norm is of what it leaves, as in torch."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        models.loss_of(model, step).backward()
        models.loss_of(expected, step).backward()
        for m in (model, expected):
            TORCH_CLIPS["value"](m)
        optimizer.step()
        norm = theirs.step()
        case.agree(model, expected)
        assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-5)


# -- 3: reading gradients that were used -----------------------------------------------------------


@pytest.mark.parametrize("name", ["embedding.weight", "up.weight", "up.bias", "experts", "gate"])
@ways.cases(where=ways.at_once)
def test_who_looks_too_late_is_told_once_where(case, name):
    if case.way.name == "immediate" and name == "embedding.weight":
        pytest.skip("a tied weight, which waits")
    model = ways.everything()
    optimizer = case.make(model)
    p = model.get_parameter(name)
    models.loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match=re.escape(LOOKED)) as caught:
        assert look(p) is None
    assert len(caught) == 1
    with silence():
        assert look(p) is None
        optimizer.step()
        models.loss_of(model, 1).backward()
        assert look(p) is None
        optimizer.step()


@ways.cases(where=ways.at_once)
def test_nobody_is_told_of_what_is_no_surprise(case):
    """Before backward, after step(), and of a parameter that has no gradient in torch either."""
    model = ways.everything()
    optimizer = case.make(model)
    with silence():
        assert all(p.grad is None for p in model.parameters())
        models.loss_of(model).backward()
        assert model.spare.grad is None
        assert model.frozen.weight.grad is None
        optimizer.step()
        assert all(p.grad is None for p in model.parameters())


HARMLESS = {
    "deepcopy": lambda model: copy.deepcopy(model),
    "apply": lambda model: model.float(),
    "to": lambda model: model.to("cpu"),
    "an infinite norm": lambda model: nn.utils.clip_grad_norm_(model.parameters(), math.inf),
}


@pytest.mark.parametrize("read", HARMLESS.values(), ids=HARMLESS.keys())
@ways.cases(where=ways.at_once)
def test_harmless_readers_are_not_told(case, read):
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    with silence():
        for step in range(2):
            models.loss_of(model, step).backward()
            read(model)
            optimizer.step()
            models.loss_of(expected, step).backward()
            theirs.step()
    case.agree(model, expected)


@pytest.mark.parametrize("clip", TORCH_CLIPS.values(), ids=TORCH_CLIPS.keys())
@ways.cases("free", "immediate")
def test_torch_s_clipping_that_comes_too_late_is_told(case, clip):
    """Whose line is that of the loop, which can be changed."""
    model = ways.everything()
    optimizer = case.make(model)
    models.loss_of(model, 0).backward()
    nothing_to_clip = contextlib.suppress(RuntimeError)  # clip_grad_value_ cannot take none at all
    with pytest.warns(UserWarning, match="clip") as caught, nothing_to_clip:
        clip(model)
    assert len(caught) == 1
    optimizer.step()
    with silence():
        models.loss_of(model, 1).backward()
        with nothing_to_clip:
            clip(model)
        optimizer.step()


@ways.cases()
def test_an_enabled_grad_scaler_is_refused(case):
    if case.way.announced:
        pytest.skip("a bare backward cannot be used")
    model = ways.everything()
    optimizer = case.make(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(models.loss_of(model)).backward()
    with pytest.raises(RuntimeError, match="switch it off and pass loss_scale to the optimizer"):
        scaler.step(optimizer)


@pytest.mark.filterwarnings("ignore:zero_grad.* came after a backward")
def test_a_scaled_step_is_closed_when_the_model_drops_its_gradients():
    """An overflow does not outlive its step, and the scale falls."""
    layer = nn.Linear(4, 4)
    optimizer = Lomo(layer, lr=0.1, loss_scale="dynamic")
    for step in range(3):
        before = models.snapshot(layer)
        loss = layer(torch.ones(2, 4)).sum() * (math.inf if step == 0 else 1.0)
        optimizer.scale(loss).backward()
        layer.zero_grad()
        optimizer.step()
        assert optimizer.last_step_skipped == (step == 0)
        assert models.same(layer, before) == (step == 0)
    assert optimizer.loss_scale == 65536.0 / 2


def test_an_assigned_gradient_is_no_reason_for_a_word_about_the_budget():
    layer = nn.Linear(8, 8, bias=False)
    optimizer = Lomo(layer, lr=0.1, clip_grad_norm=1.0)
    layer.weight.grad = torch.ones(8, 8)
    with silence():
        optimizer.step()
    assert optimizer.last_grad_norm == 8.0
