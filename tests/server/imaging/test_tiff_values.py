"""Photometric interpretations, palettes and compressions of TIFF: files by tifffile and by libtiff (through Pillow)."""

import io
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from server.errors import Unreadable
from server.imaging.decode.tiff import COMPRESSIONS
from tests.server.imaging.builders import tiff
from tests.server.imaging.conftest import assert_refused, header, read
from tests.support.files import picture_bytes

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 200, (13, 17), dtype=np.uint8)
BITS = RNG.random((33, 45)) > 0.7

# Values of the picture, as they lie in a file where white is zero.
WHITE_IS_ZERO: dict[str, np.ndarray] = {
    "bool": GREY < 99,
    "uint8": ~GREY,
    "uint16": ~(GREY.astype(np.uint16) * 300),
    "uint32": ~GREY.astype(np.uint32),
    "uint32, small numbers": 255 - GREY.astype(np.uint32),
    "uint64": ~GREY.astype(np.uint64),
    "int8": ~(GREY >> 1).astype(np.int8),
    "int16": ~GREY.astype(np.int16),
    "int32": ~GREY.astype(np.int32),
    "int32 from end to end": (2**31 - 1) - GREY.astype(np.int32),
    "int64": ~GREY.astype(np.int64),
    "float16": (1 - GREY / 256).astype(np.float16),
    "float32": (1 - GREY / 256).astype(np.float32),
    "float32, large numbers": (65535 - GREY.astype(np.float32)),
    "float64": 1 - GREY / 256,
    "float64, below zero": -GREY.astype(np.float64),
}


def scaled(values: np.ndarray) -> np.ndarray:
    """Without offset and factor, which networks do not see."""
    wide = values.astype(np.float64)
    return (wide - wide.min()) / np.ptp(wide)


@pytest.mark.parametrize("name", WHITE_IS_ZERO)
@pytest.mark.parametrize("order", "<>")
def test_white_is_zero_becomes_light_on_dark_for_every_type(name: str, order: str) -> None:
    stored = WHITE_IS_ZERO[name]
    data = tiff(stored, photometric="miniswhite", byteorder=order)
    values = read(data).values[..., 0]
    assert values.dtype in (np.uint8, np.uint16, np.float32)
    shown = (GREY >> 1 << 1 if name == "int8" else GREY) if stored.dtype != bool else GREY >= 99
    assert np.allclose(scaled(values), scaled(shown), atol=1e-6)
    assert values.min() >= 0 or stored.dtype.kind == "i"


@pytest.mark.parametrize("dtype", [np.uint32, np.float32])
def test_white_is_zero_is_one_black_for_all_pages(dtype: type) -> None:
    shown = np.stack([GREY // 2, GREY, GREY // 3])
    stored = 2**32 - 1 - shown.astype(np.uint32) if dtype is np.uint32 else 1000 - shown.astype(dtype)
    stack = read(tiff(stored, photometric="miniswhite")).voxels[..., 0].transpose(2, 1, 0)
    assert np.array_equal(stack - stack.min(), shown - shown.min())


def test_labels_are_the_values_as_stored() -> None:
    for stored in WHITE_IS_ZERO.values():
        values = read(tiff(stored, photometric="miniswhite"), labels=True).values[..., 0]
        assert np.array_equal(values > 0, stored > 0)
        if stored.dtype.kind in "iu":
            assert np.array_equal(values, stored)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.uint64, np.int64])
def test_numbers_that_float32_rounds_are_told_apart(dtype: type) -> None:
    """Of a picture on a high offset, and of labels."""
    stored = GREY.astype(dtype) + dtype(2**31 - 300)
    data = tiff(stored)
    values = read(data).values[..., 0]
    assert values.dtype == np.float32
    assert np.array_equal(scaled(values), scaled(GREY))
    labels = read(data, labels=True)
    assert np.array_equal(labels.values[..., 0], stored)
    assert header(data, labels=True).sample_bytes == labels.values.itemsize


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int16, np.float64])
def test_numbers_that_float32_holds_are_kept(dtype: type) -> None:
    stored = (GREY.astype(np.int64) * 150 + 7).astype(dtype)
    assert np.array_equal(read(tiff(stored)).values[..., 0], stored)


