"""Logging to stderr, without any of what callers send.

Texts of exceptions from code that reads inputs may quote names, headers of medical files or values, and so
may the loggers of the libraries that decode. Of those exceptions the log has the class and the lines of code;
those loggers are left out.
"""

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from server.errors import ServerFault, TryAgain

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

# Loggers whose lines are written. Others, e.g. nibabel and tifffile, quote the files that they read.
LOGGERS = ("server", "uvicorn", "asyncio", "openvino", "onnxruntime", "opentelemetry")

# The id of a job, which is in the names of its files and objects, gives access to its result; its first 8 digits are
# enough to find it. Hashes are longer.
JOB_ID = re.compile(r"(?<![0-9a-f])([0-9a-f]{8})[0-9a-f]{24}(?![0-9a-f])")

# Modules whose exceptions are written with their text, because it is about bundles, engines, the disk and the
# server itself.
TRUSTED = (
    "server.runtime",
    "server.jobs",
    "server.reload",
    "server.app",
    "server.serving",
    "server.cli",
    "server.logs",
)


def setup(form: Literal["text", "json"]) -> None:
    """Writes INFO and above to stderr, as text or as one JSON object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    handler.addFilter(LoggerFilter())
    handler.addFilter(DuplicateFilter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("openvino").setLevel(logging.WARNING)
    # Warnings would go to stderr as they are; as records of a logger that is left out they are not written.
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """Formats records for terminals."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line, with a traceback below it."""
        line = f"{self.formatTime(record)} {record.levelname} {_message(record)}"
        return "\n".join([line, *_exception(record)])

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - name of the base class
        """Returns the local time, to the millisecond."""
        del datefmt
        return (
            f"{datetime.fromtimestamp(record.created).astimezone():%Y-%m-%d %H:%M:%S},{int(record.msecs):03d}"
        )


class JsonFormatter(logging.Formatter):
    """Formats records for collectors, one JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the object: time, level, logger, message, the request's id, and the record's own `fields`."""
        time = (
            datetime.fromtimestamp(record.created, UTC)
            .isoformat(timespec="milliseconds")
            .replace("+00:00", "Z")
        )
        line = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        for text in _exception(record):
            line["exception"] = text
        return json.dumps(line)


class LoggerFilter(logging.Filter):
    """Passes records of `LOGGERS` only."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the logger is one of `LOGGERS`, or below one."""
        return record.name.partition(".")[0] in LOGGERS


class DuplicateFilter(logging.Filter):
    """Drops uvicorn's record of an exception that the handler of unexpected errors has logged already."""

    MARK = "unetpp_logged"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the exception has not been logged yet; marks it."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        again = record.name == "uvicorn.error" and hasattr(error, self.MARK)
        # On the exception itself, because nothing else lives as long as it does.
        setattr(error, self.MARK, True)
        return not again


def _message(record: logging.LogRecord) -> str:
    text = _without_job_ids(record.getMessage())
    # asyncio's further lines show tasks with the texts of their exceptions.
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _without_job_ids(text: str) -> str:
    """Cuts ids of jobs; the id of the request, which may look the same, stays."""
    own = REQUEST_ID.get()
    return JOB_ID.sub(lambda found: found[0] if found[0] == own else f"{found[1]}…", text)


def _exception(record: logging.LogRecord) -> Iterator[str]:
    if record.exc_info and record.exc_info[1]:
        yield describe(record.exc_info[1])


def describe(error: BaseException) -> str:
    """Returns tracebacks of an exception and then of its causes, without texts that may quote what was sent."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None and len(parts) < 10:
        frames = "".join(traceback.format_tb(current.__traceback__))
        parts.append(
            f"Traceback (most recent call last):\n{frames}{type(current).__name__}: {_text(current)}"
        )
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "\n\nafter\n\n".join(parts)


def _text(error: BaseException) -> str:
    ours = [
        name
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if (name := _module(frame)).startswith("server.")
    ]
    if isinstance(error, ServerFault | TryAgain) or (ours and ours[-1].startswith(TRUSTED)):
        return _without_job_ids(str(error))
    return "(its text is left out, as it may quote what was sent)"


def _module(frame: object) -> str:
    return str(getattr(frame, "f_globals", {}).get("__name__", ""))
