"""JPEG that is cut, with and without an end marker; files by Pillow."""

from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from server.errors import Unreadable
from tests.server.imaging.conftest import assert_refused, header, read
from tests.support.files import picture_bytes

END = b"\xff\xd9"
RNG = np.random.default_rng(0)
PICTURE = Pillow.fromarray(
    np.kron(RNG.integers(0, 256, (12, 15, 3), dtype=np.uint8), np.ones((9, 9, 1), np.uint8))
)
FLAT = Pillow.new("RGB", (90, 70), (128, 128, 128))
WAYS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "no subsampling": {"subsampling": 0},
}
MODES = ["L", "RGB", "CMYK"]


def jpeg(picture: Pillow.Image, mode: str, way: str) -> bytes:
    return picture_bytes(picture.convert(mode), "JPEG", **WAYS[way])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("picture", [PICTURE, FLAT], ids=["picture", "grey"])
def test_whole_files_are_read_with_and_without_end_marker(picture: Pillow.Image, way: str, mode: str) -> None:
    data = jpeg(picture, mode, way)
    image = read(data)
    assert image.note == ""
    for other in (data[:-2], data[:-1], data + b"behind" + data):
        assert np.array_equal(read(other).values, image.values)
        assert header(other).size == image.size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_cut_files_are_refused_with_and_without_end_marker(way: str, mode: str) -> None:
    data = jpeg(PICTURE, mode, way)
    # A progressive file may be cut in the tables between two scans.
    reason = "" if way == "progressive" else "truncated"
    for part in (0.5, 0.6, 0.7, 0.8, 0.9):
        cut = data[: int(part * len(data))]
        for end in (b"", END):
            assert_refused(cut + end, Unreadable, reason)


def test_frame_that_is_larger_than_its_data_is_refused() -> None:
    data = bytearray(jpeg(PICTURE, "RGB", "baseline"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = (800).to_bytes(2, "big") * 2
    assert_refused(bytes(data), Unreadable, "truncated")


def test_cut_before_a_restart_marker_is_refused() -> None:
    data = jpeg(PICTURE, "RGB", "restart markers")
    for number in range(4):
        at = data.index(bytes([0xFF, 0xD0 + number]))
        assert_refused(data[:at] + END, Unreadable, "truncated")
        assert_refused(data[: at + 2] + END, Unreadable, "truncated")


@pytest.mark.parametrize("mode", MODES)
def test_progressive_file_that_is_cut_between_two_scans_is_refused(mode: str) -> None:
    data = jpeg(PICTURE, mode, "progressive")
    tables = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xc4"]
    scan = data.index(b"\xff\xda")
    for at in tables:
        if at > scan:
            assert_refused(data[:at], Unreadable, "truncated")
