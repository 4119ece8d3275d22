"""The report of a run: what was asked of which network, and what came of every input. It is also what a run goes on from."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.inputs import Input, InputError, shown

FORMAT = "unetpp.run/1"

# Of thousands of inputs the report is large: it is written this often at most, and at the end. What a power cut takes is done again.
EVERY_S = 1.0

# What must be the same for an answer to be the same.
SAME = ("version", "options", "model")


@dataclass
class Journal:
    """A report that grows.

    Attributes:
        path: of the file; without one nothing is written.
        head: version, options, model and so on.
        entries: by input.
    """

    path: Path | None
    head: dict[str, Any]
    entries: dict[Input, dict[str, Any]] = field(default_factory=dict)
    _written: float = 0.0

    def name(self, path: Path) -> str:
        """A path as the report has it: seen from the report's own folder, so that both can be moved together."""
        return shown(path if self.path is None else Path(os.path.relpath(path.absolute(), self.path.absolute().parent)))

    def place(self, name: str) -> Path:
        """The path of a name."""
        return Path(name) if self.path is None else self.path.parent / name

    def begin(self, inputs: Iterable[Input], before: dict[str, Any]) -> None:
        """Lists all inputs, with what the report of before says of them if it was the same run.

        Args:
            inputs: of this run.
            before: the report of before, or {}.
        """
        same = all(before.get(key) == self.head[key] for key in SAME)
        known = {entry["path"]: entry for entry in before.get("inputs", [])} if same else {}
        for one in inputs:
            name = self.name(one.path)
            self.entries[one] = known.get(name, {"path": name, "status": "pending"})
        self.write(force=True)

    def is_complete(self, one: Input, digest: str, reference: str | None) -> bool:
        """Whether the answer to these very bytes was written, and is there as it was written."""
        entry = self.entries[one]
        if entry["status"] != "done" or entry.get("sha256") != digest or entry.get("reference_sha256") != reference:
            return False
        return all(self._is_there(output) for output in entry["outputs"])

    def _is_there(self, output: dict[str, Any]) -> bool:
        path = self.place(output["path"])
        return path.is_file() and path.stat().st_size == output["bytes"] and sha256(path) == output["sha256"]

    def set(self, one: Input, **entry: Any) -> None:
        """What came of an input."""
        self.entries[one] = {"path": self.name(one.path)} | {key: value for key, value in entry.items() if value is not None}
        self.write()

    def write(self, *, force: bool = False) -> None:
        """The file as a whole, or not at all."""
        if self.path is None or (not force and time.monotonic() - self._written < EVERY_S):
            return
        document = {"format": FORMAT, **self.head, "written": now(), "inputs": list(self.entries.values())}
        write(self.path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
        self._written = time.monotonic()


def read(path: Path) -> dict[str, Any]:
    """A report; {} where there is none yet.

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
        raise InputError(f"{path} is there and is no report of unetpp segment; it is left as it is, name another")
    return document


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def sha256(path: Path) -> str:
    """Hash of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, data: bytes) -> None:
    """Writes a file that is there as a whole, or as it was before."""
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        # Ctrl-C leaves nothing half-written.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
