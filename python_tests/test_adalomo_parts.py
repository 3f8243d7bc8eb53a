"""AdaLomo's update of tensors that ranks share: the ranks of a test are turns in one process."""

import math

import pytest
import torch
from backends import (
    BF16,
    F16,
    F32,
    FORMATS,
    backends,
    format_id,
    implementations,
    same_bits,
    shifted,
)

from lomo_kernels import ops

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
}
# Matrices around a tile's rows and columns, vectors around a tile, stacks, and what is empty.
SHAPES = (
    (), (5,), (0,), (300,), (1, 290), (7, 1), (3, 0), (0, 5), (64, 256), (70, 264), (5, 2, 3, 5),
    (3, 65, 40),
)  # fmt: skip
SOME = ((), (300,), (1, 600), (70, 33), (5, 3, 7))  # small, of each kind
SMALL = [s for s in SHAPES if torch.Size(s).numel() < 1000]
RANKS = (1, 2, 4)


def most(backend, several, fewer):
    """Triton's interpreter is slow."""
    return fewer if backend.id == "triton-interpreter" else several


# The unit in the last place of fp32 is 1.2e-7 of a number; sums in other orders differ by a few.
TOLERANCE = 1e-6


def values(shape, dtype, scale=1.0):
    return (torch.randn(shape) * scale).to(dtype)


def scalar(value, device="cpu"):
    return torch.tensor([value], device=device)


