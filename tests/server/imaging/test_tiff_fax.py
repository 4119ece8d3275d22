"""TIFF of fax compression whose strips are cut; files by libtiff (through Pillow)."""

import io
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from server.errors import Unreadable
from tests.server.imaging.conftest import assert_refused, read
from tests.support.files import picture_bytes

RNG = np.random.default_rng(0)
PICTURES = {
    "noise": RNG.random((33, 45)) > 0.7,
    "stripes": np.indices((64, 96)).sum(0) // 7 % 2 > 0,
    "white": np.ones((40, 50), bool),
    "black": np.zeros((40, 50), bool),
    "narrow": RNG.random((40, 5)) > 0.5,
}
COMPRESSIONS = ["tiff_ccitt", "group3", "group4"]


def fax(name: str, compression: str) -> bytes:
    return picture_bytes(Pillow.fromarray(PICTURES[name]), "TIFF", compression=compression)


def cut(data: bytes, part: float) -> bytes:
    """The file with a byte count of its only strip that is smaller."""
    with tifffile.TiffFile(io.BytesIO(data)) as written:
        count = written.pages.first.tags["StripByteCounts"]
        length = written.pages.first.databytecounts[0]
    layout = "<H" if count.dtype == tifffile.DATATYPE.SHORT else "<I"
    value = struct.pack(layout, int(part * length))
    return data[: count.valueoffset] + value + data[count.valueoffset + len(value) :]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", PICTURES)
def test_whole_strips_are_read(name: str, compression: str) -> None:
    image = read(fax(name, compression))
    assert np.array_equal(image.values[..., 0], PICTURES[name] * 255)
    assert image.note == ""


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("name", PICTURES)
def test_cut_strips_are_refused(name: str, compression: str) -> None:
    for part in (0.3, 0.4, 0.5):
        assert_refused(cut(fax(name, compression), part), Unreadable, "truncated")
