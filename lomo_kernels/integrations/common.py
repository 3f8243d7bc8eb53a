"""What the doors share: whether a library is there, and what goes wrong in it, in one sentence."""

import contextlib
import importlib


class ModelError(Exception):
    """The model cannot be used; the message says why in one sentence."""


def short(error):
    """The text of an error in one line, not all of it if it is long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def needed(name, what, extra):
    """The library of that name.

    Args:
        extra: of this package, which installs it.

    Raises:
        ModelError: `what` needs it, and it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{what} needs {name}: pip install 'lomo_kernels[{extra}]'") from error


def transformers_for(what):
    return needed("transformers", what, "finetune")


@contextlib.contextmanager
def without_bars(transformers):
    """Its bars of progress are not shown."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
