"""A zip of images: each goes the way of every request, a few at once so that they share batches; the answer is a zip of theirs."""

import asyncio
import json
import math
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any, BinaryIO, cast

from server.errors import CallerError, DeadlineTooShort, InvalidParameter, Overloaded, TooLarge, Unreadable, UnsupportedType
from server.runtime.batcher import HOPE
from server.runtime.line import Line
from server.segment.clock import Clock
from server.segment.cost import Estimate
from server.segment.packing import MOST_NAME, SPOOL_BYTES, Entry, ZipFiles, ZipTooLarge, is_zip
from server.segment.pipeline import Segmenter, until
from server.segment.request import Answer, Archived, Choice, SegmentRequest, Terms

# Images at once: enough to fill batches with small ones, while each holds its memory and a file of up to a body's size.
AT_ONCE = 4

REPORT = "report.json"


async def estimate(segmenter: Segmenter, file: BinaryIO, request: SegmentRequest) -> Estimate:
    """What a request would take; for a zip its images are its windows, and the first that can be read stands for all.

    Raises:
        CallerError: it could not be segmented at all, or is over a limit.
    """
    if not is_zip(file):
        return await segmenter.estimate(file, request)
    with ThreadPoolExecutor(1, thread_name_prefix="zip") as thread:
        clock = Clock(thread)
        zips = ZipFiles(file, segmenter.limits)
        try:
            entries = await clock.off_loop("", zips.entries)
            one = await _first(segmenter, zips, entries, request, clock)
        finally:
            zips.close()
    file.seek(0)
    return replace(one, windows=len(entries), seconds=one.seconds * len(entries))


async def _first(segmenter: Segmenter, zips: ZipFiles, entries: list[Entry], request: SegmentRequest, clock: Clock) -> Estimate:
    """The estimate of the first image that can be read.

    Raises:
        CallerError: there is none.
    """
    errors: list[CallerError] = []
    for entry in entries:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spooled:
            target = cast("BinaryIO", spooled)
            try:
                await clock.off_loop("", zips.extract, entry, target)
                _refuse_dicom(target)
                return await segmenter.estimate(target, request)
            except (ZipTooLarge, _Dicom):
                raise
            except CallerError as error:
                errors.append(error)
    raise _none(entries[0].name, errors)


def _none(first: str, errors: list[CallerError]) -> CallerError:
    """No image could be segmented; what is said of the first is true of most."""
    kind = UnsupportedType if all(isinstance(error, UnsupportedType) for error in errors) else Unreadable
    return kind(f"none of the zip's {len(errors)} files could be segmented; {first!r:.80}: {errors[0]}")


async def segment(
    segmenter: Segmenter,
    file: BinaryIO,
    request: SegmentRequest,
    reference: BinaryIO | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    terms: Terms | None = None,
    choice: Choice | None = None,
) -> Answer:
    """Segmenter an input, or each image of a zip. See `Segmenter.segment`; the progress of a zip is that of its images.

    Raises:
        CallerError, TryAgain, ServerFault: also what is wrong with a whole zip. What is wrong with one image is in its report.
    """
    if not is_zip(file):
        return await segmenter.segment(file, request, reference, progress, terms, choice)
    if reference:
        raise InvalidParameter("a reference is for one image, and the input is a zip; send each image with its own")
    if request.min_level is not None:
        raise InvalidParameter("min_level is for one image, and the input is a zip; choose the level for all of it with level=")
    terms, choice = terms or Terms(), choice or segmenter.choose(request)
    if terms.given_s < math.inf:
        async with until(terms.deadline):
            _check_in_time(await estimate(segmenter, file, request), terms, segmenter.line)
    batch = _Batch(segmenter, request, progress, terms, choice)
    with ThreadPoolExecutor(1, thread_name_prefix="zip") as thread:
        return await batch.run(file, Clock(thread))


