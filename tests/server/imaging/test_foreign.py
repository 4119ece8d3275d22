"""Files of formats that are not read are refused by name, with what to do."""

import io
import json

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from server.errors import Unreadable, UnsupportedType
from tests.server.imaging.conftest import assert_refused, header, read

PICTURE = Pillow.fromarray(np.arange(64 * 48, dtype=np.uint8).reshape(48, 64))


def saved(kind: str) -> bytes:
    """The picture in one of Pillow's formats."""
    out = io.BytesIO()
    PICTURE.convert("RGB" if kind in ("PDF", "PPM") else "L").save(out, kind)
    return out.getvalue()


def at(offset: int, data: bytes) -> bytes:
    return bytes(offset) + data + bytes(600)


FILES = {
    "Zeiss CZI": b"ZISRAWFILE" + bytes(600),
    "Leica LIF": b"\x70\0\0\0\x10\0\0\0\x2a" + bytes(600),
    "Nikon ND2": b"\xda\xce\xbe\x0a" + bytes(600),
    "Olympus OIB or Zeiss ZVI": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600),
    "Olympus ETS, a part of VSI": b"SIS\0" + bytes(600),
    "HDF5 (Imaris IMS, ilastik, MATLAB 7.3)": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "DeltaVision DV": at(96, b"\xa0\xc0"),
    "MRC": at(208, b"MAP "),
    "ICS": b"\tics_version\t2.0\r\n" + bytes(600),
    "DICOM": at(128, b"DICM"),
    "JPEG 2000, or an early Nikon ND2": saved("JPEG2000"),
    "GIF": saved("GIF"),
    "PDF": saved("PDF"),
    "PNM (PGM, PPM, PAM)": saved("PPM"),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(600),
    "MATLAB": b"MATLAB 5.0 MAT-file, Platform: GLNXA64" + bytes(600),
    "a web page": b"<!DOCTYPE html><html>",
}


@pytest.mark.parametrize("name", FILES)
def test_format_that_is_not_read_is_named_with_its_remedy(name: str) -> None:
    assert_refused(FILES[name], UnsupportedType, {"value": name}, by=(read, header))
    with pytest.raises(UnsupportedType) as caught:
        read(FILES[name])
    assert caught.value.fields["remedy"] in str(caught.value)
    json.dumps(caught.value.fields)


def test_formats_of_pillow_and_numpy_are_named() -> None:
    """The oracle: libraries that write them."""
    out = io.BytesIO()
    np.save(out, np.zeros(3))
    assert_refused(out.getvalue(), UnsupportedType, {"value": "NumPy"})
    assert_refused(saved("AVIF"), UnsupportedType, {"value": "AVIF"})


@pytest.mark.parametrize("data", [b"hello" * 200, bytes(600), b"P", b"P6", b"\xff", b"<"])
def test_unknown_format_is_refused_without_a_name(data: bytes) -> None:
    with pytest.raises(UnsupportedType) as caught:
        read(data)
    assert "value" not in caught.value.fields


SLIDES = {
    "Aperio SVS": {
        "description": "Aperio Image Library v11.2.1 \r\n46000x32914 [0,100 46000x32914]|AppMag = 20"
    },
    "Hamamatsu NDPI": {"extratags": [(65420, "I", 1, 1, True), (271, "s", 0, "Hamamatsu", True)]},
    "Leica SCN": {
        "description": '<?xml version="1.0"?><scn xmlns="http://www.leica.com/scn/2010/10/01"></scn>'
    },
    "PerkinElmer QPTIFF": {"software": "PerkinElmer-QPI"},
}


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "lzw"])
@pytest.mark.parametrize("name", SLIDES)
def test_slide_of_a_scanner_is_named_where_its_compression_is_not_read(name: str, compression: str) -> None:
    out, values = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with tifffile.TiffWriter(out) as tiff:
        options = {"photometric": "rgb", "metadata": None, "tile": (32, 32)} | SLIDES[name]
        tiff.write(values, compression=compression, **options)
        tiff.write(values[::4, ::4], photometric="rgb", metadata=None)
    if compression == "lzw":
        assert np.array_equal(read(out.getvalue()).values, values)
        return
    assert_refused(out.getvalue(), Unreadable, {"reason": "compression", "format": name}, by=(read, header))
