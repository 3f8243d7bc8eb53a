"""Which part of a parameter this rank has, and what all ranks decide together.

Note [Shards]
A sharded parameter is a DTensor: of `fully_shard` (FSDP2), of tensor parallelism, or of both. Its
hook runs after the reduction, with a gradient that is sharded alike; the kernels work on the local
tensors, with the number that each element has in the whole parameter, so that random bits are those
of one device. What one rank cannot know alone is agreed on with one message: the squared norms of
all parts, and the flags, of all ranks, which `ops.decide_` adds in a fixed order. So the norm, the
skip and the loss scale are the same bits on all ranks.

The leaves of the graph are the whole parameters that FSDP2 gathers for a unit, not the sharded
ones. A second backward that is limited to some parameters needs them: they are what a module holds
while its forward runs.

This is the one room that knows of torch.distributed; it imports nothing of it before a DTensor is
met.
"""

import functools
import sys
from typing import NamedTuple

import torch

from . import notices


def dtensor():
    """The class DTensor, or None while no module that makes one was imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)


def is_sharded(tensor):
    return _is_sharded_class(type(tensor))


@functools.cache  # no class of today becomes a DTensor by an import of tomorrow
def _is_sharded_class(kind):
    sharded = dtensor()
    return sharded is not None and issubclass(kind, sharded)


def local(tensor):
    """What this rank has of a tensor; of a plain one the tensor itself."""
    # to_local() costs 10 us, and makes a node of the graph where gradients are enabled
    return tensor._local_tensor if is_sharded(tensor) else tensor


def local_gradient(grad, param, name_of):
    """This rank's part of a gradient, placed as its parameter is.

    Raises:
        TypeError: the gradient is a sum over ranks that cannot be formed.
    """
    if grad is None or not is_sharded(grad):
        return grad
    if grad.placements != param.placements:  # of sequence parallelism: sums that are still to do
        for placement in grad.placements:
            if placement.is_partial() and placement.reduce_op not in ("sum", "avg"):
                raise TypeError(notices.PARTIAL.format(name=name_of(param), placement=placement))
        grad = grad.redistribute(placements=param.placements)
    grad = grad._local_tensor
    if grad.is_cuda:
        # The engine made it on another stream than the one that the update runs on, and its memory
        # may be used again as soon as the gradient is freed.
        grad.record_stream(torch.cuda.current_stream(grad.device))
    return grad


def like(value, param):
    """`value`, this rank's part of what has the parameter's shape, or its first dimension alone,
    as a DTensor that is sharded alike; of a plain parameter `value` itself."""
    if not is_sharded(param):
        return value
    whole = value.shape == local(param).shape
    shape = param.shape if whole else torch.Size((param.shape[0], *value.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return dtensor().from_local(
        value, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
    )


class Part(NamedTuple):
    """Where a rank's part lies in the whole parameter."""

    offset: int  # number of its first element
    counts: bool  # whether it is no copy of what a rank before this one has
    nbytes: int  # of the largest part that a rank has, the same on all ranks


def _offset(param):
    """-> (number of the first local element, place of the part: where it begins, and its shape).

    A part of another dimension than the first is no run of elements: its elements get numbers that
    no other part has.
    """
    mine = local(param)
    if mine is param:
        return 0, ((0,) * param.ndim, tuple(param.shape))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, first = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    strides = torch.empty(param.shape, device="meta").stride()
    if mine.numel() == 0:
        offset = 0
    elif tuple(shape[1:]) == tuple(param.shape[1:]):
        offset = first[0] * strides[0]
    else:
        offset = first[0] * strides[0] + shape[0] * sum(
            place * stride for place, stride in zip(first[1:], strides[1:])
        )
    return offset, (tuple(first), tuple(mine.shape))


def check(param, name, by_rows):
    """Refuses placements that an update cannot work on.

    Args:
        by_rows: whether the rule needs whole rows.
    """
    if not is_sharded(param):
        return
    for placement in param.placements:
        if placement.is_partial():
            raise TypeError(notices.PARTIAL.format(name=name, placement=placement))
    if by_rows and any(
        getattr(placement, "dim", 0) % max(1, param.ndim) != 0 for placement in param.placements
    ):
        raise TypeError(notices.COLUMNS.format(name=name, placements=param.placements))
    if (
        torch.__version__ < (2, 13)
        and param._local_tensor.device.type == "cpu"
        and param.device_mesh.device_type != "cpu"
    ):
        raise RuntimeError(notices.OLD_OFFLOAD.format(version=torch.__version__))


