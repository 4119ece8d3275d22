"""All errors, free of HTTP; `api/problems.py` maps them to statuses in one table.

UnetppError
├── CallerError   the caller can fix it: Unreadable, UnsupportedType, TooLarge, HeadTooLarge, UploadStalled,
│                 Unauthorized, OtherSite, UnknownFormat, InvalidParameter, InvalidInferRequest,
│                 DeadlineTooShort, UnknownModel, UnknownJob, UnknownUpload, ReloadFailed, NotFinished,
│                 Unimplemented, PacsRefused
├── TryAgain      the same request may succeed later: ReloadRunning, Overloaded, DeadlinePassed, NotReady,
│                 StoreFull, DiskFull, StoreUnavailable, Interrupted, PacsUnavailable
└── ServerFault   the operator, or we, must fix it: BundleDamaged, Misconfigured, EngineUnavailable,
                  TuningTooNoisy, InferenceFailed, StoreBroken

The docstring of each class is its entry in the manual and on the server's page /errors: the cause, the
remedy, and the fields that it may have.
"""

import errno
import re
from typing import Any, ClassVar


class UnetppError(Exception):
    """Base of all errors.

    Args:
        detail: one or two sentences for a person: what is wrong, the value and the limit, the remedy.
        fields: facts of the detail, for a program; None values are left out. They become members of the
            problem document, and tests assert them. The usual names are `parameter`, `value`, `allowed`
            (values that exist), `limit`, `actual`, `unit`, `setting` (the one that raises the limit) and
            `remedy`.

    Attributes:
        code: class name in lower case with dashes, e.g. "too-large".
        fields: fields that have a value.
        refusal: value of the label `reason` under which `unetpp_refusals` counts it; "" where it is not
            counted.
    """

    code: ClassVar[str] = "unetpp-error"
    refusal = ""

    def __init_subclass__(cls) -> None:
        """Derives the code from the name, unless the class states one; a private class keeps that of its base."""
        super().__init_subclass__()
        if "code" not in vars(cls) and not cls.__name__.startswith("_"):
            cls.code = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    def __init__(self, detail: str, **fields: Any) -> None:
        super().__init__(detail)
        self.fields = {name: value for name, value in fields.items() if value is not None}


class CallerError(UnetppError):
    """The caller can fix it."""


class Unreadable(CallerError):
    """A file of a known format cannot be decoded.

    It is cut off, damaged, or holds what is not supported: a compression, a data type, a reference on another
    grid.
    Remedy: Open the file in another program and save it again. `detail` names the field or the byte where
    reading ended.
    Fields: reason, format, field, value, allowed, limit, actual, total, unit, parameter, part, file, remedy
    """


class UnsupportedType(CallerError):
    """The file has a format that is not read here.

    The `Content-Type` names another one, or the first bytes of the file are of no known format.
    Remedy: Convert the file to one of the formats in `allowed`. Send `application/octet-stream`, or no
    `Content-Type`, to have the format found from the file itself.
    Fields: parameter, value, allowed, remedy
    """


class TooLarge(CallerError):
    """A size is over a limit.

    Limits are on the bytes of the body, pixels, voxels, files of a zip, estimated memory and predicted time.
    Remedy: Send a smaller input, e.g. a crop or fewer files. Where `setting` is given, the operator can raise
    that limit.
    Fields: limit, actual, unit, setting, format, field, remedy
    """

    refusal = "too_large"


class HeadTooLarge(TooLarge):
    """Path, query and headers are too long or too many.

    Remedy: Send fewer or shorter headers and a shorter query.
    Fields: limit, actual, unit
    """


class UploadStalled(CallerError):
    """The body stopped coming, or comes too slowly.

    Remedy: Send the request again over a faster or steadier connection.
    Fields: limit, unit, min_bytes_per_s
    """


class Unauthorized(CallerError):
    """The request has no API key, or an unknown one.

    Remedy: Send a key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. The operator makes keys with
    `unetpp key NAME`.
    Fields: allowed
    """


class OtherSite(CallerError):
    """A browser sends the request for a page of another site.

    That page could use the server without its user's knowledge.
    Remedy: Send the request from a program, or from a page of this server. A proxy in front must pass on the
    `Host` header.
    """


class UnknownFormat(CallerError):
    """The output format does not exist, or not for this input.

    `format` names it, or `Accept` allows no other.
    Remedy: Choose one of `allowed`.
    Fields: parameter, value, allowed, remedy
    """


