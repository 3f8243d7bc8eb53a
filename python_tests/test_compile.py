"""Models that torch.compile has compiled, beside the same models without it."""

import contextlib
import gc
from pathlib import Path

import models
import pytest
import torch
import torch.nn.functional as F
import ways
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from lomo_kernels import Lomo
from lomo_kernels.optim import compiled

pytestmark = [
    pytest.mark.skipif(not compiled.AVAILABLE, reason="this torch has no operators with effects"),
    # Of torch itself: where what it compiles is given an activation, and where it loads inductor.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]
DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ),
    ],
)
# torch's own compiler without and with the part that writes and fuses kernels.
TRACED, FUSED = "aot_eager", "inductor"
ROUNDING = 1e-6  # of fused operations, on weights that are near 1
STEPS = 5


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """As in a new process; two backwards need what the first would give away."""
    torch._dynamo.reset()
    counters.clear()
    with torch._functorch.config.patch(donated_buffer=False):
        yield
    torch._dynamo.reset()


def compile_blocks(model, backend):
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)


def compile_whole(model, backend):
    model.compile(backend=backend, fullgraph=True)


PLACES = pytest.mark.parametrize("place", [compile_blocks, compile_whole])


def step(case, optimizer, model, number, device="cpu"):
    for group in optimizer.param_groups:
        group["lr"] = case.lr / (1 + number)
    case.step(optimizer, loss(model, number, device))