def bounds(shape, ranks):
    """Where the rows of each rank begin, and where they end: as many for all but the last ones."""
    size = shape[0] if shape else 1
    each = -(-size // ranks)
    return [(min(k * each, size), min((k + 1) * each, size)) for k in range(ranks)]


def rows_of(tensor, begin, end):
    if tensor is None or tensor.ndim:
        return tensor if tensor is None else tensor[begin:end]
    return tensor  # one number, which all ranks have


class Ranks:
    """Whole tensors, cut for a number of ranks; each update is that of all the ranks' parts."""

    def __init__(self, backend, params, ranks, rounding="nearest", shift=0, sums=True):
        self.device, self.name = (backend.device, backend.name) if backend else ("cpu", "reference")
        self.shapes, self.rounding = [p.shape for p in params], rounding
        self.cuts = [bounds(p.shape, ranks) for p in params]
        self.ranks, self.shift = ranks, shift
        self.messages = []
        self.params, self.states, self.lows, self.sums, self.found = [], [], [], [], []
        for rank in range(ranks):
            mine = [self.place(p, k, rank) for k, p in enumerate(params)]
            split = [rounding == "split" and p.dtype is BF16 for p in mine]
            self.params.append(mine)
            self.states.append([ops.adalomo_state(p) for p in mine])
            self.lows.append(
                [torch.zeros_like(p, dtype=torch.int16) if s else None for p, s in zip(mine, split)]
            )
            self.sums.append(
                [ops.adalomo_sums_(p, backend=self.name) if sums else None for p in mine]
            )
            self.found.append(scalar(0.0, self.device))

    def place(self, tensor, k, rank):
        part = rows_of(tensor, *self.cuts[k][rank])
        return shifted(part.reshape(-1), self.shift, self.device).view(part.shape)

    def offset(self, k, rank):
        return self.cuts[k][rank][0] * self.shapes[k][1:].numel() if self.shapes[k] else 0

    def update(self, grads, lr, **options):
        for name in ("inv_scale", "clip_coef", "skip"):
            if options.get(name) is not None:
                options[name] = scalar(options[name], self.device)
        updates = []
        for rank in range(self.ranks):
            updates.append(
                ops.AdalomoParts(
                    self.params[rank],
                    [self.place(g, k, rank) for k, g in enumerate(grads)],
                    self.states[rank],
                    shape=self.shapes,
                    offset=[self.offset(k, rank) for k in range(len(self.shapes))],
                    counts=[bool(shape) or rank == 0 for shape in self.shapes],
                    lr=lr,
                    rounding=self.rounding,
                    low=self.lows[rank],
                    sums=self.sums[rank],
                    found_inf=self.found[rank],
                    backend=self.name,
                    **options,
                )
            )
        statistics = torch.stack([u.statistics for u in updates])
        squares = torch.stack([u.squares(statistics) for u in updates])
        for u in updates:
            u.update_(squares)
        self.messages += [statistics, squares]

    def joined(self, k, get):
        """The parts of a tensor, of its low halves or of its state, one after the other."""
        parts = [get(rank) for rank in range(self.ranks)]
        if parts[0] is None or not self.shapes[k]:
            return parts[0]
        return torch.cat([part.cpu() for part in parts])

    def result(self):
        """What the ranks have together; what all of them have must be the same."""
        out = {"found_inf": self.same(self.found)}
        for k in range(len(self.shapes)):
            out[f"param {k}"] = self.joined(k, lambda r, k=k: self.params[r][k])
            out[f"low {k}"] = self.joined(k, lambda r, k=k: self.lows[r][k])
            for name in self.states[0][k]:
                states = [states[k][name] for states in self.states]
                shared = name == "step" or (len(self.shapes[k]) == 2 and name.endswith("col"))
                out[f"{name} {k}"] = (
                    self.same(states) if shared else self.joined(k, lambda r, s=states: s[r])
                )
        return {name: value for name, value in out.items() if value is not None}

    @staticmethod
    def same(tensors):
        assert all(torch.equal(t, tensors[0]) for t in tensors)
        return tensors[0]


def parts(backend, params, all_grads, options, ranks, **more):
    """What a few updates leave behind, and the messages."""
    options = dict(options)
    got = Ranks(backend, params, ranks, options.pop("rounding", "nearest"), **more)
    for grads in all_grads:
        got.update(grads, **options)
    return got.result(), got.messages


def whole(params, all_grads, options, backend="reference"):
    """The same from `adalomo_update_`."""
    options = dict(options)
    for name in ("inv_scale", "clip_coef", "skip"):
        if options.get(name) is not None:
            options[name] = scalar(options[name])
    params = [p.clone() for p in params]
    states = [ops.adalomo_state(p) for p in params]
    split = options.get("rounding") == "split"
    lows = [torch.zeros_like(p, dtype=torch.int16) if split else None for p in params]
    found = scalar(0.0)
    for grads in all_grads:
        ops.adalomo_update_(
            params, grads, states, low=lows, found_inf=found, backend=backend, **options
        )
    out = {"found_inf": found}
    for k, (p, state, low) in enumerate(zip(params, states, lows)):
        out |= {f"param {k}": p} | {f"{name} {k}": value for name, value in state.items()}
        if low is not None and p.dtype is BF16:
            out[f"low {k}"] = low
    return out


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        same = same_bits if value.dtype.is_floating_point else lambda a, b: torch.equal(a.cpu(), b)
        assert same(got[name], value), name


def cases(shapes, param=F32, grad=None, updates=2):
    return (
        [values(s, param, 0.1) for s in shapes],
        [[values(s, grad or param) for s in shapes] for _ in range(updates)],
    )


# -- against the update of whole tensors ----------------------------------------------------------


@ALL_BACKENDS
def test_one_rank_gets_the_bits_of_the_whole(backend):
    for options in most(backend, ({"lr": 0.01}, EVERYTHING), (EVERYTHING,)):
        params, grads = cases(most(backend, SHAPES, SMALL), BF16)
        options = {**options, "rounding": "stochastic"}
        with backend.active():
            got, _ = parts(backend, params, grads, options, 1)
        assert_same(got, whole(params, grads, options))


@ALL_BACKENDS
@pytest.mark.parametrize("ranks", RANKS)
def test_equal_to_the_reference_in_every_bit(backend, ranks):
    every = ({"lr": 0.01, "rounding": "stochastic"}, {**EVERYTHING, "rounding": "split"})
    for options in most(backend, every, every[:1]):
        params, grads = cases(most(backend, SHAPES, SMALL), BF16)
        want, told = parts(None, params, grads, options, ranks)
        with backend.active():
            got, messages = parts(backend, params, grads, options, ranks)
        assert_same(got, want)
        assert all(same_bits(a, b) for a, b in zip(messages, told))


@ALL_BACKENDS
@pytest.mark.parametrize("format", FORMATS, ids=format_id)
def test_every_format(backend, format):
    param, grad, rounding = format
    params, grads = cases(((9, 40), (30,)), param, grad, updates=1)
    options = {**EVERYTHING, "rounding": rounding}
    want, _ = parts(None, params, grads, options, 2)
    with backend.active():
        got, _ = parts(backend, params, grads, options, 2)
    assert_same(got, want)
    assert want["step 0"] == 1


@ALL_BACKENDS
def test_views_that_start_anywhere_and_sums_that_are_not_given(backend):
    params, grads = cases(((33, 63), (101,)), BF16)
    options = {"lr": 0.01, "rounding": "stochastic"}
    want, _ = parts(None, params, grads, options, 3)
    with backend.active():
        got, _ = parts(backend, params, grads, options, 3, shift=3, sums=False)
    assert_same(got, want)


@ALL_BACKENDS
def test_dtypes_mixed_and_many_vectors(backend):
    """A list of more than share a launch, in several pairs of dtypes: messages keep its order."""
    shapes = [(4, 12), (), (2, 3, 4), (600,)] + [(3,)] * (70 if backend.name == "native" else 2)
    params, grads = cases(shapes)
    params = [p.to((BF16, F32, F16)[k % 3]) for k, p in enumerate(params)]
    grads = [[g.to(p.dtype) for g, p in zip(each, params)] for each in grads]
    want, told = parts(None, params, grads, {"lr": 0.01}, 2)
    with backend.active():
        got, messages = parts(backend, params, grads, {"lr": 0.01}, 2)
    assert_same(got, want)
    assert all(same_bits(a, b) for a, b in zip(messages, told))


def test_more_than_256_rows_of_groups_and_tiles():
    """Sums of sums on a rank: 8 and more tiles along a column, 256 and more groups of rows."""
    for shape, name in (((1100, 40), "reference"), ((150_000, 3), "native")):
        backend = next(b for b in backends() if b.name == "native")
        params, grads = cases((shape,), updates=1)
        with backend.active():
            got, _ = parts(backend, params, grads, {"lr": 0.01}, 2)
        assert_close(got, whole(params, grads, {"lr": 0.01}, name))
        want, _ = parts(None, params, grads, {"lr": 0.01}, 2)
        assert_same(got, want)


def assert_close(got, want):
    for name, value in want.items():
        if name.split()[0] in ("step", "found_inf"):
            assert torch.equal(got[name], value), name
        else:
            a, b = got[name].double(), value.double()
            assert (a - b).norm() <= TOLERANCE * b.norm(), name


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("options", [{"lr": 0.01}, EVERYTHING], ids=["few", "all"])
def test_as_close_to_the_whole_as_sums_in_another_order(ranks, options):
    params, grads = cases(SHAPES, updates=3)
    got, _ = parts(None, params, grads, options, ranks)
    assert_close(got, whole(params, grads, options))


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("shape", [(6000,), (64, 40), (30, 300), (5, 6, 7)], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "split"])
def test_where_sums_are_exact_the_bits_are_those_of_the_whole(shape, ranks, rounding):
    """Stochastic rounding draws the bits of the whole tensor."""
    param = (torch.randint(-8, 9, shape) / 64).to(BF16)
    grad = (torch.randint(0, 2, shape) * 2 - 1).to(BF16)
    options = {"lr": 0.013, "rounding": rounding, "seed": 5}
    got, _ = parts(None, [param], [[grad]], options, ranks)
    assert_same(got, whole([param], [[grad]], options))


