"""The error of CLIPs that cannot be loaded."""

from __future__ import annotations

from vitrine.models.errors import VitrineError


class ClipError(VitrineError, ValueError):
    """A CLIP cannot be loaded; the message says why, and lists the valid choices or what to do."""