class Ranks:
    """All ranks that have parts of an optimizer's parameters.

    Making it is a collective: every rank makes its optimizer from the same parameters in the same
    order.

    Args:
        params: all parameters, at least one of them sharded.
        name_of: their names for errors.

    Raises:
        ValueError: the ranks have different parameters.
    """

    def __init__(self, params, name_of):
        import torch.distributed as dist

        self._dist = dist
        meshes = [param.device_mesh for param in params if is_sharded(param)]
        widest = max(meshes, key=lambda mesh: mesh.size())
        if widest.size() == dist.get_world_size():
            self.group = dist.group.WORLD
        else:
            self.group = (widest if widest.ndim == 1 else widest._flatten()).get_group()
        self.size = dist.get_world_size(self.group)
        backends = str(dist.get_backend_config(self.group))
        # Offloaded parameters lie on the CPU, from which a group of NCCL alone cannot send.
        by_cpu = widest.device_type == "cpu" or any(b in backends for b in ("cpu:", "gloo", "mpi"))
        self._device = "cpu" if by_cpu else widest.device_type
        found = [(*_offset(p), tuple(p.shape), str(p.dtype), local(p).nbytes) for p in params]
        places = [each[1:] for each in found]
        ranks = self._all(places)
        for other in ranks:
            if [each[1:3] for each in other] != [each[1:3] for each in places]:
                raise ValueError(_difference(places, other, params, name_of))
        me = dist.get_rank(self.group)
        self._parts = {
            id(param): Part(
                offset,
                all(ranks[rank][k][0] != place for rank in range(me)),
                max(other[k][3] for other in ranks),
            )
            for k, (param, (offset, place, *_)) in enumerate(zip(params, found))
        }
        self._masks = {}
        self._params = params

    def _all(self, value):
        """What every rank says."""
        if self.size == 1 or self._dist.get_backend(self.group) == "fake":  # of a plan: no others
            return [value] * self.size
        every = [None] * self.size
        self._dist.all_gather_object(every, value, group=self.group)
        return every

    def part(self, param):
        """The Part of a parameter."""
        return self._parts[id(param)]

    def gather(self, values):
        """[size, n] of every rank's n values, the same bits on all of them. One message."""
        values = values.reshape(1, -1)
        if self.size == 1:
            return values
        sent = values.to(self._device) if values.device.type == "cpu" else values
        every = sent.new_empty((self.size, sent.shape[1]))
        _all_gather(self._dist)(every, sent, group=self.group)
        return every.to(values.device)

    def agree(self, sumsq, flags):
        """One message from each rank to all.

        Args:
            sumsq: this rank's squared norms, one for each parameter; None: no norm is wanted.
            flags: this rank's flags.

        Returns:
            Squared norms, a part that several ranks have counted once, and flags, of all ranks.
        """
        if sumsq is None:
            return None, self.gather(flags).view(-1)
        count = sumsq.numel()
        counted = torch.where(self._mask(sumsq), sumsq, 0.0)
        every = self.gather(torch.cat([counted, flags.to(sumsq.dtype)]))
        return every[:, :count].reshape(-1), every[:, count:].reshape(-1)

    def agree_on(self, param, sumsq, skip):
        """One message: the squared norms of all parts of one parameter, where `skip`, a flag, is
        set on every rank if it is on one."""
        mine = sumsq if self.part(param).counts else torch.zeros_like(sumsq)
        every = self.gather(torch.cat([mine.view(1), skip.to(mine.dtype).view(1)]))
        skip.copy_(every[:, 1].amax())
        return every[:, 0].contiguous()

    def _mask(self, sumsq):
        if sumsq.device not in self._masks:
            counts = [self._parts[id(param)].counts for param in self._params]
            self._masks[sumsq.device] = torch.tensor(counts, device=sumsq.device)
        return self._masks[sumsq.device]


def _all_gather(dist):
    """The call has a new name since torch 2.13, and warns under the old one."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _difference(mine, other, params, name_of):
    for param, a, b in zip(params, mine, other):
        if a[1:3] != b[1:3]:
            return (
                f"{name_of(param)} is {a[2]} of shape {a[1]} here and {b[2]} of shape {b[1]} on "
                "another rank: make the optimizer from the same parameters on every rank"
            )
    return (
        f"this rank has {len(mine)} parameters and another one {len(other)}: make the optimizer "
        "from the same parameters on every rank"
    )


class Leaves:
    """The leaves of the graph that stand for sharded parameters; see Note [Shards].

    Made from a module and the optimizer's parameters; nothing of the module is changed but for
    forward pre-hooks, which `remove` takes away.
    """

    def __init__(self, module, params):
        self._found = {}  # id(sharded) -> leaf, of every forward so far
        self._order = {}  # ids in the order of their use in this step
        self._handles = []
        wanted = {id(param) for param in params if is_sharded(param)}
        for owner in module.modules():
            names = {n: id(p) for n, p in owner._parameters.items() if id(p) in wanted}
            if names:
                self._handles.append(owner.register_forward_pre_hook(self._look(names)))

    def remove(self):
        for handle in self._handles:
            handle.remove()

    def _look(self, names):
        def look(module, args):
            in_forward = torch._C._current_graph_task_id() == -1  # else recomputation
            for name, key in names.items():
                self._found[key] = module._parameters[name]
                if in_forward:
                    self._order.setdefault(key)

        return look

    def of(self, params):
        """Those of parameters; of a plain parameter it is the parameter itself. None that no
        forward has used."""
        leaves = (self._found.get(id(p)) if is_sharded(p) else p for p in params)
        return [leaf for leaf in leaves if leaf is not None]

    def know(self, params):
        """Whether the leaf of each parameter is known."""
        return len(self.of(params)) == len(params)

    def ids(self):
        return {id(leaf) for leaf in self._found.values()}

    def left_in(self, module, names):
        """Names under which the module has a leaf in the place of the sharded parameter."""
        now, ids = dict(module.named_parameters(remove_duplicate=False)), self.ids()
        return [name for name in names if name in now and id(now[name]) in ids]

    def used(self):
        """Ids of the parameters in the order of their first use in this step."""
        return list(self._order)

    def close(self):
        self._order = {}


def ignored(params):
    """The trained parameters that the engine which shards the others leaves alone: FSDP2 reduces no
    gradients of them. None without FSDP2: tensor parallelism keeps plain parameters whose gradients
    are the same on all ranks."""
    plain = [p for p in params if p.requires_grad and not is_sharded(p)]
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if not plain or kind is None:
        return []
    modules = notices.modules_with({id(p) for p in params}, kind)
    inside = {id(p) for module in modules for p in module.parameters()}
    return [p for p in plain if id(p) in inside]
