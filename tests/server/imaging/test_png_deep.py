"""PNG with 16 bits per channel: written by hand from the specification, and by ImageMagick where it is installed."""

import io
import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import ImageOps

from server.errors import CallerError, TooLarge, Unreadable
from server.imaging import png_chunks
from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import assert_refused, deterministic, header, read
from tests.support.memory import memory_stays_below

RNG = np.random.default_rng(0)
# Type of pixels in the header per number of channels, and whether the last is alpha.
TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    values: np.ndarray, *before: bytes, behind: bytes = b"", interlaced: bool = False, idat: int = 1000
) -> bytes:
    """A PNG of (H, W, channels) with 16 bits, without filters; chunks before and behind the pixels."""
    height, width, channels = values.shape
    passes = [values[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [values]
    rows = (row for part in passes if part.size for row in part)
    packed = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows))
    parts = [packed[first : first + idat] for first in range(0, len(packed), idat)]
    size = struct.pack(">IIBBBBB", width, height, 16, TYPES[channels], 0, 0, interlaced)
    body = b"".join(chunk(b"IDAT", part) for part in parts)
    return png_chunks.MAGIC + chunk(b"IHDR", size) + b"".join(before) + body + behind + chunk(b"IEND", b"")


def deep(channels: int, size: tuple[int, int] = (23, 19), top: int = 65536) -> np.ndarray:
    return RNG.integers(0, top, (*size, channels), dtype=np.uint16)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", TYPES)
@pytest.mark.parametrize("top", [65536, 256, 2])
def test_all_16_bits_are_read(channels: int, interlaced: bool, top: int) -> None:
    values = deep(channels, top=top)
    data = png(values, interlaced=interlaced)
    image, known = read(data), header(data)
    expected = values[..., :1] if channels < 3 else values[..., :3]
    assert image.values.dtype == np.uint16
    assert np.array_equal(image.values, expected)
    assert image.note == ""
    assert known.size == (23, 19)
    assert known.channels * known.sample_bytes >= image.values.shape[-1] * 2
    # 8 bits are those that Pillow reads, which is not our code.
    if channels > 2 and top == 65536:
        by_pillow = np.asarray(Pillow.open(io.BytesIO(data)))
        assert np.array_equal(image.values >> 8, by_pillow[..., :3])


@deterministic
@given(
    st.sampled_from([1, 2, 3, 4]), st.integers(1, 17), st.integers(1, 17), st.booleans(), st.integers(1, 50)
)
def test_every_size_is_read(channels: int, height: int, width: int, interlaced: bool, idat: int) -> None:
    values = deep(channels, (height, width))
    image = read(png(values, interlaced=interlaced, idat=idat), channel=0)
    assert np.array_equal(image.values, values[..., :1])


@pytest.mark.parametrize("channels", [3, 4])
def test_low_light_is_as_in_tiff(channels: int) -> None:
    values = deep(channels, top=235) + np.uint16(15)
    same = tiff(values[..., :3], photometric="rgb")
    assert np.array_equal(read(png(values)).values, read(same).values)


ANCILLARY = {
    "gamma": chunk(b"gAMA", struct.pack(">I", 45455)),
    "significant bits": chunk(b"sBIT", bytes([12, 12, 12])),
    "transparent colour": chunk(b"tRNS", struct.pack(">HHH", 5, 6, 7)),
    "background": chunk(b"bKGD", struct.pack(">HHH", 5, 6, 7)),
    "profile": chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(b"no profile")),
    "resolution": chunk(b"pHYs", struct.pack(">IIB", 1, 1, 1)),
    "text": chunk(b"tEXt", b"Comment\0hello"),
    "text too long": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5_000_000))),
    "unknown": chunk(b"vpAg", bytes(9)),
    "wrong checksum": chunk(b"tEXt", b"Comment\0hello")[:-1] + b"?",
    "suggested palette": chunk(b"sPLT", b"?"),
}


@pytest.mark.parametrize("name", ANCILLARY)
def test_other_chunks_change_no_pixel(name: str) -> None:
    values = deep(3)
    for data in (png(values, ANCILLARY[name]), png(values, behind=ANCILLARY[name])):
        assert np.array_equal(read(data).values, values)
        assert header(data).size == (23, 19)


@pytest.mark.parametrize("behind", [False, True])
def test_orientation_is_applied(behind: bool) -> None:
    values = deep(3)
    for orientation in range(1, 9):
        exif = Pillow.Exif()
        exif[0x0112] = orientation
        info = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
        data = png(values, behind=info) if behind else png(values, info)
        eight = Pillow.open(io.BytesIO(png(values, info)))
        upright = np.asarray(ImageOps.exif_transpose(eight))
        assert np.array_equal(read(data).values >> 8, upright)


def test_one_channel_can_be_chosen() -> None:
    values = deep(3)
    assert np.array_equal(read(png(values), channel=1).values, values[..., 1:2])
    assert np.array_equal(read(png(values), labels=True).values, values)


@pytest.mark.parametrize("kind", ["PNG48", "PNG64", "PNG32:16"])
@pytest.mark.parametrize("interlace", ["None", "PNG"])
def test_files_of_imagemagick(kind: str, interlace: str, tmp_path: Path) -> None:
    if shutil.which("convert") is None:
        pytest.skip("needs ImageMagick")
    values = deep(3, (40, 50))
    (tmp_path / "in.tif").write_bytes(tiff(values, photometric="rgb"))
    prefix = kind.split(":", maxsplit=1)[0].replace("PNG32", "PNG64")
    command = ["convert", "in.tif", "-depth", "16", "-interlace", interlace, f"{prefix}:out.png"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert np.array_equal(read((tmp_path / "out.png").read_bytes()).values, values)


def test_limit_is_checked_before_decoding() -> None:
    size = struct.pack(">IIBBBBB", 60000, 60000, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", size), chunk(b"IDAT", zlib.compress(bytes(100_000))), chunk(b"IEND", b"")
    bomb = png_chunks.MAGIC + b"".join(parts)
    with memory_stays_below(10):
        assert_refused(bomb, TooLarge, {"actual": 60000**2}, by=(read, header))


def test_memory_is_bounded() -> None:
    """48 MB of pixels with alpha become 36 MB."""
    data = png(np.tile(deep(4, (300, 200)), (10, 10, 1)), idat=1_000_000)
    with memory_stays_below(48 + 36 + len(data) // 10**6 + 20):
        assert read(data).values.shape == (3000, 2000, 3)


def test_more_chunks_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_chunks, "MAX_CHUNKS", 50)
    assert_refused(png(deep(3), idat=10), TooLarge, {"limit": 50, "unit": "chunks"})


DAMAGED: dict[str, Any] = {
    "truncated": lambda data: data[: len(data) // 2],
    "without pixels": lambda data: data[:33] + chunk(b"IEND", b""),
    "a wrong checksum": lambda data: data[:60] + b"?" + data[61:],
    "a long chunk": lambda data: data[:33] + b"\xff\xff\xff\xff" + data[37:],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused(name: str) -> None:
    with memory_stays_below(20):
        assert_refused(DAMAGED[name](png(deep(3))), Unreadable, "damaged")


def test_changed_bytes_never_crash() -> None:
    data = png(deep(4, (9, 9)), ANCILLARY["transparent colour"], interlaced=True)
    rng = np.random.default_rng(5)
    for _ in range(500):
        changed = bytearray(data)
        for at in rng.integers(8, len(data), 3):
            changed[at] = rng.integers(256)
        try:
            assert read(bytes(changed), limit=10_000).values.size
        except CallerError:
            continue
