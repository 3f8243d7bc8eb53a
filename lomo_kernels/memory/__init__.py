"""Where the memory goes: what is held, measured."""

from .held import HeldBytes, state_bytes

__all__ = ["HeldBytes", "state_bytes"]
