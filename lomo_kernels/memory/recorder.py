"""Follows every tensor storage of a training step: when it appears, when it goes, what it was for.

Note [Categories]
Every storage has one category for its whole life, decided by what it became:

parameters  a parameter of the module
gradients   it was in `param.grad` or on its way there; or it waits in a gradient's place until the
            global norm is known, as a factor that backward made (optim/gradient.py)
states      it is in `optimizer.state` after a step
activations made by forward, the loss included, or by a recomputation of forward in backward; a
            factor that forward made stays here while it waits
other       the rest: gradients of activations, temporaries of backward and of the step, buffers,
            the batch; with FSDP all that is of whole units: parameters gathered, gradients before
            their reduction, and the buffers of both messages

Of sharded parameters the first three are this device's parts, the reduced gradients among them.
Where they live in host memory (CPUOffloadPolicy), storages there are counted apart.

A gradient is nothing special until backward has formed it, so categories are given afterwards: the
log keeps appearances and disappearances, and is read when the step is over. That, the maximum of
each category, and updates that run inside backward are what torch.distributed._tools.MemTracker
does not have; its totals are the same (python_tests/test_measure.py).
"""

import bisect
import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ..optim.sharding import is_sharded
from ..optim.watching import observes, unwatched

CATEGORIES = ("parameters", "gradients", "states", "activations", "other")
_COLLECTIVES = ("fsdp", "c10d", "_c10d_functional")  # operators' namespaces
ALLOCATION = 512  # CUDA's caching allocator gives out multiples of it


class Place(NamedTuple):
    """Where in a step something happened."""

    phase: str  # forward, backward, backward again or step
    module: str  # dotted name; "" outside of all modules

    def __str__(self):
        return f"{self.phase} of {self.module}" if self.module else self.phase


