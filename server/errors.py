"""Everything that can go wrong, free of HTTP; `api/problems.py` maps it to statuses once.

UnetppError
├── CallerError               the caller can fix it
│   ├── Unreadable            the file is of a known kind but broken
│   ├── UnsupportedType       not a kind of file that is read here
│   ├── TooLarge              over a limit; says the limit and the size
│   ├── HeadTooLarge          headers or the path, and their number
│   ├── UploadStalled         the body stopped coming, or trickles
│   ├── Unauthorized          no API key, or none that is known
│   ├── OtherSite             a browser sends it for a page of another site
│   ├── UnknownFormat         no such output format
│   ├── InvalidParameter      mode, level, precision, reference, ...
│   ├── DeadlineTooShort      even an idle server could not meet it
│   ├── UnknownModel          no such bundle is open
│   ├── UnknownJob            never accepted, deleted or expired
│   ├── ReloadFailed          the operator's bundles cannot be opened; the old ones are served
│   └── NotFinished           the job has no result (yet)
├── TryAgain                  the caller can try again later
│   ├── ReloadRunning         another reload is not done
│   ├── Overloaded            too many requests at once
│   ├── DeadlinePassed        the request's time was up before its answer was there
│   ├── NotReady              starting or shutting down
│   ├── StoreFull             no disk space for jobs and results
│   └── Interrupted           a job that the server never got to finish
└── ServerFault               we, or the operator, must fix it
    ├── BundleDamaged         refuse to start; names the file
    ├── Misconfigured         settings with which the server must not or cannot listen
    ├── EngineUnavailable     a configured engine or provider cannot run here
    ├── TuningTooNoisy        measurements that differ too much to be stored
    ├── InferenceFailed       details are logged, never sent
    └── StoreBroken           the folder of the jobs is in use, damaged or not writable
"""

import re
from typing import Any, ClassVar


class UnetppError(Exception):
    """Base of all errors.

    Args:
        detail: one or two sentences for a person: what is wrong, the value and the limit, the remedy.
        fields: the same facts for a program. They become members of the problem document, and tests assert them. The usual names are
            `parameter`, `value`, `allowed` (what exists), `limit`, `actual`, `unit`, `setting` (that raises the limit) and `remedy`.

    Attributes:
        code: the class name in lower case with dashes, e.g. "too-large".
        fields: see above.
        refusal: label under which the metrics count a request that it turns away; "" where none counts it.
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
    """A file of a known kind that cannot be decoded."""


class UnsupportedType(CallerError):
    """Not a kind of file that this server reads."""


class TooLarge(CallerError):
    """Over a limit."""

    refusal = "too_large"


class HeadTooLarge(TooLarge):
    """The path with its query and the headers are too long, or too many."""


class UploadStalled(CallerError):
    """The body stopped coming, or trickles."""


class Unauthorized(CallerError):
    """No API key, or none that is known."""


class OtherSite(CallerError):
    """A browser sends it for a page of another site."""


class UnknownFormat(CallerError):
    """No such output format."""


class InvalidParameter(CallerError):
    """A parameter of the request is wrong."""


class DeadlineTooShort(CallerError):
    """The work alone takes longer than the caller has time for."""


class UnknownModel(CallerError):
    """No such bundle is open."""


class UnknownJob(CallerError):
    """Never accepted, deleted or expired."""


class ReloadFailed(CallerError):
    """The bundles on disk cannot be opened, and whoever operates the server is told why; what was open still is."""


class NotFinished(CallerError):
    """The job has no result, or none yet.

    Attributes:
        retry_after_s: when asking again makes sense; None if never.
    """

    def __init__(self, detail: str, retry_after_s: int | None = None, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retry_after_s = retry_after_s


class TryAgain(UnetppError):
    """The same request may succeed later.

    Attributes:
        retry_after_s: seconds to wait first.
    """

    def __init__(self, detail: str, retry_after_s: int = 1, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retry_after_s = retry_after_s


class ReloadRunning(TryAgain):
    """Another reload is not done."""


class Overloaded(TryAgain):
    """Too many requests at once."""

    def __init__(self, detail: str, retry_after_s: int = 1, refusal: str = "wait", **fields: Any) -> None:
        super().__init__(detail, retry_after_s, **fields)
        self.refusal = refusal


class DeadlinePassed(TryAgain):
    """The caller's time was up before the answer was there."""


class NotReady(TryAgain):
    """Starting or shutting down."""

    refusal = "stopping"


class StoreFull(TryAgain):
    """No disk space for jobs and results."""


class Interrupted(TryAgain):
    """A job that was started again and again and never got to its end."""


class ServerFault(UnetppError):
    """We or the operator must fix it."""


class BundleDamaged(ServerFault):
    """A bundle cannot be read, fails its hashes or its golden pairs."""


class Misconfigured(ServerFault):
    """Settings with which the server must not or cannot listen; names the setting."""


class EngineUnavailable(ServerFault):
    """A configured engine or provider cannot run on this machine."""


class TuningTooNoisy(ServerFault):
    """Measurements differ too much between rounds to be stored."""


class InferenceFailed(ServerFault):
    """An engine raised while running a batch."""


class StoreBroken(ServerFault):
    """The folder of the jobs is in use, damaged or not writable."""
