"""Logs: one JSON object a line on stderr, or lines for a person where stderr is a terminal."""

import logging
from typing import Any

from structlog.contextvars import merge_contextvars
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import JSONRenderer, TimeStamper, format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import EventDict, Processor, WrappedLogger

from service.errors import logger

SHOWN_CHARACTERS = 200  # how much of a client's own text a line repeats
FIRST = ("timestamp", "level", "logger", "event", "request_id")


def log_config(terminal: bool) -> dict[str, Any]:
    """For uvicorn.Config(log_config=...), and logging.config.dictConfig: all loggers write by one formatter."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": ProcessorFormatter, "processors": _processors(terminal)}},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr", "formatter": "line"}},
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {
            logger.name: _to_root("INFO"),
            "uvicorn": _to_root("INFO"),
            "uvicorn.access": {"handlers": [], "propagate": False},  # log_request says more
            "python_multipart": _to_root("ERROR"),  # it warns of every malformed form
        },
    }


def log_request(
    *,
    method: str,
    route: str,
    path: str,
    status: int | None,
    seconds: float,
    key_name: str | None = None,
    images: int | None = None,
) -> None:
    """The line of a request that has ended. route: its template. status: None where the client left before an answer.

    path is without the query, which may hold what is nobody's business.
    """
    if route.startswith("/health/") or route == "/metrics":
        level = logging.DEBUG  # probes come every few seconds, and say nothing
    else:
        level = logging.WARNING if status is not None and status >= 500 else logging.INFO
    fields: dict[str, Any] = {
        "method": _cut(method),
        "route": route,
        "path": _cut(path),
        "status": status,
        "seconds": round(seconds, 6),
    }
    known = {name: value for name, value in (("key_name", key_name), ("images", images)) if value is not None}
    logger.log(level, "request", extra=fields | known)


def _processors(terminal: bool) -> list[Processor]:
    """What makes a line of a record. Only the standard library's records come here: all of it is for each of them."""
    shared: list[Processor] = [
        ExtraAdder(),
        merge_contextvars,
        add_log_level,
        add_logger_name,
        TimeStamper(fmt="iso", utc=True),
        format_exc_info,  # Rich's tracebacks and structlog's structured ones show local variables: keys, images
        _ordered,
        _printable,
    ]
    if terminal:
        return [*shared, _indented, ConsoleRenderer(sort_keys=False, exception_formatter=plain_traceback)]
    return [*shared, JSONRenderer()]


def _ordered(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """What every line has comes first; what is not for the line is left out."""
    for name in ("_record", "_from_structlog", "color_message"):  # the last is uvicorn's event again, in colours
        event.pop(name, None)
    first = {name: event[name] for name in FIRST if name in event}
    return {**first, **event}


def _printable(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Text that a client may have sent cannot end a line, move the cursor or be an invalid JSON string.

    JSON would escape most of it, but only until a reader prints it.
    """
    for name, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            lines = value.split("\n") if name == "exception" else [value]
            event[name] = "\n".join(map(_escaped, lines))
    return event


def _indented(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """No line of a traceback, whose message may be a client's text, looks like one of the log."""
    if "exception" in event:
        event["exception"] = "    " + event["exception"].replace("\n", "\n    ")
    return event


def _escaped(text: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."


def _to_root(level: str) -> dict[str, Any]:
    return {"handlers": [], "level": level, "propagate": True}
