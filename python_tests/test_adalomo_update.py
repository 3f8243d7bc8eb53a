"""AdaLomo's fused update: every backend against the reference, the reference against others."""

import math
from types import SimpleNamespace

import cuda_on_cpu
import pytest
import torch
from backends import (
    BF16,
    F16,
    F32,
    FORMATS,
    backends,
    bits,
    format_id,
    implementations,
    random_bits,
    same_bits,
    shifted,
)

from lomo_kernels import ops
from lomo_kernels.ops import native, reference

pytestmark = pytest.mark.filterwarnings(  # numpy, under Triton's interpreter
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)
ALL_BACKENDS = pytest.mark.parametrize("backend", implementations("triton-interpreter"))
EVERYTHING = {
    "lr": 0.013,
    "weight_decay": 0.1,
    "inv_scale": 1 / 1024,
    "clip_value": 0.02,
    "clip_coef": 0.37,
    "eps": (1e-20, 2e-3),
    "clip_threshold": 0.7,
    "decay_rate": -0.6,
    "seed": 2**63 + 12345,
    "param_id": 2**31 + 5,
}
# Scalars, vectors around a tile (16384), matrices around its rows and columns, odd rows (whose
# elements are not aligned), batches, and what is empty.
SHAPES = (
    (), (1,), (5,), (16384,), (16400,), (0,), (3, 0), (0, 5, 7), (1, 7), (7, 1), (64, 256),
    (65, 257), (70, 520), (2, 65, 264), (2, 2, 3, 5),
)  # fmt: skip


def scalar(value, device="cpu"):
    return torch.tensor([value], device=device)


def run(backend, param, grads, options, shift=0, carry=True):
    """What a few updates leave behind, on copies that start `shift` elements past an aligned
    address."""
    device, name = (backend.device, backend.name) if backend else ("cpu", "reference")
    p = shifted(param.reshape(-1), shift, device).view(param.shape)
    state = ops.adalomo_state(p)
    split = options.get("rounding") == "split" and p.dtype is BF16
    low = torch.zeros_like(p, dtype=torch.int16) if split else None
    sums = ops.adalomo_sums_(p, backend=name) if carry else None
    found = scalar(0.0, device)
    options = dict(options)
    for key in ("inv_scale", "clip_coef", "skip"):
        if options.get(key) is not None:
            options[key] = scalar(options[key], device)
    for grad in grads:
        g = shifted(grad.reshape(-1), shift, device).view(grad.shape)
        before = bits(g).clone()
        ops.adalomo_update_(
            p, g, state, low=low, sums=sums, found_inf=found, backend=name, **options
        )
        assert torch.equal(bits(g), before)  # the gradient is read, never written
    result = {"param": p, "found_inf": found, "sums": sums, "low": low, **state}
    return {key: value for key, value in result.items() if value is not None}


def check(backend, param, grads, options, **more):
    want = run(None, param, grads, options, **more)
    with backend.active():
        got = run(backend, param, grads, options, **more)
    for key, value in want.items():
        same = same_bits if value.dtype.is_floating_point else lambda a, b: torch.equal(a.cpu(), b)
        assert same(got[key], value), key
    return want


