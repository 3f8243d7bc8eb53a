"""Where the memory goes: what is held, measured."""

from .held import HeldBytes, state_bytes
from .live import LiveBytes

__all__ = ["HeldBytes", "LiveBytes", "state_bytes"]
