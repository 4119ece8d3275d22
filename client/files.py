"""Files of this machine: hashes, atomic writes, printable names."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a hidden file that replaces `path` when the block succeeds, and is removed when the block fails."""
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        # Also after Ctrl-C: nothing half-written is left behind.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Computes the hash of a file, block by block."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_zip(path: Path) -> bool:
    """Tells a zip by its first bytes, as the server does; False where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:
        return False


def printable(path: Path) -> str:
    """Formats a path as text; bytes of its name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
