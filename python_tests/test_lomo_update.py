"""The fused update: every backend against the reference, the reference against others."""

import math

import pytest
import torch
from backends import (
    BF16,
    F16,
    F32,
    FORMATS,
    SIZES,
    backends,
    bits,
    format_id,
    needs,
    random_bits,
    random_values,
    same_bits,
    shifted,
)

from lomo_kernels import ops

pytestmark = pytest.mark.filterwarnings(  # numpy, under Triton's interpreter
    "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"
)
ALL_BACKENDS = pytest.mark.parametrize("backend", backends(), ids=lambda b: b.id)
PLAIN = {"lr": 0.01}
EVERYTHING = {
    "lr": 0.013,
    "weight_decay": 0.1,
    "inv_scale": 1 / 1024,
    "clip_value": 0.02,
    "clip_coef": 0.37,
    "seed": 2**63 + 12345,
    "step": 77,
    "param_id": 2**31 + 5,
}


def scalar(value, device="cpu"):
    return torch.tensor([value], device=device)


def run(backend, param, grad, low, options, shift=(0, 0, 0)):
    """Results of one update on fresh copies that start `shift` elements past an aligned address."""
    device = backend.device if backend else "cpu"
    p = shifted(param, shift[0], device)
    g = shifted(grad, shift[1], device)
    rest = shifted(low, shift[2], device) if options.get("rounding") == "split" else None
    found = scalar(0.0, device)
    options = dict(options)
    for name in ("inv_scale", "clip_coef", "skip"):
        if options.get(name) is not None:
            options[name] = scalar(options[name], device)
    name = backend.name if backend else "reference"
    before = bits(g).clone()
    ops.lomo_update_(p, g, low=rest, found_inf=found, backend=name, **options)
    assert torch.equal(bits(g), before)  # the gradient is read, never written
    return p, rest, found


def check(backend, param, grad, low, options, shift=(0, 0, 0)):
    want_p, want_low, want_found = run(None, param, grad, low, options)
    with backend.active():
        p, rest, found = run(backend, param, grad, low, options, shift)
    assert same_bits(p, want_p)
    assert want_low is None or torch.equal(rest.cpu(), want_low)
    assert found.item() == want_found.item()


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
@pytest.mark.parametrize("n", SIZES)
def test_equal_to_the_reference_in_every_bit(backend, format, n):
    param, grad, rounding = format
    low = torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16)
    p, g = random_values(n, param), random_values(n, grad)
    check(backend, p, g, low, {**PLAIN, "rounding": rounding})
    check(backend, p, g, low, {**EVERYTHING, "rounding": rounding})
    p, g = random_bits(n, param), random_bits(n, grad)
    check(backend, p, g, low, {**PLAIN, "rounding": rounding})
    check(backend, p, g, low, {**EVERYTHING, "rounding": rounding, "clip_value": 1e30})


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
@pytest.mark.parametrize("shift", [(1, 1, 1), (3, 0, 5), (0, 7, 0), (8, 4, 2)], ids=str)
def test_views_that_start_anywhere(backend, format, shift):
    param, grad, rounding = format
    n = 3001
    low = torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16)
    options = {**EVERYTHING, "rounding": rounding}
    check(backend, random_values(n, param), random_bits(n, grad), low, options, shift)


@ALL_BACKENDS
@pytest.mark.parametrize("name", ["weight_decay", "inv_scale", "clip_value", "clip_coef"])
def test_each_option_alone(backend, name):
    p, g = random_values(999, BF16), random_values(999, BF16)
    check(backend, p, g, None, {"lr": 0.1, name: EVERYTHING[name]})


@ALL_BACKENDS
@pytest.mark.parametrize("offset", [0, 8, 5, 2**34 + 3, 2**35 - 2011, 2**40])
def test_shards_draw_the_bits_of_the_whole(backend, offset):
    """The rounding of an element depends on its global index, not on where a tensor was cut."""
    p, g = random_values(4000, BF16), random_values(4000, BF16)
    options = {**EVERYTHING, "rounding": "stochastic"}
    check(backend, p, g, None, {**options, "offset": offset})
    with backend.active():
        whole, _, _ = run(backend, p, g, None, {**options, "offset": offset})
        first, _, _ = run(backend, p[:1501], g[:1501], None, {**options, "offset": offset})
        second, _, _ = run(backend, p[1501:], g[1501:], None, {**options, "offset": offset + 1501})
    assert same_bits(torch.cat([first, second]), whole)


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
def test_a_list_is_updated_as_its_tensors_one_by_one(backend, format):
    """More tensors than one table of the CUDA launcher holds, empty ones and odd ones included."""
    param, grad, rounding = format
    many = 600 if "cuda" in backend.id else 60
    sizes = [0, 1, 5000, 0, 17] + [n % 40 for n in range(many)] + [2049, 1]
    params = [random_values(n, param) for n in sizes]
    grads = [random_bits(n, grad) for n in sizes]
    lows = [torch.zeros(n, dtype=torch.int16) for n in sizes]
    ids = [7 * k for k in range(len(sizes))]
    offsets = [3 * k for k in range(len(sizes))]
    options = {"lr": 0.1, "rounding": rounding, "seed": 3, "step": 4}

    want = [p.clone() for p in params]
    want_low = [low.clone() for low in lows]
    want_found = scalar(0.0)
    for p, g, low, i, o in zip(want, grads, want_low, ids, offsets):
        ops.lomo_update_(
            p, g, low=low if rounding == "split" else None, param_id=i, offset=o,
            found_inf=want_found, backend="reference", **options,
        )  # fmt: skip
    device = backend.device
    got = [p.clone().to(device) for p in params]
    got_low = [low.clone().to(device) for low in lows]
    found = scalar(0.0, device)
    with backend.active():
        ops.lomo_update_(
            got, [g.to(device) for g in grads], low=got_low if rounding == "split" else None,
            param_id=ids, offset=offsets, found_inf=found, backend=backend.name, **options,
        )  # fmt: skip
    assert all(same_bits(a, b) for a, b in zip(got, want))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got_low, want_low))
    assert found.item() == want_found.item() == 1.0


