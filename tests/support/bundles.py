"""Bundles that a test may damage."""

import json
from pathlib import Path
from typing import Any

from server.runtime.bundle import FileEntry, sha256
from tests.support.service import manifest


def rewrite_hashes(folder: Path) -> None:
    """Makes the manifest agree with the files as they are, as a forger would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    for name in document["files"]:
        file = folder / name
        document["files"][name] = FileEntry(sha256=sha256(file), bytes=file.stat().st_size).model_dump()
    path.write_text(json.dumps(document))


def write_nonsense_bundle(folder: Path, **changes: Any) -> Path:
    """A bundle whose manifest and hashes are right, and whose other files are nonsense; `changes` are of the manifest."""
    folder.mkdir(parents=True)
    made = manifest(**changes)
    for name in made.files:
        (folder / name).write_bytes(name.encode() * 50)
    (folder / "manifest.json").write_text(made.model_dump_json(exclude_none=True))
    rewrite_hashes(folder)
    return folder
