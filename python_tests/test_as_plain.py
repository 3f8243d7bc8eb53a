"""Parameters that an optimizer watches behave like any others: copies, traces, derivatives of any
kind and order, and double precision."""

import copy
import io
import pickle
import warnings
import weakref

import models
import pytest
import torch
import ways
from torch import nn

from lomo_kernels import AdaLomo, Lomo

ALL_WAYS = ways.cases(kinds=(Lomo,))


def trains_on(case, optimizer, model, expected, theirs, steps=range(2)):
    for step in steps:
        case.step(optimizer, models.loss_of(model, step))
        models.loss_of(expected, step).backward()
        theirs.step()
    case.agree(model, expected)


def gets_a_gradient(p):
    """Of its own, as a leaf of nobody's."""
    (p * 2.0).sum().backward()
    assert torch.equal(p.grad, torch.full_like(p, 2.0))


# -- 10: copies ------------------------------------------------------------------------------------


def unpickled(w):
    return pickle.loads(pickle.dumps(w))


def saved_and_loaded(w):
    file = io.BytesIO()
    torch.save(w, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES = {
    "Parameter": lambda w: nn.Parameter(w),
    "Parameter of data": lambda w: nn.Parameter(w.data),
    "its type": lambda w: type(w)(w.detach().clone(), requires_grad=True),
    "its type, frozen": lambda w: type(w)(w.detach().clone(), requires_grad=False),
    "its type, of itself": lambda w: type(w)(w),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": unpickled,
    "torch.save": saved_and_loaded,
    "clone": lambda w: nn.Parameter(w.detach().clone()),
    "ParameterList": lambda w: nn.ParameterList([w.detach().clone()])[0],
    "empty_like": lambda w: nn.Parameter(torch.ones_like(w)),
}
NAMES = ["embedding.weight", "up.weight", "up.bias", "experts", "gate", "empty", "frozen.weight"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@ways.cases("free", "auto", "immediate", kinds=(Lomo,))
def test_a_copy_is_a_plain_parameter(case, make, name):
    """Of the same values, storage and flags as a copy of a plain one; the optimizer ignores it."""
    model, plain = ways.everything(), ways.everything()
    optimizer = case.make(model)
    before = models.snapshot(model)
    got, want = make(model.get_parameter(name)), make(plain.get_parameter(name))
    assert type(got) is type(want) is nn.Parameter
    assert got.requires_grad == want.requires_grad
    assert torch.equal(got, want)
    shares = [c.data_ptr() == p.get_parameter(name).data_ptr() for c, p in
              ((got, model), (want, plain))]  # fmt: skip
    assert shares[0] == shares[1]
    assert got.is_leaf
    if want.requires_grad:
        gets_a_gradient(got)
    optimizer.step()
    assert models.same(model, before)
    assert optimizer.param_groups[0]["step"] == 0


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES.keys())
@ways.cases("auto", "immediate", "two_backward", kinds=(Lomo,))
def test_the_original_is_trained_after_it_was_copied(case, make):
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    copies = [make(p) for p in model.parameters()]
    trains_on(case, optimizer, model, expected, theirs)
    assert len(copies) == len(list(model.parameters()))


@ways.cases("free", "auto", kinds=(Lomo, AdaLomo))
def test_a_second_model_of_copies_is_trained_by_torch(case):
    """A teacher, an average, a reference model: made of the parameters of one that is trained."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    case.step(optimizer, models.loss_of(model, 0))
    models.loss_of(expected, 0).backward()
    theirs.step()
    twins = []
    for m in (model, expected):
        twin = copy.deepcopy(m)
        sgd = torch.optim.SGD(twin.parameters(), lr=0.1)
        for step in range(2):
            models.loss_of(twin, step).backward()
            sgd.step()
            sgd.zero_grad()
        twins.append(twin)
    assert models.difference(*twins) < 2e-5
    trains_on(case, optimizer, model, expected, theirs, [1])


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "save"])
@ALL_WAYS
def test_a_model_is_copied_between_backward_and_step(case, how):
    """What waits stays with the original."""
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    make = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": unpickled,
            "save": lambda m: torch.save(m, io.BytesIO())}[how]  # fmt: skip
    case.gather(optimizer, models.loss_of(model))
    make(model)
    optimizer.step()
    models.loss_of(expected).backward()
    theirs.step()
    case.agree(model, expected)


@ALL_WAYS
def test_what_it_looks_like(case):
    model, plain = ways.everything(), ways.everything()
    optimizer = case.make(model)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert isinstance(p, nn.Parameter), name
        assert repr(p) == repr(q)
        assert p.is_leaf
        assert (p.dtype, p.shape, p.requires_grad) == (q.dtype, q.shape, q.requires_grad)
        assert type(p.data) is torch.Tensor
        assert type(p.detach()) is torch.Tensor
        assert type(p * 1.0) is torch.Tensor
        assert p in set(model.parameters())
    assert all(type(v) is torch.Tensor for v in model.state_dict().values())
    assert optimizer.param_groups[0]["params"][0] is next(model.parameters())


def test_a_deepcopy_of_a_plain_tensor_has_its_gradient():
    weight = torch.ones(8, 8).requires_grad_()
    optimizer = Lomo([weight], lr=0.1)
    with optimizer.accumulate():
        (3 * weight).sum().backward()
    copied = copy.deepcopy(weight)
    assert type(copied) is torch.Tensor
    assert torch.equal(copied.grad, torch.full((8, 8), 3.0))
    optimizer.step()


# -- 10: conversions, traces, exports --------------------------------------------------------------


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("used", [False, True])
@ways.cases(kinds=(Lomo, AdaLomo))
def test_a_conversion_that_swaps_parameters(case, used, swapping):
    """model.to() under torch's newer way: the same objects with other contents."""
    model, expected = models.build(width=64), models.build(width=64)
    optimizer, theirs = case.make(model, rounding="nearest"), case.in_torch(expected)
    ids = [id(p) for p in model.parameters()]
    if used:
        trains_on(case, optimizer, model, expected, theirs, [0])
    watched = [type(p) for p in model.parameters()]
    before = models.snapshot(expected)
    model.to(torch.bfloat16)
    assert [id(p) for p in model.parameters()] == ids
    assert all(p.dtype is torch.bfloat16 and isinstance(p, nn.Parameter) for p in
               model.parameters())  # fmt: skip
    expected.to(torch.bfloat16)
    case.step(optimizer, models.loss_of(model, 1))
    models.loss_of(expected, 1).backward()
    theirs.step()
    assert all(p.grad is None for p in model.parameters())
    assert [type(p) for p in model.parameters()] == watched
    unit = torch.finfo(torch.bfloat16).eps
    moved = 0
    for p, q, old in zip(model.parameters(), expected.parameters(), before, strict=True):
        assert (p.float() - q.float()).abs().max() <= 2 * unit * q.float().abs().max()
        moved += not torch.equal(p, old.to(torch.bfloat16))
    assert moved


@pytest.mark.parametrize("swap", [False, True])
@ALL_WAYS
def test_a_conversion_that_changes_nothing(case, swap, request):
    if swap:
        request.getfixturevalue("swapping")
    model, expected = ways.everything(), ways.everything()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    trains_on(case, optimizer, model, expected, theirs, [0])
    model.to("cpu", torch.float32)
    trains_on(case, optimizer, model, expected, theirs, [1, 2])
    assert all(p.grad is None for p in model.parameters())


class Logits(nn.Module):
    """Without what traces cannot have."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(30, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embedding(ids))))


def logits_model():
    with torch.random.fork_rng():
        torch.manual_seed(13)
        return Logits()


def loss_of_logits(model, step=0):
    return model(torch.arange(8 * (1 + step)) % 30).square().mean()


def keeps_training(case, optimizer, model):
    expected = logits_model()
    theirs = case.in_torch(expected)
    for step in range(2):
        case.step(optimizer, loss_of_logits(model, step))
        loss_of_logits(expected, step).backward()
        theirs.step()
    case.agree(model, expected)


@pytest.mark.filterwarnings("ignore")  # torch says that TorchScript is old
@ALL_WAYS
def test_a_trace(case):
    """The operations of a plain model's trace, saved and loaded without this package."""
    model, plain = logits_model(), logits_model()
    optimizer = case.make(model)
    ids = torch.arange(6).view(2, 3)
    traced, want = (torch.jit.trace(m, (ids,)) for m in (model, plain))
    kinds = [sorted(n.kind() for n in t.inlined_graph.nodes()) for t in (traced, want)]
    assert kinds[0] == kinds[1]
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(ids), plain(ids))
    keeps_training(case, optimizer, model)