@ALL_BACKENDS
@pytest.mark.parametrize("length", [2, 32, 33])
def test_lists_around_the_sizes_of_a_table(backend, length):
    """CUDA's launcher takes the smallest of three tables."""
    params = [random_values(5 + 200 * (k % 3), BF16) for k in range(length)]
    grads = [random_values(p.numel(), BF16) for p in params]
    want, got = [p.clone() for p in params], [p.to(backend.device, copy=True) for p in params]
    ops.lomo_update_(want, grads, lr=0.1, rounding="stochastic", backend="reference")
    sumsq = torch.empty(length, device=backend.device)
    with backend.active():
        grads = [g.to(backend.device) for g in grads]
        ops.lomo_update_(got, grads, lr=0.1, rounding="stochastic", backend=backend.name)
        ops.grad_sumsq_(sumsq, grads, backend=backend.name)
    assert all(same_bits(a, b) for a, b in zip(got, want))
    norms = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(sumsq.double(), norms, rtol=1e-6, atol=0.0)


@ALL_BACKENDS
def test_a_list_may_mix_dtypes(backend):
    formats = [(BF16, BF16), (F32, F32), (BF16, BF16), (F16, F32), (F32, BF16)]
    params = [random_values(100, p) for p, _ in formats]
    grads = [random_values(100, g) for _, g in formats]
    want, got = [p.clone() for p in params], [p.clone().to(backend.device) for p in params]
    ops.lomo_update_(want, grads, lr=0.1, rounding="stochastic", backend="reference")
    with backend.active():
        grads = [g.to(backend.device) for g in grads]
        ops.lomo_update_(got, grads, lr=0.1, rounding="stochastic", backend=backend.name)
    assert all(same_bits(a, b) for a, b in zip(got, want))


@ALL_BACKENDS
def test_an_empty_list_is_nothing_to_do(backend, monkeypatch):
    """No launch, and flags of others stay; what is wrong with the rest is still said."""
    needs(backend.name)
    launches = []
    module = ops.pick_backend(backend.device, backend.name)
    monkeypatch.setattr(module, "lomo_update_", lambda *a, **k: launches.append(a))
    flags = {name: torch.full((1,), 7.0, device=backend.device) for name in ("found_inf", "skip")}
    ops.lomo_update_([], [], lr=0.1, backend=backend.name, **flags)
    assert not launches
    assert all(flag.item() == 7.0 for flag in flags.values())
    with pytest.raises(ValueError, match="grad"):
        ops.lomo_update_([], [torch.ones(1)], lr=0.1, backend=backend.name)
    with pytest.raises(ValueError, match="lr"):
        ops.lomo_update_([], [], lr=-0.1, backend=backend.name)


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
def test_what_is_not_finite_is_left_alone_and_reported(backend, format):
    param, grad, rounding = format
    p = random_bits(3000, param)
    g = random_values(3000, grad)
    bad = torch.tensor([0, 7, 8, 1024, 2047, 2999])
    g[bad] = torch.tensor([math.nan, math.inf, -math.inf] * 2).to(grad)
    low = torch.randint(-(2**15), 2**15, (3000,), dtype=torch.int16)
    with backend.active():
        after, rest, found = run(backend, p, g, low, {**EVERYTHING, "rounding": rounding})
    assert found.item() == 1.0
    assert torch.equal(bits(after.cpu())[bad], bits(p)[bad])  # also the payload of a NaN
    if rounding == "split":
        assert torch.equal(rest.cpu()[bad], low[bad])
    check(backend, p, g, low, {**EVERYTHING, "rounding": rounding})


@ALL_BACKENDS
def test_finite_gradients_leave_the_flag_alone(backend):
    p, g = random_bits(3000, BF16), random_values(3000, BF16)
    with backend.active():
        _, _, found = run(backend, p, g, None, {"lr": 0.1})
    assert found.item() == 0.0


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
@pytest.mark.parametrize("n", [0, 1, 3000])
def test_skip_writes_nothing_but_the_flag(backend, format, n):
    param, grad, rounding = format
    p, g = random_bits(n, param), random_values(n, grad)
    low = torch.randint(-(2**15), 2**15, (n,), dtype=torch.int16)
    options = {**EVERYTHING, "rounding": rounding, "skip": 1.0}
    with backend.active():
        after, rest, found = run(backend, p, g, low, options)
    assert torch.equal(bits(after.cpu()), bits(p))
    assert rounding != "split" or torch.equal(rest.cpu(), low)
    assert found.item() == 1.0
    check(backend, p, g, low, {**options, "skip": 0.0})


