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
class Served:
    """How a kept file is answered."""

    media_type: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Job:
    """One row. Times are seconds since 1970; `attempts` counts runs that were started and not ended in good order."""

    id: str
    state: str
    attempts: int
    created: float
    started: float | None
    finished: float | None
    ticket: Ticket
    preview: Served | None
    result: Served | None
    problem: dict[str, Any] | None


def read(row: sqlite3.Row) -> Job:
    """A row of the table."""
    preview, result, problem = (row[name] and json.loads(row[name]) for name in ("preview", "result", "problem"))
    return Job(
        row["id"], row["state"], row["attempts"], row["created"], row["started"], row["finished"],
        Ticket(**json.loads(row["ticket"])), Served(**preview) if preview else None, Served(**result) if result else None, problem,
    )  # fmt: skip
