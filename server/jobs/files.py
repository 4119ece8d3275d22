"""Files of jobs, one folder each. A file is written as `.part`, synced and renamed, so that none is ever there by half."""

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

# Nothing else in the folder is ours to remove, whatever folder the operator has named.
ID = re.compile("[0-9a-f]{32}")

COPY_BYTES = 1024 * 1024
RETRY_FULL_S = 60


class Files:
    """The jobs' folders, and how much lies in them. Calls may come from any thread.

    Args:
        settings: folder and quota.

    Attributes:
        used_bytes: size of them all.
    """

    def __init__(self, settings: JobsSettings) -> None:
        self._settings = settings
        self._folder = settings.folder
        self._sums = threading.Lock()  # of the three below: never held while waiting for the disk
        self._sizes: dict[str, int] = {}
        self.used_bytes = 0
        self._claimed = 0

    def path(self, id_: str, name: str) -> Path:
        """Where a job's file lies."""
        return self._folder / id_ / name

    def ids(self) -> list[str]:
        """Whose folders there are."""
        return [path.name for path in self._folder.iterdir() if ID.fullmatch(path.name) and path.is_dir()]

    def inputs(self, id_: str, opened: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO | None]:
        """A job's input and reference, which `opened` closes.

        Raises:
            FileNotFoundError: the input is gone, and will not come back.
            StoreFull, StoreBroken: what may pass.
        """
        path, beside = self.path(id_, "input"), self.path(id_, "reference")
        # Whoever cancels the job may remove them at any moment.
        with self.disk(), contextlib.suppress(FileNotFoundError):
            file = opened.enter_context(path.open("rb"))
            return file, opened.enter_context(beside.open("rb")) if beside.exists() else None
        raise FileNotFoundError(f"the input of job {short_id(id_)} is gone")

    def write(self, id_: str, name: str, source: BinaryIO) -> None:
        """A file that is there, whole, when this returns. Whatever the quota: that is for what comes in.

        Raises:
            StoreFull, StoreBroken: nothing is there.
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

    def keep_only(self, id_: str, useful: Collection[str]) -> None:
        """Removes all other files of a job. Never raises: its row is what counts, and the next start of the server tries again."""
        folder = self._folder / id_
        try:
            for path in folder.iterdir() if useful else ():
                if path.name not in useful:
                    path.unlink()
            if not useful:
                shutil.rmtree(folder)
        except FileNotFoundError:
            pass
        except OSError:
            log.exception("files of job %s could not be removed; the next start of the server tries again", short_id(id_))
        self._account(id_)

    def discard(self, id_: str) -> None:
        """Removes a job's folder. Never raises either."""
        self.keep_only(id_, ())

    @contextlib.contextmanager
    def reserve(self) -> Iterator[Callable[[int], None]]:
        """Room for what is still arriving; the function it gives takes so many bytes more.

        Raises:
            StoreFull: from that function, over the quota; or the disk is full, wherever the block writes.
        """
        claimed = 0

        def claim(size: int) -> None:
            nonlocal claimed
            settings = self._settings
            with self._sums:
                if self.used_bytes + self._claimed + size > settings.max_disk_mb * 1024 * 1024:
                    raise StoreFull(
                        f"the disk space for jobs is used up ({settings.max_disk_mb:,} MiB); finished jobs make room after "
                        f"{settings.keep_results_h:g} hours, or when they are deleted; or raise UNETPP_JOBS__MAX_DISK_MB",
                        retry_after_s=RETRY_FULL_S,
                    )
                self._claimed += size
            claimed += size

        try:
            with self.disk():
                yield claim
        finally:
            with self._sums:
                self._claimed -= claimed

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """What the disk and the database raise, in our words."""
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            code = error.errno if isinstance(error, OSError) else getattr(error, "sqlite_errorname", None)
            if code in (errno.ENOSPC, errno.EDQUOT, "SQLITE_FULL"):
                raise StoreFull("the disk of the server is full; try again later", retry_after_s=RETRY_FULL_S) from error
            raise StoreBroken(
                f"the jobs folder {self._folder} cannot be used ({error}); make it writable, or move it away if it is damaged, or "
                "name another with UNETPP_JOBS__FOLDER"
            ) from error

    def _account(self, id_: str) -> None:
        """Never raises: what cannot be seen counts nothing."""
        size = 0
        with contextlib.suppress(OSError):
            size = sum(path.stat().st_size for path in (self._folder / id_).iterdir())
        with self._sums:
            self.used_bytes += size - self._sizes.pop(id_, 0)
            if size:
                self._sizes[id_] = size


def short_id(id_: str) -> str:
    """What the log may say of an id: whoever has all of it has the job."""
    return id_[:8]


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
