"""The library transformers: whether it is there, and what goes wrong in it, in one sentence."""

import contextlib


class ModelError(Exception):
    """The model cannot be used; the message says why in one sentence."""


def short(error):
    """The text of an error in one line, not all of it if it is long."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def transformers_for(what):
    """The library.

    Raises:
        ModelError: `what` needs it, and it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelError(
            f"{what} needs transformers: pip install 'lomo_kernels[finetune]'"
        ) from error
    return transformers


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