def values(shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


@ALL_BACKENDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equal_to_the_reference_in_every_bit(backend, shape):
    p, grads = values(shape, BF16, 0.1), [values(shape, BF16) for _ in range(2)]
    check(backend, p, grads, {"lr": 0.01, "rounding": "stochastic"})
    if backend.id != "triton-interpreter" or p.numel() < 1000:  # it is slow
        check(backend, p, grads, {**EVERYTHING, "rounding": "split"})
        check(backend, p.float(), grads, {**EVERYTHING})


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
def test_every_format(backend, format):
    param, grad, rounding = format
    for shape in ((9, 264), (300,)):
        p, grads = values(shape, param, 0.1), [values(shape, grad) for _ in range(2)]
        want = check(backend, p, grads, {"lr": 0.01, "rounding": rounding})
        check(backend, p, grads, {**EVERYTHING, "rounding": rounding})
        assert not torch.equal(want["param"], p)
        assert want["step"] == 2


@ALL_BACKENDS
@pytest.mark.parametrize("shift", [1, 4])
def test_views_that_start_anywhere(backend, shift):
    for shape in ((33, 64), (100,)):
        p, grad = values(shape, BF16, 0.1), values(shape, BF16)
        check(backend, p, [grad], {"lr": 0.01, "rounding": "stochastic"}, shift=shift)


@ALL_BACKENDS
def test_more_than_256_rows_and_tiles(backend):
    """Sums of sums: of groups of rows, and of 8 and more tiles along a row and a column."""
    shape = (530, 2400) if backend.name == "native" and backend.device == "cpu" else (530, 2060)
    if backend.id == "cuda_on_cpu" or backend.id == "triton-interpreter":
        shape = (530, 40)
    p, grad = values(shape, F32, 0.1), values(shape, BF16)
    check(backend, p, [grad, grad * 0.5], {"lr": 0.01})
    if shape == (530, 40):
        check(backend, p.T.contiguous()[:9], [grad.T.contiguous()[:9]], {"lr": 0.01})
        check(backend, values((3, 2200), F32), [values((3, 2200), F32)], {"lr": 0.01})


@ALL_BACKENDS
@pytest.mark.parametrize(
    "kind",
    ["infinity", "nan", "infinity, not clipped", "nan, not clipped", "squares overflow", "skip"],
)
@pytest.mark.parametrize("shape", [(9, 300), (3, 4, 9), (300,)], ids=str)
def test_overflow_changes_nothing_at_all(backend, kind, shape):
    p, good = values(shape, BF16, 0.1), values(shape, F32)
    options = {"lr": 0.01, "clip_value": 0.5, "rounding": "split"}
    bad = good.clone()
    if kind == "skip":
        options["skip"] = 1.0
    elif kind == "squares overflow":
        options["clip_value"] = None
        bad.view(-1)[-1] = 3e19
    else:
        if "not clipped" in kind:
            options["clip_value"] = None
        bad.view(-1)[-1] = -math.inf if "infinity" in kind else math.nan
    want = check(backend, p, [bad], options)
    assert want["found_inf"] == 1
    assert torch.equal(want["param"], p)
    assert want["step"] == 0
    for name in ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col", "low"):
        assert name not in want or not want[name].any()
    if kind != "skip":  # and what comes after is as if it had not been
        first, later = (run(backend_or_reference, p, grads, options) for backend_or_reference, grads
                        in ((None, [good]), (None, [bad, good])))  # fmt: skip
        assert all(torch.equal(first[k], later[k]) for k in first if k != "found_inf")


@ALL_BACKENDS
def test_any_bits(backend):
    """Subnormals, -0, the largest numbers, NaN and infinities."""
    for shape in ((9, 264), (300,)):
        numel = math.prod(shape)
        tame = torch.where(torch.rand(numel) < 0.5, 1e-40, -0.0).view(shape)
        check(backend, tame, [tame, tame.to(BF16).float()], {"lr": 0.01, "weight_decay": 0.1})
        check(backend, tame.to(F16), [tame.to(F16)], {"lr": 0.01})
        wild = random_bits(numel, F16).view(shape)
        check(backend, wild, [values(shape, F16)], {"lr": 0.01})
        finite = wild.nan_to_num(0.0, 0.0, 0.0)
        check(backend, finite, [finite, finite], {"lr": 0.01, "rounding": "stochastic"})


@ALL_BACKENDS
def test_lists(backend):
    """Kinds, dtypes and sizes mixed."""
    device = backend.device
    shapes = [(5,), (12, 34), (), (0,), (300,), (2, 3, 4), (16385,)] + [(3,)] * 70
    if backend.id == "triton-interpreter":
        shapes = shapes[:-68]
    dtypes = [BF16, F32, F16]
    ps = [values(s, dtypes[i % 3], 0.1) for i, s in enumerate(shapes)]
    gs = [values(s, p.dtype) for s, p in zip(shapes, ps)]
    with backend.active():
        together = [p.clone().to(device) for p in ps]
        states = [ops.adalomo_state(p) for p in together]
        ops.adalomo_update_(
            together, [g.to(device) for g in gs], states, lr=0.1, rounding="stochastic",
            backend=backend.name,
        )  # fmt: skip
    for k, (p, g, got) in enumerate(zip(ps, gs, together)):
        want = run(None, p, [g], {"lr": 0.1, "rounding": "stochastic", "param_id": k})
        assert same_bits(got, want["param"])
        assert states[k]["step"] == 1
    ops.adalomo_update_([], [], [], lr=0.1)


def update_of(backend, params, grads):
    """-> all that a list's update leaves behind."""
    device, name = (backend.device, backend.name) if backend else ("cpu", "reference")
    params, grads = ([t.to(device, copy=True) for t in each] for each in (params, grads))
    states, found = [ops.adalomo_state(p) for p in params], scalar(0.0, device)
    ops.adalomo_update_(params, grads, states, lr=0.1, found_inf=found, backend=name)
    return params, [value for state in states for value in state.values()], found


@ALL_BACKENDS
def test_more_than_share_a_launch(backend):
    """Matrices, empty ones too, and vectors beyond a table; matrices beyond the tiles of a group.
    An overflow in one of them leaves that one alone."""
    small = [(k % 7, 1 + k % 5) for k in range(140)]
    shapes = [(70, 300), *small, (600, 1, 1), (600, 1, 1), *[(3,)] * 140]
    if backend.id == "triton-interpreter":
        shapes = [(70, 300), *small[:10], (3, 1, 1), (3,)]
    params, grads = ([values(s, BF16, scale) for s in shapes] for scale in (0.1, 1.0))
    grads[9][-1, -1] = torch.inf
    want = update_of(None, params, grads)
    with backend.active():
        params_got, states_got, found = update_of(backend, params, grads)
    assert found.item() == 1.0
    for got, wanted in ((params_got, want[0]), (states_got, want[1])):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted))