@ALL_WAYS
def test_an_export(case):
    model, plain = logits_model(), logits_model()
    optimizer = case.make(model)
    ids = torch.arange(6).view(2, 3)
    program, want = (torch.export.export(m, (ids,)) for m in (model, plain))
    targets = [[str(n.target) for n in p.graph.nodes] for p in (program, want)]
    assert targets[0] == targets[1]
    assert torch.equal(program.module()(ids), plain(ids))
    keeps_training(case, optimizer, model)


# -- 12: derivatives of derivatives ----------------------------------------------------------------


def critic():
    with torch.random.fork_rng():
        torch.manual_seed(14)
        return nn.Sequential(
            nn.Linear(16, 64), nn.Softplus(), nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 1)
        )


def penalty(model, x):
    """WGAN-GP: the norm of the gradient of the input is pulled to 1."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (grad.norm(dim=1) - 1).square().mean()


def wgan_gp(model, step):
    real, fake = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))
    between = 0.3 * real + 0.7 * fake
    return model(fake).mean() - model(real).mean() + 10 * penalty(model, between)


def double_backward_of_parameters(model, step):
    """A gradient with respect to the parameters is part of the loss."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    loss = model(x).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return 0.01 * loss + 0.001 * sum(g.square().sum() for g in grads)


def maml(model, step):
    """An inner step whose result is called functionally, and the outer loss through it."""
    draws = torch.Generator().manual_seed(step)
    support, query = torch.randn(2, 8, 16, generator=draws)
    params = dict(model.named_parameters())
    inner = model(support).square().mean()
    grads = torch.autograd.grad(inner, list(params.values()), create_graph=True)
    fast = {n: p - 0.1 * g for (n, p), g in zip(params.items(), grads)}
    return 0.01 * (torch.func.functional_call(model, fast, (query,)) - 1).square().mean()


