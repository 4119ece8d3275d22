"""Slides of scanners, whose files are TIFF, are refused by name where their compression is not read."""

import io

import numpy as np
import pytest
import tifffile

from server.errors import Unreadable
from tests.server.imaging.conftest import assert_refused, header, read

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
