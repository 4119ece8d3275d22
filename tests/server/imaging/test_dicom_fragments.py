"""Encapsulated pixels: fragments become frames as the standard says, and none takes more memory than a frame can need."""

import io
import struct
from typing import Any

import numpy as np
import pytest
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.encoders import RLELosslessEncoder
from pydicom.uid import RLELossless

from server.errors import Unreadable
from server.imaging.dicom_files import read_instances
from server.imaging.dicom_fragments import read_frames
from server.imaging.dicom_frames import pixel_format
from server.imaging.dicom_pixels import decode_frames
from tests.server.imaging.conftest import assert_refused, read, uploaded
from tests.support.dicom import instance, zipped
from tests.support.memory import memory_stays_below

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns about what it tolerates

ROWS, COLUMNS = 12, 10
GREY = np.random.default_rng(5).integers(0, 256, (ROWS, COLUMNS), dtype=np.uint8)
VALUE = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
END = b"\xfe\xff\xdd\xe0\0\0\0\0"
LIMIT, EVERYTHING = 64 * 1024, 1 << 30


def item(data: bytes) -> bytes:
    return b"\xfe\xff\x00\xe0" + struct.pack("<I", len(data)) + data


def table(*offsets: int) -> bytes:
    return item(struct.pack(f"<{len(offsets)}I", *offsets))


def file_of(value: bytes, frames: int = 1) -> bytes:
    """An instance of run-length frames, whose value is written as it is."""
    described: dict[str, Any] = {
        "Rows": ROWS,
        "Columns": COLUMNS,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "NumberOfFrames": frames if frames > 1 else None,
        "Modality": "US",
    }
    return instance(None, RLELossless, **described) + VALUE + value


def coded(pixels: np.ndarray = GREY) -> bytes:
    data: bytes = RLELosslessEncoder.encode(
        pixels,
        rows=ROWS,
        columns=COLUMNS,
        samples_per_pixel=1,
        bits_allocated=8,
        bits_stored=8,
        pixel_representation=0,
        photometric_interpretation="MONOCHROME2",
        number_of_frames=1,
    )
    return data + b"\0" * (len(data) % 2)


BOMBS = {
    "empty fragments": item(b"") + item(b"") * (32 << 17) + END,
    "one fragment": item(b"") + item(bytes(256 << 20)) + END,
    "table": item(bytes(256 << 20)) + END,
}


@pytest.mark.parametrize("name", BOMBS)
def test_fragments_are_refused_before_they_take_memory(name: str) -> None:
    data = zipped([file_of(BOMBS[name])])
    read(file_of(item(b"") + item(coded()) + END))
    with memory_stays_below(40):
        assert_refused(data, Unreadable, "damaged")


def test_nothing_behind_the_last_frame_is_read() -> None:
    value = item(b"") + item(coded()) + END
    with uploaded(file_of(value)) as file:
        (one,) = read_instances(file, 1).instances
    stream = io.BytesIO(value + bytes(1000))
    (stored,) = decode_frames(one, pixel_format(one.dataset), 1, stream, EVERYTHING)
    assert np.array_equal(stored, GREY)
    assert stream.tell() == len(value)


def frames_of(value: bytes, count: int) -> list[bytes]:
    return list(read_frames(io.BytesIO(value), count, LIMIT, EVERYTHING))


PARTS = [bytes([k]) * 10 for k in range(6)]
EOI = [part + b"\xff\xd9" for part in PARTS]


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (encapsulate(PARTS), 6),
        (encapsulate(PARTS, has_bot=False), 6),
        (encapsulate(PARTS, fragments_per_frame=3), 6),
        (encapsulate(PARTS[:1], fragments_per_frame=3, has_bot=False), 1),
        (encapsulate(PARTS[:1], has_bot=False), 1),
        (encapsulate(PARTS), 4),
        (encapsulate(EOI, fragments_per_frame=2, has_bot=False), 6),
        (encapsulate(EOI, fragments_per_frame=2, has_bot=False), 5),
        (table(0) + b"".join(map(item, PARTS)), 1),
        (table(0, 36) + b"".join(map(item, PARTS)), 1),
        (table(0, 36) + b"".join(map(item, PARTS)), 2),
    ],
)
def test_frames_are_those_of_pydicom(value: bytes, count: int) -> None:
    expected = list(generate_frames(value, number_of_frames=count))[:count]
    assert frames_of(value + END, count) == expected
    # Some devices leave out the delimiter.
    assert frames_of(value, count) == expected


def test_as_many_fragments_as_frames_need_no_table() -> None:
    assert frames_of(table(*[0] * 6) + b"".join(map(item, PARTS)), 6) == PARTS


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (b"", 1),
        (item(b"") + END, 1),
        (b"ABCD" + bytes(4), 1),
        (item(b"abc") + item(PARTS[0]) + END, 1),
        (item(b"") + item(PARTS[0]) + b"ABCD" + bytes(4), 1),
        (item(b"") + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + PARTS[0], 1),
        (item(b"") + item(PARTS[0]) + END, 2),
        (item(b"") + item(PARTS[0]) + item(PARTS[1]) + item(PARTS[2]) + END, 2),
        (table(0) + b"".join(map(item, PARTS)) + END, 2),
        (item(b"") + item(bytes(LIMIT + 2)) + END, 1),
        (item(b"") + item(bytes(LIMIT)) + item(b"ab") + END, 1),
        (table(0, LIMIT + 18) + item(bytes(LIMIT)) + item(b"ab") + item(b"ab") + END, 2),
        (item(b"") + item(b"ab") * 1065 + END, 1),
    ],
)
def test_values_that_hold_no_frames_are_refused(value: bytes, count: int) -> None:
    with pytest.raises(Unreadable) as caught:
        frames_of(value, count)
    assert caught.value.fields["reason"] == "damaged"


def test_a_fragment_that_is_cut_off_is_truncated() -> None:
    with pytest.raises(Unreadable) as caught:
        frames_of((item(b"") + item(PARTS[0]))[:-4], 1)
    assert caught.value.fields["reason"] == "truncated"
