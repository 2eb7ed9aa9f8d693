"""Log lines, as JSON objects or as text, for our logger and for BentoML's, of which it is a child.

A request's line has its id, endpoint, status, time and trace; never its image, and labels only if `log_labels` is set.
"""

from __future__ import annotations

import logging

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger("bentoml.vitrine")  # BentoML configures its own loggers and their children

_TEXT_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def configure(log_format: str) -> None:
    """Set our format on BentoML's handlers. Without such handlers (in a test, on the command line) nothing happens."""
    formatter: logging.Formatter
    if log_format == "json":
        formatter = JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            reserved_attrs=[*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"],
        )
    else:
        formatter = _TextFormatter(_TEXT_FORMAT, "%Y-%m-%dT%H:%M:%S%z")
    for handler in {*logging.getLogger("bentoml").handlers, *logging.getLogger().handlers}:
        if type(handler) is logging.StreamHandler:  # the process's own, not a test's
            handler.filters.clear()  # BentoML's filter overwrites `request_id` with a span id
            handler.setFormatter(formatter)


class _TextFormatter(logging.Formatter):
    """Appends the fields of a request to the message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "request", None)
        line = super().format(record)
        return f"{line} {' '.join(f'{key}={value}' for key, value in fields.items())}" if fields else line


def trace_id() -> str | None:
    """Trace id of the current request (W3C: 32 hexadecimal digits)."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None
