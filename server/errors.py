"""All errors, free of HTTP; `api/problems.py` maps them to statuses in one table.

UnetppError
├── CallerError               the caller can fix it
│   ├── Unreadable            a file of a known format that cannot be decoded
│   ├── UnsupportedType       a format that is not read here
│   ├── TooLarge              over a limit
│   │   └── HeadTooLarge      path, query and headers over a limit
│   ├── UploadStalled         a body that stopped coming, or comes too slowly
│   ├── Unauthorized          no API key, or an unknown one
│   ├── OtherSite             a browser's request for a page of another site
│   ├── UnknownFormat         an output format that does not exist
│   ├── InvalidParameter      mode, level, precision, reference, ...
│   ├── DeadlineTooShort      a deadline that even an idle server would miss
│   ├── UnknownModel          a bundle that is not served
│   ├── UnknownJob            a job that was never accepted, was deleted or has expired
│   ├── ReloadFailed          bundles on disk that cannot be served; the old ones are
│   └── NotFinished           a job without a result, or without one yet
├── TryAgain                  the same request may succeed later
│   ├── ReloadRunning         another reload is running
│   ├── Overloaded            too many requests at once
│   ├── DeadlinePassed        the request's time was up before its response was ready
│   ├── NotReady              the server is starting or stopping
│   ├── StoreFull             no disk space for jobs and results
│   └── Interrupted           a job that was started several times and never ended
└── ServerFault               the operator, or we, must fix it
    ├── BundleDamaged         a bundle that fails a check; names the file
    ├── Misconfigured         settings that exclude each other, or that this machine cannot follow
    ├── EngineUnavailable     an engine or provider that does not run here
    ├── TuningTooNoisy        measurements that differ too much to be stored
    ├── InferenceFailed       an engine that failed while serving; its text is logged, not sent
    └── StoreBroken           a jobs folder that is in use, damaged or not writable
"""

import re
from typing import Any, ClassVar


class UnetppError(Exception):
    """Base of all errors.

    Args:
        detail: one or two sentences for a person: what is wrong, the value and the limit, the remedy.
        fields: facts of the detail, for a program; None values are left out. They become members of the
            problem document, and tests assert them. The usual names are `parameter`, `value`, `allowed`
            (values that exist), `limit`, `actual`, `unit`, `setting` (the one that raises the limit) and
            `remedy`. The docstring of each class lists the fields it may have.

    Attributes:
        code: class name in lower case with dashes, e.g. "too-large".
        fields: fields that have a value.
        refusal: value of the label `reason` under which `unetpp_refusals` counts it; "" where it is not
            counted.
    """

    code: ClassVar[str] = "unetpp-error"
    refusal = ""

    def __init_subclass__(cls) -> None:
        """Derives the code from the name; a private class keeps the code of its base."""
        super().__init_subclass__()
        if not cls.__name__.startswith("_"):
            cls.code = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(self, detail: str, **fields: Any) -> None:
        super().__init__(detail)
        self.fields = {name: value for name, value in fields.items() if value is not None}


class CallerError(UnetppError):
    """The caller can fix it."""


class Unreadable(CallerError):
    """A file of a known format cannot be decoded. Fields: format, value, limit."""


class UnsupportedType(CallerError):
    """The file has a format that is not read here. Fields: value, allowed."""


class TooLarge(CallerError):
    """A size is over a limit. Fields: parameter, limit, actual, unit, setting, remedy."""

    refusal = "too_large"


class HeadTooLarge(TooLarge):
    """Path, query and headers are too long or too many. Fields: limit, actual, unit."""


class UploadStalled(CallerError):
    """The body stopped coming, or comes too slowly. Fields: limit, unit."""


class Unauthorized(CallerError):
    """The request has no API key, or an unknown one."""


class OtherSite(CallerError):
    """A browser sends the request for a page of another site."""


class UnknownFormat(CallerError):
    """The output format does not exist, or not for this input. Fields: parameter, value, allowed."""


class InvalidParameter(CallerError):
    """A parameter of the request is wrong. Fields: parameter, value, allowed, limit."""


class DeadlineTooShort(CallerError):
    """The work alone takes longer than the deadline allows. Fields: limit, actual, unit, remedy."""


class UnknownModel(CallerError):
    """The bundle is not served. Fields: parameter or setting, value, allowed."""


class UnknownJob(CallerError):
    """The job was never accepted, was deleted or has expired. Fields: value."""


class ReloadFailed(CallerError):
    """The bundles on disk cannot be served, and the old ones stay in service. Fields: those of the cause, for the operator."""


class NotFinished(CallerError):
    """The job has no result, or none yet.

    Args:
        detail: sentence for a person.
        retry_after_s: seconds after which to ask again; None where there will be no result.
        fields: state.
    """

    def __init__(self, detail: str, retry_after_s: int | None = None, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retry_after_s = retry_after_s


class TryAgain(UnetppError):
    """A request is refused that may succeed later.

    Args:
        detail: sentence for a person.
        retry_after_s: seconds to wait first, for the header Retry-After.
        fields: facts for a program.
    """

    def __init__(self, detail: str, retry_after_s: int = 1, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retry_after_s = retry_after_s


class ReloadRunning(TryAgain):
    """Another reload is running."""


class Overloaded(TryAgain):
    """Too many requests came at once.

    Args:
        detail: sentence for a person.
        retry_after_s: seconds to wait first.
        refusal: label of the metrics: "wait", "in_flight", "memory" or "uploads".
        fields: limit, actual, unit, setting, remedy.
    """

    def __init__(self, detail: str, retry_after_s: int = 1, refusal: str = "wait", **fields: Any) -> None:
        super().__init__(detail, retry_after_s, **fields)
        self.refusal = refusal


class DeadlinePassed(TryAgain):
    """The request's time was up before its response was ready. Fields: limit, unit, remedy."""


class NotReady(TryAgain):
    """The server is starting or stopping, or its device does not answer."""

    refusal = "stopping"


class StoreFull(TryAgain):
    """The disk space for jobs and results is used up. Fields: limit, actual, unit, setting."""


class Interrupted(TryAgain):
    """A job was started several times and never ended. Fields: limit, actual."""


class ServerFault(UnetppError):
    """The operator or the developers must fix the cause. Its details are not sent to callers."""


class BundleDamaged(ServerFault):
    """A bundle cannot be read, or fails its hashes or golden pairs. Fields: file, name, limit, actual."""


class Misconfigured(ServerFault):
    """Settings exclude each other, or this machine cannot follow them. Fields: setting, value, remedy."""


class EngineUnavailable(ServerFault):
    """An engine or provider does not run here. Fields: engine, provider, precision, graph, allowed."""


class TuningTooNoisy(ServerFault):
    """Measurements differ too much between rounds to be stored. Fields: limit, actual, graph."""


class InferenceFailed(ServerFault):
    """An engine failed while serving."""


class StoreBroken(ServerFault):
    """The jobs folder is in use, damaged or not writable. Fields: setting, value."""


def all_codes() -> dict[str, type[UnetppError]]:
    """Returns every error by code, in the order of the tree: what a manual must explain."""
    rows, queue = {}, [UnetppError]
    while queue:
        error = queue.pop(0)
        rows[error.code] = error
        queue = [child for child in error.__subclasses__() if child.__module__ == __name__] + queue
    return rows


def shutting_down() -> NotReady:
    """The error of work that a server which shuts down does not begin, or not finish."""
    return NotReady("the server is shutting down; try again in a moment")