def _check_in_time(found: Estimate, terms: Terms, line: Line) -> None:
    """Refuses what would take too long, before any of it is done; as for one image, see `Segmenter`.

    Args:
        found: see `estimate`.
        terms: of all together.
        line: of those who use the device.

    Raises:
        TooLarge, DeadlineTooShort: the work alone would.
        Overloaded: with the wait for others it would.
    """
    holds, seconds = f"the zip holds {found.windows:,} images", f"about {found.seconds:,.0f} s here"
    if found.seconds > terms.patience_s:
        raise TooLarge(
            f"{holds}, which would take {seconds} if all are like the first, and POST /segment works for at most "
            f"{terms.patience_s:g} s. Send it to POST /jobs, or in parts"
        )
    idle, left_s = line.idle(), max(0.0, terms.allowed_s)
    # Where nobody waits it is tried, unless hopeless: estimates err.
    if found.seconds * (HOPE if idle else 1) > terms.given_s:
        raise DeadlineTooShort(
            f"{holds}, which take {seconds} even when nobody else waits, and the deadline leaves {terms.given_s:,.1f} s; allow more, "
            "send it in parts, or choose a shallower level"
        )
    likely_s = found.seconds + line.wait_s(found.seconds)
    if not idle and likely_s > left_s:
        raise Overloaded(
            f"others wait already: the zip would take {likely_s:,.1f} s and is of use for {left_s:,.1f} s; try again later, or send it "
            "to POST /jobs",
            retry_after_s=math.ceil(likely_s - left_s),
        )


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
        self, segmenter: Segmenter, request: SegmentRequest, progress: Callable[[str, int, int], None], terms: Terms, choice: Choice
    ) -> None:
        self._segmenter = segmenter
        self._request = request
        self._progress = progress
        self._terms = terms
        self._choice = choice
        self._rows: list[dict[str, Any]] = []
        self._errors: dict[int, CallerError] = {}
        self._done = 0
        self._seconds: Counter[str] = Counter()

    async def run(self, file: BinaryIO, clock: Clock) -> Answer:
        """All of it; `clock` has the one thread that touches the zips."""
        # Here, as whoever is cancelled while a thread makes it has nothing to close.
        zips = ZipFiles(file, self._segmenter.limits)
        try:
            entries = await clock.off_loop("", zips.entries)
            await self._in_time(self._all(zips, entries, clock), len(entries))
            order = [name for row in self._rows for name in row.get("files", ())]
            await clock.off_loop("", zips.finish, order, REPORT, json.dumps({"images": self._rows}, indent=1).encode())
        except BaseException:
            zips.close()
            raise
        made, route = cast("BinaryIO", zips.out), self._choice.route
        return Archived(
            b"", "application/zip", "masks.zip", route, self._choice, "", dict(self._seconds), {}, self._note(), zip=made
        )  # fmt: skip

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

    async def _all(self, zips: ZipFiles, entries: list[Entry], clock: Clock) -> None:
        """A few at once.

        Raises:
            CallerError: none could be segmented; says why of the first.
        """
        self._rows = [{"name": entry.name[:MOST_NAME]} for entry in entries]
        self._progress("decode", 0, len(entries))
        todo = iter(enumerate(entries))

        async def work() -> None:
            for index, entry in todo:
                try:
                    self._rows[index] |= await self._one(zips, entry, clock)
                except (ZipTooLarge, _Dicom):
                    raise
                except CallerError as error:
                    self._errors[index] = error
                    self._rows[index] |= {"status": "failed", "detail": str(error)}
                self._done += 1
                self._progress("infer", self._done, len(entries))

        tasks = [asyncio.create_task(work()) for _ in range(min(AT_ONCE, len(entries)))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        errors = [self._errors[index] for index in sorted(self._errors)]
        if len(errors) == len(entries):
            raise _none(entries[0].name, errors)

    async def _one(self, zips: ZipFiles, entry: Entry, clock: Clock) -> dict[str, Any]:
        """One image, and what its row of the report says.

        Raises:
            CallerError: what is wrong with it.
        """
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spooled:
            target = cast("BinaryIO", spooled)
            await clock.off_loop("", zips.extract, entry, target)
            _refuse_dicom(target)
            # Time is for all together: each alone would be refused because of the others.
            terms = Terms(urgent=self._terms.urgent)
            answer = await self._segmenter.segment(
                target, replace(self._request, name=entry.name), terms=terms, choice=self._choice
            )
        files = await clock.off_loop("", lambda: zips.add(entry, _files(answer)))
        self._seconds.update(answer.seconds)
        route = answer.choice.route
        said = {"postprocessing": dict(answer.postprocessing), "note": answer.note}
        return {
            "status": "ok", "files": files, "model": answer.choice.model, "mode": route.mode, "level": route.level,
            "precision": answer.choice.precision, **{name: value for name, value in said.items() if value},
            "timings_ms": {phase: round(spent * 1e3, 2) for phase, spent in answer.seconds.items()},
        }  # fmt: skip

    def _note(self) -> str:
        return f"{len(self._errors)} of {len(self._rows)} files could not be segmented; see {REPORT}" if self._errors else ""


def _files(answer: Answer) -> dict[str, bytes]:
    """The answer to one image, by name; several formats come as a zip."""
    if answer.media_type != "application/zip":
        return {answer.file: answer.body}
    with zipfile.ZipFile(BytesIO(answer.body)) as several:
        return {name: several.read(name) for name in several.namelist()}


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
