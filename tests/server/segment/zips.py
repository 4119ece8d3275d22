"""Zips of images, and the answers to them."""

import io
import json
import warnings
import zipfile
from typing import Any

import numpy as np

from server.segment.request import Response
from tests.support.files import picture_bytes
from tests.support.service import bright, opened_service, segment

Files = dict[str, bytes] | list[tuple[str, bytes]]
Row = dict[str, Any]


def packed(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip."""
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as made:
        warnings.simplefilter("ignore")  # of two files of one name
        for name, body in files.items() if isinstance(files, dict) else files:
            made.writestr(name, body)
    return out.getvalue()


def picture(value: int = 0, side: int = 16) -> bytes:
    """Bright on its right half, and never the same twice."""
    pixels = np.full((side, side), value, dtype=np.uint8)
    pixels[:, side // 2 :] = 200
    return picture_bytes(pixels)


def unpacked(response: Response) -> tuple[dict[str, bytes], list[Row]]:
    """The files of the answer, and the rows of its report."""
    assert not isinstance(response.body, bytes)
    with zipfile.ZipFile(io.BytesIO(response.body.read())) as made:
        assert made.testzip() is None
        files = {name: made.read(name) for name in made.namelist()}
    response.close()
    return files, json.loads(files.pop("report.json"))["images"]


async def answered(
    files: Files | bytes,
    reference: bytes | None = None,
    *,
    run: Any = bright,
    limits: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, bytes], list[Row]]:
    data = files if isinstance(files, bytes) else packed(files)
    with opened_service(run, limits=limits or {}) as service:
        return unpacked(await segment(service, data, reference, **options))


SMALL = {"max_body_mb": 1, "max_zip_mb": 100}