# -- against others -------------------------------------------------------------------------------


def formula(param, grad, state, t, lr, weight_decay, eps, clip_threshold, decay_rate, **clips):
    """Algorithm 1 of arXiv 2310.10195 in float64."""
    g = grad.double() * clips["inv_scale"]
    g = g.clamp(-clips["clip_value"], clips["clip_value"]) * clips["clip_coef"]
    w = t**decay_rate
    if param.ndim < 2:
        state["v"] = state.get("v", 0) * (1 - w) + w * (g**2 + eps[0])
        u = g / state["v"].sqrt()
    else:
        state["r"] = state.get("r", 0) * (1 - w) + w * ((g**2).mean(-1) + eps[0])
        state["c"] = state.get("c", 0) * (1 - w) + w * ((g**2).mean(-2) + eps[0])
        r = state["r"] / state["r"].mean(-1, keepdim=True)
        u = g / r.sqrt()[..., :, None] / state["c"].sqrt()[..., None, :]
    size = lr * max(eps[1], param.pow(2).mean().sqrt().item())
    shrink = size * weight_decay
    return param - shrink * param - size / max(1, u.pow(2).mean().sqrt() / clip_threshold) * u


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_formula_in_float64(ranks, backend):
    shapes = [(), (7,), (3000,), (1, 7), (7, 1), (33, 65), (300, 100), (3, 70, 30), (2, 2, 3, 5)]
    params, grads = cases(shapes, updates=5)
    grads = [[g * 20 for g in each] for each in grads]
    chosen = next(b for b in backends() if b.name == "native") if backend == "native" else None
    got, _ = parts(chosen, params, grads, EVERYTHING, ranks)
    options = {name: value for name, value in EVERYTHING.items() if name != "seed"}
    for k, param in enumerate(params):
        want, state = param.double(), {}
        for t, each in enumerate(grads, 1):
            want = formula(want, each[k], state, t, **options)
        assert (got[f"param {k}"] - want).norm() <= 3e-6 * want.norm(), shapes[k]
        assert not torch.allclose(param.double(), want, rtol=1e-3)


