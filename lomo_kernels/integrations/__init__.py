"""Doors to other libraries; the only rooms that import them."""

from .wrapped import unwrap

__all__ = ["LomoCallback", "unwrap"]


def __getattr__(name):
    if name == "LomoCallback":  # it is made of a class of transformers, which others do without
        from .trainer import LomoCallback

        return LomoCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
