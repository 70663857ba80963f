"""What can go wrong with a model; kept apart so that it can be named without importing torch."""

from __future__ import annotations

__all__ = ["ModelError"]


class ModelError(ValueError):
    """A model that cannot be loaded or used; the message is one line that names it and the remedy."""