def embedding_penalty(model, step):
    """Adversarial: the gradient with respect to what the first layer makes."""
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    hidden = model[0](x)
    out = model[1:](hidden)
    (grad,) = torch.autograd.grad(out.sum(), hidden, create_graph=True)
    return out.mean() + grad.square().mean()


LOSSES = {f.__name__: f for f in (wgan_gp, double_backward_of_parameters, maml, embedding_penalty)}


@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES.keys())
@ways.cases()
def test_losses_with_derivatives_in_them(case, loss_of):
    model, expected = critic(), critic()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        case.step(optimizer, loss_of(model, step))
        loss_of(expected, step).backward()
        norm = theirs.step()
        case.agree(model, expected)
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=1e-4)


@ALL_WAYS
def test_a_gradient_that_is_differentiated_without_a_step(case):
    """Hessian times vector, twice, and gradients of embeddings: no part of any step."""
    model, plain = ways.everything(), ways.everything()
    optimizer = case.make(model)
    before = models.snapshot(model)
    results = []
    for m in (model, plain):
        names = ["embedding.weight", "up.weight", "up.bias", "experts", "gate"]
        params = [m.get_parameter(n) for n in names]
        grads = torch.autograd.grad(models.loss_of(m), params, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in grads), params))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    optimizer.step()
    assert models.same(model, before)
    assert all(p.grad is None for p in model.parameters())


def functional(model):
    """-> (a function of the parameters alone, the parameters)"""
    params = dict(model.named_parameters())

    def loss(params, ids):
        return torch.func.functional_call(model, params, (ids,)).square().mean()

    return loss, params


def vector_like(params):
    draws = torch.Generator().manual_seed(15)
    return {n: torch.randn(p.shape, generator=draws) for n, p in params.items()}


def func_grad(model, ids):
    loss, params = functional(model)
    return torch.func.grad(loss)(params, ids)


