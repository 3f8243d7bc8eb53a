"""Checkpoints that are whole or not there: a killed run goes on from the last one."""

import json
import shutil
from pathlib import Path

import torch

from ..integrations import huggingface

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


def save(folder, step, model, tokenizer, optimizer, scheduler, progress):
    """Writes checkpoint-STEP under another name, renames it, then drops the older ones."""
    target = folder / f"{_PREFIX}{step}"
    partial = folder / f"{target.name}{_PARTIAL}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    huggingface.save(partial, model, tokenizer)
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "progress": progress,
    }
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


def restore(path, optimizer, scheduler):
    """Loads everything but the model, which is loaded from `path` like any other. -> progress."""
    state = torch.load(path / "state.pt", map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])
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