class InvalidParameter(CallerError):
    """A parameter of the request is wrong.

    It does not exist, has a wrong value, is given twice, or does not go with another one or with the input.
    Remedy: Correct the parameter that `parameter` names; `allowed` or `limit` has what is accepted.
    Fields: parameter, value, allowed, limit, actual, unit, format, kind, channels, setting, remedy
    """


class InvalidInferRequest(CallerError):
    """A request of the Open Inference Protocol is not as the protocol or the model's metadata say.

    The JSON is broken, a tensor has another shape or data type, or its bytes are more or fewer than its shape says.
    Remedy: Compare the request with `GET /v2/models/NAME`. `parameter` names the member that is wrong.
    Fields: parameter, value, allowed, limit, actual
    """


class DeadlineTooShort(CallerError):
    """The work alone takes longer than the deadline allows.

    An idle server would miss it, too.
    Remedy: Allow more time, ask for a shallower level, allow one with `min_level`, send a smaller input, or
    use `POST /jobs`.
    Fields: limit, actual, unit, remedy
    """


class UnknownModel(CallerError):
    """The bundle is not served.

    Remedy: Choose a name from `GET /models`.
    Fields: parameter, setting, value, allowed
    """


class UnknownJob(CallerError):
    """The job was never accepted, was deleted or has expired.

    Remedy: Check the id. Results are removed after `UNETPP_JOBS__KEEP_RESULTS_H` hours: send the input again.
    Fields: parameter, value, limit, unit
    """


class UnknownUpload(CallerError):
    """A client of MONAI Label names a session or an image that is not kept here, or not any more.

    Remedy: Upload the image again. It is kept for `UNETPP_MONAI_LABEL__KEEP_UPLOADS_H` hours after its last use.
    Fields: parameter, value, limit, unit
    """


class ReloadFailed(CallerError):
    """The bundles on disk cannot be served, and the old ones stay in service.

    One is damaged or misses its golden pair, or the default model is gone.
    Remedy: Correct the bundle that `detail` names and reload again.
    Fields: those of the cause, for the operator
    """