def func_vmap(model, ids):
    """Gradients of each sample."""
    loss, params = functional(model)
    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, ids)


def func_vmap_of_models(model, ids):
    """An ensemble of two."""
    loss, params = functional(model)
    stacked = {n: torch.stack([p, 2 * p]) for n, p in params.items()}
    return {"losses": torch.func.vmap(loss, in_dims=(0, None))(stacked, ids)}


def func_jvp(model, ids):
    loss, params = functional(model)
    params = {n: p.detach() for n, p in params.items()}
    value, tangent = torch.func.jvp(lambda p: loss(p, ids), (params,), (vector_like(params),))
    return {"value": value, "tangent": tangent}


def func_jvp_of_parameters(model, ids):
    """Of the parameters themselves, as they lie in the model."""
    loss, params = functional(model)
    value, tangent = torch.func.jvp(lambda p: loss(p, ids), (params,), (vector_like(params),))
    return {"value": value, "tangent": tangent}


def func_hessian_vector(model, ids):
    """Forward over reverse."""
    loss, params = functional(model)
    gradient = torch.func.grad(lambda p: loss(p, ids))
    return torch.func.jvp(gradient, (params,), (vector_like(params),))[1]


def forward_of_input(model, ids):
    """The parameters have no tangent, an activation has."""
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(model.embedding(ids), torch.ones(*ids.shape, 16))
        out = model.head(torch.tanh(model.inner(x)))
        return {"tangent": torch.autograd.forward_ad.unpack_dual(out).tangent}


def vmap_of_inputs(model, ids):
    """The parameters are the model's own, and an activation has a further dimension."""
    hidden = torch.linspace(-1, 1, 5 * 16).view(5, 16)
    return {"out": torch.func.vmap(lambda x: model.head(torch.tanh(model.inner(x))))(hidden)}


def func_jacrev(model, ids):
    loss, params = functional(model)
    return torch.func.jacrev(lambda p: loss(p, ids))(params)


TRANSFORMS = {
    f.__name__: f
    for f in (
        func_grad, func_vmap, func_vmap_of_models, func_jvp, func_jvp_of_parameters,
        func_hessian_vector, forward_of_input, vmap_of_inputs, func_jacrev,
    )
}  # fmt: skip


# Of torch itself, when forward-mode derivatives are used for the first time.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@ALL_WAYS
def test_transforms_of_functions(case, transform):
    """And a step after them as if they had not been."""
    model, plain = logits_model(), logits_model()
    optimizer = case.make(model)
    ids = torch.arange(6).view(2, 3)
    got, want = transform(model, ids), transform(plain, ids)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    keeps_training(case, optimizer, model)


def test_graphs_of_second_order_die_with_their_step():
    """create_graph=True makes circles in torch itself only when .grad is in them."""
    model = critic()
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0)
    loss = wgan_gp(model, 0)
    alive = weakref.ref(loss)
    optimizer.backward(loss)
    del loss
    assert alive() is None


@pytest.mark.parametrize("second", [False, True])
def test_graphs_die_before_a_step(second):
    """What waits is no part of them: factors, and gradients made with create_graph=True."""

    class Kept:
        pass

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = Kept()
            Keeps.kept = weakref.ref(ctx.kept)
            return x * 1.0

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.0

    param = nn.Parameter(torch.ones(3) if second else torch.ones(64, 64))
    optimizer = Lomo([param], lr=0.1, clip_grad_norm=1.0)
    x = param if second else torch.ones(4, 64, requires_grad=True)
    y = Keeps.apply(x)
    loss = (y if second else nn.functional.linear(y, param)).pow(3).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that create_graph=True may make circles
        loss.backward(create_graph=second)
    del y, loss
    assert optimizer.waiting_tensors()
    assert Keeps.kept() is None


# -- 13: double precision --------------------------------------------------------------------------

EXACT = 1e-12


def double(**options):
    return ways.everything(torch.float64, **options)


