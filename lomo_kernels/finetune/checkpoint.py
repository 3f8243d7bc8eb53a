"""A run's folder: one writer, one run, and checkpoints that are whole or not there."""

import contextlib
import json
import shutil
from pathlib import Path

import filelock
import torch

from ..integrations import huggingface

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


def save(folder, step, model, tokenizer, optimizer, scheduler, progress, keep):
    """Writes checkpoint-STEP under another name, renames it, then drops all but `keep`."""
    state = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "random": torch.get_rng_state(),
        "progress": progress,
    }
    save_model(folder, f"{_PREFIX}{step}", model, tokenizer, state)
    drop(folder, keep)


def save_model(folder, name, model, tokenizer, state=None):
    """Writes folder/name, which transformers loads, with `state` for `restore`. What was there
    under this name stays until the new one is whole; a name.partial is never read."""
    target, partial = folder / name, folder / f"{name}{_PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            partial.mkdir(parents=True)
            huggingface.save(partial, model, tokenizer)
            if state is not None:
                torch.save(state, partial / "state.pt")
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
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


def restore(path, optimizer, scheduler):
    """Loads everything but the model, which is loaded from `path` like any other. -> progress."""
    state = torch.load(path / "state.pt", map_location="cpu")
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["random"])
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
