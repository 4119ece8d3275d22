"""Files of jobs in a bucket that speaks S3, which all servers of a fleet reach."""

import contextlib
import io
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any, BinaryIO, cast

import obstore
from obstore import exceptions
from obstore.store import S3Store

from server.errors import StoreBroken, StoreUnavailable, disk_full
from server.jobs.file_store import COPY_BYTES, FileStore, KeptFile, short_id
from server.jobs.files import ID
from server.settings import JobsSettings

log = logging.getLogger(__name__)

SETTING = "UNETPP_JOBS__FILES"
SCHEME = "s3://"
RETRY_S = 5

# A request that fails is tried again twice within this time; then the caller hears of it.
RETRY_CONFIG: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=10)}
# A request fails when the server is silent for a minute. `timeout` holds for all of a request with its body, which is one piece.
# http:// only where the operator writes it in the endpoint.
CLIENT_OPTIONS: Any = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "10m", "allow_http": True}

# Objects are read in pieces, of which the first is short and each next one twice as long as the one before, so that a part costs
# little, and all of it few requests.
FIRST_PIECE_BYTES = 1024 * 1024
MAX_PIECE_BYTES = 8 * FIRST_PIECE_BYTES

_REFUSED = (
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.UnknownConfigurationKeyError,
    exceptions.InvalidPathError,
)
_GONE = (exceptions.NotFoundError, FileNotFoundError)


