"""The labels and templates of a request: defaults filled in, within the limits."""

from __future__ import annotations

from vitrine.models.bundle.label_sets import DEFAULT
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.errors import ServiceError
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.classify import LabelsRequest

Texts = tuple[tuple[str, ...], tuple[str, ...]]  # labels, templates


def resolve_texts(request: LabelsRequest, encoder: LabelEncoder, settings: Settings) -> Texts:
    """(labels, templates) of a request, defaults filled in, within the limits. Raises `ServiceError`."""
    if request.labels is not None and request.label_set is not None:
        raise ServiceError("invalid_request", "`labels` and `label_set` cannot be used together; send one of them")
    name = request.label_set or DEFAULT
    if (named := encoder.named.get(name)) is None:
        names = ", ".join(encoder.named)
        raise ServiceError("unknown_label_set", f"there is no label set {name[:100]!r}; the label sets are: {names}")
    if request.labels is None and request.templates is None:  # encoded already, whatever its size
        return named.labels, named.templates or encoder.default_templates
    labels = tuple(request.labels or named.labels)
    templates = tuple(request.templates or encoder.default_templates)
    check_texts(labels, templates, settings)
    return labels, templates


def check_texts(labels: tuple[str, ...], templates: tuple[str, ...], settings: Settings) -> None:
    """Raises `ServiceError` if a limit is exceeded."""
    if len(labels) > settings.max_labels:
        raise ServiceError(
            "invalid_request", f"there are {len(labels):,} labels; at most {settings.max_labels:,} are accepted"
        )
    if len(templates) > settings.max_templates:
        raise ServiceError(
            "invalid_request", f"there are {len(templates)} templates; at most {settings.max_templates} are accepted"
        )
    if len(labels) * len(templates) > settings.max_prompts:
        raise ServiceError(
            "invalid_request",
            f"{len(labels):,} labels in {len(templates)} templates make {len(labels) * len(templates):,} texts; at "
            f"most {settings.max_prompts:,} are accepted",
        )
    if too_long := [text for text in (*labels, *templates) if len(text) > settings.max_label_chars]:
        raise ServiceError(
            "invalid_request",
            f"a label or template has {len(too_long[0]):,} characters; at most {settings.max_label_chars} are accepted",
        )
    longest = max(map(len, labels))
    filled = max(len(template) + template.count("{}") * (longest - len("{}")) for template in templates)
    if filled > settings.max_prompt_chars:
        raise ServiceError(
            "invalid_request",
            f"a template filled in with the longest label has {filled:,} characters; at most "
            f"{settings.max_prompt_chars:,} are accepted",
        )