def loss_in_double(model, step=0):
    """Everything in float64, the loss included, which models.loss_of() has in float32."""
    ids = models.tokens(step)
    logits = model(ids)[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_decay": 0.1}, {"clip_grad_value": 0.003}, {"loss_scale": 1024.0},
     {"rounding": "stochastic"}],
    ids=str,
)  # fmt: skip
@ALL_WAYS
def test_double_precision_is_sgd_s(case, options):
    model, expected = double(), double()
    optimizer = case.make(model, **options)
    theirs = case.in_torch(expected, **options)
    assert optimizer.backend == "reference"
    for step in range(3):
        case.step(optimizer, loss_in_double(model, step))
        loss_in_double(expected, step).backward()
        norm = theirs.step()
        assert models.difference(model, expected) < EXACT
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=EXACT)
    assert all(p.dtype is torch.float64 for p in model.parameters())


@pytest.mark.parametrize("how", ["fused", "accumulated", "checkpointed"])
@ALL_WAYS
def test_double_precision_in_other_ways(case, how):
    shape = {"checkpointing": "non-reentrant"} if how == "checkpointed" else {}
    model, expected = double(**shape), double()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    for step in range(2):
        loss = loss_in_double(model, step)
        if how == "accumulated":
            with optimizer.accumulate():
                loss.backward()
            with optimizer.accumulate():
                loss_in_double(model, step + 5).backward()
            optimizer.step()
            loss_in_double(expected, step + 5).backward()
        elif how == "fused":
            if case.way.options.get("norm") != "tensor" and "clip_grad_norm" in case.way.options:
                optimizer.grad_norm(loss)
            optimizer.fused_backward(loss, case.lr)
        else:
            case.step(optimizer, loss)
        loss_in_double(expected, step).backward()
        theirs.step()
        assert models.difference(model, expected) < EXACT


@ALL_WAYS
def test_a_model_of_two_precisions(case):
    """The parameters of each are updated in their own."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.short, self.long = nn.Linear(64, 64), nn.Linear(64, 64).double()

        def loss(self, step):
            x = torch.randn(12, 64, generator=torch.Generator().manual_seed(step))
            return self.long(torch.tanh(self.short(x)).double()).square().mean()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Both()
    expected = copy.deepcopy(model)
    optimizer = case.make(model)
    halves = [[p for p in expected.parameters() if p.dtype is d] for d in
              (torch.float32, torch.float64)]  # fmt: skip
    for step in range(2):
        case.step(optimizer, model.loss(step))
        expected.loss(step).backward()
        params = list(expected.parameters())
        norms = [torch.linalg.vector_norm(p.grad.double()) for p in params]
        total, clip = torch.stack(norms).norm(), case.way.options.get("clip_grad_norm", 1e9)
        for p, norm in zip(params, norms):
            own = norm if case.way.options.get("norm") == "tensor" else total
            p.grad.mul_((clip / (own + 1e-6)).clamp(max=1.0))
        for half in halves:
            sgd = torch.optim.SGD(half, lr=case.lr)
            sgd.step()
            sgd.zero_grad()
    assert models.difference(model.short, expected.short) < 1e-6
    assert models.difference(model.long, expected.long) < 1e-6


@ALL_WAYS
def test_what_is_not_finite_in_double_precision(case):
    """Also what is finite in float64 alone: 1e60 is no overflow."""
    model, expected = double(), double()
    optimizer, theirs = case.make(model), case.in_torch(expected)
    case.step(optimizer, loss_in_double(model) * 1e60)
    if case.way.options.get("clip_grad_norm"):
        (loss_in_double(expected) * 1e60).backward()
        norm = theirs.step()
        assert not optimizer.last_step_skipped
        assert models.difference(model, expected) < EXACT
        if optimizer.last_grad_norm is not None:
            assert optimizer.last_grad_norm == pytest.approx(norm, rel=EXACT)
    before = models.snapshot(model)
    case.step(optimizer, loss_in_double(model) * float("nan"))
    assert optimizer.last_step_skipped
    assert models.same(model, before)


@ways.cases(kinds=(AdaLomo,))
def test_adalomo_says_that_it_has_no_double_precision(case):
    with pytest.raises(TypeError, match="float64"):
        case.make(double())


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_no_other_backend_has_double_precision(backend):
    model = double()
    with pytest.raises((TypeError, ValueError, RuntimeError), match="float64"):
        Lomo(model, backend=backend)
