"""Stacks of public bug reports, of which planes were lost or thumbnails read, or whose answers lost their calibration."""

import io
from pathlib import Path

import httpx
import pytest
import tifffile

from tests.conftest import _shared


@pytest.fixture(scope="module")
def reports() -> Path:
    return _shared("field_reports")


@pytest.mark.parametrize(
    ("folder", "name"), [("stk-planes-lost", "metamorph.stk"), ("tiff-reduced-pages", "lsm_like.tif")]
)
def test_answer_has_a_page_per_plane(client: httpx.Client, reports: Path, folder: str, name: str) -> None:
    answer = client.post("/segment?level=2", content=(reports / folder / name).read_bytes())
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "image/tiff"
    assert "only the first" not in answer.headers.get("x-segment-note", "")
    with tifffile.TiffFile(io.BytesIO(answer.content)) as file:
        assert [page.shape for page in file.pages] == [(96, 128)] * 4


@pytest.mark.parametrize("format_", ["mask.tif", "labels.tif", "scores.tif", "uncertainty.tif"])
def test_answer_has_the_calibration_of_its_source(client: httpx.Client, reports: Path, format_: str) -> None:
    path = reports / "tiff-answer-loses-calibration" / "timelapse_TYX_0.25um.tif"
    mode = "mode=accurate" if format_ == "uncertainty.tif" else "level=2"
    answer = client.post(f"/segment?{mode}&format={format_}", content=path.read_bytes())
    assert answer.status_code == 200, answer.text
    with tifffile.TiffFile(path) as before, tifffile.TiffFile(io.BytesIO(answer.content)) as after:
        assert (after.series[0].axes, after.series[0].shape) == (
            before.series[0].axes,
            before.series[0].shape,
        )
        words = ("unit", "finterval", "frames")
        assert [after.imagej_metadata[w] for w in words] == [before.imagej_metadata[w] for w in words]
        assert after.pages.first.resolution == before.pages.first.resolution == (4, 4)