class BucketFiles(FileStore):
    """The files of jobs as objects PREFIX/ID/NAME of one bucket.

    An object is there as a whole or not at all, so that nothing has to be renamed.

    Args:
        settings: bucket and quota.
    """

    def __init__(self, settings: JobsSettings) -> None:
        super().__init__(settings)
        address = settings.files or ""
        # The endpoint and the keys are in AWS_* variables, which obstore reads.
        bucket, _, prefix = address.removeprefix(SCHEME).partition("/")
        self._prefix = prefix.strip("/")
        with self.translate_errors():
            self._bucket = S3Store(
                bucket, prefix=self._prefix or None, client_options=CLIENT_OPTIONS, retry_config=RETRY_CONFIG
            )

    def ids(self, older_than_s: float = 0) -> list[str]:
        """The ids of all jobs that have objects, of which none was written in the last seconds."""
        newest: dict[str, float] = {}
        with self.translate_errors():
            for objects in obstore.list(self._bucket):
                for one in objects:
                    id_ = one["path"].split("/")[-2] if "/" in one["path"] else ""
                    newest[id_] = max(newest.get(id_, 0.0), one["last_modified"].timestamp())
        latest = time.time() - older_than_s
        return [id_ for id_, written in newest.items() if ID.fullmatch(id_) and written <= latest]

    def has(self, id_: str, name: str) -> bool:
        """Whether there is such an object."""
        return self.kept(id_, name) is not None

    def open(self, id_: str, name: str) -> BinaryIO:
        """Copies an object into a temporary file, which has no name."""
        file = self._copy(id_, name)
        if file is None:
            raise FileNotFoundError(f"the {name} of job {short_id(id_)} is gone")
        return file

    def inputs(
        self, id_: str, stack: contextlib.ExitStack, name: str = "input"
    ) -> tuple[BinaryIO, BinaryIO | None]:
        """Copies a job's input and its reference; `stack` closes the copies."""
        file = stack.enter_context(self.open(id_, name))
        reference = self._copy(id_, "reference")
        return file, stack.enter_context(reference) if reference else None

    def kept(self, id_: str, name: str) -> KeptFile | None:
        """An object to be served, of which nothing is fetched before it is read; None if it is gone."""
        path = f"{id_}/{name}"
        with self.translate_errors():
            try:
                meta = obstore.head(self._bucket, path)
            except _GONE:
                return None
        modified = int(meta["last_modified"].timestamp())
        # Mode, inode, device, links, user, group, size, and times: the entity tag is made of the last two kinds.
        stat = os.stat_result((0o100600, 0, 0, 1, 0, 0, meta["size"], modified, modified, modified))
        return KeptFile(stat, lambda: io.BufferedReader(ObjectReader(self._bucket, path, meta["size"])))

    def write(self, id_: str, name: str, source: BinaryIO) -> int:
        """Writes an object; when this returns, the bucket has confirmed all of it."""
        source.seek(0, os.SEEK_END)
        size = source.tell()
        source.seek(0)
        with self.translate_errors():
            obstore.put(self._bucket, f"{id_}/{name}", source)
        return size

    def keep_only(self, id_: str, names: Collection[str]) -> None:
        """Removes all other objects of a job. Never raises, because the row is what counts."""
        try:
            paths = [
                f"{id_}/{name}"
                for objects in obstore.list(self._bucket, prefix=f"{id_}/")
                for one in objects
                if (name := one["path"].split("/")[-1]) not in names
            ]
            if paths:
                obstore.delete(self._bucket, paths)
        except _GONE:
            pass
        except (exceptions.BaseError, OSError):
            log.exception("files of job %s could not be removed; a sweep tries again", short_id(id_))

    @contextlib.contextmanager
    def translate_errors(self) -> Iterator[None]:
        """Translates errors of the bucket and of this server's disk.

        Raises:
            StoreUnavailable: the bucket does not answer.
            DiskFull: this server has no room for a copy.
            StoreBroken: it refuses, or the folder for temporary files cannot be used.
        """
        try:
            yield
        except _REFUSED + _GONE as error:
            raise StoreBroken(
                f"the bucket of jobs refuses ({error}); see that it exists, that the AWS_* variables have its endpoint and keys, and "
                f"that these may read, write, list and delete under {SETTING}",
                setting=SETTING,
            ) from error
        except exceptions.BaseError as error:
            raise StoreUnavailable(
                "the bucket in which jobs keep their files does not answer; try again in a moment",
                RETRY_S,
                setting=SETTING,
            ) from error
        except OSError as error:
            if full := disk_full(error):
                raise full from error
            raise StoreBroken(
                f"the folder for temporary files cannot be used ({error}); make it writable, or name another with TMPDIR",
                setting="TMPDIR",
            ) from error

    def _copy(self, id_: str, name: str) -> BinaryIO | None:
        """Copies an object into a file without a name, which is left open at its beginning; None if the object is gone."""
        kept = self.kept(id_, name)
        if kept is None:
            return None
        with self.translate_errors():
            file = cast("BinaryIO", tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
            try:
                shutil.copyfileobj(kept.open(), file, COPY_BYTES)
                file.seek(0)
            except _GONE:
                file.close()
                return None
            except BaseException:
                file.close()
                raise
            return file


class ObjectReader(io.RawIOBase):
    """Reads an object in pieces, each by a request of its own, so that no request lasts as long as a download.

    Args:
        bucket: bucket with the object.
        path: path of the object.
        size: its size in bytes.
    """

    def __init__(self, bucket: S3Store, path: str, size: int) -> None:
        self._bucket = bucket
        self._path = path
        self._size = size
        self._position = 0
        self._piece = memoryview(b"")
        self._piece_bytes = FIRST_PIECE_BYTES

    def readable(self) -> bool:
        """Says that it can be read."""
        return True

    def seekable(self) -> bool:
        """Says that it has positions."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Goes to a position, from which the next piece is read."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        self._piece = memoryview(b"")
        self._piece_bytes = FIRST_PIECE_BYTES
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads what is there of a piece, or the next one; 0 at the end."""
        if not self._piece and self._position < self._size:
            end = min(self._position + self._piece_bytes, self._size)
            self._piece = memoryview(
                obstore.get_range(self._bucket, self._path, start=self._position, end=end)
            )
            self._piece_bytes = min(2 * self._piece_bytes, MAX_PIECE_BYTES)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self._position += count
        return count