class NotFinished(CallerError):
    """The job has no result, or none yet.

    It is queued or running, was cancelled, or makes no preview.
    Remedy: Wait for `Retry-After`, or follow `GET /jobs/ID/events`. Without `Retry-After` there will be no
    file: `detail` has the reason.
    Fields: state, position, done, total, parameter, remedy

    Args:
        detail: sentence for a person.
        retry_after_s: seconds after which to ask again; None where there will be no result.
        fields: state.
    """

    def __init__(self, detail: str, retry_after_s: int | None = None, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retry_after_s = retry_after_s


class Unimplemented(CallerError):
    """A client of another protocol calls a part of it that is not here.

    Of MONAI Label annotation, training and the datastore; of the Open Inference Protocol shared memory, loading of models,
    and settings of traces and logs.
    Remedy: Use the models for automatic segmentation; `GET /info/` lists them for MONAI Label, `GET /v2` what there is of the
    other.
    Fields: value
    """


class PacsRefused(CallerError):
    """A PACS does not give or take what a job needs of it.

    It does not know the study or series, does not accept the server's credentials, or refuses the segmentation.
    Remedy: Check the UIDs of `source`. Where the PACS answered 401 or 403, the operator corrects its credentials. Then
    send the job again.
    Fields: value, actual, remedy
    """


class TryAgain(UnetppError):
    """The request may succeed later.

    Args:
        detail: sentence for a person.
        retry_after_s: seconds to wait first, for the header Retry-After.
        fields: facts for a program.
    """

    def __init__(self, detail: str, retry_after_s: int = 1, **fields: Any) -> None:
        super().__init__(detail, **fields)
        self.retry_after_s = retry_after_s


class ReloadRunning(TryAgain):
    """Another reload is running.

    Remedy: Wait until it has ended, then reload again.
    """


class Overloaded(TryAgain):
    """Too many requests came at once.

    Requests, uploads, jobs or event streams are limited, and so is the predicted wait of a request.
    Remedy: Send the request again after the seconds in `Retry-After`. Or allow a shallower level with
    `min_level`, or use `POST /jobs`.
    Fields: limit, actual, unit, setting, remedy

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
    """The request's time was up before its response was ready.

    The time is `deadline_ms`, or the header `X-Deadline-Ms`. The rest of the work was not begun.
    Remedy: Do not repeat the request unchanged. Allow more time, a shallower level with `min_level`, or use
    `POST /jobs`. `Retry-After` is 1 s and promises nothing about the time that the work needs.
    Fields: limit, unit, remedy
    """


class NotReady(TryAgain):
    """The server is starting or stopping, or its device does not answer.

    Remedy: Send the request again after `Retry-After`, or to another server. Where it does not end, the
    operator finds the reason in the log.
    """

    refusal = "stopping"


class StoreFull(TryAgain):
    """The disk space for jobs and results is used up.

    Inputs and results of jobs, and images of sessions, take `UNETPP_JOBS__MAX_DISK_MB`, or the disk itself is full.
    Remedy: Delete jobs that are done with `DELETE /jobs/ID`, or send the request again after `Retry-After`.
    The operator can raise the limit.
    Fields: limit, actual, unit, setting
    """


class DiskFull(TryAgain):
    """The disk of this server has no room for the temporary files of a request.

    Large bodies and answers wait on the disk, in the folder that `TMPDIR` names.
    Remedy: Send the request again after `Retry-After`; of several servers another one may take it. The operator makes
    room.
    """


class StoreUnavailable(TryAgain):
    """The database or the bucket of jobs does not answer.

    Jobs that were accepted are not lost; those that run go on, and are kept when it answers again. Requests to
    `POST /segment` do not need it.
    Remedy: Send the request again after `Retry-After`. If it lasts, the operator sees with `unetpp doctor` which of
    them is away.
    Fields: setting
    """


class Interrupted(TryAgain):
    """A job was started several times and never ended.

    The server ended during each attempt, perhaps because of this job.
    Remedy: Send a smaller input, and ask the operator to look into the log of the server.
    Fields: limit, actual, unit
    """


class PacsUnavailable(TryAgain):
    """A PACS did not answer, or not in full, until the server gave up.

    It is tried again for `UNETPP_DICOM__RETRY_H` hours, with pauses that grow to some minutes.
    Remedy: See that the PACS runs and that the server reaches it, then send the job again.
    Fields: value, actual, limit, unit, setting
    """


class ServerFault(UnetppError):
    """The operator or the developers must fix the cause. Its details are not sent to callers."""


class BundleDamaged(ServerFault):
    """A bundle cannot be read, or fails its hashes or golden pairs.

    Remedy: Copy the bundle again, or export it again. `unetpp verify BUNDLE` checks every file and graph.
    Fields: file, name, graph, parameter, setting, limit, actual
    """


class Misconfigured(ServerFault):
    """Settings exclude each other, or this machine cannot follow them.

    The server does not start.
    Remedy: Change the setting that `setting` names, as `detail` says.
    Fields: setting, parameter, value, line, remedy
    """


class EngineUnavailable(ServerFault):
    """An engine or provider does not run here.

    A setting names it and it is not installed, or the device does not work.
    Remedy: Install the extra that `detail` names, or set `UNETPP_RUNTIME__ENGINE` and
    `UNETPP_RUNTIME__PROVIDER` to `auto`.
    Fields: engine, engines, provider, precision, graph, allowed
    """


class TuningTooNoisy(ServerFault):
    """Measurements differ too much between rounds to be stored.

    The machine was busy. Nothing is stored.
    Remedy: Stop other work on the machine, the server included, and tune again.
    Fields: limit, actual, graph
    """


class InferenceFailed(ServerFault):
    """An engine failed while serving.

    The log has its message under the id of the request.
    Remedy: Send the request again once. If it fails again, restart the server and report the message of the
    log.
    """


class StoreBroken(ServerFault):
    """The jobs folder is in use, damaged or not writable.

    Remedy: Give each server a `UNETPP_JOBS__FOLDER` of its own that it may write to. Move a damaged folder
    away.
    Fields: setting, value, actual, allowed
    """


def disk_full(error: BaseException) -> DiskFull | None:
    """The error for one of the operating system that says that a disk is full; None for any other."""
    if not isinstance(error, OSError) or error.errno not in {errno.ENOSPC, errno.EDQUOT}:
        return None
    return DiskFull(
        "the disk of this server is full, so that it has no room for the temporary files of this request; try again, or send less at once",
        retry_after_s=1,
    )


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
