"""Watched weights in code that torch.compile has compiled: products that offer their factors.

Note [Compiled products]
A compiled block is one node of autograd's graph, so the functions of products.py cannot be in it.
While torch traces it, they call operators, whose Python runs whenever the compiled code comes to
them:

    y, handle = lomo::linear(x, weight, bias)            forward; the handle names the weight
    ticket    = lomo::ticket(x)                          backward; q, k and v share theirs
    dx        = lomo::linear_backward(grad, x, tickets, weight, handle)

- The compiled graph gives the weight no gradient. What the optimizer does not take is added to
  `weight.grad` by the operator; autograd runs the hook on the weight after all of its gradients,
  those that are None included.
- Buffers of compiled code are written again, so what waits is a copy, made when it is kept. torch
  merges equal calls of an operator without effects, so one input has one ticket, which carries the
  copy.
- An operator that offers factors has an effect: torch neither removes nor merges nor moves it.
  Two equal products in forward are merged: then "immediate", which counts them, raises.
- The weight's tensor is no name for it: hooks on saved tensors (checkpointing) hand a detached one
  or a copy to backward.
- dx is made before the factors are offered: the optimizer may update the weight at once.
"""

import contextlib
from typing import Any

import torch
import torch.fx.traceback
import torch.nn.functional as F

from .products import without_padding

try:
    from torch._library.effects import EffectType
except ImportError:  # an old torch: compiled code leaves ordinary gradients
    EffectType = None  # type: ignore[assignment,misc]

AVAILABLE = EffectType is not None and hasattr(torch.library.Library, "_register_effectful_op")

watch_of: Any = None  # (weight) -> its Watch or None; watching.py sets both
watched: Any = None  # (id of a weight) -> (its Watch, the weight)


# -- when compiled code runs -----------------------------------------------------------------------


def _runs(function):
    """The Python of an operator: its tensors may be watched parameters."""

    def run(*args):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args)

    return run


def _run_linear(x, weight, bias, in_first):
    w = weight.to(x.dtype)
    out = torch.addmm(bias, x, w) if in_first else F.linear(x, w, bias)
    return out.contiguous(), _handle(weight, x, out)


def _handle(weight, given, out):
    if (watch := watch_of(weight)) is not None and watch.takes(weight):
        if torch._C._current_graph_task_id() == -1:
            watch.saw_product(weight, given, out.nbytes)
        else:  # checkpointing inside the compiled code, of which forward does not know
            watch.recomputes.add(id(weight))
    return torch.tensor(id(weight), device="cpu")  # reading it waits for nothing


def _run_ticket(x):
    return x.new_empty(0)


def _run_linear_backward(grad, x, grad_ticket, x_ticket, weight, handle, in_first):
    g, flat = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = x.new_empty(0)
    if weight is not None:
        w = weight.to(x.dtype)
        dx = (g @ (w.T if in_first else w)).view(x.shape)

    def copies():
        kept = _copy(g, grad_ticket), _copy(flat, x_ticket)
        return kept[::-1] if in_first else kept

    left, right = (flat, g) if in_first else (g, flat)
    watch, param = watched(handle.item())
    watch.receive(param, left, right, copies, lambda: (left.T @ right).to(param.dtype))
    return dx


def _run_embedding(ids, weight, padding):
    out = torch.embedding(weight, ids, padding)
    return out, _handle(weight, ids, out)


def _run_embedding_backward(grad, ids, grad_ticket, ids_ticket, handle, padding):
    left, right = ids.reshape(-1), grad.reshape(-1, grad.shape[-1])

    def factors(left, right):
        return left, without_padding(left, right, padding)

    def copies():
        return factors(_copy(left, ids_ticket), _copy(right, grad_ticket))

    watch, param = watched(handle.item())

    def form():
        rows = param.shape[0]
        return torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)

    watch.receive(param, *factors(left, right), copies, form)
    return grad.new_empty(0)


def _copy(tensor, ticket):
    if not hasattr(ticket, "copy"):
        ticket.copy = tensor.clone(memory_format=torch.contiguous_format)
    return ticket.copy


def _run_saw_other(weight):
    if (watch := watch_of(weight)) is not None and torch._C._current_graph_task_id() == -1:
        watch.saw_other(weight)