@pytest.mark.parametrize("shape", [(7,), (33, 65), (3, 70, 30)], ids=str)
def test_equal_to_transformers_adafactor(shape):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    p = values(shape, F32, 0.05)
    q = torch.nn.Parameter(p.double())
    adafactor = transformers.Adafactor(
        [q], lr=1e-2, weight_decay=0.1, scale_parameter=True, relative_step=False,
        warmup_init=False,
    )  # fmt: skip
    ranks = Ranks(None, [p], 3)
    for step in range(20):
        grad = values(shape, F32) * (0.01 + step % 7)
        q.grad = grad.double()
        adafactor.step()
        ranks.update([grad], lr=1e-2, weight_decay=0.1)
    got = ranks.result()
    assert (got["param 0"] - q.detach()).norm() <= 3e-6 * q.norm()
    for name in ranks.states[0][0].keys() - {"step"}:
        assert torch.allclose(got[f"{name} 0"].double(), adafactor.state[q][name], rtol=1e-5)


@ALL_BACKENDS
def test_sums_of_ranks_are_added_in_float64_and_rounded_once(backend):
    """In fp32 the small ones would be lost one after the other."""
    state = ops.adalomo_state(torch.ones(1, 2, device=backend.device))
    ones = [torch.ones(1, 2, device=backend.device)]
    with backend.active():
        update = ops.AdalomoParts(
            ones, [ones[0].clone()], [state], shape=[(4, 2)], offset=[0], lr=0.1,
            backend=backend.name,
        )  # fmt: skip
        every = torch.full((4, 4), 2**-25, device=backend.device)
        every[0] = 1
        update.update_(update.squares(every).repeat(4, 1))
    assert state["exp_avg_sq_col"].tolist() == [(1 + 2**-23) / 4] * 2


# -- what is not finite, and what does not count --------------------------------------------------


