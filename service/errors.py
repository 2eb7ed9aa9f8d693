"""Errors of a request: one exception type, one body {"error": {code, message, details, request_id}}."""

from __future__ import annotations

from typing import Any

from vitrine.models.errors import VitrineError

STATUS = {
    "invalid_request": 400,
    "invalid_image": 400,
    "missing_image": 400,
    "unknown_label_set": 400,
    "unknown_edit": 400,
    "unauthorized": 401,
    "not_found": 404,
    "model_not_found": 404,
    "no_cards": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "bundle_refused": 409,
    "answer_too_large": 413,
    "batch_too_large": 413,
    "body_too_large": 413,
    "image_too_costly": 413,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "unsupported_image": 415,
    "queue_full": 429,
    "headers_too_large": 431,
    "client_gone": 499,  # nginx's code; nobody reads the answer, but logs and metrics count it
    "internal": 500,
    "not_ready": 503,
    "too_many_connections": 503,
    "deadline_exceeded": 504,
}


class ServiceError(VitrineError):
    """A request that cannot be answered. `code` is one of `STATUS`; `message` says what is wrong and what to do."""

    def __init__(
        self,
        code: str,
        message: str,
        details: list[dict[str, Any]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.details, self.headers = code, message, details or [], headers or {}

    @property
    def status(self) -> int:
        return STATUS[self.code]


def queue_full() -> ServiceError:
    """The error for overload."""
    return ServiceError(
        "queue_full", "too many images are waiting; try again in a second", headers={"Retry-After": "1"}
    )


def uploads_full() -> ServiceError:
    """The error for more bytes of uploads than may be in hand."""
    return ServiceError(
        "queue_full",
        "too many bytes of uploads are being processed; try again in a second",
        headers={"Retry-After": "1"},
    )
