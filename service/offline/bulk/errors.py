"""The error of a bulk run."""

from vitrine.models.errors import VitrineError


class BulkError(VitrineError, ValueError):
    """Options or output cannot be used; the message says what is wrong and what to do."""
