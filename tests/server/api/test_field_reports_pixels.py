"""Files of public bug reports whose pixels were read wrongly, or refused, through the shipped network."""

import io
from pathlib import Path

import httpx
import numpy as np
import pytest

from server.segment.quality import overlap
from tests.conftest import _shared
from tests.support.files import mask_of


@pytest.fixture(scope="module")
def reports() -> Path:
    return _shared("field_reports")


def segmented(client: httpx.Client, path: Path, query: str = "format=mask.png") -> httpx.Response:
    answer = client.post(f"/segment?level=2&{query}", content=path.read_bytes())
    assert answer.status_code == 200, answer.text
    return answer


def iou(client: httpx.Client, one: Path, other: Path) -> float:
    masks = [mask_of(segmented(client, path).content) > 0 for path in (one, other)]
    assert masks[1].any()
    return overlap(*masks).iou


@pytest.mark.parametrize(
    ("folder", "name", "same"),
    [
        ("false-colour-dapi", "blue.png", "grey_same_pixels.png"),
        ("png16-colour-low-range", "rgb16.png", "rgb16_same.tif"),
        ("tiff-miniswhite-not-inverted", "miniswhite_float32.tif", "miniswhite_uint16_works.tif"),
    ],
)
def test_mask_is_that_of_the_same_pixels(
    client: httpx.Client, reports: Path, folder: str, name: str, same: str
) -> None:
    assert iou(client, reports / folder / name, reports / folder / same) == 1


def test_false_colour_is_noted(client: httpx.Client, reports: Path) -> None:
    path = reports / "false-colour-dapi" / "blue.png"
    answer = segmented(client, path, "format=json")
    assert "only the blue channel" in answer.headers["x-segment-note"]
    assert answer.json()["note"] == answer.headers["x-segment-note"]


def test_fax_is_as_png(client: httpx.Client, reports: Path) -> None:
    """Pillow, which reads fax by libtiff, makes the PNG."""
    from PIL import Image as Pillow

    fax, out = reports / "tiff-ccitt-fax" / "group4.tif", io.BytesIO()
    with Pillow.open(fax) as picture:
        picture.save(out, "PNG")
    same = client.post("/segment?level=2&format=mask.png", content=out.getvalue())
    assert np.array_equal(mask_of(segmented(client, fax).content), mask_of(same.content))


@pytest.mark.parametrize(
    ("path", "note"),
    [("bad-exif/exif_bad.jpg", "EXIF"), ("png-long-metadata/itxt_xmp_1.2MB.png", "metadata")],
)
def test_metadata_costs_no_pixel(client: httpx.Client, reports: Path, path: str, note: str) -> None:
    from PIL import Image as Pillow
    from PIL import PngImagePlugin

    answer = segmented(client, reports / path)
    assert note in answer.headers["x-segment-note"]
    limit, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, 10**8
    try:
        with Pillow.open(reports / path) as picture:
            out = io.BytesIO()
            Pillow.fromarray(np.asarray(picture)).save(out, "PNG")
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = limit
    same = client.post("/segment?level=2&format=mask.png", content=out.getvalue())
    assert np.array_equal(mask_of(answer.content), mask_of(same.content))
