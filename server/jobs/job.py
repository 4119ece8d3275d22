"""A job as it is kept: what was asked, how far it came, and what there is to fetch."""

import json
import sqlite3
from dataclasses import dataclass
from typing import Any

FINISHED = ("done", "failed", "cancelled")


@dataclass(frozen=True)
class Ticket:
    """What was accepted.

    Attributes:
        request: the fields of the `SegmentRequest`.
        preview: whether a quick look comes first.
        model: of the route that the request was resolved to, as are mode, level and precision.
        windows: of the asked-for level.
        seconds: the whole job's estimate.
    """

    request: dict[str, Any]
    preview: bool
    model: str
    mode: str
    level: int
    precision: str
    windows: int
    seconds: float


@dataclass(frozen=True)
class Job:
    """One row. Times are seconds since 1970.

    Attributes:
        attempts: how many lives of the server began with it and did not end in good order.
        preview: headers of the answer that serves the kept file; as of `result`.
        problem: why it failed.
    """

    id: str
    state: str
    attempts: int
    created: float
    ticket: Ticket
    started: float | None = None
    finished: float | None = None
    preview: dict[str, str] | None = None
    result: dict[str, str] | None = None
    problem: dict[str, Any] | None = None


def read(row: sqlite3.Row) -> Job:
    """A row of the table."""
    preview, result, problem = (row[name] and json.loads(row[name]) for name in ("preview", "result", "problem"))
    return Job(
        row["id"], row["state"], row["attempts"], row["created"], Ticket(**json.loads(row["ticket"])), row["started"], row["finished"],
        preview, result, problem,
    )  # fmt: skip
