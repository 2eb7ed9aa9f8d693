"""What an answer says beside what was asked for: notices of its labels and of its image, under `warnings`."""

from __future__ import annotations

from collections.abc import Sequence

from vitrine.models.bundle.manifest import FIT_SHARE, LabelFit
from vitrine.models.images.decode import Note
from vitrine.models.texts.labels import LabelNotice
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.base import DETAILS, Notice
from vitrine.service.schemas.classify import Prediction, Verdict

UNLIKE = "image_unlike_labels"


def to_notices(labels: Sequence[LabelNotice] = (), image: Sequence[Note] = ()) -> list[Notice]:
    """Notices of labels and of an image, as answers have them."""
    of_labels = [Notice(code=code, message=message, labels=list(about)) for code, message, about in labels]
    return [*of_labels, *(Notice(code=code, message=message) for code, message in image)]


def unlike_labels(
    fit: LabelFit | None, predictions: Sequence[Prediction], judged: Verdict | None = None
) -> tuple[Note, ...]:
    """A note if the best label fits the image worse than the bundle's own labels fit nearly all of its images.

    fit: of the bundle's manifest; judged: whether the image fits a label was asked for, and needs no note.
    """
    best = max(prediction.cosine for prediction in predictions)
    if judged is not None or fit is None or best >= fit.low_cosine:
        return ()
    shown = round(best, 2) + 0  # no "-0.00"
    says = (
        f"Perhaps none of the labels fits this image: the best one has a cosine of {shown:.2f}. With the bundle's own "
        f"labels, {1 - FIT_SHARE:.0%} of {fit.images:,} images have at least {fit.low_cosine:.2f}."
    )
    return (Note(UNLIKE, says),)


def refuse(notices: Sequence[LabelNotice], field: str) -> None:
    """For a strict request. Raises `ServiceError` invalid_request if there is anything to say of its labels."""
    if not notices:
        return
    details = [
        {"field": field, "problem": notice.message, "code": notice.code, "labels": list(notice.labels)}
        for notice in notices[:DETAILS]
    ]
    raise ServiceError("invalid_request", " ".join(dict.fromkeys(n.message for n in notices[:3])), details)
