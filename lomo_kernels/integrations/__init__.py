"""Doors to other libraries; the only rooms that import them."""
