"""What the log says, and what it never says: nothing of what callers send.

Texts of exceptions from code that reads inputs may quote names, headers of medical files, or values; so do the loggers of the
libraries that decode. Of those exceptions the log has the kind and the lines of code, and of those loggers nothing.
"""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal

from server.errors import ServerFault, TryAgain

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

# Whose lines are of use to whoever operates the server. Others, e.g. nibabel and tifffile, tell of the files that they read.
HEARD = ("server", "uvicorn", "asyncio", "openvino", "onnxruntime", "opentelemetry")

# Exceptions raised here speak of bundles, engines, the disk and the server itself.
SPEAKING = ("server.runtime", "server.jobs", "server.reload", "server.app", "server.serving", "server.cli", "server.logs")


def setup(form: Literal["text", "json"]) -> None:
    """INFO and above as single lines on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else Text())
    handler.addFilter(Heard())
    handler.addFilter(Once())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("openvino").setLevel(logging.WARNING)
    # They would go to stderr as they are; as lines of a logger that is not heard they go nowhere.
    logging.captureWarnings(True)


class Text(logging.Formatter):
    """For terminals."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, and a traceback below it."""
        line = f"{self.formatTime(record)} {record.levelname} {_message(record)}"
        return "\n".join([line, *_exception(record)])

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - the base's name
        """To the millisecond."""
        del datefmt
        return f"{datetime.fromtimestamp(record.created).astimezone():%Y-%m-%d %H:%M:%S},{int(record.msecs):03d}"


class Json(logging.Formatter):
    """For collectors: one object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """The fields that every line has, the request's where there is one, and those that the line brings as `fields`."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": time, "level": record.levelname.lower(), "logger": record.name, "message": _message(record)}
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        for text in _exception(record):
            line["exception"] = text
        return json.dumps(line)


class Heard(logging.Filter):
    """Leaves out the loggers that nobody should hear."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is one of `HEARD`, or below it."""
        return record.name.partition(".")[0] in HEARD


class Once(logging.Filter):
    """Leaves out what uvicorn says of an exception that the handler of unexpected errors has logged: it marks those that pass."""

    MARK = "unetpp_logged"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is new."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        again = record.name == "uvicorn.error" and hasattr(error, self.MARK)
        # On the exception itself, so that it goes when that does.
        setattr(error, self.MARK, True)
        return not again


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    # asyncio's other lines show tasks with their exceptions' texts.
    return text.partition("\n")[0] if record.name == "asyncio" else text


def _exception(record: logging.LogRecord) -> Iterator[str]:
    if record.exc_info and record.exc_info[1]:
        yield describe(record.exc_info[1])


def describe(error: BaseException) -> str:
    """Tracebacks of an exception and what led to it, that last, without texts that may quote what was sent."""
    parts: list[str] = []
    left: BaseException | None = error
    while left is not None and len(parts) < 10:
        frames = "".join(traceback.format_tb(left.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{type(left).__name__}: {_text(left)}")
        left = left.__cause__ or (None if left.__suppress_context__ else left.__context__)
    return "\n\nafter\n\n".join(parts)


def _text(error: BaseException) -> str:
    own = [name for frame, _ in traceback.walk_tb(error.__traceback__) if (name := _module(frame)).startswith("server.")]
    if isinstance(error, ServerFault | TryAgain) or (own and own[-1].startswith(SPEAKING)):
        return str(error)
    return "(its text is left out, as it may quote what was sent)"


def _module(frame: object) -> str:
    return str(getattr(frame, "f_globals", {}).get("__name__", ""))