# -- what torch is told of them --------------------------------------------------------------------


def _fake_linear(x, weight, bias, in_first):
    return x.new_empty(*x.shape[:-1], weight.shape[1 if in_first else 0]), _fake_handle()


def _fake_handle():
    return torch.empty((), dtype=torch.int64, device="cpu")


def _fake_linear_backward(grad, x, grad_ticket, x_ticket, weight, handle, in_first):
    return x.new_empty(0 if weight is None else x.shape)


def _fake_embedding(ids, weight, padding):
    return weight.new_empty(*ids.shape, weight.shape[1]), _fake_handle()


def _fake_embedding_backward(grad, ids, grad_ticket, ids_ticket, handle, padding):
    return grad.new_empty(0)


def _setup_linear(ctx, inputs, output):
    x, weight, _, ctx.in_first = inputs
    ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, output[1])
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx, grad, _):
    if grad is None:
        return None, None, None, None
    x, weight, handle = ctx.saved_tensors
    tickets = _tickets(grad, x)
    dx = torch.ops.lomo.linear_backward(grad, x, *tickets, weight, handle, ctx.in_first)
    db = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
    return None if weight is None else dx, None, db, None


def _setup_embedding(ctx, inputs, output):
    ids, _, ctx.padding = inputs
    ctx.save_for_backward(ids, output[1])
    ctx.set_materialize_grads(False)


def _embedding_gradients(ctx, grad, _):
    if grad is not None:
        ids, handle = ctx.saved_tensors
        tickets = _tickets(grad, ids)
        torch.ops.lomo.embedding_backward(grad, ids, *tickets, handle, ctx.padding)
    return None, None, None


def _tickets(*tensors):
    with _in_backward():
        return [torch.ops.lomo.ticket(tensor) for tensor in tensors]


@contextlib.contextmanager
def _in_backward():
    """Keeps torch from making tickets in forward, to save them in place of what they are of."""
    meta = torch.fx.traceback.current_meta
    if not torch.fx.traceback.has_preserved_node_meta():  # nothing is traced
        yield
        return
    before = meta.get("partitioner_tag")
    meta["partitioner_tag"] = "must_be_in_backward"
    try:
        yield
    finally:
        meta["partitioner_tag"] = before


def _define(schema, run, fake, effect=False):
    # CUDA graphs would not replay their Python.
    _LIBRARY.define(schema, tags=(torch.Tag.cudagraph_unsafe,))
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, _runs(run), "CompositeExplicitAutograd")
    torch.library.register_fake(f"lomo::{name}", fake, lib=_LIBRARY)
    if effect:
        _LIBRARY._register_effectful_op(f"lomo::{name}", EffectType.ORDERED)


def _define_product(name, gradients, setup):
    torch.library.register_autograd(f"lomo::{name}", gradients, setup_context=setup, lib=_LIBRARY)


if AVAILABLE:
    _LIBRARY = torch.library.Library("lomo", "DEF")
    _define(
        "linear(Tensor x, Tensor weight, Tensor? bias, bool in_first) -> (Tensor, Tensor)",
        _run_linear, _fake_linear,
    )  # fmt: skip
    _define("ticket(Tensor x) -> Tensor", _run_ticket, _run_ticket)
    _define(
        "linear_backward(Tensor grad, Tensor x, Tensor grad_ticket, Tensor x_ticket, "
        "Tensor? weight, Tensor handle, bool in_first) -> Tensor",
        _run_linear_backward, _fake_linear_backward, effect=True,
    )  # fmt: skip
    _define(
        "embedding(Tensor ids, Tensor weight, int padding) -> (Tensor, Tensor)",
        _run_embedding, _fake_embedding,
    )  # fmt: skip
    _define(
        "embedding_backward(Tensor grad, Tensor ids, Tensor grad_ticket, Tensor ids_ticket, "
        "Tensor handle, int padding) -> Tensor",
        _run_embedding_backward, _fake_embedding_backward, effect=True,
    )  # fmt: skip
    _define("saw_other(Tensor weight) -> ()", _run_saw_other, lambda weight: None, effect=True)
    _define_product("linear", _linear_gradients, _setup_linear)
    _define_product("embedding", _embedding_gradients, _setup_embedding)
