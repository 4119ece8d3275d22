"""A job as it is kept: what was requested, how far it is, and what there is to fetch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

# The files of a job that are needed in each state; all others are removed when it gets there.
FILES = {
    "queued": {"input", "reference", "preview"},
    "running": {"input", "reference", "preview"},
    "done": {"preview", "result"},
    "failed": set[str](),
    "cancelled": set[str](),
}

FINISHED = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class JobSpec:
    """An accepted request. It is kept as JSON, so that fields may be added but not renamed.

    Attributes:
        request: fields of `SegmentParams`, and `name` and `accept` of the `Upload`.
        preview: True if a mask of level 1 comes first.
        model: name of the model that the request resolved to.
        mode: mode of the resolved request.
        level: level of the resolved request.
        precision: precision of the resolved request.
        windows: windows at that level.
        seconds: estimated seconds of the whole job.
        source: series of a PACS that is the input, "NAME/STUDY[/SERIES]"; None where the input was sent.
        destination: PACS that the result is sent to, a name of DICOMweb or "AET@host:port"; None without one.
    """

    request: dict[str, Any]
    preview: bool
    model: str
    mode: str
    level: int
    precision: str
    windows: int
    seconds: float
    source: str | None = None
    destination: str | None = None


@dataclass(frozen=True)
class Job:
    """One row of the table. Times are seconds since 1970.

    Attributes:
        id: 32 hexadecimal digits, which only the owner knows.
        state: queued, running, done, failed or cancelled.
        attempts: runs of the server that began with the job and did not end in good order.
        created: time of acceptance.
        spec: accepted request.
        started: time of the last start; None while it waits.
        finished: time of the end; None before.
        preview: headers of the response that serves the preview; None without one.
        result: headers of the response that serves the result; None without one. A job that still has to send
            its result has them, too.
        problem: problem document of a failed job.
        files: names under which files are kept, where these are others than `FILES` says.
    """

    id: str
    state: str
    attempts: int
    created: float
    spec: JobSpec
    started: float | None = None
    finished: float | None = None
    preview: dict[str, str] | None = None
    result: dict[str, str] | None = None
    problem: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)


class LeaseLost(Exception):
    """Another server has the job now, or it was removed; nothing more of this attempt may be kept."""


@dataclass(frozen=True)
class SharedJob(Job):
    """A job of a store that several servers share.

    Attributes:
        lease: number that grows each time that a server takes the job; only the last one may change it.
        postponed: times that it was postponed in a row.
        sizes: bytes of its files by `files`' keys.
        stage: stage as its server reported it last.
        done: windows that are done.
        total: windows in all.
        eta_s: seconds of work left in it.
        position: place among the jobs that wait; None unless it waits.
        ahead_s: estimated seconds of all work before it.
        running: jobs that run on all servers.
    """

    lease: int = 0
    postponed: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    stage: str | None = None
    done: int = 0
    total: int = 0
    eta_s: float = 0.0
    position: int | None = None
    ahead_s: float = 0.0
    running: int = 0


TICKET = {one.name for one in fields(JobSpec)}


def job_from_row(row: Mapping[str, Any]) -> Job:
    """Makes a job of a row of the table."""
    preview, result, problem = (
        row[name] and json.loads(row[name]) for name in ("preview", "result", "problem")
    )
    if problem:
        # Problem documents of earlier versions have no code, or the type "urn:unetpp:CODE".
        problem.setdefault("code", problem["type"].rpartition(":")[2])
        problem["type"] = problem["type"].replace("urn:unetpp:", "/errors#")
    # The column is called ticket since the first version of the table.
    # Of a job that a later version accepted it may have fields that this one does not know.
    ticket = {name: value for name, value in json.loads(row["ticket"]).items() if name in TICKET}
    spec = JobSpec(**ticket)
    times = row["started"], row["finished"]
    return Job(
        row["id"], row["state"], row["attempts"], row["created"], spec, *times, preview, result, problem
    )


def needed_files(job: Job) -> set[str]:
    """The files of a job that it needs; a result also before the end, where it must still be sent."""
    return FILES[job.state] | ({"result"} if job.result else set())
