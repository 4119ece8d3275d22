"""The report of a run: what was requested of which model, and the outcome of every input. A later run resumes from it."""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.errors import InputError
from client.files import printable, replacing, sha256
from client.inputs import Input

FORMAT = "unetpp.run/1"

# The report of thousands of inputs is large, so it is written this often at most, and at the end.
INTERVAL_S = 1.0

# Members of the head that must be equal for an earlier answer to be valid.
SAME = ("version", "options", "model")


@dataclass
class Report:
    """A report that is written while the run goes on.

    Attributes:
        path: path of the file; without one nothing is written.
        head: version, options, model, server and start.
        entries: outcome by input.
    """

    path: Path | None
    head: dict[str, Any]
    entries: dict[Input, dict[str, Any]] = field(default_factory=dict)
    _written: float = 0.0

    def relative(self, path: Path) -> str:
        """Formats a path relative to the report, so that both can be moved together."""
        home = self.path.absolute().parent if self.path else None
        return printable(Path(os.path.relpath(path.absolute(), home)) if home else path)

    def begin(self, inputs: Iterable[Input], before: dict[str, Any]) -> None:
        """Lists all inputs, with the entries of the report `before` if it is one of the same run."""
        same = all(before.get(key) == self.head[key] for key in SAME)
        known = {entry["path"]: entry for entry in before.get("inputs", [])} if same else {}
        for one in inputs:
            name = self.relative(one.path)
            self.entries[one] = known.get(name, {"path": name, "status": "pending"})
        self.write(force=True)

    def is_complete(self, one: Input, digest: str, reference_digest: str | None) -> bool:
        """Whether the answer to these bytes was written and is still there, unchanged."""
        entry = self.entries[one]
        digests = (entry.get("sha256"), entry.get("reference_sha256"))
        if entry["status"] != "done" or digests != (digest, reference_digest):
            return False
        folder = self.path.parent if self.path else Path()
        return all(
            (path := folder / output["path"]).is_file() and sha256(path) == output["sha256"]
            for output in entry["outputs"]
        )

    def update(self, one: Input, **entry: Any) -> None:
        """Replaces the entry of an input; None values are left out."""
        known = {key: value for key, value in entry.items() if value is not None}
        self.entries[one] = {"path": self.relative(one.path)} | known
        self.write()

    def write(self, *, force: bool = False) -> None:
        """Writes the file atomically, unless it was written just now."""
        if self.path is None or (not force and time.monotonic() - self._written < INTERVAL_S):
            return
        document = {"format": FORMAT, **self.head, "written": now(), "inputs": list(self.entries.values())}
        with replacing(self.path) as file:
            file.write((json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        self._written = time.monotonic()


def read_report(path: Path) -> dict[str, Any]:
    """Reads a report; {} where there is none yet.

    Raises:
        InputError: the file is something else.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f"{path} exists and is not a report of unetpp segment; name another file")
    return document


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
