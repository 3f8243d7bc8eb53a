"""SIGINT and SIGTERM, looked at between steps."""

import contextlib
import signal
import threading


class StoppedError(Exception):
    """Somebody asked to stop; what was done is in a checkpoint where there is an output folder."""


@contextlib.contextmanager
def noted():
    """SIGINT and SIGTERM fill a list, which the loop looks at between steps; a second one is as
    usual. In a thread, where signals cannot be caught, nothing changes."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