@ALL_BACKENDS
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layouts_other_than_row_major(backend, dtype):
    """A permuted but dense parameter is updated in memory order, whatever the gradient's layout."""
    device = backend.device
    source = torch.randn(6, 5, 4, 3).to(dtype)
    grad = torch.randn(6, 5, 4, 3).to(dtype)
    want = source.clone()
    ops.lomo_update_(want, grad, lr=0.1, backend="reference")
    channels_last = torch.channels_last
    with backend.active():
        for layout in (
            grad.contiguous(memory_format=channels_last),
            grad,
            grad.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
            torch.cat([grad, grad], 3)[..., :3],
        ):
            for p in (
                source.clone(memory_format=torch.contiguous_format),
                source.contiguous(memory_format=channels_last).clone(),
                source.permute(1, 0, 2, 3).clone(memory_format=channels_last).permute(1, 0, 2, 3),
            ):
                p = p.to(device)
                ops.lomo_update_(p, layout.to(device), lr=0.1, backend=backend.name)
                assert same_bits(p, want)
        expanded = torch.ones((), dtype=dtype, device=device).expand(6, 5, 4, 3)
        p = source.to(device, copy=True)
        ops.lomo_update_(p, expanded, lr=0.1, backend=backend.name)
        other = source.clone()
        ops.lomo_update_(other, torch.ones_like(other), lr=0.1, backend="reference")
        assert same_bits(p, other)


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_autograd_is_told_of_the_write(backend):
    """Without the version bump, backward would use the new weight and be wrong in silence."""
    needs(backend)
    w = torch.randn(4, requires_grad=True)
    y = (w * w).sum()
    ops.lomo_update_(w.detach(), torch.ones(4), lr=0.1, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_fp32_is_the_formula_in_float64_rounded():
    """The reference itself, against arithmetic that nobody here wrote."""
    p, g = torch.randn(10_000), torch.randn(10_000) * 100
    want = p.double() * (1 - 0.013 * 0.1)
    want -= 0.013 * (g.double() / 1024).clamp(-0.02, 0.02) * 0.37
    options = {k: v for k, v in EVERYTHING.items() if k not in ("inv_scale", "clip_coef")}
    ops.lomo_update_(
        p, g, inv_scale=scalar(1 / 1024), clip_coef=scalar(0.37), backend="reference", **options
    )
    # seven roundings of relative size 2^-24, and those of the float32 scalars
    assert (p.double() - want).abs().max() <= 8 * 2.0**-24 * want.abs().max()


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_equal_to_torch_sgd(dtype):
    """Without options and in fp32, bit for bit; in 16 bits, SGD on an fp32 copy, then rounded."""
    p, g = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    sgd = p.float().clone().requires_grad_()
    sgd.grad = g.float()
    # a fused multiply-add inside torch's add_ rounds once where the update rounds twice
    torch.optim.SGD([sgd], lr=0.5).step()  # 0.5 * g is exact: no difference
    ops.lomo_update_(p, g, lr=0.5)
    assert same_bits(p, sgd.detach().to(dtype))


def test_split_is_an_fp32_master():
    """1000 small steps on a bf16 parameter with `low` are 1000 steps in fp32."""
    master = torch.randn(500).to(BF16).float()
    p, low = master.to(BF16), torch.zeros(500, dtype=torch.int16)
    for step in range(1000):
        g = torch.randn(500).to(BF16)
        ops.lomo_update_(master, g, lr=1e-4, weight_decay=0.1)
        ops.lomo_update_(p, g, lr=1e-4, weight_decay=0.1, rounding="split", low=low, step=step)
    whole = (p.view(torch.int16).int() << 16) + low.int()
    assert torch.equal(whole, master.view(torch.int32))
    assert ((p.float() - master).abs() <= master.abs() * 2.0**-8).all()


@pytest.mark.parametrize(
    ("rounding", "kept"), [("nearest", 0.0), ("stochastic", 1.0), ("split", 1.0)]
)
def test_small_decay_in_bf16(rounding, kept):
    """1 - lr * weight_decay rounds to 1 in bf16: applied there, decay would never happen."""
    p, low = torch.ones(20_000, dtype=BF16), torch.zeros(20_000, dtype=torch.int16)
    zero = torch.zeros(20_000, dtype=BF16)
    low = low if rounding == "split" else None
    for step in range(300):
        ops.lomo_update_(p, zero, lr=1e-3, weight_decay=0.1, rounding=rounding, low=low, step=step)
    expected = (1 - 1e-4) ** 300  # 0.970
    assert p.float().mean().item() == pytest.approx(1 + kept * (expected - 1), abs=2e-3)
