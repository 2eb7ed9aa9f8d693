"""The error of files."""

from __future__ import annotations

from vitrine.models.errors import VitrineError


class FileError(VitrineError):
    """A file or a folder cannot be used; the message says which, why, and what to do."""
