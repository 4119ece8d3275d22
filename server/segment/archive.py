"""A zip of images: each goes the way of every request, a few at once so that they share batches; the answer is a zip of theirs.

Nothing that a zip says of itself is believed: sizes are counted while inflating, and names lead nowhere, as nothing is ever
written under them here.
"""

import asyncio
import contextlib
import itertools
import json
import math
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, BinaryIO, Protocol, cast, runtime_checkable

from server.errors import CallerError, InvalidParameter, TooLarge, Unreadable, UnsupportedType
from server.imaging.encode import EPOCH
from server.segment.clock import Clock
from server.segment.cost import Estimate
from server.segment.pipeline import until
from server.segment.request import Answer, Choice, SegmentRequest, Terms
from server.settings import LimitsSettings

# Images at once: enough to fill batches with small ones, while each holds its memory and a file of up to a body's size.
AT_ONCE = 4

# Larger files wait on disk, not in memory.
SPOOL_BYTES = 4 * 1024 * 1024
COPY_BYTES = 256 * 1024
# Of the list of entries at a zip's end; 1,000 with long paths take a tenth of it.
LIST_BYTES = 1024 * 1024
MOST_NAME = 500

METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
ENCRYPTED = 0x1
REPORT = "report.json"


@runtime_checkable
class Segments(Protocol):
    """What is asked of a `Segmenter`."""

    @property
    def limits(self) -> LimitsSettings:
        """See there."""
        ...

    def choose(self, request: SegmentRequest) -> Choice:
        """See there."""
        ...

    async def estimate(self, file: BinaryIO, request: SegmentRequest) -> Estimate:
        """See there."""
        ...

    async def segment(
        self,
        file: BinaryIO,
        request: SegmentRequest,
        reference: BinaryIO | None = None,
        progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
        terms: Terms | None = None,
        choice: Choice | None = None,
    ) -> Answer:
        """See there."""
        ...


@dataclass(frozen=True)
class _Entry:
    """An image of a zip.

    Attributes:
        info: where it lies.
        name: with its folders.
        stem: what the names of its answers begin with.
        problem: why it is not read, or "".
    """

    info: zipfile.ZipInfo
    name: str
    stem: str
    problem: str


