"""DICOM files that were good once: bytes changed, cut out, doubled, cut off; and bombs. What comes out is a domain error or pixels.

`python -m tests.server.imaging.test_dicom_fuzz 100000` goes on for longer.
"""

import random
import struct
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pydicom.data
import pytest

from server.errors import CallerError, TooLarge, Unreadable
from tests.server.imaging.conftest import assert_refused, header, read
from tests.support.dicom import enhanced, instance, series, zipped
from tests.support.memory import memory_stays_below

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns about what it tolerates

LIMIT, MEMORY_MB, SECONDS = 1_000_000, 250, 60

ODD = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
VRS = [b"SQ", b"UN", b"OB", b"OW", b"US", b"DS", b"IS", b"UI", b"PN", b"AT", b"FD", b"OF", b"??"]
ITEMS = [b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\xfe\xff\x0d\xe0\0\0\0\0", b"\xfe\xff\xdd\xe0\0\0\0\0"]

GREY = np.random.default_rng(0).integers(0, 4096, (20, 24), dtype=np.uint16)
# Small files of every codec that pydicom ships but JPEG-LS: CharLS takes tens of seconds to refuse some damaged frames.
CODED = (
    "MR_small_RLE.dcm",
    "MR_small_jp2klossless.dcm",
    "SC_rgb_small_odd_jpeg.dcm",
    "SC_rgb_jpeg_gdcm.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
    "image_dfl.dcm",
)


def seeds() -> list[bytes]:
    volume = GREY.reshape(20, 6, 4).astype(np.int16)
    shipped = [pydicom.data.get_testdata_file(name, download=False) for name in CODED]
    files = [open(str(path), "rb").read() for path in shipped]  # noqa: PTH123, SIM115
    files += [
        instance(GREY),
        instance(GREY, "1.2.840.10008.1.2", RescaleSlope=0.3),
        instance(GREY, "1.2.840.10008.1.2.2"),
        instance(GREY.astype(np.uint8), PhotometricInterpretation="MONOCHROME1"),
        enhanced(volume),
        zipped(series(volume)),
        zipped(series(volume), 0),
    ]
    return files


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to four changes, most of them near the beginning, where the header is."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = int(len(changed) * chance.random() ** chance.choice([1, 3])) if changed else 0
        kind = chance.randrange(7)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            changed[at : at + 2] = chance.choice(VRS)
        elif kind == 2:
            changed[at : at + 4] = struct.pack("<I", chance.choice(ODD))
        elif kind == 3:
            changed[at : at + 2] = struct.pack("<H", chance.choice(ODD) & 0xFFFF)
        elif kind == 4:
            changed[at:at] = chance.choice(ITEMS) * chance.choice([1, 1, 50])
        elif kind == 5:
            del changed[at : at + chance.choice([1, 2, 8, 64])]
        else:
            del changed[at:]
    return bytes(changed)


def survives(data: bytes) -> str:
    """Decodes; returns the code of the error, or "" where it succeeds."""
    started = time.monotonic()
    outcomes = []
    for attempt in (header, read):
        try:
            attempt(data, limit=LIMIT, voxels=LIMIT)
            outcomes.append("")
        except CallerError as error:
            outcomes.append(error.code)
    assert time.monotonic() - started < SECONDS
    return outcomes[1]


def test_mutated_files_are_only_ever_refused() -> None:
    chance, files = random.Random(5), seeds()  # noqa: S311
    for data in files:
        assert survives(data) == ""
    with memory_stays_below(MEMORY_MB):
        outcomes = [survives(mutated(chance.choice(files), chance)) for _ in range(400)]
    # Some are read, some are refused: the mutations reach both.
    assert outcomes.count("") > 20
    assert outcomes.count("unreadable") > 60


def deflated(body: bytes) -> bytes:
    """A file whose data set inflates to `body`."""
    plain = instance(GREY, "1.2.840.10008.1.2.1.99")
    start = plain.index(b"1.2.840.10008.1.2.1.99")
    end = plain.index(b"\x08\x00\x16\x00", start) if b"\x08\x00\x16\x00" in plain[start:] else len(plain)
    meta = plain[: min(end, start + 22)]
    squeeze = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return meta + squeeze.compress(body) + squeeze.flush()


def private(length: int, count: int = 1) -> bytes:
    """Private elements of zeros."""
    element = b"\x09\x00\x10\x10OB\0\0" + struct.pack("<I", length) + bytes(length)
    return element * count


def nested(depth: int) -> bytes:
    """Sequences in sequences, each of undefined length."""
    return (b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + ITEMS[0]) * depth


META = instance(None)[:132] + b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
EMPTY_ITEMS = b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\0\0\0\0" * 2_000_000
TINY = b"".join(b"\x09\x00" + struct.pack("<H", k % 65536) + b"US\2\0\1\0" for k in range(600_000))
BOMBS: dict[str, Callable[[], Any]] = {
    "deflated": lambda: deflated(private(200_000_000)),
    "empty items": lambda: META + EMPTY_ITEMS,
    "items in a zip": lambda: zipped([META + EMPTY_ITEMS]),
    "elements": lambda: META + TINY,
    "long element": lambda: META + private(64, 1)[:8] + struct.pack("<I", 0xFFFFFFF0) + bytes(100),
    "large element in a zip": lambda: zipped([META + private(200_000_000)]),
    "nested": lambda: META + nested(20_000),
    "rows and columns": lambda: instance(GREY, Rows=65535, Columns=65535),
    "frames": lambda: instance(GREY, NumberOfFrames=2_000_000_000),
    "pixels in a zip": lambda: zipped([instance(np.zeros((9000, 9000), np.uint16))]),
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_before_they_take_memory(make: Callable[[], bytes]) -> None:
    data = make()
    read(instance(GREY))
    started = time.monotonic()
    with memory_stays_below(MEMORY_MB + 2 * len(data) / 1e6), pytest.raises((TooLarge, Unreadable)):
        read(data, limit=LIMIT, voxels=LIMIT)
    assert time.monotonic() - started < SECONDS


def test_frame_with_another_size_than_its_header_is_refused() -> None:
    """A codec would allocate what its own header says."""
    path = pydicom.data.get_testdata_file("MR_small_jp2klossless.dcm", download=False)
    data = bytearray(open(str(path), "rb").read())  # noqa: PTH123, SIM115
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = struct.pack(">II", 60000, 60000)
    with memory_stays_below(100):
        assert_refused(bytes(data), Unreadable, "damaged")


if __name__ == "__main__":
    generator, originals = random.Random(), seeds()  # noqa: S311
    for _ in range(int(sys.argv[1])):
        survives(mutated(generator.choice(originals), generator))
