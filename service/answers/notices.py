"""What an answer says beside what was asked for: notices of its labels and of its image, under `warnings`."""

from __future__ import annotations

from collections.abc import Sequence

from vitrine.models.images.decode import Note
from vitrine.models.texts.labels import LabelNotice
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.base import DETAILS, Notice


def to_notices(labels: Sequence[LabelNotice] = (), image: Sequence[Note] = ()) -> list[Notice]:
    """Notices of labels and of an image, as answers have them."""
    of_labels = [Notice(code=code, message=message, labels=list(about)) for code, message, about in labels]
    return [*of_labels, *(Notice(code=code, message=message) for code, message in image)]


def refuse(notices: Sequence[LabelNotice], field: str) -> None:
    """For a strict request. Raises `ServiceError` invalid_request if there is anything to say of its labels."""
    if not notices:
        return
    details = [
        {"field": field, "problem": notice.message, "code": notice.code, "labels": list(notice.labels)}
        for notice in notices[:DETAILS]
    ]
    raise ServiceError("invalid_request", " ".join(dict.fromkeys(n.message for n in notices[:3])), details)