@ALL_BACKENDS
@pytest.mark.parametrize("clip_value", [None, 0.5], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("bad", [math.inf, math.nan, 3e19], ids=["infinity", "nan", "overflow"])
def test_one_bad_element_stops_every_rank(backend, bad, clip_value):
    """And that one tensor alone: the others of the list are updated."""
    if bad == 3e19 and clip_value:
        bad = -math.inf
    shapes = ((9, 40), (5, 3, 7), (300,), (9, 40), (5, 3, 7), (300,))
    params, (grads, good) = cases(shapes)
    for grad in grads[:3]:
        grad.view(-1)[grad.numel() // 2] = bad
    options = {"lr": 0.01, "clip_value": clip_value}
    with backend.active():
        got, _ = parts(backend, params, [grads], options, most(backend, 3, 2))
    later, _ = parts(None, params, [grads, good], options, 3)
    without, _ = parts(None, params[:3], [good[:3]], options, 3)
    assert got["found_inf"] == 1
    for k in range(3):
        assert torch.equal(got[f"param {k}"].cpu(), params[k])
        assert got[f"step {k}"] == 0
        assert not torch.equal(got[f"param {k + 3}"].cpu(), params[k + 3])
        assert got[f"step {k + 3}"] == 1
    for name in ("exp_avg_sq_row 0", "exp_avg_sq_col 0", "exp_avg_sq_row 1", "exp_avg_sq 2"):
        assert not got[name].any()
    for name in without:  # and what comes after is as if it had not been
        assert name == "found_inf" or torch.equal(later[name], without[name]), name


@ALL_BACKENDS
def test_skip(backend):
    params, grads = cases(SOME)
    with backend.active():
        got, _ = parts(backend, params, grads, {"lr": 0.01, "skip": 1.0}, 4)
    assert got["found_inf"] == 1
    for k, param in enumerate(params):
        assert torch.equal(got[f"param {k}"].cpu(), param)
        assert got[f"step {k}"] == 0
    assert not any(value.any() for name, value in got.items() if name.startswith("exp"))


@ALL_BACKENDS
def test_copies_do_not_count(backend):
    """Two ranks cut the tensors, two more have copies of their parts."""
    params, (grads,) = cases(SOME, updates=1)
    found = [scalar(0.0, backend.device) for _ in range(4)]
    with backend.active():
        want = Ranks(backend, params, 2)
        want.update(grads, lr=0.01)
        twice = [Ranks(backend, params, 2) for _ in range(2)]
        updates = [
            ops.AdalomoParts(
                twice[copy].params[rank],
                [want.place(g, k, rank) for k, g in enumerate(grads)],
                twice[copy].states[rank],
                shape=want.shapes,
                offset=[want.offset(k, rank) for k in range(len(params))],
                counts=[copy == 0 and (bool(p.ndim) or rank == 0) for p in params],
                lr=0.01,
                found_inf=found[2 * copy + rank],
                backend=backend.name,
            )
            for copy in (0, 1)
            for rank in (0, 1)
        ]
        statistics = torch.stack([u.statistics for u in updates])
        squares = torch.stack([u.squares(statistics) for u in updates])
        for u in updates:
            u.update_(squares)
    assert not statistics[2:].any()
    assert not squares[2:].any()
    assert torch.equal(statistics[:2], want.messages[0])
    for ranks in twice:
        assert_same(ranks.result(), {n: v.cpu() for n, v in want.result().items()})


# -- the calls ------------------------------------------------------------------------------------


def arguments(**change):
    return {
        "param": [torch.ones(2, 4)],
        "grad": [torch.ones(2, 4)],
        "state": [ops.adalomo_state(torch.ones(2, 4))],
        "shape": [(6, 4)],
        "offset": [8],
        "lr": 0.1,
        **change,
    }


@pytest.mark.parametrize("name", ["native", "reference"])
def test_nothing_is_written_before_the_third_call(name):
    given = arguments(backend=name, sums=[ops.adalomo_sums_(torch.ones(2, 4))])
    written = [*given["param"], *given["state"][0].values(), *given["sums"]]
    before = [t.clone() for t in written]
    update = ops.AdalomoParts(**given)
    assert update.statistics.tolist() == [8.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    squares = update.squares(torch.stack([update.statistics] * 3))
    assert squares.tolist() == [8.0]
    assert all(torch.equal(a, b) for a, b in zip(written, before))
    update.update_(torch.stack([squares] * 3))
    assert not any(torch.equal(a, b) for a, b in zip(written, before))
    assert torch.equal(given["sums"][0], ops.adalomo_sums_(given["param"][0]))


@pytest.mark.parametrize("name", ["native", "reference"])
def test_a_part_that_is_not_contiguous(name):
    p, g = values((6, 4), BF16, 0.1), values((6, 4), BF16)
    results = []
    for layout in (lambda t: t.clone(), lambda t: t.T.contiguous().T):
        own, low = layout(p), layout(torch.zeros(6, 4, dtype=torch.int16))
        update = ops.AdalomoParts(
            **arguments(
                param=[own], grad=[g], state=[ops.adalomo_state(p)], low=[low], rounding="split",
                offset=[0], backend=name,
            )
        )  # fmt: skip
        update.update_(update.squares(update.statistics[None])[None])
        results.append((own, low))
    (a, b), (c, d) = results
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, p)


def test_autograd_notices():
    p, x = torch.nn.Parameter(torch.ones(2, 4)), torch.ones(2, 4, requires_grad=True)
    product = p * x
    update = ops.AdalomoParts(**arguments(param=[p]))
    update.update_(update.squares(update.statistics[None])[None])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"param": []}, ValueError, "param must have at least one tensor"),
        ({"lr": -1.0}, ValueError, "lr must be finite and at least 0, got -1.0"),
        ({"grad": [torch.ones(4, 2)]}, ValueError, "grad must have param's shape"),
        ({"shape": [(6, 5)]}, ValueError, r"shape must be param's but for the number of rows, "),
        ({"shape": [(6, 4, 1)]}, ValueError, r"shape must be param's but for .* \(2, 4\), got"),
        ({"shape": (6, 4)}, ValueError, "shape must have param's length 1, got 2"),
        ({"offset": [7]}, ValueError, r"offset must be that of rows that shape \(6, 4\) has, got"),
        ({"offset": [20]}, ValueError, r"offset must be that of rows .* got 20 for \(2, 4\)"),
        ({"offset": [None]}, TypeError, "offset must be an integer, got NoneType"),
        ({"counts": [True, True]}, ValueError, "counts must have param's length 1, got 2"),
        ({"state": [{}]}, TypeError, r"state\['step'\] must be a tensor, got NoneType"),
        ({"sums": [torch.zeros(3)]}, ValueError, "sums must have 1 elements for shape"),
        ({"backend": "fast"}, ValueError, "backend must be 'auto' or one of"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        ops.AdalomoParts(**arguments(**change))


@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (None, TypeError, "every must be a float32 tensor, got NoneType"),
        (
            torch.zeros(2, 6).double(),
            TypeError,
            "every must be a float32 tensor, got torch.float64",
        ),
        (torch.zeros(6), ValueError, r"every must have shape \[ranks, 6\], got \(6,\)"),
        (torch.zeros(0, 6), ValueError, r"every must have shape \[ranks, 6\], got \(0, 6\)"),
        (torch.zeros(2, 5), ValueError, r"every must have shape \[ranks, 6\], got \(2, 5\)"),
    ],
)
def test_wrong_messages(every, error, message):
    with pytest.raises(error, match=message):
        ops.AdalomoParts(**arguments()).squares(every)


def test_calls_out_of_their_order():
    update = ops.AdalomoParts(**arguments())
    with pytest.raises(RuntimeError, match=r"update_\(\) must come once, after squares"):
        update.update_(torch.zeros(1, 1))
    update.update_(update.squares(update.statistics[None])[None])
    with pytest.raises(RuntimeError, match=r"update_\(\) must come once, after squares"):
        update.update_(torch.zeros(1, 1))
