"""Checkpoints that are whole or not there: a killed run goes on from the last one.

Weights and the optimizer's state are torch.distributed.checkpoint's, whatever the number of ranks:
each writes what it has, and any number goes on.
"""

import json
import shutil
from pathlib import Path

import torch

_PREFIX, _PARTIAL = "checkpoint-", ".partial"


class ResumeError(Exception):
    """The folder holds another run; the message says which setting differs."""


def _step_of(path):
    return int(path.name.removeprefix(_PREFIX))


def _whole(folder):
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()
    ]
    return sorted(found, key=_step_of)


def save(folder, step, ranks, model, optimizer, scheduler, progress):
    """Writes checkpoint-STEP under another name, renames it, then drops the older ones.

    All ranks call it; the folder is one that all of them see.
    """
    from torch.distributed import checkpoint as dcp

    target = folder / f"{_PREFIX}{step}"
    partial = folder / f"{target.name}{_PARTIAL}"
    ranks.first(_empty, partial)
    dcp.save(_tensors(model, optimizer), checkpoint_id=partial, no_dist=ranks.size == 1)
    state = {
        "scheduler": scheduler.state_dict(),
        "random": ranks.all(torch.get_rng_state()),
        "progress": progress,
    }
    ranks.first(_complete, folder, partial, target, state)


def _tensors(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    saved = model.state_dict().keys()
    weights = {name: p.detach() for name, p in model.named_parameters()}  # tied ones once
    buffers = {name: b for name, b in model.named_buffers() if name in saved}
    return {"model": weights | buffers, "optimizer": get_optimizer_state_dict(model, optimizer)}


def _empty(folder):
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _complete(folder, partial, target, state):
    torch.save(state, partial / "state.pt")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    for path in _whole(folder):
        if path != target:
            shutil.rmtree(path)
    for path in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(path)


def latest(folder):
    """(step, folder) of the newest whole checkpoint, or None."""
    found = _whole(Path(folder))
    return (_step_of(found[-1]), found[-1]) if found else None


def restore(path, ranks, model, optimizer, scheduler):
    """Loads everything into what was made as if at the beginning. -> progress.

    Where another number of ranks goes on, what they draw at random begins anew.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    tensors = _tensors(model, optimizer)
    dcp.load(tensors, checkpoint_id=path, no_dist=ranks.size == 1)  # weights in place
    set_optimizer_state_dict(model, optimizer, tensors["optimizer"])
    state = torch.load(path / "state.pt", map_location="cpu")
    scheduler.load_state_dict(state["scheduler"])
    if len(state["random"]) == ranks.size:
        torch.set_rng_state(state["random"][ranks.rank])
    return state["progress"]


def claim(folder, settings):
    """Writes down which run the folder is for; refuses one that another run has begun."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text())
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise ResumeError(
                    f"{folder} holds a run with {key}={before.get(key)!r}, this one has "
                    f"{settings.get(key)!r}: give the same settings to go on with it, "
                    "or another --out"
                )
    path.write_text(json.dumps(settings, indent=2) + "\n")
