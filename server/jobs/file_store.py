"""Interface of the stores of jobs' files, and the quota that they keep."""

import contextlib
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from server.errors import StoreFull
from server.settings import JobsSettings

COPY_BYTES = 1024 * 1024
RETRY_FULL_S = 60


@dataclass(frozen=True)
class KeptFile:
    """A file that is there to be read.

    Attributes:
        stat: its size and time, the same on every replica.
        open: function that opens it. It may block, and so may each read; what is not read is not fetched.
    """

    stat: os.stat_result
    open: Callable[[], BinaryIO]


class FileStore(ABC):
    """Files of jobs: each is whole or not there. Calls may come from any thread.

    Args:
        settings: quota.

    Attributes:
        used_bytes: bytes of all files.
    """

    def __init__(self, settings: JobsSettings) -> None:
        self._settings = settings
        self._sums = threading.Lock()  # of the sums: never held while waiting for the disk
        self.used_bytes = 0
        self._reserved = 0

    @abstractmethod
    def ids(self, older_than_s: float = 0) -> list[str]:
        """The ids of all jobs that have files, of which none was written in the last seconds."""

    @abstractmethod
    def has(self, id_: str, name: str) -> bool:
        """Whether a job has a file."""

    @abstractmethod
    def open(self, id_: str, name: str) -> BinaryIO:
        """Opens a job's file.

        Raises:
            FileNotFoundError: it is gone, and will not come back.
            StoreFull, StoreBroken, StoreUnavailable: the store fails, perhaps for a while.
        """

    @abstractmethod
    def inputs(
        self, id_: str, stack: contextlib.ExitStack, name: str = "input"
    ) -> tuple[BinaryIO, BinaryIO | None]:
        """Opens a job's input, which has that name, and its reference; `stack` closes them.

        Raises:
            FileNotFoundError: the input is gone, and will not come back.
            StoreFull, StoreBroken, StoreUnavailable: the store fails, perhaps for a while.
        """

    @abstractmethod
    def kept(self, id_: str, name: str) -> KeptFile | None:
        """A file to be served; None if it is gone."""

    @abstractmethod
    def write(self, id_: str, name: str, source: BinaryIO) -> int:
        """Writes a file, which is whole and safe when this returns; the quota is for uploads only.

        Returns:
            The number of its bytes.

        Raises:
            StoreFull, StoreBroken, StoreUnavailable: nothing was written.
        """

    @abstractmethod
    def keep_only(self, id_: str, names: Collection[str]) -> None:
        """Removes all other files of a job. Never raises, because the row is what counts."""

    @abstractmethod
    def translate_errors(self) -> contextlib.AbstractContextManager[None]:
        """Translates errors of the store.

        Raises:
            StoreFull, StoreBroken, StoreUnavailable: the store fails.
        """

    def discard(self, id_: str) -> None:
        """Removes all files of a job. Never raises."""
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
            with self._sums:
                self.check_quota(self.used_bytes + self._reserved + size)
                self._reserved += size
            reserved += size

        try:
            with self.translate_errors():
                yield add
        finally:
            with self._sums:
                self._reserved -= reserved

    def check_quota(self, actual: int) -> None:
        """Compares a number of bytes with the quota.

        Raises:
            StoreFull: it is exceeded.
        """
        limit_mb = self._settings.max_disk_mb
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


def short_id(id_: str) -> str:
    """The part of an id that may be logged, because all of it gives access to the job."""
    return id_[:8]
