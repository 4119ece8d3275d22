"""Files of jobs, one folder each.

A file is written as `.part`, synced and renamed, so that none is ever there by half.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from server.errors import StoreBroken, StoreFull
from server.settings import JobsSettings

log = logging.getLogger(__name__)

# Only folders of this form are removed, because the operator may name a folder with other contents.
ID = re.compile("[0-9a-f]{32}")

COPY_BYTES = 1024 * 1024
RETRY_FULL_S = 60


class Files:
    """The folders of the jobs, and the bytes in them. Calls may come from any thread.

    Args:
        settings: folder and quota.

    Attributes:
        used_bytes: bytes of all files.
    """

    def __init__(self, settings: JobsSettings) -> None:
        self._settings = settings
        self._folder = settings.folder
        self._sums = threading.Lock()  # of the three below: never held while waiting for the disk
        self._sizes: dict[str, int] = {}
        self.used_bytes = 0
        self._reserved = 0

    def path(self, id_: str, name: str) -> Path:
        """The path of a job's file."""
        return self._folder / id_ / name

    def ids(self) -> list[str]:
        """The ids of all folders."""
        return [path.name for path in self._folder.iterdir() if ID.fullmatch(path.name) and path.is_dir()]

    def has(self, id_: str, name: str) -> bool:
        """Whether a job has a file."""
        with self.disk():
            return self.path(id_, name).exists()

    def open(self, id_: str, name: str) -> BinaryIO:
        """Opens a job's file.

        Raises:
            FileNotFoundError: it is gone, and will not come back.
            StoreFull, StoreBroken: the disk fails, perhaps for a while.
        """
        with self.disk(), contextlib.suppress(FileNotFoundError):
            return self.path(id_, name).open("rb")
        raise FileNotFoundError(f"the {name} of job {short_id(id_)} is gone")

    def inputs(self, id_: str, stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO | None]:
        """Opens a job's input and reference, which `stack` closes.

        Raises:
            FileNotFoundError: the input is gone, and will not come back.
            StoreFull, StoreBroken: the disk fails, perhaps for a while.
        """
        path, reference = self.path(id_, "input"), self.path(id_, "reference")
        # Cancelling the job may remove them at any moment.
        with self.disk(), contextlib.suppress(FileNotFoundError):
            file = stack.enter_context(path.open("rb"))
            return file, stack.enter_context(reference.open("rb")) if reference.exists() else None
        raise FileNotFoundError(f"the input of job {short_id(id_)} is gone")

    def write(self, id_: str, name: str, source: BinaryIO) -> None:
        """Writes a file, which is whole and on the disk when this returns; the quota is for uploads only.

        Raises:
            StoreFull, StoreBroken: nothing was written.
        """
        path = self.path(id_, name)
        part = path.with_name(f"{name}.part")
        source.seek(0)
        with self.disk():
            path.parent.mkdir(exist_ok=True, mode=0o700)
            try:
                with part.open("wb") as file:
                    shutil.copyfileobj(source, file, COPY_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
            for folder in (path.parent, self._folder):
                _sync(folder)
        self._account(id_)

    def keep_only(self, id_: str, names: Collection[str]) -> None:
        """Removes all other files of a job.

        Never raises, because the row is what counts and the next start tries again.
        """
        folder = self._folder / id_
        try:
            for path in folder.iterdir() if names else ():
                if path.name not in names:
                    path.unlink()
            if not names:
                shutil.rmtree(folder)
        except FileNotFoundError:
            pass
        except OSError:
            log.exception(
                "files of job %s could not be removed; the next start of the server tries again",
                short_id(id_),
            )
        self._account(id_)

    def discard(self, id_: str) -> None:
        """Removes a job's folder. Never raises."""
        self.keep_only(id_, ())

    @contextlib.contextmanager
    def reserve(self) -> Iterator[Callable[[int], None]]:
        """Reserves room for an upload; the yielded function adds bytes.

        Raises:
            StoreFull: the quota is exceeded, raised by that function; or the disk is full, wherever the block
                writes.
        """
        reserved = 0

        def add(size: int) -> None:
            nonlocal reserved
            limit_mb = self._settings.max_disk_mb
            with self._sums:
                actual = self.used_bytes + self._reserved + size
                if actual > limit_mb * 1024 * 1024:
                    raise StoreFull(
                        f"the disk space for jobs is used up ({limit_mb:,} MiB); finished jobs make room after "
                        f"{self._settings.keep_results_h:g} hours, or when they are deleted; or raise "
                        "UNETPP_JOBS__MAX_DISK_MB",
                        retry_after_s=RETRY_FULL_S,
                        limit=limit_mb * 1024 * 1024,
                        actual=actual,
                        unit="bytes",
                        setting="UNETPP_JOBS__MAX_DISK_MB",
                    )
                self._reserved += size
            reserved += size

        try:
            with self.disk():
                yield add
        finally:
            with self._sums:
                self._reserved -= reserved

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """Translates errors of the disk and the database.

        Raises:
            StoreFull: the disk is full.
            StoreBroken: the folder or the database cannot be used.
        """
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            code = error.errno if isinstance(error, OSError) else getattr(error, "sqlite_errorname", None)
            if code in (errno.ENOSPC, errno.EDQUOT, "SQLITE_FULL"):
                raise StoreFull(
                    "the disk of the server is full; try again later", retry_after_s=RETRY_FULL_S
                ) from error
            raise StoreBroken(
                f"the jobs folder {self._folder} cannot be used ({error}); make it writable, or move it away if it is damaged, or "
                "name another with UNETPP_JOBS__FOLDER",
                setting="UNETPP_JOBS__FOLDER",
                value=str(self._folder),
            ) from error

    def _account(self, id_: str) -> None:
        """Counts the bytes of a job again. Never raises; files that cannot be seen count nothing."""
        size = 0
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in (self._folder / id_).iterdir())
        with self._sums:
            self.used_bytes += size - self._sizes.pop(id_, 0)
            if size:
                self._sizes[id_] = size


def short_id(id_: str) -> str:
    """The part of an id that may be logged, because all of it gives access to the job."""
    return id_[:8]


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
