"""A zip of images: each goes the way of every request, a few at once so that they share batches; a zip of answers comes back."""

import asyncio
import json
import math
import tempfile
import zipfile
from collections import Counter
from dataclasses import replace
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from server.errors import CallerError, InvalidParameter, TooLarge, Unreadable, UnsupportedType
from server.imaging.zip_reader import MAX_NAME, is_zip
from server.segment.deadline import timeout
from server.segment.estimate import Estimate, times
from server.segment.registry import Target
from server.segment.request import OnProgress, QoS, Response, SegmentParams, Upload
from server.segment.workers import Worker, gather_limited
from server.segment.zip_files import SPOOL_BYTES, Entry, ZipFiles, ZipTooLarge

if TYPE_CHECKING:
    from server.segment.service import SegmentationService

# Images at once: enough to fill batches with small ones, while each holds its memory and a file of up to a
# body's size.
CONCURRENCY = 4

REPORT = "report.json"


async def estimate(service: "SegmentationService", upload: Upload, params: SegmentParams) -> Estimate:
    """Estimates a zip: the first image that can be read stands for all, and images count as windows.

    Raises:
        CallerError: no image could be segmented, or the zip is over a limit.
    """
    zips = ZipFiles(upload.file, service.limits)
    try:
        worker = service.workers.task()
        entries = await worker.run("decode", zips.entries)
        one = await _estimate_first(service, zips, entries, params, worker)
    finally:
        zips.close()
        upload.file.seek(0)
    return replace(times(one, len(entries)), windows=len(entries))


async def segment(
    service: "SegmentationService",
    upload: Upload,
    params: SegmentParams,
    qos: QoS,
    on_progress: OnProgress,
    target: Target,
) -> Response:
    """Segments each image of a zip; progress counts images.

    Raises:
        CallerError, TryAgain, ServerFault: the whole zip is refused. The error of one image is in its report.
    """
    for parameter, given in (("reference", upload.reference), ("min_level", params.min_level)):
        if given is not None:
            raise InvalidParameter(
                f"{parameter} is for one image, and the input is a zip; send each image by itself to use it",
                parameter=parameter,
            )
    zips = ZipFiles(upload.file, service.limits)
    try:
        if qos.budget_s < math.inf:
            service.admission.check_time(await estimate(service, upload, params), qos)
        return await _ZipBatch(service, params, qos, on_progress, target, upload).run(zips)
    except BaseException:
        zips.close()
        raise


async def _estimate_first(
    service: "SegmentationService",
    zips: ZipFiles,
    entries: list[Entry],
    params: SegmentParams,
    worker: Worker,
) -> Estimate:
    """The estimate of the first image that can be read.

    Raises:
        CallerError: there is none.
    """
    errors: list[CallerError] = []
    for entry in entries:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spooled:
            file = cast("BinaryIO", spooled)
            try:
                await worker.run("decode", zips.extract, entry, file)
                _check_image(file)
                return await service.estimate(Upload(file), params)
            except ZipTooLarge:
                raise
            except CallerError as error:
                errors.append(error)
    raise _no_image(entries[0].name, errors)


def _no_image(first: str, errors: list[CallerError]) -> CallerError:
    """The error of a zip without an image that could be segmented; what is wrong with the first is true of most."""
    kind = UnsupportedType if all(isinstance(error, UnsupportedType) for error in errors) else Unreadable
    return kind(
        f"none of the zip's {len(errors)} files could be segmented; {first!r:.80}: {errors[0]}",
        actual=len(errors),
        file=first[:80],
    )


