"""The errors of inputs: the whole of them cannot be used, or one image cannot be read."""

from __future__ import annotations

from vitrine.models.errors import VitrineError


class InputError(VitrineError, ValueError):
    """Inputs that cannot be used; the message says what is wrong and what to do."""


class Unreadable(OSError):
    """One image that cannot be read, though the inputs name it; the message says why."""


class MissingImage(Unreadable):
    """A row of a table that has no image."""
