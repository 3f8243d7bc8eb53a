"""A run's folder: one writer, one run, and checkpoints that are whole or not there.

Weights and the optimizer's state are torch.distributed.checkpoint's, whatever the number of ranks:
each writes what it has, and any number goes on. All ranks see the folder.
"""

import contextlib
import json
import shutil
from pathlib import Path

import filelock
import torch

_PREFIX, _PARTIAL = "checkpoint-", ".partial"


class OutputError(Exception):
    """The folder cannot be used; the message says why in one sentence."""


@contextlib.contextmanager
def claimed(folder, settings, contents):
    """Makes the folder this run's alone, and writes down which run that is.

    Args:
        settings: a dict. contents: digests of what the run reads, by what it is called.

    Raises:
        OutputError: it is another run's, somebody writes to it, or it cannot be written to.
    """
    lock = filelock.FileLock(folder / "lock", timeout=0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise OutputError(f"another run is writing to {folder}: give another --out") from error
    try:
        path = folder / "settings.json"
        if path.exists():
            _refuse_another(folder, json.loads(path.read_text()), settings, contents)
        with writing(folder):
            _write(path, {**settings, "contents": contents})
        yield
    finally:
        lock.release()


def _refuse_another(folder, before, settings, contents):
    contents_before = before.pop("contents", {})
    for key in sorted(before.keys() | settings.keys()):
        if before.get(key) != settings.get(key):
            raise OutputError(
                f"{folder} holds a run with {key}={before.get(key)!r}, this one has "
                f"{settings.get(key)!r}: give the same settings to go on with it, or another --out"
            )
    for name, digest in contents.items():
        if contents_before.get(name) != digest:
            raise OutputError(
                f"{name} has changed since the run in {folder} began: give another --out, or "
                "remove that folder"
            )


@contextlib.contextmanager
def writing(folder):
    """Turns what fails when something is written into one sentence."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:  # torch's and safetensors' are of classes of their own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(folder).free:,} bytes are free there)"
        raise OutputError(f"cannot write to {folder}: {reason}") from error


def _write(path, record):
    """The file is whole or as before."""
    temporary = path.with_name(path.name + _PARTIAL)
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    temporary.rename(path)


def save(folder, step, ranks, model, optimizers, schedulers, progress, keep):
    """Writes checkpoint-STEP under another name, renames it, then drops all but `keep`."""
    state = {
        "schedulers": [scheduler.state_dict() for scheduler in schedulers],
        "progress": progress,
    }
    _save_tensors(folder, f"{_PREFIX}{step}", ranks, _tensors(model, optimizers), state)
    ranks.first(drop, folder, keep)


def save_weights(folder, name, ranks, model):
    """Writes folder/name, for `load_weights`."""
    _save_tensors(folder, name, ranks, {"model": _weights(model)}, None)


def load_weights(path, ranks, model):
    """Puts the weights of what `save_weights` or `save` wrote into the model."""
    _load({"model": _weights(model)}, path, ranks)


def _save_tensors(folder, name, ranks, tensors, state):
    from torch.distributed import checkpoint as dcp

    def begin():
        shutil.rmtree(partial, ignore_errors=True)
        with writing(folder):
            partial.mkdir(parents=True)

    def end():
        with writing(folder):
            torch.save(state, partial / "state.pt")
            _replace(target, partial)

    target, partial = folder / name, folder / f"{name}{_PARTIAL}"
    ranks.first(begin)
    try:
        with writing(folder), _cause_alone():
            dcp.save(tensors, checkpoint_id=partial, no_dist=ranks.size == 1)
        ranks.first(end)
    except OutputError:
        if ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _load(tensors, path, ranks):
    """In place, all but what is no tensor."""
    from torch.distributed import checkpoint as dcp

    with _cause_alone():
        dcp.load(tensors, checkpoint_id=path, no_dist=ranks.size == 1)


@contextlib.contextmanager
def _cause_alone():
    """Raises what went wrong on a rank, in place of the BaseException that says so on all."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from error


def _tensors(model, optimizers):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    weights = _weights(model)  # first: it ends what FSDP2 has gathered, which torch cannot name
    # one by one: torch misses states where one optimizer has some and another none
    states = {str(i): get_optimizer_state_dict(model, each) for i, each in enumerate(optimizers)}
    return {"model": weights, "optimizers": states}


def _weights(model):
    """All that a run may change; beside an adapter the model stays as it is."""
    saved = model.state_dict().keys()
    named = model.named_parameters()  # tied ones once
    weights = {name: p.detach() for name, p in named if p.requires_grad}
    return weights | {name: b for name, b in model.named_buffers() if name in saved}


def _replace(target, partial):
    """What was there under this name stays until now; a name.partial is never read."""
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def save_model(folder, name, write):
    """Writes folder/name by `write(folder)`."""
    target, partial = folder / name, folder / f"{name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            write(partial)
            _replace(target, partial)
    except OutputError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def drop(folder, keep):
    """Removes all whole checkpoints but the newest `keep`, and every one that is not whole."""
    found = _whole(folder)
    for path in [*found[: len(found) - keep], *folder.glob(f"{_PREFIX}*{_PARTIAL}")]:
        shutil.rmtree(path)


def latest(folder):
    """(step, folder) of the newest whole checkpoint, or None."""
    found = _whole(Path(folder))
    return (_step_of(found[-1]), found[-1]) if found else None


def restore(path, ranks, model, optimizers, schedulers):
    """Loads everything into what was made as if at the beginning. -> progress."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    tensors = _tensors(model, optimizers)
    _load(tensors, path, ranks)
    for optimizer, its in zip(optimizers, tensors["optimizers"].values()):
        set_optimizer_state_dict(model, optimizer, its)
    state = torch.load(path / "state.pt", map_location="cpu")
    for scheduler, its in zip(schedulers, state["schedulers"]):
        scheduler.load_state_dict(its)
    return state["progress"]


def _step_of(path):
    return int(path.name.removeprefix(_PREFIX))


def _whole(folder):
    found = [
        path
        for path in folder.glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()
    ]
    return sorted(found, key=_step_of)