@pytest.mark.parametrize("depth", [8, 16])
def test_palette_entries_may_have_8_bits(depth: int) -> None:
    table = RNG.integers(0, 256, (256, 3), dtype=np.uint16)
    table[0] = 255
    stored = table.T if depth == 8 else table.T * 257
    data = tiff(GREY, photometric="palette", colormap=stored)
    assert np.array_equal(read(data).values, table[GREY])


def by_libtiff(pixels: np.ndarray, compression: str | None) -> bytes:
    return picture_bytes(Pillow.fromarray(pixels), "TIFF", compression=compression)


def with_compression(number: int, data: bytes) -> bytes:
    """A TIFF that says so, whatever its strips hold."""
    with tifffile.TiffFile(io.BytesIO(data)) as written:
        offset = written.pages.first.tags["Compression"].valueoffset
    return data[:offset] + number.to_bytes(2, "little") + data[offset + 2 :]


# Pillow's names. Each compression that is promised is written by libtiff.
PROMISED = {
    "raw": 1,
    "tiff_ccitt": 2,
    "group3": 3,
    "group4": 4,
    "tiff_lzw": 5,
    "tiff_adobe_deflate": 8,
    "packbits": 32773,
    "tiff_deflate": 32946,
    "lzma": 34925,
    "zstd": 50000,
}


def test_table_of_promised_compressions_is_complete() -> None:
    assert set(PROMISED.values()) == set(COMPRESSIONS)


@pytest.mark.parametrize("name", PROMISED)
def test_promised_compressions_are_read(name: str) -> None:
    pictures = [BITS] if PROMISED[name] in (2, 3, 4) else [BITS, GREY, GREY.astype(np.uint16) * 300]
    for pixels in pictures:
        # libtiff reads both numbers of deflate, and Pillow has it write the official one.
        data = by_libtiff(pixels, name.replace("tiff_deflate", "tiff_adobe_deflate"))
        data = with_compression(32946, data) if name == "tiff_deflate" else data
        with tifffile.TiffFile(io.BytesIO(data)) as written:
            assert written.pages.first.compression == PROMISED[name]
        expected = np.where(pixels, 255, 0) if pixels.dtype == bool else pixels
        assert np.array_equal(read(data).values[..., 0], expected)


# Options of libtiff's own tool.
FAX = ["g3:1d", "g3:2d", "g3:1d:fill", "g3:2d:fill", "g4"]
LAYOUTS = [[], ["-r", "7"], ["-f", "lsb2msb"], ["-B"], ["-t", "-w", "32", "-l", "16"]]


@pytest.mark.parametrize("compression", [*FAX, "lzw", "zip", "packbits"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_fax_and_others_in_every_layout_of_tiffcp(
    compression: str, layout: list[str], tmp_path: Path
) -> None:
    if shutil.which("tiffcp") is None:
        pytest.skip("needs tiffcp (Debian: libtiff-tools)")
    (tmp_path / "in.tif").write_bytes(by_libtiff(BITS, None))
    subprocess.run(["tiffcp", "-c", compression, *layout, "in.tif", "out.tif"], cwd=tmp_path, check=True)
    data = (tmp_path / "out.tif").read_bytes()
    assert np.array_equal(read(data).values[..., 0], np.where(BITS, 255, 0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("number", "name"),
    [(7, "JPEG"), (34712, "JPEG2000"), (50002, "JPEGXL"), (34887, "LERC"), (12345, "12345")],
)
def test_other_compressions_are_refused_by_name(number: int, name: str) -> None:
    expected = {"reason": "compression", "value": name, "allowed": sorted(COMPRESSIONS.values())}
    assert_refused(with_compression(number, tiff(GREY)), Unreadable, expected)
