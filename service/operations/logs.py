"""Log lines: one JSON object each, or text; of BentoML's own loggers too, under which ours is.

A request's line has its id, endpoint, status, time and trace; never its image, nor labels unless that is set.
"""

from __future__ import annotations

import logging

from opentelemetry import trace
from pythonjsonlogger.json import JsonFormatter

logger = logging.getLogger("bentoml.vitrine")  # BentoML sets up its own loggers and those under them

_TEXT = "%(asctime)s %(levelname)s %(message)s"


def configure(log_format: str) -> None:
    """Give the handlers that BentoML has set up our format. Without them (in a test, on the command line) nothing."""
    formatter: logging.Formatter
    if log_format == "json":
        formatter = JsonFormatter(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            datefmt="%Y-%m-%dT%H:%M:%S%z",
            reserved_attrs=[*logging.makeLogRecord({}).__dict__, "message", "asctime", "color_message"],
        )
    else:
        formatter = _Text(_TEXT, "%Y-%m-%dT%H:%M:%S%z")
    for handler in {*logging.getLogger("bentoml").handlers, *logging.getLogger().handlers}:
        if type(handler) is logging.StreamHandler:  # of the process, not of a test
            handler.filters.clear()  # BentoML's own writes a span's id over `request_id`
            handler.setFormatter(formatter)


class _Text(logging.Formatter):
    """A line with the fields of a request behind its message."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "request", None)
        line = super().format(record)
        return f"{line} {' '.join(f'{key}={value}' for key, value in fields.items())}" if fields else line


def trace_id() -> str | None:
    """Of the request at hand (W3C: 32 hexadecimal digits)."""
    context = trace.get_current_span().get_span_context()
    return format(context.trace_id, "032x") if context.is_valid else None
