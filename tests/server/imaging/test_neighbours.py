"""Formats that are refused by name, as their own writers write them."""

import bz2
import gzip
import io
import lzma
import tarfile
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image as Pillow

from server.errors import Unreadable, UnsupportedType
from server.imaging.decode import DECODERS
from server.imaging.neighbours import NEIGHBOURS, PREFIX_BYTES, find
from tests.server.imaging.conftest import assert_refused, header, read
from tests.server.imaging.itk import by_itk

VALUES = np.zeros((4, 5, 6), np.int16)


def by_pillow(format_: str) -> bytes:
    out = io.BytesIO()
    Pillow.new("RGB", (20, 20)).save(out, format_)
    return out.getvalue()


def by_nibabel(image: nib.spatialimages.SpatialImage, suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"image{suffix}"
        nib.save(image, path)
        return path.read_bytes()


def saved(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def tarred(data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("a.png")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


ITK = SimpleITK.GetImageFromArray(VALUES)
MIF = b"mrtrix image\ndim: 4,5,6\nvox: 1,1,1\nlayout: +0,+1,+2\ndatatype: Int16LE\nfile: . 200\nEND\n"
# Files, and a word of their names.
FILES = {
    "MGH": by_nibabel(nib.MGHImage(VALUES, np.eye(4)), ".mgh"),
    "VTK": by_itk(ITK, ".vtk"),
    "GIPL": by_itk(ITK, ".gipl"),
    "MRtrix": MIF,
    ".nia": by_itk(ITK, ".nia"),
    "NumPy": saved(VALUES),
    "GIF": by_pillow("GIF"),
    "JPEG 2000": by_pillow("JPEG2000"),
    "PDF": by_pillow("PDF"),
    "tar": tarred(b"x"),
    "bzip2": bz2.compress(b"x"),
    "xz": lzma.compress(b"x"),
    "AFNI": b"\ntype = string-attribute\nname = HISTORY_NOTE\n",
    "CZI": b"ZISRAWFILE" + bytes(600),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
}


@pytest.mark.parametrize("name", FILES)
def test_refusal_names_the_format_and_the_remedy(name: str) -> None:
    neighbour = find(FILES[name][:PREFIX_BYTES])
    assert neighbour is not None
    assert name in neighbour.name
    assert_refused(
        FILES[name],
        UnsupportedType,
        {"value": neighbour.name, "remedy": neighbour.remedy},
        by=(read, header),
    )


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("FreeSurfer MGH", by_nibabel(nib.MGHImage(VALUES, np.eye(4)), ".mgz")),
        ("MRtrix .mif", gzip.compress(MIF)),
        ("tar", gzip.compress(tarred(b"x"))),
    ],
    # Not from the bytes, which hold the time and differ between the workers.
    ids=["MGZ", "MRtrix", "tar"],
)
def test_refusal_of_gzip_names_what_is_in_it(name: str, data: bytes) -> None:
    expected = {"reason": "gzip-without-nifti", "value": name}
    assert_refused(data, Unreadable, expected, by=(read, header))


def test_gzip_of_another_thing_is_refused() -> None:
    for data in (b"", b"x", b"NRRD0005\n", b"text" * 999):
        assert_refused(gzip.compress(data), Unreadable, by=(read, header))


def test_no_neighbour_is_a_format_that_is_read() -> None:
    for row in NEIGHBOURS:
        prefix = bytes(row.start) + row.magic + bytes(600)
        assert find(prefix[:PREFIX_BYTES]) is not None
        assert not any(decoder.sniff(prefix) for decoder in DECODERS.values()), row.name