def launches_of(shapes):
    params, grads = ([values(s, BF16) for s in shapes] for _ in range(2))
    before = cuda_on_cpu.library().test_launches()
    for backend in backends():
        if backend.id == "cuda_on_cpu":
            with backend.active():
                update_of(backend, params, grads)
    return cuda_on_cpu.library().test_launches() - before - len(shapes)  # sums, one each


def test_launches_do_not_grow_with_the_number_of_small_tensors():
    assert launches_of([(3, 5)]) == launches_of([(3, 5)] * 128) == 5
    assert launches_of([(3, 5)] * 129) == 10
    assert launches_of([(3,)]) == launches_of([(3,)] * 128) == 3


def test_scratch_memory_is_that_of_a_group():
    def scratch(*shapes):
        items = [
            SimpleNamespace(tiles=reference.Tiles.of(s), param=torch.empty(s, device="meta"))
            for s in shapes
        ]
        return native.adalomo_scratch(items)

    small, large, vector = (64, 256), (4096, 4096), (100,)
    assert scratch(small, small) == 2 * scratch(small)
    assert scratch(*[small] * 3000) == 1024 * scratch(small)
    assert scratch(large, large, small) == scratch(large)  # 1,024 tiles, a group of its own
    assert scratch(vector, large, vector) == scratch(large) + 2 * scratch(vector)


@ALL_BACKENDS
def test_sums_that_are_not_given_are_found(backend):
    p, grads = values((70, 30), F32, 0.1), [values((70, 30), F32) for _ in range(2)]
    carried = check(backend, p, grads, {"lr": 0.1})
    found = check(backend, p, grads, {"lr": 0.1}, carry=False)
    assert torch.equal(carried["param"], found["param"])


