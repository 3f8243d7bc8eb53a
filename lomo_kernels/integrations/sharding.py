"""A model cut into units for torch's own engine, FSDP2."""

import dataclasses
from collections import Counter

from torch import nn

UNITS = ("layer", "fine")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


def shard(model, mesh, *, units="layer", offload=False, mp_policy=None):
    """Shards the parameters of a model with `fully_shard`; the optimizer is made afterwards.

    A unit is what is gathered before its modules run and freed after them, so the largest one is
    what a device needs beside its share of the parameters, several times over: gathered, its
    gradients, and both on their way.

    Args:
        model: any module whose layers are in a `ModuleList`; changed in place.
        mesh: a DeviceMesh of one dimension, or of two (replicas, shards).
        units: "layer": each layer, and what is outside of them, as FSDP2's tutorial has it; the
            next layer is gathered while one runs backward. "fine": attention and MLP of each layer
            apart, embedding and head too, vectors with what is left, and nothing is gathered ahead
            in backward: the least memory, in more and smaller messages that less of the arithmetic
            hides. Modules that become units must be called, not only their weights be used.
        offload: parameters, gradients and states live in host memory, and the optimizer's update
            runs there; needs torch 2.13. Beside a GPU that memory is pinned: see docs/sharding.md
            for the setting without which torch rounds each block up to a power of two.
        mp_policy: a MixedPrecisionPolicy; its `output_dtype` is that of the model, not of units
            inside of it, between which everything is in `param_dtype`.

    Returns:
        The model.

    Raises:
        ValueError: `units` is unknown.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if units not in UNITS:
        raise ValueError(f"units must be one of {', '.join(UNITS)}, got {units!r}")
    options = {"mesh": mesh}
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    policy = mp_policy or MixedPrecisionPolicy()
    inner = dataclasses.replace(policy, output_dtype=None)
    parts = fine_units(model) if units == "fine" else layers(model)
    for part in parts:
        fully_shard(part, mp_policy=inner, **options)
    fully_shard(model, mp_policy=policy, **options)
    if units == "fine":
        for part in (*parts, model):
            # No list means the unit before it in backward; itself is gathered already.
            part.set_modules_to_backward_prefetch([part])
    return model


def layers(model):
    """The entries of the outermost lists of modules."""
    found = []
    for child in model.children():
        entries = _parts(child) if isinstance(child, nn.ModuleList) else layers(child)
        found += [entry for entry in entries if next(entry.parameters(), None) is not None]
    return found


def fine_units(model):
    """The modules with matrices that a layer is made of, and those outside of layers.

    A module that shares a parameter with another one is none: a parameter belongs to one unit, so
    tied embeddings stay with the root. A layer that has matrices of its own is one for these.
    """
    users = Counter(
        id(param) for module in model.modules() for param in set(module._parameters.values())
    )

    def alone(module):
        return all(users[id(param)] == 1 for param in module.parameters())

    def own_matrices(module):
        return any(p is not None and p.ndim > 1 for p in module._parameters.values())

    found, inside = [], set()
    for layer in layers(model):
        inside.update(map(id, layer.modules()))
        found += [part for part in _parts(layer) if _has_matrices(part) and alone(part)]
        if own_matrices(layer):
            found.append(layer)
    outside = (module for module in model.modules() if id(module) not in inside)
    found += [m for m in outside if m is not model and own_matrices(m) and alone(m)]
    return found


def _parts(module):
    """The children of a module, and those of the containers among them."""
    for child in module.children():
        if isinstance(child, _CONTAINERS):  # no forward of its own, which FSDP2 could wait for
            yield from _parts(child)
        else:
            yield child


def _has_matrices(module):
    return any(param.ndim > 1 for param in module.parameters())