class _ZipBatch:
    """The images of one zip, while they are worked on."""

    def __init__(
        self,
        service: "SegmentationService",
        params: SegmentParams,
        qos: QoS,
        on_progress: OnProgress,
        target: Target,
        upload: Upload,
    ) -> None:
        self._service = service
        self._params = params
        self._qos = qos
        self._on_progress = on_progress
        self._target = target
        self._upload = upload
        self._rows: list[dict[str, Any]] = []
        self._errors: dict[int, CallerError] = {}
        self._done = 0
        self._timings: Counter[str] = Counter()
        # One call at a time may touch the zips.
        self._files = asyncio.Lock()

    async def run(self, zips: ZipFiles) -> Response:
        """Segments the images and packs the answers, in the order of the images."""
        worker = self._service.workers.task()
        entries = await worker.run("decode", zips.entries)
        await self._run_within_timeout(self._segment_all(zips, entries, worker), len(entries))
        order = [name for row in self._rows for name in row.get("files", ())]
        rows = json.dumps({"images": self._rows}, indent=1).encode()
        await worker.run("encode", zips.finish, order, REPORT, rows)
        failed = len(self._errors)
        note = f"{failed} of {len(self._rows)} files could not be segmented; see {REPORT}" if failed else ""
        body = cast("BinaryIO", zips.out)
        return Response(
            body,
            "application/zip",
            "masks.zip",
            self._target,
            self._target,
            "",
            dict(self._timings),
            note=note,
        )

    async def _run_within_timeout(self, work: Any, total: int) -> None:
        """Awaits the work for as long as the request may take.

        Raises:
            TooLarge: it took longer.
        """
        left_s = self._qos.timeout_s
        try:
            async with timeout(left_s) as limit:
                await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise TooLarge(
                f"the zip holds {total} images, {self._done} of which were done in the {left_s:g} s that POST /segment works for at "
                "most; send it to POST /jobs, or in parts",
                limit=left_s,
                unit="s",
                actual=self._done,
                remedy="POST /jobs",
            ) from error

    async def _segment_all(self, zips: ZipFiles, entries: list[Entry], worker: Worker) -> None:
        """Segments a few images at once.

        Raises:
            CallerError: none could be segmented.
        """
        self._rows = [{"name": entry.name[:MAX_NAME]} for entry in entries]
        self._on_progress("decode", 0, len(entries))

        async def segment_one(index: int, entry: Entry) -> None:
            try:
                self._rows[index] |= await self._segment_one(zips, entry, worker)
            except ZipTooLarge:
                raise
            except CallerError as error:
                self._errors[index] = error
                self._rows[index] |= {"status": "failed", "code": error.code, "detail": str(error)}
            self._done += 1
            self._on_progress("infer", self._done, len(entries))

        await gather_limited(entries, segment_one, CONCURRENCY)
        errors = [self._errors[index] for index in sorted(self._errors)]
        if len(errors) == len(entries):
            raise _no_image(entries[0].name, errors)

    async def _segment_one(self, zips: ZipFiles, entry: Entry, worker: Worker) -> dict[str, Any]:
        """Segments one image, and describes it for the report.

        Raises:
            CallerError: the image is refused.
        """
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spooled:
            file = cast("BinaryIO", spooled)
            async with self._files:
                await worker.run("decode", zips.extract, entry, file)
            _check_image(file)
            # Time is for all images together: one alone would be refused because of the others.
            upload = Upload(file, name=entry.name, accept=self._upload.accept)
            qos = QoS(priority=self._qos.priority)
            response = await self._service.segment(upload, self._params, qos, target=self._target)
        async with self._files:
            files = await worker.run("encode", zips.add, entry, _answer_files(response))
        self._timings.update(response.timings)
        target = response.target
        optional: dict[str, Any] = {
            "postprocessing": dict(response.postprocessing) or None,
            "note": response.note or None,
            "uncertain_share": response.uncertain_share,
        }
        return {
            "status": "ok",
            "files": files,
            "model": target.model,
            "mode": target.mode,
            "level": target.level,
            "precision": target.precision,
            **{name: value for name, value in optional.items() if value is not None},
        }


def _answer_files(response: Response) -> dict[str, bytes]:
    """The answer to one image, by file name; several formats come as a zip."""
    body = cast("bytes", response.body)
    if response.media_type != "application/zip":
        return {response.filename: body}
    with zipfile.ZipFile(BytesIO(body)) as several:
        return {name: several.read(name) for name in several.namelist()}


def _check_image(file: BinaryIO) -> None:
    """Refuses what cannot be one image of many.

    Raises:
        UnsupportedType: the file is a zip itself.
    """
    if is_zip(file):
        raise UnsupportedType("a zip in a zip is not read; pack the images themselves")
