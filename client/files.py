"""Files of this machine: hashes, atomic writes, printable names."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast


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
    """Computes the hash of a file, block by block, or of the hashes of a series in a folder."""
    if path.is_dir():
        return hashlib.sha256("".join(sorted(map(sha256, series_files(path)))).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_zip(path: Path) -> bool:
    """Tells a zip by its first bytes, as the server does; False where the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:
        return False


def byte_size(path: Path) -> int:
    """Returns the bytes of a file, or of a series in a folder."""
    return sum(file.stat().st_size for file in series_files(path)) if path.is_dir() else path.stat().st_size


def is_archive(path: Path) -> bool:
    """Tells a zip of images, which has many answers, from one of a DICOM series, which has one."""
    return is_zip(path) and not _holds_dicom(path)


def is_dicom(head: bytes) -> bool:
    """Tells DICOM by the bytes behind its preamble."""
    return head[128:132] == b"DICM"


def series_files(folder: Path) -> list[Path]:
    """Lists the DICOM files in a folder, without its directory (DICOMDIR), in the order of their names."""
    return [path for path in sorted(folder.iterdir()) if is_dicom_file(path)]


def is_dicom_file(path: Path) -> bool:
    """Tells a DICOM instance; False for hidden files and where the file cannot be read."""
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(132))
    except OSError:
        return False


def zip_series(folder: Path) -> BinaryIO:
    """Packs the DICOM files in a folder into a temporary zip, without their names, which may be those of patients."""
    packed = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - closed by whom it is returned to
    with zipfile.ZipFile(packed, "w") as archive:
        for number, path in enumerate(series_files(folder)):
            archive.write(path, f"{number:05}")
    packed.seek(0)
    return packed


def _holds_dicom(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(is_dicom(archive.open(info).read(132)) for info in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, OSError):
        return False


def printable(path: Path) -> str:
    """Formats a path as text; bytes of its name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