class Recorder(TorchDispatchMode):
    """The log of one step, between `__enter__` and `__exit__`; see Note [Categories].

    Args:
        optimizers: of the module's parameters.
        device: where the step runs, if neither the parameters nor their mesh tell.
    """

    def __init__(self, module, optimizers=(), device=None):
        super().__init__()
        self._module, self._optimizers = module, optimizers
        self._ids = {}  # of the storages alive: address of the C++ object -> index
        self._references = {}
        self.sizes, self.categories = [], []
        self.homes = []  # "device"; "host" where that is apart; None: it is not counted
        self.log = []  # (index, bytes that came or went, index into places)
        self.places = []
        self._known_places = {}
        self._scopes = []  # modules whose forward runs
        self._sequence, self._names = [-1], [""]  # autograd's sequence numbers -> module
        self._in_step = 0
        self._last_node_module = ""
        self._backwards, self._was_backward = 0, False
        self._handles = []
        first = next(module.parameters(), torch.empty(0))
        self._device = device or _device_of(first)
        self._home_of = {first.device: "host", self._device: "device"}

    @unwatched
    def __enter__(self):
        for param in self._module.parameters():
            self._see(param, "parameters")
            if param.grad is not None:
                self._see(param.grad, "gradients")
        for buffer in self._module.buffers():
            self._see(buffer, "other")
        self._see_states()
        self._attach()
        # No operator, and FSDP frees and fills storages with it.
        torch.UntypedStorage.resize_ = lambda storage, size: self._resized(storage, size)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        del torch.UntypedStorage.resize_  # it is the base class's again
        self._see_states()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._references.clear()

    # -- what torch calls --------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        gathers = function.namespace in _COLLECTIVES
        for value in _tensors((args, (kwargs or {}).values())):
            self._see(value, "gathered" if gathers else None)
        result = function(*args, **(kwargs or {}))
        crosses = function is torch.ops.aten._to_copy.default and args[0].device != result.device
        made = "activations" if self._forward_runs() and not gathers | crosses else "other"
        for value in _tensors((result,)):
            self._see(value, made)
        return result

    def _attach(self):
        attach = self._handles.append
        for name, module in self._module.named_modules():
            attach(module.register_forward_pre_hook(self._entering(name)))
            attach(module.register_forward_hook(self._left, always_call=True))
        for param in self._module.parameters():
            if param.requires_grad:
                attach(param.register_hook(self._on_gradient))
                handle = param.register_post_accumulate_grad_hook(self._on_accumulated)
                param._post_accumulate_grad_hooks.move_to_end(handle.id, last=False)
                attach(handle)  # the first, before an optimizer takes the gradient away
        for optimizer in self._optimizers:
            attach(optimizer.register_step_pre_hook(self._step_begins))
            attach(optimizer.register_step_post_hook(self._step_ended))

    def _entering(self, name):
        def enter(module, args):
            self._scopes.append(name)
            self._mark(name)

        return enter

    def _left(self, module, args, output):
        self._scopes.pop()
        self._mark(self._scopes[-1] if self._scopes else "")

    def _mark(self, name):
        """From this sequence number on, nodes of the graph belong to the module."""
        number = torch.autograd._get_sequence_nr()
        if number >= self._sequence[-1]:  # threads count on their own
            self._sequence.append(number)
            self._names.append(name)

    @observes
    def _on_gradient(self, grad):
        if grad is not None:  # an optimizer has taken its factors
            self._see(grad, "gradients")

    @observes
    @unwatched
    def _on_accumulated(self, param):
        if param.grad is not None:
            self._see(param.grad, "gradients")

    def _step_begins(self, optimizer, *_):
        self._in_step += 1
        for tensor in getattr(optimizer, "waiting_tensors", tuple)():
            self._see(tensor, "gradients")

    def _step_ended(self, *_):
        self._in_step -= 1
        self._see_states()

    def _see_states(self):
        states = [state for each in self._optimizers for state in each.state.values()]
        for value in _tensors(state.values() for state in states):
            self._see(value, "states")

    # -- the log -----------------------------------------------------------------------------------

    def _forward_runs(self):
        return bool(self._scopes) or torch.is_grad_enabled()

    def _see(self, tensor, category):
        """Notes a tensor's storage; None: it comes from outside, if it was not seen before."""
        if is_traceable_wrapper_subclass(tensor):
            for part in _tensors(getattr(tensor, n) for n in tensor.__tensor_flatten__()[0]):
                self._see(part, category)
        elif tensor.layout is torch.strided and tensor.device in self._home_of:
            self._see_storage(tensor.untyped_storage(), category, self._home_of[tensor.device])

    def _see_storage(self, storage, category, home):
        key, size = storage._cdata, self._bytes(storage)
        index = self._ids.get(key)
        if index is None:
            if category is None and torch._C._current_graph_task_id() != -1:
                home = None  # no operator made it: a library's own, as gloo's copy of a message
            index = self._ids[key] = len(self.sizes)
            self.sizes.append(size)
            self.categories.append(category if category in CATEGORIES else "other")
            self.homes.append(home)
            self._references[key] = weakref.ref(storage, lambda _: self._gone(key))
            self._note(index, size, outside=category is None)
            return
        self._note_size(index, size)
        current = self.categories[index]
        if category in ("parameters", "gradients", "states"):
            self.homes[index] = home
            # A factor that forward made is an activation still; a parameter stays one.
            if current == "other" or (current == "activations" and category != "gradients"):
                self.categories[index] = category
        elif category == "gathered" and current == "activations":
            self.categories[index] = "other"

    def _note_size(self, index, size):
        if size != self.sizes[index]:
            self._note(index, size - self.sizes[index])
            self.sizes[index] = size

    def _resized(self, storage, size):
        result = super(torch.UntypedStorage, storage).resize_(size)
        if storage.device in (self._device, torch.device("meta")):  # fake ones are on meta
            self._see_storage(storage, "gathered", "device")
        return result

    def _gone(self, key):
        del self._references[key]
        index = self._ids.pop(key)
        self._note(index, -self.sizes[index])

    def _bytes(self, storage):
        size = storage.nbytes()
        return -(-size // ALLOCATION) * ALLOCATION if storage.device.type == "cuda" else size

    def _note(self, index, size, outside=False):
        if outside:  # it was there all the time
            self.log.insert(0, (index, size, 0))
        else:
            self.log.append((index, size, self._place()))

    def _place(self):
        phase, module = self._where()
        place = Place(phase, module)
        number = self._known_places.get(place)
        if number is None:
            number = self._known_places[place] = len(self.places)
            self.places.append(place)
        return number

    def _where(self):
        in_backward = torch._C._current_graph_task_id() != -1
        self._backwards += in_backward and not self._was_backward
        self._was_backward = in_backward
        backward = "backward" if self._backwards < 2 else "backward again"
        if self._scopes:
            return (backward if in_backward else "forward"), self._scopes[-1]
        if (node := torch._C._current_autograd_node()) is not None:
            number = node._sequence_nr()
            if number < 2**63:  # else it puts a gradient into a parameter, and has no number
                place = bisect.bisect_right(self._sequence, number) - 1
                self._last_node_module = self._names[place]
            return backward, self._last_node_module
        if self._in_step or not torch.is_grad_enabled():
            return "step", ""
        return "forward", ""


def _device_of(param):
    """Where a parameter is used: offloaded ones live elsewhere."""
    kind = param.device_mesh.device_type if is_sharded(param) else param.device.type
    if kind == param.device.type:
        return param.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, Iterable) and not isinstance(value, str):
            yield from _tensors(value)
