"""Bundles that a test may damage."""

import json
from pathlib import Path

from server.runtime.bundle import FileEntry, sha256


def rewrite_hashes(folder: Path) -> None:
    """Makes the manifest agree with the files as they are, as a forger would."""
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    for name in document["files"]:
        file = folder / name
        document["files"][name] = FileEntry(sha256=sha256(file), bytes=file.stat().st_size).model_dump()
    path.write_text(json.dumps(document))
