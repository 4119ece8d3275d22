"""Makes the rows of new jobs: what a request resolves to now, and how long it will take."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, BinaryIO

from server.errors import InvalidParameter
from server.imaging import encode
from server.jobs.executor import preview_params
from server.jobs.file_store import COPY_BYTES
from server.jobs.job import JobSpec
from server.segment.request import SegmentParams, Upload
from server.segment.service import SegmentationService

# Formats that a PACS takes; the first is that of requests that name none. Not `dicomsr`, because it refers to an
# instance of `dicomseg` that would not be there.
STORED_FORMATS = ("dicomseg", "dicomseg.labelmap", "dicomseg.fractional")


async def make_spec(
    service: SegmentationService,
    upload: Upload,
    params: SegmentParams,
    *,
    preview: bool,
    destination: str | None = None,
) -> JobSpec:
    """Makes the specification of a job whose input is there.

    Raises:
        CallerError: the request is wrong, or could never be done.
    """
    params = storable(params) if destination else params
    target = service.registry.resolve(params)
    if (upload.reference or preview) and await service.is_batch(upload):
        raise InvalidParameter(
            "a zip of images has neither a reference nor a preview; send each image by itself to have them",
            parameter="reference" if upload.reference else "preview",
        )
    preview = preview and target.level != 1
    estimate = await service.estimate(upload, params)
    seconds = estimate.seconds
    if preview:
        seconds += (await service.estimate(upload, preview_params(params))).seconds
    spec = _spec(service, params, upload.name, upload.accept)
    return replace(spec, preview=preview, windows=estimate.windows, seconds=seconds, destination=destination)


def make_fetched_spec(
    service: SegmentationService,
    source: str,
    params: SegmentParams,
    accept: str | None,
    *,
    preview: bool,
    destination: str | None = None,
) -> JobSpec:
    """Makes the specification of a job whose input is fetched later, of which nothing is known yet.

    Raises:
        CallerError: the request is wrong, whatever its input is.
    """
    params = storable(params) if destination else params
    spec = _spec(service, params, "", accept)
    return replace(spec, preview=preview and spec.level != 1, source=source, destination=destination)


def repeatable_id(key: str, request: Mapping[str, Any], *files: BinaryIO | None) -> str:
    """The id of a job whose request may come several times: the same for the same key, parameters and files, and for no others.

    Args:
        key: random text of the caller.
        request: parameters of the request, as JSON has them.
        files: input and reference.
    """
    digest = hashlib.sha256(json.dumps([key, request], sort_keys=True).encode())
    for file in files:
        if file is not None:
            file.seek(0)
            content = hashlib.sha256()
            while piece := file.read(COPY_BYTES):
                content.update(piece)
            digest.update(content.digest())
            file.seek(0)
        digest.update(b"|")
    return digest.hexdigest()[:32]


def _spec(service: SegmentationService, params: SegmentParams, name: str, accept: str | None) -> JobSpec:
    # The target as it is now, whatever the default or the recommended level is when the job runs.
    target = service.registry.resolve(params)
    level = target.level if target.mode == "fast" else None
    request = params.model_dump() | {"model": target.model, "mode": target.mode, "level": level}
    # COCO alone repeats the file name, which may be a patient's.
    named = "coco" in encode.split(params.format or "")
    request |= {"name": name if named else "", "accept": accept}
    return JobSpec(
        request, False, target.model, target.mode, target.level, target.precision, windows=0, seconds=0.0
    )


def storable(params: SegmentParams) -> SegmentParams:
    """The parameters, with a format that a PACS takes.

    Raises:
        InvalidParameter: they name another one, or several.
    """
    names = encode.split(params.format or STORED_FORMATS[0])
    if len(names) != 1 or names[0] not in STORED_FORMATS:
        raise InvalidParameter(
            f"format={params.format!r:.60} is not what a PACS stores; with store=true give one of {', '.join(STORED_FORMATS)}, or none. A report (dicomsr) refers to a segmentation, and is in the answer alone: format=dicomseg,dicomsr without store",
            parameter="format",
            value=(params.format or "")[:60],
            allowed=[*STORED_FORMATS],
        )
    return params.model_copy(update={"format": names[0]})
