"""Files of jobs, one folder each.

A file is written as a `.part`, synced and renamed, so that none is ever there by half.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import shutil
import sqlite3
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from server.errors import StoreBroken, StoreFull
from server.jobs.file_store import COPY_BYTES, RETRY_FULL_S, FileStore, KeptFile, short_id
from server.settings import JobsSettings

log = logging.getLogger(__name__)

# Only folders of this form are removed, because the operator may name a folder with other contents.
ID = re.compile("[0-9a-f]{32}")


class Files(FileStore):
    """The folders of the jobs, and the bytes in them. Calls may come from any thread.

    Args:
        settings: folder and quota.
        folder: another folder than that of the settings.
        setting: setting that names it.
    """

    def __init__(
        self, settings: JobsSettings, folder: Path | None = None, setting: str = "UNETPP_JOBS__FOLDER"
    ) -> None:
        super().__init__(settings)
        self._folder = folder or settings.folder
        self._setting = setting
        self._sizes: dict[str, int] = {}

    def path(self, id_: str, name: str) -> Path:
        """The path of a job's file."""
        return self._folder / id_ / name

    def ids(self, older_than_s: float = 0) -> list[str]:
        """The ids of all folders, of which none has changed in the last seconds."""
        latest = time.time() - older_than_s
        ids: list[str] = []
        for path in self._folder.iterdir():
            # Another server may remove it at this moment.
            with contextlib.suppress(FileNotFoundError):
                is_job = ID.fullmatch(path.name) and path.is_dir()
                if is_job and (not older_than_s or path.stat().st_mtime <= latest):
                    ids.append(path.name)
        return ids

    def has(self, id_: str, name: str) -> bool:
        """Whether a job has a file."""
        with self.translate_errors():
            return self.path(id_, name).exists()

    def open(self, id_: str, name: str) -> BinaryIO:
        """Opens a job's file.

        Raises:
            FileNotFoundError: it is gone, and will not come back.
            StoreFull, StoreBroken: the disk fails, perhaps for a while.
        """
        with self.translate_errors(), contextlib.suppress(FileNotFoundError):
            return self.path(id_, name).open("rb")
        raise FileNotFoundError(f"the {name} of job {short_id(id_)} is gone")

    def inputs(
        self, id_: str, stack: contextlib.ExitStack, name: str = "input"
    ) -> tuple[BinaryIO, BinaryIO | None]:
        """Opens a job's input and reference, which `stack` closes.

        Raises:
            FileNotFoundError: the input is gone, and will not come back.
            StoreFull, StoreBroken: the disk fails, perhaps for a while.
        """
        path, reference = self.path(id_, name), self.path(id_, "reference")
        # Cancelling the job may remove them at any moment.
        with self.translate_errors(), contextlib.suppress(FileNotFoundError):
            file = stack.enter_context(path.open("rb"))
            return file, stack.enter_context(reference.open("rb")) if reference.exists() else None
        raise FileNotFoundError(f"the input of job {short_id(id_)} is gone")

    def kept(self, id_: str, name: str) -> KeptFile | None:
        """A file to be served; None if it is gone."""
        path = self.path(id_, name)
        with contextlib.suppress(FileNotFoundError):
            return KeptFile(path.stat(), lambda: path.open("rb"))
        return None

    def write(self, id_: str, name: str, source: BinaryIO) -> int:
        """Writes a file, which is whole and on the disk when this returns; the quota is for uploads only.

        Raises:
            StoreFull, StoreBroken: nothing was written.
        """
        path = self.path(id_, name)
        # Of a name of its own, because another request may write the same file at this moment.
        part = path.with_name(f"{name}.{secrets.token_hex(4)}.part")
        source.seek(0)
        with self.translate_errors():
            path.parent.mkdir(exist_ok=True, mode=0o700)
            try:
                with part.open("wb") as file:
                    shutil.copyfileobj(source, file, COPY_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
                    size = file.tell()
                part.rename(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
            for folder in (path.parent, self._folder):
                _sync(folder)
        self._account(id_)
        return size

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
    def translate_errors(self) -> Iterator[None]:
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
                f"name another with {self._setting}",
                setting=self._setting,
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


class SharedFiles(Files):
    """Files in a folder that all servers of a fleet mount. The database counts their bytes.

    Args:
        settings: quota.
        folder: the folder.
    """

    def __init__(self, settings: JobsSettings, folder: Path) -> None:
        super().__init__(settings, folder, "UNETPP_JOBS__FILES")

    def _account(self, id_: str) -> None:
        """Leaves the counting to the database."""


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