class _Bounded:
    """A file of which no long piece is read at once: zipfile reads the list of entries whole, however long it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """As of files.

        Raises:
            TooLarge: very many entries.
        """
        data = self._file.read(LIST_BYTES + 1 if size < 0 else min(size, LIST_BYTES + 1))
        if len(data) > LIST_BYTES:
            raise TooLarge(f"the zip's list of files has more than {LIST_BYTES:,} bytes; send fewer images, with shorter names")
        return data


class _Zips:
    """The zip that came and the one that is made. Calls come from one thread at a time.

    Args:
        file: the zip that came.
        limits: of a request.

    Attributes:
        out: the zip that is made.
    """

    def __init__(self, file: BinaryIO, limits: LimitsSettings) -> None:
        self._limits = limits
        self._left = limits.max_zip_mb * 1024 * 1024
        try:
            self._zip = zipfile.ZipFile(cast("BinaryIO", _Bounded(file)))
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, OSError) as error:
            raise Unreadable("the zip's list of files cannot be read (truncated or damaged?); pack it again") from error
        self.out = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the answer's, who closes it
        self._made = zipfile.ZipFile(self.out, "w")

    def close(self) -> None:
        """Removes what was made."""
        with contextlib.suppress(ValueError):
            self._made.close()
        self.out.close()

    def entries(self) -> list[_Entry]:
        """The images; folders and what systems hide among them are left out.

        Raises:
            Unreadable: none, two of one name, or two in one place.
            TooLarge: says the limit.
        """
        infos = [(info, info.filename.replace("\\", "/")) for info in self._zip.infolist()]
        infos = [(info, name) for info, name in infos if not info.is_dir() and not _is_hidden(name)]
        if not infos:
            raise Unreadable("the zip holds no files; pack the images themselves")
        if len(infos) > self._limits.max_zip_images:
            raise TooLarge(
                f"the zip holds {len(infos):,} files; the limit is {self._limits.max_zip_images:,}. Send it in parts, or raise "
                "UNETPP_LIMITS__MAX_ZIP_IMAGES on the server"
            )
        if twice := [name for name, times in Counter(name for _, name in infos).items() if times > 1]:
            raise Unreadable(f"the zip holds two files named {twice[0]!r:.80}; give each its own name")
        places = sorted((info.header_offset, info.compress_size) for info, _ in infos)
        if any(start + size > after for (start, size), (after, _) in itertools.pairwise(places)):
            raise Unreadable("files of the zip lie over each other, as no packer writes them; pack it again")
        stems = Counter(_stem(name) for _, name in infos)
        return [_Entry(info, name, _stem(name) if stems[_stem(name)] == 1 else name, _problem(info, name)) for info, name in infos]

    def extract(self, entry: _Entry, target: BinaryIO) -> None:
        """Inflates an image.

        Raises:
            Unreadable: damaged, or not to be read.
            UnsupportedType: it is DICOM.
            TooLarge: it, or all together.
        """
        if entry.problem:
            raise Unreadable(entry.problem)
        most = self._limits.max_body_mb * 1024 * 1024
        for piece in self._pieces(entry.info):
            target.write(piece)
            self._left -= len(piece)
            if target.tell() > most:
                raise TooLarge(
                    f"the file has more than {self._limits.max_body_mb:,} MiB, which is the limit; UNETPP_LIMITS__MAX_BODY_MB on the "
                    "server raises it"
                )
            if self._left < 0:
                raise self._full("files")
        target.seek(0)

    def _pieces(self, info: zipfile.ZipInfo) -> Iterator[bytes]:
        try:
            with self._zip.open(info) as source:
                while piece := source.read(COPY_BYTES):
                    yield piece
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
            raise Unreadable("the file cannot be unpacked (damaged?); pack the zip again") from error

    def add(self, entry: _Entry, answer: Answer) -> list[str]:
        """Keeps an answer, and says under which names.

        Raises:
            TooLarge: all together.
        """
        assert isinstance(answer.body, bytes)  # noqa: S101 - of one image
        files = {answer.file: answer.body}
        if answer.media_type == "application/zip":
            with zipfile.ZipFile(BytesIO(answer.body)) as several:
                files = {name: several.read(name) for name in several.namelist()}
        for name, body in files.items():
            packed = not name.endswith((".json", ".csv", ".geojson"))
            self._write(f"{entry.stem}_{name}", body, packed=packed)
        return [f"{entry.stem}_{name}" for name in files]

    def finish(self, rows: list[dict[str, Any]]) -> None:
        """Writes the report; nothing comes after it."""
        self._write(REPORT, json.dumps({"images": rows}, indent=1).encode(), packed=False)
        self._made.close()
        self.out.seek(0)

    def _write(self, name: str, body: bytes, *, packed: bool) -> None:
        if self.out.tell() + len(body) > self._limits.max_zip_mb * 1024 * 1024:
            raise self._full("answers")
        # A date would make the same answer other bytes each time.
        self._made.writestr(zipfile.ZipInfo(name, EPOCH), body, zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED, 1)

    def _full(self, what: str) -> "_Full":
        return _Full(
            f"all {what} of the zip together have more than {self._limits.max_zip_mb:,} MiB, which is the limit. Send it in parts, or "
            "raise UNETPP_LIMITS__MAX_ZIP_MB on the server"
        )


class _Full(TooLarge):
    """Not one image is too large, but all together."""


def is_zip(file: BinaryIO) -> bool:
    """Whether a file is a zip; leaves it at its start."""
    head = file.read(4)
    file.seek(0)
    return head in (b"PK\x03\x04", b"PK\x05\x06")


async def estimate(segmenter: Segments, file: BinaryIO, request: SegmentRequest) -> Estimate:
    """What a request would take; for a zip its images are its windows, and the first that can be read stands for all.

    Raises:
        CallerError: it could not be segmented at all, or is over a limit.
    """
    if not is_zip(file):
        return await segmenter.estimate(file, request)
    with ThreadPoolExecutor(1, thread_name_prefix="zip") as thread:
        clock = Clock(thread)
        zips = await clock.off_loop("", _Zips, file, segmenter.limits)
        try:
            entries = await clock.off_loop("", zips.entries)
            one = Estimate(0, 0, 0, 0, 0.0, 0)
            for entry in entries[:AT_ONCE]:
                with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as target, contextlib.suppress(CallerError):
                    await clock.off_loop("", zips.extract, entry, cast("BinaryIO", target))
                    one = await segmenter.estimate(cast("BinaryIO", target), request)
                    break
        finally:
            zips.close()
    file.seek(0)
    return replace(one, windows=len(entries), seconds=one.seconds * len(entries))


async def segment(
    segmenter: Segments,
    file: BinaryIO,
    request: SegmentRequest,
    reference: BinaryIO | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    terms: Terms | None = None,
    choice: Choice | None = None,
) -> Answer:
    """Segments an input, or each image of a zip. See `Segmenter.segment`; the progress of a zip is that of its images.

    Raises:
        CallerError, TryAgain, ServerFault: also what is wrong with a whole zip. What is wrong with one image is in its report.
    """
    if not is_zip(file):
        return await segmenter.segment(file, request, reference, progress, terms, choice)
    if reference:
        raise InvalidParameter("a reference is for one image, and the input is a zip; send each image with its own")
    batch = _Batch(segmenter, request, progress, terms or Terms(), choice or segmenter.choose(request))
    with ThreadPoolExecutor(1, thread_name_prefix="zip") as thread:
        return await batch.run(file, Clock(thread))


class _Batch:
    """The images of one zip, while they are worked on.

    Args:
        segmenter: does the work.
        request: for each.
        progress: see `segment`.
        terms: of all together.
        choice: of the request.
    """

    def __init__(
        self, segmenter: Segments, request: SegmentRequest, progress: Callable[[str, int, int], None], terms: Terms, choice: Choice
    ) -> None:
        self._segmenter = segmenter
        self._request = request
        self._progress = progress
        self._terms = terms
        self._choice = choice
        self._rows: list[dict[str, Any]] = []
        self._done = 0
        self._seconds: Counter[str] = Counter()

    async def run(self, file: BinaryIO, clock: Clock) -> Answer:
        """All of it; `clock` has the one thread that touches the zips."""
        zips = await clock.off_loop("", _Zips, file, self._segmenter.limits)
        try:
            entries = await clock.off_loop("", zips.entries)
            await self._in_time(self._all(zips, entries, clock), len(entries))
            await clock.off_loop("", zips.finish, self._rows)
        except BaseException:
            zips.close()
            raise
        route, body = self._choice.route, cast("BinaryIO", zips.out)
        return Answer(body, "application/zip", "masks.zip", route, self._choice, "", dict(self._seconds), {}, self._note())

    async def _in_time(self, work: Any, total: int) -> None:
        left_s = self._terms.patience_s - (time.monotonic() - self._terms.begun)
        try:
            async with asyncio.timeout(None if left_s == math.inf else left_s) as limit, until(self._terms.deadline):
                await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TooLarge(
                f"the zip holds {total} images, {self._done} of which were done in the {self._terms.patience_s:g} s that POST /segment "
                "works for at most. Send it to POST /jobs, or in parts"
            ) from error

    async def _all(self, zips: _Zips, entries: list[_Entry], clock: Clock) -> None:
        """A few at once.

        Raises:
            CallerError: none could be segmented; says why of the first.
        """
        self._rows = [{"name": entry.name[:MOST_NAME]} for entry in entries]
        self._progress("decode", 0, len(entries))
        todo = iter(list(zip(entries, self._rows, strict=True)))

        async def work() -> None:
            for entry, row in todo:
                await self._one(zips, entry, row, clock)
                self._done += 1
                self._progress("infer", self._done, len(entries))

        tasks = [asyncio.create_task(work()) for _ in range(min(AT_ONCE, len(entries)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if all(row["status"] == "failed" for row in self._rows):
            first = self._rows[0]
            raise Unreadable(f"none of the zip's {len(entries)} files could be segmented; {first['name']!r:.80}: {first['detail']}")

    async def _one(self, zips: _Zips, entry: _Entry, row: dict[str, Any], clock: Clock) -> None:
        """One image; what is wrong with it alone becomes its row of the report."""
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spooled:
            target = cast("BinaryIO", spooled)
            try:
                await clock.off_loop("", zips.extract, entry, target)
                _refuse_dicom(target)
                # Time is for all together: each alone would be refused because of the others.
                terms = Terms(urgent=self._terms.urgent)
                answer = await self._segmenter.segment(target, self._request, terms=terms, choice=self._choice)
            except (_Full, _Dicom):
                raise
            except CallerError as error:
                row |= {"status": "failed", "detail": str(error)}
                return
        files = await clock.off_loop("", zips.add, entry, answer)
        route = answer.choice.route
        row |= {"status": "ok", "files": files, "model": answer.choice.model, "mode": route.mode, "level": route.level}
        row |= {"precision": answer.choice.precision}
        row |= {"note": answer.note} if answer.note else {}
        row["timings_ms"] = {phase: round(spent * 1e3, 2) for phase, spent in answer.seconds.items()}
        self._seconds.update(answer.seconds)

    def _note(self) -> str:
        failed = sum(row["status"] == "failed" for row in self._rows)
        return f"{failed} of {len(self._rows)} files could not be segmented; see {REPORT}" if failed else ""


class _Dicom(UnsupportedType):
    """Not one file is of no use, but all."""


def _refuse_dicom(file: BinaryIO) -> None:
    """A series is one volume, not many images.

    Raises:
        _Dicom: it is one of its files.
    """
    head = file.read(132)
    file.seek(0)
    if head[128:] == b"DICM":
        raise _Dicom("the zip holds DICOM files, which are not read here; convert the series to NIfTI (dcm2niix) and send that")


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part != ".." for part in parts)


def _stem(name: str) -> str:
    """Without its suffix, or both of .nii.gz."""
    plain = name.removesuffix(".gz")
    folder, slash, last = plain.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}"


def _problem(info: zipfile.ZipInfo, name: str) -> str:
    """Why a file is not read, before any of it is; the names of its answers would be as bad."""
    if not name.isprintable() or len(name) > MOST_NAME or name[1:2] == ":" or not all(p and p != ".." for p in name.split("/")):
        return "its name leads out of the zip, or is none; pack it under a plain one"
    if info.flag_bits & ENCRYPTED:
        return "the file is encrypted; pack it without a password"
    if info.compress_type not in METHODS:
        return "the file is packed by a method that is not read; pack it with deflate or stored"
    return ""
