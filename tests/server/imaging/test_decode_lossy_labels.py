"""Labels in lossy formats are refused, and the same labels in lossless ones are read."""

import io
from typing import Any

import imagecodecs
import numpy as np
import pytest
from PIL import Image as Pillow

from server.errors import Unreadable
from tests.server.imaging.conftest import assert_refused, header, read

LABELS = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, np.ones((8, 8), np.uint8))
EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"


def saved(format_: str, mode: str = "L", **options: Any) -> bytes:
    out = io.BytesIO()
    Pillow.fromarray(LABELS).convert(mode).save(out, format_, **options)
    return out.getvalue()


def animated(**options: Any) -> bytes:
    return saved("WEBP", "RGB", save_all=True, append_images=[Pillow.new("RGB", (32, 24))], **options)


LOSSY = {
    "JPEG": saved("JPEG", quality=90),
    "JPEG of the best quality": saved("JPEG", quality=100, subsampling=0),
    "progressive JPEG": saved("JPEG", progressive=True),
    "JPEG with EXIF": saved("JPEG", exif=EXIF),
    "colour JPEG": saved("JPEG", "RGB"),
    "CMYK JPEG": saved("JPEG", "CMYK"),
    "WebP": saved("WEBP", "RGB"),
    "WebP of the best quality": saved("WEBP", "RGB", quality=100),
    "WebP with alpha": saved("WEBP", "RGBA"),
    "WebP with EXIF": saved("WEBP", "RGB", exif=EXIF),
    "WebP with a profile": saved("WEBP", "RGB", icc_profile=b"odd"),
    "animated WebP": animated(lossless=False),
}
# The last byte of the header of a scan says how many bits of each value were dropped.
PREDICTIVE = imagecodecs.jpeg8_encode(LABELS, lossless=True)
SCAN_END = PREDICTIVE.index(b"\xff\xda") + 9
LOSSY["lossless JPEG of fewer bits"] = PREDICTIVE[:SCAN_END] + b"\x02" + PREDICTIVE[SCAN_END + 1 :]
LOSSLESS = {
    "lossless JPEG": PREDICTIVE,
    "lossless JPEG of another library": imagecodecs.ljpeg_encode(LABELS, bitspersample=8),
    "PNG": saved("PNG"),
    "palette PNG": saved("PNG", "P"),
    "BMP": saved("BMP"),
    "WebP": saved("WEBP", "RGB", lossless=True),
    "WebP with EXIF": saved("WEBP", "RGB", lossless=True, exif=EXIF),
    "WebP with a profile": saved("WEBP", "RGB", lossless=True, icc_profile=b"odd"),
    "animated WebP": animated(lossless=True),
}


@pytest.mark.parametrize("data", LOSSY.values(), ids=LOSSY)
def test_lossy_labels_are_refused_and_lossy_images_are_not(data: bytes) -> None:
    assert_refused(data, Unreadable, "lossy", by=(read, header), labels=True)
    assert read(data).size == header(data).size == LABELS.shape


@pytest.mark.parametrize("data", LOSSLESS.values(), ids=LOSSLESS)
def test_lossless_labels_are_read(data: bytes) -> None:
    decoded = read(data, labels=True)
    assert np.array_equal(decoded.values[..., 0], LABELS)
    assert header(data, labels=True).size == LABELS.shape


@pytest.mark.parametrize(
    "data", [b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBP" + b"JUNK\0\0\0\0" * 999, b"\xff\xd8\xff"]
)
def test_broken_labels_are_refused(data: bytes) -> None:
    assert_refused(data, Unreadable, by=(read, header), labels=True)
