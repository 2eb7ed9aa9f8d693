"""Why an image of bulk or replay was not answered, as a code and a sentence."""

from __future__ import annotations

from vitrine.models.inputs.errors import MissingImage
from vitrine.models.inputs.files import reason
from vitrine.service.errors import ServiceError


def failure(error: ServiceError | OSError) -> tuple[str, str]:
    """(code, message): the service's own, or `missing_image`, or `unreadable`: the file cannot be read."""
    if isinstance(error, ServiceError):
        return error.code, error.message
    if isinstance(error, MissingImage):
        return "missing_image", reason(error)
    return "unreadable", f"the file cannot be read: {reason(error)}"