def loss(model, number, device="cpu"):
    ids = models.tokens(number, batch=2).to(device)
    logits = model(ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def pair(case, place, backend, device="cpu", **options):
    """A model and its optimizer, as it is and compiled."""
    found = []
    for compile_ in (lambda model, backend: None, place):
        model = models.build(**{"width": 64, **options}).to(device)
        found.append((model, case.make(model)))
        compile_(model, backend)
    return found


# -- equal to the model without torch.compile ------------------------------------------------------


@PLACES
@ways.cases()
def test_equal_to_eager_in_every_bit(case, place):
    (model, optimizer), (other, same) = pair(case, place, TRACED, tied=True)
    for number in range(2):
        step(case, optimizer, model, number)
        step(case, same, other, number)
    assert models.same(other, models.snapshot(model))
    assert same.explain() == optimizer.explain()
    assert same.last_waiting_bytes == optimizer.last_waiting_bytes


@DEVICES
@PLACES
@ways.cases("one_backward", "two_backward", "immediate", kinds=(Lomo,))
def test_one_graph_that_is_equal_to_eager_up_to_rounding(case, place, device):
    """For all equal layers and learning rates: compiled once, and never again after the second
    step."""
    (model, optimizer), (other, same) = pair(case, place, FUSED, device)
    for number in range(STEPS):
        step(case, optimizer, model, number, device)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            step(case, same, other, number, device)
    assert models.difference(model, other) < ROUNDING
    assert same.explain() == optimizer.explain()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


class Block(nn.Module):
    """One way to use weights."""

    def __init__(self, kind, width=32):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        if self.kind.startswith("checkpointed inside"):
            return checkpoint(self.inner, x, use_reentrant=self.kind.endswith("reentrant"))
        return self.inner(x)

    def inner(self, x):
        h = torch.tanh(self.up(self.norm(x)))
        if self.kind == "used twice":
            h = torch.tanh(self.up(h))
        h = self.down(h)
        if self.kind == "used elsewhere":
            h = h + 0.01 * self.down.weight.square().sum() + x @ self.down.weight.T
        if self.kind == "detached":
            h = h + x @ self.down.weight.detach()
        return x + h


class Transposed(Block):
    """GPT-2's layers, whose weights lie [in, out]; two that give a sum, as parallel blocks do."""

    def inner(self, x):
        x = self.norm(x)
        h = torch.addmm(self.up.bias, torch.tanh(x), self.up.weight)
        return torch.addmm(self.up.bias, x.sin(), self.down.weight) + h + x


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        padding = int(models.tokens(0, batch=1)[0, 0])
        self.embedding = nn.Embedding(models.VOCABULARY, 32, padding_idx=padding)
        block = Transposed if kind == "addmm" else Block
        self.blocks = nn.ModuleList(block(kind) for _ in range(2))
        self.out = nn.Linear(32, 4)
        if kind == "tied":
            self.blocks[1].down.weight = self.blocks[0].down.weight
        if kind == "frozen":
            self.blocks[0].up.requires_grad_(False)
        if kind == "bfloat16":
            self.to(torch.bfloat16)

    def forward(self, ids):
        x = self.embedding(ids.flatten())
        for block in self.blocks:
            x = self.run(block, x)
        return self.out(x).float().square().mean()

    def run(self, block, x):
        if self.kind.startswith("checkpointed outside"):
            return checkpoint(block, x, use_reentrant=self.kind.endswith("reentrant"))
        hooks = torch.autograd.graph.save_on_cpu if self.kind == "saved elsewhere" else None
        with hooks() if hooks else contextlib.nullcontext():
            return block(x)


KINDS = (
    "compiled whole", "addmm", "used twice", "used elsewhere", "detached", "tied", "frozen",
    "bfloat16", "autocast",
    "checkpointed inside", "checkpointed inside, reentrant", "checkpointed outside",
    "checkpointed outside, reentrant", "saved elsewhere",
)  # fmt: skip


def net(kind):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return Net(kind)


@pytest.mark.parametrize("kind", KINDS)
@ways.cases("one_backward", "two_backward", "immediate", kinds=(Lomo,))
def test_every_use_of_a_weight(case, kind):
    if kind.endswith("reentrant") and case.way.name == "two_backward":
        pytest.skip("reentrant checkpointing lets a backward run once only")
    models_of = []
    for backend in (None, TRACED):
        model = net(kind)
        optimizer = case.make(model, rounding="nearest")
        if backend:
            (compile_whole if kind == "compiled whole" else compile_blocks)(model, backend)
        for number in range(2):
            autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast")
            with autocast:
                result = model(models.tokens(number, batch=1))
            case.step(optimizer, result)
        models_of.append(model)
    assert models.same(models_of[1], models.snapshot(models_of[0]))


def test_the_example():
    page = (Path(__file__).parent.parent / "docs" / "compile.md").read_text()
    code, given = page.split("```python\n")[1].split("```")[0], {}
    exec(compile(code, "docs/compile.md", "exec"), given)
    assert "4 weights kept factors" in given["optimizer"].explain()


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_what_waits_beside_recomputed_activations(place):
    """Of checkpointing inside the compiled code the optimizer knows after the first backward."""
    model = net(f"checkpointed {place}")
    optimizer = Lomo(model, clip_grad_norm=1.0, strategy="one_backward")
    compile_blocks(model, TRACED)
    beside = []
    for number in range(2):
        result = model(models.tokens(number, batch=1))
        beside.append([each.beside for each in optimizer.would_wait()[1]])
        optimizer.backward(result)
    known = [False, *[True] * 4, False]  # of the blocks; not of the embedding and the last layer
    assert beside == [known if place == "outside" else [False] * 6, known]


@ways.cases("one_backward", "auto")
def test_micro_batches(case):
    found = []
    for backend in (None, TRACED):
        model = models.build(width=64)
        optimizer = case.make(model)
        if backend:
            compile_blocks(model, backend)
        for number in range(3):
            models.loss_of(model, number, batch=1).backward()
        optimizer.step()
        found.append((models.snapshot(model), optimizer.explain()))
    assert models.same(model, found[0][0])
    assert found[0][1] == found[1][1]


def test_a_llama():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LlamaConfig(
        vocab_size=models.VOCABULARY, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    found = []
    for backend in (None, TRACED):
        torch.manual_seed(3)
        model = transformers.LlamaForCausalLM(config)
        optimizer = Lomo(model, lr=0.1, clip_grad_norm=0.1)
        for layer in model.model.layers if backend else ():
            layer.compile(backend=backend, fullgraph=True)
        for number in range(2):
            ids = models.tokens(number, batch=1)
            optimizer.backward(model(input_ids=ids, labels=ids).loss)
        found.append((models.snapshot(model), optimizer.last_waiting_bytes))
    assert models.same(model, found[0][0])
    assert found[0][1] == found[1][1]
    assert counters["stats"]["unique_graphs"] == 1


# -- what waits ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three products of one input, two of another, and two that share the gradient of their sum."""

    def __init__(self, width=64):
        super().__init__()
        self.q, self.k, self.v, self.gate, self.up, self.out, self.down = (
            nn.Linear(width, width, bias=False) for _ in range(7)
        )

    def forward(self, x):
        h = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        m = torch.sigmoid(self.gate(h)) * self.up(h)
        return self.out(h.sin()) + self.down(m)


@DEVICES
def test_one_copy_for_each_input(device):
    for backend in (None, TRACED, FUSED):
        model = Attention().to(device)
        optimizer = Lomo(model, clip_grad_norm=1.0)
        if backend:
            model.compile(backend=backend, fullgraph=True)
        model(torch.randn(8, 64, device=device)).square().mean().backward()
        storages = {t.untyped_storage().data_ptr() for t in optimizer.waiting_tensors()}
        assert len(optimizer.waiting_tensors()) == 14
        assert len(storages) == 4 + 6, backend  # x, h, sin(h), m; out and down have one gradient


@PLACES
@pytest.mark.parametrize("backend", [TRACED, FUSED])
def test_what_waits_takes_the_memory_of_eager(backend, place):
    """Followed from outside: what a backward leaves alive, and not what the optimizer says."""
    case = ways.Case(Lomo, ways.Way("one_backward", {"strategy": "one_backward"}))
    (model, optimizer), (other, same) = pair(case, place, backend)
    step(case, optimizer, model, 0)
    step(case, same, other, 0)
    before = alive()
    loss(model, 1).backward()
    loss(other, 1).backward()
    left = {key: nbytes for key, nbytes in alive().items() if key not in before}
    waits = [{t.untyped_storage()._cdata for t in o.waiting_tensors()} for o in (optimizer, same)]
    assert left.keys() == waits[0] | waits[1]
    assert sum(left[key] for key in waits[0]) == sum(left[key] for key in waits[1])


def alive():
    """Bytes of the storages of all tensors that Python knows."""
    gc.collect()
    with torch._C.DisableTorchFunctionSubclass():
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        found = [t for t in tensors if t.layout is torch.strided]  # others have no storage
        return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in found}


# -- who looks, and who has left -------------------------------------------------------------------


@pytest.fixture
def layers():
    """Two compiled layers, of which the first is looked at, their optimizer, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    optimizer = Lomo(model, lr=0.1, clip_grad_norm=1.0, strategy="one_backward")
    model.compile(backend=TRACED)
    return model, optimizer, torch.randn(8, 64)


def gradient(model, x, of):
    """What autograd gives without torch.compile and without an optimizer."""
    plain = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    plain.load_state_dict(model.state_dict())
    plain(x).square().sum().backward()
    return plain.get_parameter(of).grad


def test_a_reader_sees_the_gradient(layers):
    model, _, x = layers
    expected = gradient(model, x, "0.weight")
    for count in (1, 2):
        model(x).square().sum().backward()
        torch.testing.assert_close(model[0].weight.grad, count * expected)


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_sees_the_gradient(layers, hook):
    model, optimizer, x = layers
    model(x)  # compiled before
    seen = []
    weight = model[0].weight
    getattr(weight, hook)(lambda each: seen.append(weight.grad if each is weight else each))
    expected = gradient(model, x, "0.weight")
    model(x).square().sum().backward()
    torch.testing.assert_close(seen, [expected])
    assert sum(t.shape == (8, 64) for t in optimizer.waiting_tensors()) == 2  # of the other layer


def test_a_hook_that_comes_after_forward_is_refused(layers):
    model, _, x = layers
    result = model(x).square().sum()
    model[0].weight.register_hook(lambda grad: None)
    with pytest.raises(RuntimeError, match="register the hook before the forward"):
        result.backward()


def test_a_gradient_that_is_asked_for_is_refused(layers):
    model, _, x = layers
    with pytest.raises(RuntimeError, match=r"torch.autograd.grad\(\) asks for"):
        torch.autograd.grad(model(x).square().sum(), [model[0].weight])


def test_a_backward_for_others_is_no_part_of_the_step(layers):
    model, optimizer, x = layers
    x.requires_grad_()
    model(x).square().sum().backward(inputs=[x])
    assert x.grad is not None
    assert optimizer.is_clean


def test_accumulated_gradients_are_those_of_torch(layers):
    model, optimizer, x = layers
    expected = gradient(model, x, "0.weight")
    with optimizer.accumulate():
        model(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, 2 * expected)


def test_the_optimizer_has_left(layers):
    model, optimizer, x = layers
    expected = gradient(model, x, "0.weight")
    result = model(x).square().sum()
    optimizer.remove()
    with pytest.raises(RuntimeError, match="removed between forward and backward"):
        result.backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected)


# -- graphs ----------------------------------------------------------------------------------------


def operators(graph):
    names = (str(node.target) for node in graph.graph.nodes)
    return {name.removesuffix(".default") for name in names if name.startswith("lomo")}


def captured(model, example):
    """What newer exports begin with, in the state that torch.export runs it in."""
    functional_export = pytest.importorskip(
        "torch._dynamo.functional_export", reason="this torch exports in other ways alone"
    )
    with torch._export.utils._compiling_state_context():
        return functional_export.dynamo_graph_capture_for_export(model)(example)


EXPORTS = {
    "strict": lambda model, x: torch.export.export(model, (x,), strict=True).graph_module,
    "not strict": lambda model, x: torch.export.export(model, (x,), strict=False).graph_module,
    "captured": captured,
}


@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS.keys())
def test_exported_graphs_hold_no_operator_of_ours(export):
    model = models.build(width=64, depth=1)
    optimizer = Lomo(model, clip_grad_norm=1.0)
    graph = export(model, models.tokens())
    assert any("linear" in str(node.target) for node in graph.graph.nodes)
    assert not operators(graph)
    assert optimizer.is_clean


@pytest.mark.parametrize("clip", [None, 1.0])
def test_only_where_gradients_wait_there_are_operators(clip):
    """Without a norm torch's own gradients are used at once; a clip that comes later compiles the
    layer again."""
    seen = []

    def backend(graph, inputs):
        seen.append(operators(graph))
        return graph

    layer = nn.Linear(64, 64)
    optimizer = Lomo(layer, clip_grad_norm=clip)
    layer.compile(backend=backend, fullgraph=True)
    layer(torch.randn(2, 64))
    optimizer.clip_grad_norm = None if clip else 1.0
    layer(torch.randn(2, 64))
    with_factors, without = {"lomo.linear"}, set()
    assert seen == ([with_factors, without] if clip else [without, with_factors])


def test_two_backwards_say_what_to_set():
    """Where torch's first backward, for which it compiles the graph, kept nothing for another."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = Lomo(model, clip_grad_norm=1.0, strategy="two_backward")
    model.compile(backend=FUSED)
    x = torch.randn(8, 64)
    with torch._functorch.config.patch(donated_buffer=True):
        with optimizer.accumulate():
            model(x).tanh().sum().backward()
        optimizer.step()
        result = model(x).tanh().sum()
        with pytest.raises(RuntimeError, match=r"donated_buffer = False before the first forward"):
            optimizer.backward(result)