@pytest.mark.parametrize("name", ["native", "reference"])
def test_any_layout(name):
    """What is not contiguous is copied, and copied back; so are the low halves."""
    base, grad = values((4, 6, 5, 3), BF16, 0.1), values((4, 6, 5, 3), BF16)
    want = run(None, base, [grad], {"lr": 0.1, "rounding": "split"})
    for order in (torch.channels_last, torch.contiguous_format):
        p = base.clone(memory_format=order)
        low = torch.zeros_like(p, dtype=torch.int16)
        for g in (grad, grad.to(memory_format=torch.channels_last)):
            q, rest, state = p.clone(), low.clone(), ops.adalomo_state(p)
            ops.adalomo_update_(q, g, state, lr=0.1, rounding="split", low=rest, backend=name)
            assert q.stride() == p.stride()
            assert torch.equal(q, want["param"])
            assert torch.equal(rest, want["low"])


def test_autograd_notices():
    p, x = torch.nn.Parameter(torch.ones(3, 4)), torch.ones(3, 4, requires_grad=True)
    product = p * x
    ops.adalomo_update_(p, torch.ones(3, 4), ops.adalomo_state(p), lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


# -- against others ------------------------------------------------------------------------------


RANKS = [(), (7,), (20_000,), (1, 7), (7, 1), (33, 65), (300, 1000), (3, 70, 300), (2, 2, 3, 5)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", RANKS, ids=str)
def test_equal_to_transformers_adafactor(shape, weight_decay):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    p = values(shape, F32, 0.05)
    q = torch.nn.Parameter(p.double())
    adafactor = transformers.Adafactor(
        [q], lr=1e-2, weight_decay=weight_decay, scale_parameter=True, relative_step=False,
        warmup_init=False,
    )  # fmt: skip
    state, sums = ops.adalomo_state(p), ops.adalomo_sums_(p)
    for step in range(50):
        grad = values(shape, F32) * (0.01 + step % 7)
        q.grad = grad.double()
        adafactor.step()
        ops.adalomo_update_(p, grad, state, lr=1e-2, weight_decay=weight_decay, sums=sums)
    assert (p - q.detach()).norm() <= 3e-6 * q.norm()
    for name in state.keys() - {"step"}:
        assert torch.allclose(state[name].double(), adafactor.state[q][name], rtol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (33, 65), (300, 1000), (3, 70, 300)], ids=str)
def test_equal_to_torch_adafactor(shape):
    """Where it is the same rule: it adds eps to the factors' product instead of to the squares, so
    gradients must not be small; and its lr is bounded by 1 / sqrt(step)."""
    p = values(shape, F32, 0.05)
    q = torch.nn.Parameter(p.double())
    adafactor = torch.optim.Adafactor([q], lr=1e-2, eps=(1e-60, 1e-3), d=1.0, foreach=False)
    state = ops.adalomo_state(p)
    for _ in range(50):
        grad = values(shape, F32)
        q.grad = grad.double()
        adafactor.step()
        ops.adalomo_update_(p, grad, state, lr=1e-2)
    assert (p - q.detach()).norm() <= 3e-6 * q.norm()


def test_in_sixteen_bits_it_is_the_rounded_rule():
    """bf16 storage: after each step the nearest bf16 to what fp32 gives from the same weights."""
    p, grads = values((50, 60), BF16, 0.05), [values((50, 60), BF16) for _ in range(5)]
    state = ops.adalomo_state(p)
    for grad in grads:
        wide, wide_state = p.float(), {k: v.clone() for k, v in state.items()}
        ops.adalomo_update_(wide, grad.float(), wide_state, lr=0.05)
        ops.adalomo_update_(p, grad, state, lr=0.05)
        assert torch.equal(p, wide.to(BF16))
        assert torch.equal(state["exp_avg_sq_row"], wide_state["exp_avg_sq_row"])


def test_stochastic_rounding_keeps_small_updates():
    p = torch.full((64, 1024), 1.0, dtype=BF16)
    state = ops.adalomo_state(p)
    for _ in range(20):
        ops.adalomo_update_(p, torch.ones_like(p), state, lr=1e-4, rounding="stochastic", seed=3)
    assert p.float().mean().item() == pytest.approx(1 - 20e-4, abs=2e-4)


def test_decay_is_not_lost():
    """A decay of 1e-8 a step is less than half a unit in the last place of 1 - 1e-8."""
    p = torch.full((8, 256), 0.02)
    state = ops.adalomo_state(p)
    before = p.clone()
    ops.adalomo_update_(p, torch.zeros_like(p), state, lr=5e-4, weight_decay=0.1)
    assert ((before - p) / before / (5e-4 * 0.02 * 0.1)).sub(1).abs().max() < 0.2


# -- arguments -----------------------------------------------------------------------------------


def matrix():
    p = torch.ones(3, 4)
    return p, torch.ones(3, 4), ops.adalomo_state(p)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"eps": 1e-30}, TypeError, "eps must be two numbers, got 1e-30"),
        ({"eps": (0.0, 1e-3)}, ValueError, r"eps\[0\] must be finite and at least 1.17.*, got 0"),
        ({"clip_threshold": 0.0}, ValueError, "clip_threshold must be finite and at least 1.17"),
        ({"decay_rate": 0.8}, ValueError, "decay_rate must be a finite number less than 0, got"),
        ({"rounding": "up"}, ValueError, "rounding must be one of"),
        ({"sums": torch.zeros(3)}, ValueError, "sums must have 1 elements for shape"),
        ({"state": None}, TypeError, "state must be a dict of tensors, got NoneType"),
        ({"state": {}}, TypeError, r"state\['step'\] must be a tensor, got NoneType"),
        ({"skip": torch.zeros(2)}, TypeError, "skip must be a one-element float32 tensor"),
        ({"grad": torch.ones(4, 3)}, ValueError, "grad must have param's shape"),
        ({"param": torch.ones(3, 4).int()}, TypeError, "param must be float32, bfloat16 or"),
        ({"backend": "fast"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_wrong_arguments(change, error, message):
    param, grad, state = matrix()
    arguments = {"param": param, "grad": grad, "state": state, "lr": 0.1, **change}
    with pytest.raises(error, match=message):
        ops.adalomo_update_(**arguments)
    assert torch.equal(param, torch.ones(3, 4))
    assert not state["exp_avg_sq_row"].any()
    assert state["step"] == 0


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("step", torch.zeros(()), TypeError),
        ("exp_avg_sq_row", torch.zeros(4), ValueError),
        ("exp_avg_sq_col", torch.zeros(4, dtype=BF16), TypeError),
        ("exp_avg_sq_col", torch.zeros(8)[::2], TypeError),
    ],
)
def test_wrong_state(name, value, error):
    param, grad, state = matrix()
    state[name] = value
    with pytest.raises(error, match=rf"state\['{name}'\] must"):
        ops.adalomo_update_(param, grad, state, lr=0.1)


def test_the_table_of_weights_ends_and_stays():
    weights = ops.adalomo.adalomo_weights(torch.device("cpu"), -0.8)
    exact = torch.arange(1, 2**20 + 1, dtype=torch.float64) ** -0.8
    assert torch.equal(weights, exact.float())
    p, grad, state = matrix()
    state["step"].fill_(2**30)
    ops.adalomo_update_(p, grad, state, lr=0.1)
    expected = weights[-1].item()
    assert state["exp_avg_sq_row"].tolist() == pytest.approx([expected] * 3)


def test_tiles_are_the_same_for_both_languages():
    for shape in ((), (0,), (20_000,), (65, 257), (3, 70, 264), (3, 0), (0, 5, 7)):
        tiles = reference.Tiles.of(shape)
        kept, passing = native._C.adalomo_sizes(*tiles, tiles.rows)
        assert kept >= 2 + tiles.count
        if not tiles.factored:
            assert (kept, passing) == (2 + tiles.count, 0)
