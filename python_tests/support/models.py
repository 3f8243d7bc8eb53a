"""Small models for the tests of the optimizers."""

import functools
import weakref

import drivers
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

VOCABULARY = 40


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class LanguageModel(nn.Module):
    """Embedding, blocks and a head; tied weights and checkpointing on request."""

    def __init__(self, width=16, depth=3, tied=False, checkpointing=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.checkpointing = checkpointing

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        return self.head(x)


def build(dtype=torch.float32, **options):
    """The same model, to the bit, for the same options."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LanguageModel(**options).to(dtype)


def tokens(step=0, batch=4):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCABULARY, (batch, 6), generator=generator)


def loss_of(model, step=0, batch=4):
    ids = tokens(step, batch)
    logits = model(ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Spoil(torch.autograd.Function):
    """Identity whose backward puts a value into the gradient, or raises."""

    @staticmethod
    def forward(context, x, value):
        context.value = value
        return x.clone()

    @staticmethod
    def backward(context, grad):
        if context.value is None:
            raise ZeroDivisionError("planted")
        grad = grad.clone()
        grad.view(-1)[0] = context.value
        return grad, None


def spoiled_loss(model, value, at):
    """The loss with something wrong in the gradient that enters block `at` from above."""
    block = model.blocks[at]
    handle = block.register_forward_hook(lambda module, inputs, out: Spoil.apply(out, value))
    try:
        return loss_of(model)
    finally:
        handle.remove()


def difference(a, b):
    """Largest difference of two models' parameters."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(
        (p.detach().double() - q.detach().double()).abs().max().item()
        for p, q in pairs
        if p.numel()
    )


def snapshot(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, parameters):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), parameters, strict=True))


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations take or return, while it is entered.

    `now` and `peak` are in bytes. Workspaces inside an operation, an allocator's rounding and
    what no operation touched are not seen. torch keeps one Python object for a storage's life, so
    a weak reference to it tells when the memory is given back.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def add(self, tensor):
        """Counts the storage of a tensor from here on, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self.now += size
            self._alive[key] = weakref.ref(storage, functools.partial(self._freed, key, size))

    def _freed(self, key, size, reference):
        self.now -= size
        del self._alive[key]


def _addmm_flops(out, a, b, out_shape=None, **factors):
    return 2 * a[0] * a[1] * b[1]


# For torch's FlopCounterMode, which does not know the operator by which a CPU forms blocks of a
# gradient: without this they would be missing.
FLOPS = {torch.ops.aten.addmm_: _addmm_flops}


# -- ways to drive a step: (optimizer, model, step) ----------------------------------------------


def _on_loss(drive):
    return lambda optimizer, model, step: drive(optimizer, loss_of(model, step))


with_loop = _on_loss(drivers.by_loop)
with_scaled_loop = _on_loss(drivers.by_scaled_loop)
with_fused_backward = _on_loss(drivers.by_fused_backward)
with_backward = _on_loss(drivers.by_backward)
with_held_gradients = _on_loss(drivers.by_held_gradients)
DRIVERS = {
    "loop": with_loop,
    "scaled loop": with_scaled_loop,
    "fused_backward": with_fused_backward,
    "backward": with_backward,
    "held gradients": with_held_gradients,
}
