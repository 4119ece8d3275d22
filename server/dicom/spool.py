"""Series that arrive at the node, on disk: an instance is there before it is acknowledged, and after a restart."""

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SERIES, COMPLETE = "series.json", "complete"
INSTANCE = ".dcm"
COPY_BYTES = 1024 * 1024
# A sender that keeps its association open may pause for so many times the quiet time.
OPEN_FACTOR = 12

Key = tuple[str, str, str, str]


@dataclass(eq=False)
class Series:
    """A series that is not complete yet.

    Attributes:
        id: 32 hexadecimal digits: name of its folder, and id of its job.
        key: AE title that calls, AE title that was called, UIDs of study and series.
        plan: request parameters and destination, as JSON.
        last: clock time of its last instance.
        writing: instances that are being written.
        senders: associations that have sent instances and are open.
        instances: names of the files of instances.
        bytes: size of all instances.
        refused: instances that were refused and did not come again; known when it is complete.
    """

    id: str
    key: Key
    plan: dict[str, Any]
    last: float
    writing: int = 0
    senders: set[object] = field(default_factory=set)
    instances: set[str] = field(default_factory=set)
    bytes: int = 0
    refused: int = 0


class Spool:
    """The series of one folder. Calls may come from any thread.

    Args:
        folder: folder, which is made if it does not exist.
        quiet_s: seconds after which a series is complete.
        clock: seconds that only go forward.
    """

    def __init__(self, folder: Path, quiet_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._quiet_s = quiet_s
        self._clock = clock
        self._lock = threading.Lock()
        self._series: dict[Key, Series] = {}
        self._refused: dict[Key, tuple[float, set[str]]] = {}
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in sorted(folder.iterdir()):
            self._load(path)

    @property
    def used_bytes(self) -> int:
        """Bytes of all series that are not complete."""
        with self._lock:
            return sum(series.bytes for series in self._series.values())

    def find(self, key: Key) -> tuple[int, int]:
        """The number and bytes of the instances of a series so far."""
        with self._lock:
            series = self._series.get(key)
            return (len(series.instances), series.bytes) if series else (0, 0)

    def add(self, key: Key, plan: dict[str, Any], instance: str, file: BinaryIO, sender: object) -> None:
        """Keeps an instance; when this returns, it is on the disk.

        Args:
            key: key of its series.
            plan: request parameters and destination of the series, if it is new.
            instance: UID of the instance; one that is there already is replaced.
            file: instance as a DICOM file, at its start.
            sender: its association.

        Raises:
            OSError: it was not kept.
        """
        with self._lock:
            series = self._series.get(key)
            if series is None:
                series = Series(uuid.uuid4().hex, key, plan, self._clock())
                self._series[key] = series
                self._create(series)
            series.writing += 1
            series.senders.add(sender)
        size = 0
        try:
            size = self._write(self._folder / series.id, _name(instance), file)
        finally:
            with self._lock:
                series.writing -= 1
                series.last = self._clock()
                if size and _name(instance) not in series.instances:
                    series.bytes += size
                    series.instances.add(_name(instance))
                if size and key in self._refused:
                    self._refused[key][1].discard(_name(instance))

    def refuse(self, key: Key, instance: str) -> None:
        """Notes that an instance was not kept, without which its series is not complete."""
        with self._lock:
            now = self._clock()
            # Of series of which nothing was kept, for no longer than an open one may pause.
            over = now - self._quiet_s * OPEN_FACTOR
            for old in [
                one for one, (at, _) in self._refused.items() if at < over and one not in self._series
            ]:
                del self._refused[old]
            names = self._refused[key][1] if key in self._refused else set()
            self._refused[key] = now, names | {_name(instance)}

    def hang_up(self, sender: object) -> None:
        """Notes that an association was released. After one that was lost, more may come."""
        with self._lock:
            for series in self._series.values():
                series.senders.discard(sender)

    def take_complete(self) -> list[Series]:
        """Removes the series that are complete from those that grow, and returns them."""
        with self._lock:
            now = self._clock()
            complete = [one for one in self._series.values() if not one.writing and self._due(one) <= now]
            for series in complete:
                del self._series[series.key]
                series.refused = len(self._refused.pop(series.key, (0.0, set()))[1])
            return complete

    def next_s(self) -> float | None:
        """Seconds until the next series is complete, if nothing more arrives; None without one."""
        with self._lock:
            due = [self._due(series) for series in self._series.values() if not series.writing]
            return max(0.0, min(due) - self._clock()) if due else None

    def seal(self, series: Series) -> None:
        """Notes on the disk that a series is complete, so that what comes after a restart is another one."""
        path = self._folder / series.id / COMPLETE
        path.touch()
        _sync(path.parent)

    def put_back(self, series: Series, seconds: float) -> None:
        """Takes a sealed series that could not become a job for one that is complete in some seconds."""
        with self._lock:
            series.key, series.last = _sealed(series.key, series.id), self._clock() + seconds - self._quiet_s
            series.senders.clear()
            self._series[series.key] = series

    def write_zip(self, series: Series, file: BinaryIO) -> None:
        """Writes the instances of a series into a zip, in an order that does not depend on that of arrival."""
        with zipfile.ZipFile(file, "w") as archive:
            paths = sorted((self._folder / series.id).glob(f"*{INSTANCE}"))
            for number, path in enumerate(paths):
                with path.open("rb") as source, archive.open(f"{number:05}", "w", force_zip64=True) as target:
                    shutil.copyfileobj(source, target, COPY_BYTES)

    def discard(self, series: Series) -> None:
        """Removes a series, which is a job now or never will be one."""
        # Its description first, without which what is left is removed at the next start.
        with contextlib.suppress(OSError):
            (self._folder / series.id / SERIES).unlink()
        shutil.rmtree(self._folder / series.id, ignore_errors=True)

    def _due(self, series: Series) -> float:
        return series.last + self._quiet_s * (OPEN_FACTOR if series.senders else 1)

    def _create(self, series: Series) -> None:
        folder = self._folder / series.id
        try:
            folder.mkdir(mode=0o700)
            text = json.dumps({"key": series.key, "plan": series.plan}).encode()
            with (folder / f"{SERIES}.part").open("wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            (folder / f"{SERIES}.part").rename(folder / SERIES)
            _sync(self._folder)
        except OSError:
            del self._series[series.key]
            raise

    def _write(self, folder: Path, name: str, source: BinaryIO) -> int:
        """Writes a file as another one that is synced and renamed, so that none is ever there by half."""
        part = folder / f"{name}.{uuid.uuid4().hex}.part"
        try:
            with part.open("wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
                size = file.tell()
                file.flush()
                os.fsync(file.fileno())
            part.rename(folder / f"{name}{INSTANCE}")
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        _sync(folder)
        return size

    def _load(self, folder: Path) -> None:
        """Takes up a series of an earlier run; one without an instance or description was never acknowledged."""
        paths = sorted(folder.glob(f"*{INSTANCE}"))
        try:
            kept = json.loads((folder / SERIES).read_text("utf-8"))
            key = tuple(map(str, kept["key"]))
        except (OSError, ValueError, KeyError):
            paths = []
        if not paths:
            shutil.rmtree(folder, ignore_errors=True)
            return
        for part in folder.glob("*.part"):
            part.unlink()
        caller, called, study, uid = key
        found = caller, called, study, uid
        if found in self._series or (folder / COMPLETE).exists():
            found = _sealed(found, folder.name)
        series = Series(folder.name, found, kept["plan"], self._clock())
        series.instances = {path.stem for path in paths}
        series.bytes = sum(path.stat().st_size for path in paths)
        self._series[series.key] = series


def _sealed(key: Key, id_: str) -> Key:
    """A key that no instance has which arrives."""
    return (*key[:3], id_)


def _name(instance: str) -> str:
    return hashlib.sha256(instance.encode()).hexdigest()[:32]


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
