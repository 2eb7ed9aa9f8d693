"""What cannot be debiased."""

from __future__ import annotations

from vitrine.models.errors import VitrineError


class DebiasError(VitrineError, ValueError):
    """These images, labels or groups do not do; the message says why and what would."""
