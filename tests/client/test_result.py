import io
import json
from typing import Any

import httpx
import nrrd
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from client.errors import BadResponse
from client.result import Result, read_result
from tests.client.conftest import HEADERS, zipped
from tests.support.files import nifti_bytes, picture_bytes

MASK = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
VOXELS = np.random.default_rng(0).integers(0, 3, (4, 3, 2), dtype=np.uint8)


def result(**files: bytes) -> Result:
    return Result({name.replace("__", "."): data for name, data in files.items()}, "m", "fast", 1, "fp32", {})


def indexed(mask: np.ndarray) -> bytes:
    picture = Pillow.new("P", mask.shape[::-1])
    picture.putdata(mask.ravel().tolist())
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    return picture_bytes(picture)


def tiff(pages: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, pages, photometric="minisblack", **options)
    return out.getvalue()


def npz(mask: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, mask=mask, scores=np.zeros(3))
    return out.getvalue()


def nrrd_bytes(voxels: np.ndarray) -> bytes:
    out = io.BytesIO()
    nrrd.write(out, voxels)
    return out.getvalue()


FILES = {
    "mask.png": (indexed(MASK), MASK),
    "mask_1bit.png": (picture_bytes(Pillow.fromarray(MASK == 1)), MASK == 1),
    "labels.png": (picture_bytes(np.array([[0, 65535]], np.uint16)), [[0, 65535]]),
    "mask.tiff": (tiff(VOXELS), VOXELS),
    "mask.tif": (tiff(VOXELS[:1]), VOXELS[0]),
    "labels.tiff": (tiff(VOXELS, metadata={"axes": "QYX"}, imagej=False), VOXELS),
    "mask.nii.gz": (nifti_bytes(VOXELS), VOXELS),
    "mask.seg.nrrd": (nrrd_bytes(VOXELS), VOXELS),
    "scores.npz": (npz(MASK), MASK),
}


@pytest.mark.parametrize("name", FILES)
def test_mask_is_decoded(name: str) -> None:
    data, expected = FILES[name]
    found = Result({name: data}, "", "", 0, "", {}).mask
    assert found.dtype != bool
    assert np.array_equal(found, expected)


def test_mask_is_the_plainest_of_several() -> None:
    files = {
        name: data for name, (data, _) in FILES.items() if name in ("scores.npz", "labels.png", "mask.png")
    }
    assert np.array_equal(Result({"scores.tiff": b"", "mask.csv": b""} | files, "", "", 0, "", {}).mask, MASK)


def test_nrrd_with_other_data_file_is_not_read() -> None:
    text = b"NRRD0004\ntype: uint8\ndimension: 1\nsizes: 4\nencoding: raw\ndata file: /etc/hostname\n\n"
    with pytest.raises(ValueError, match="another file"):
        result(mask__seg__nrrd=text).array("mask.seg.nrrd")


def test_missing_parts_raise() -> None:
    with pytest.raises(ValueError, match="no pixels"):
        result(objects__csv=b"").array("objects.csv")
    with pytest.raises(LookupError, match="json"):
        _ = result(mask__png=b"").statistics
    with pytest.raises(LookupError, match="'mask'"):
        _ = result(scores__tiff=b"").mask


def test_answer_to_zip_lists_images() -> None:
    report = json.dumps({"images": [{"name": "a.png", "status": "ok"}]}).encode()
    answer = result(a_mask__png=FILES["mask.png"][0], report__json=report)
    assert answer.images == [{"name": "a.png", "status": "ok"}]
    assert np.array_equal(answer.array("a_mask.png"), MASK)
    for attribute in ("mask", "statistics"):
        with pytest.raises(LookupError, match="zip of images"):
            getattr(answer, attribute)
    assert result(mask__png=b"").images == []


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('inline; filename="mask.nii.gz"', "mask.nii.gz"),
        ("inline", "mask"),
        ('x; filename="../../etc"', "mask"),
    ],
)
def test_file_name_of_only_file(disposition: str, name: str) -> None:
    headers = httpx.Headers(HEADERS | {"Content-Disposition": disposition})
    assert list(read_result(headers, b"").files) == [name]


def test_headers_are_read() -> None:
    more = {
        "Content-Type": "application/zip",
        "X-Segment-IoU": "0.5",
        "X-Segment-Note": "n",
        "X-Segment-Degraded": "load",
    }
    answer = read_result(
        httpx.Headers(HEADERS | more), zipped({"mask.png": b"1", "folder/": b"", "statistics.json": b"{}"})
    )
    assert list(answer.files) == ["mask.png", "statistics.json"]
    assert (answer.model, answer.mode, answer.level, answer.precision) == ("fake", "accurate", 2, "fp32")
    assert (answer.iou, answer.dice, answer.note, answer.degraded, answer.request_id) == (
        0.5,
        None,
        "n",
        "load",
        "abc",
    )
    assert answer.timings_ms == {"decode": 1.5, "infer": 20.0}
    assert answer.total_ms == 21.5
    assert answer.statistics == {}


def test_response_without_model_raises() -> None:
    with pytest.raises(BadResponse):
        read_result(httpx.Headers(), b"")
