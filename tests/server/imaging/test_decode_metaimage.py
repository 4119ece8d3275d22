"""Headers of MetaImage in every spelling that ITK reads."""

import gzip
import zlib

import numpy as np
import pytest
import SimpleITK

from server.arrays import Volume
from server.errors import Unreadable, UnsupportedType
from server.imaging.decode.metaimage import sniff
from tests.server.imaging.builders import RAW, VALUES
from tests.server.imaging.conftest import assert_refused, header, read
from tests.server.imaging.itk import by_itk, itk_read

FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "TransformMatrix": "0 1 0 -1 0 0 0 0 1",
    "Offset": "4 5.5 -6",
    "ElementSpacing": "1 2 3",
    "DimSize": "3 4 5",
    "ElementType": "MET_UCHAR",
}
Lines = list[tuple[str, str]]


def spelled(
    lines: Lines | None = None, *, between: str = " = ", end: str = "\n", before: str = "", body: bytes = RAW
) -> bytes:
    """A header line by line, and values behind it."""
    chosen = [*(FIELDS.items() if lines is None else lines), ("ElementDataFile", "LOCAL")]
    return "".join(f"{before}{name}{between}{value}{end}" for name, value in chosen).encode() + body


def having(place: int, *more: tuple[str, str], without: str = "") -> Lines:
    lines = [(name, value) for name, value in FIELDS.items() if name != without]
    return [*lines[:place], *more, *lines[place:]]


def first(name: str, value: str) -> Lines:
    return [(name, value), *FIELDS.items()]


SPELLINGS = {
    "tabs": spelled(between="\t=\t"),
    "no blanks": spelled(between="="),
    "aligned": spelled([(name.ljust(24), value) for name, value in FIELDS.items()]),
    "colon": spelled(between=": "),
    "colon and blanks": spelled(between=" :  "),
    "twice": spelled(between=" == "),
    "Windows": spelled(end="\r\n"),
    "blanks before": spelled(before="  "),
    "tab before": spelled(before="\t"),
    "blanks behind": spelled(end=" \t\n"),
    "empty lines": b"\n\n" + spelled(end="\n\n", body=b"").rstrip(b"\n") + b"\n" + RAW,
    "blanks in values": spelled([(name, value.replace(" ", "\t  ")) for name, value in FIELDS.items()]),
    "short truths": spelled(
        [(name, value.replace("True", "T").replace("False", "F")) for name, value in FIELDS.items()]
    ),
    "numbers as truths": spelled(
        [(name, value.replace("True", "1").replace("False", "0")) for name, value in FIELDS.items()]
    ),
    "lower case truths": spelled([(name, value.replace("True", "true")) for name, value in FIELDS.items()]),
    "comment first": spelled(first("Comment", "made by : hand = yes")),
    "long comment first": spelled(first("Comment", "x" * 400)),
    "ID first": spelled(first("ID", "7")),
    "name first": spelled(first("Name", "brain")),
    "modality first": spelled(first("Modality", "MET_MOD_MR")),
    "DICOM tag first": spelled(first("0008|0060", "MR")),
    "custom first": spelled(first("Patient Position", "HFS")),
    "DICOM tag": spelled(having(1, ("0008|0060", "MR"))),
    "object type in lower case": spelled([("ObjectType", "image"), *list(FIELDS.items())[1:]]),
    "no object type": spelled(having(0, without="ObjectType")),
    "subtype": spelled(having(1, ("ObjectSubType", "Scalar"))),
    "doubled": spelled(having(6, ("DimSize", "3 4 5"))),
    "doubled in other figures": spelled(having(6, ("Offset", "4.0 5.50 -6e0"))),
    "doubled by another name": spelled(having(6, ("Position", "4 5.5 -6"), ("Origin", "4 5.5 -6"))),
    "byte order twice": spelled(having(3, ("ElementByteOrderMSB", "False"))),
    "rotation": spelled(having(4, ("Rotation", "0 1 0 -1 0 0 0 0 1"), without="TransformMatrix")),
    "orientation": spelled(having(4, ("Orientation", "0 1 0 -1 0 0 0 0 1"), without="TransformMatrix")),
    "position": spelled(having(4, ("Position", "4 5.5 -6"), without="Offset")),
    "origin": spelled(having(4, ("Origin", "4 5.5 -6"), without="Offset")),
    "size of elements": spelled(having(4, ("ElementSize", "1 2 3"), without="ElementSpacing")),
    "another size of elements": spelled(having(4, ("ElementSize", "9 9 9"))),
    "centre of rotation": spelled(having(4, ("CenterOfRotation", "9 9 9"))),
    "orientation by letters": spelled(having(4, ("AnatomicalOrientation", "LPI"))),
    "what ITK does not read": spelled(
        having(4, ("ElementMin", "0"), ("Color", "1 0 0 1"), ("AcquisitionDate", "none"))
    ),
    "HeaderSize 0": spelled(having(4, ("HeaderSize", "0"))),
    "HeaderSize -1": spelled(having(4, ("HeaderSize", "-1")), body=b"another header" + RAW),
    "HeaderSize": spelled(having(4, ("HeaderSize", "600")), body=b"").ljust(600, b"x") + RAW,
    "size of compressed data": spelled(
        having(4, ("CompressedData", "True"), ("CompressedDataSize", str(len(zlib.compress(RAW))))),
        body=zlib.compress(RAW),
    ),
}


@pytest.mark.parametrize("data", SPELLINGS.values(), ids=SPELLINGS)
def test_header_is_read_as_itk_reads_it(data: bytes) -> None:
    decoded, itk = read(data), itk_read(data, ".mha")
    assert isinstance(decoded, Volume)
    assert np.array_equal(decoded.voxels[..., 0], SimpleITK.GetArrayFromImage(itk).transpose(2, 1, 0))
    expected = np.eye(4)
    expected[:3, :3] = np.array(itk.GetDirection()).reshape(3, 3) * np.array(itk.GetSpacing())
    expected[:3, 3] = itk.GetOrigin()
    assert np.allclose(decoded.affine, np.diag([-1, -1, 1, 1]) @ expected)
    assert np.array_equal(header(data).affine, decoded.affine)
    assert decoded.note == ""


@pytest.mark.parametrize(
    "more",
    [
        {"ElementSpacing": "1 2 4"},
        {"Position": "4 5.5 6"},
        {"DimSize": "5 4 3"},
        {"ElementByteOrderMSB": "True"},
    ],
)
def test_doubled_fields_that_differ_are_refused(more: dict[str, str]) -> None:
    ((name, value),) = more.items()
    for place in (0, 9):
        assert_refused(spelled(having(place, (name, value))), Unreadable, "header", by=(read, header))


@pytest.mark.parametrize("size", ["-2", "x", "10000000"])
def test_header_size_that_leads_nowhere_is_refused(size: str) -> None:
    assert_refused(spelled(having(4, ("HeaderSize", size))), Unreadable)
    packed = having(4, ("HeaderSize", "-1"), ("CompressedData", "True"))
    assert_refused(spelled(packed, body=gzip.compress(RAW)), Unreadable, "header")


def test_values_at_the_end_of_a_short_file_are_refused() -> None:
    assert_refused(spelled(having(4, ("HeaderSize", "-1")), body=RAW[:-1]), Unreadable, "truncated")


@pytest.mark.parametrize("unit", ["um", "mm", "cm", "?"])
def test_unit_is_read_and_noted_and_the_numbers_stay(unit: str) -> None:
    decoded = read(spelled(having(4, ("DistanceUnits", unit))))
    scale = {"um": 1e-3, "cm": 10}.get(unit, 1)
    assert np.allclose(np.abs(decoded.affine[:3, :3]).sum(axis=0), np.array([1, 2, 3]) * scale)
    assert ("DistanceUnits" in decoded.note) == (scale != 1)


def test_image_has_its_unit() -> None:
    lines = [
        ("NDims", "2"),
        ("DimSize", "12 5"),
        ("ElementSpacing", "0.5 0.25"),
        ("ElementType", "MET_UCHAR"),
    ]
    assert read(spelled(lines)).spacing_mm == (0.25, 0.5)
    assert read(spelled([*lines, ("DistanceUnits", "um")])).spacing_mm == pytest.approx((0.00025, 0.0005))


def test_files_of_itk_with_every_metadata_field(tmp_path: object) -> None:
    image = SimpleITK.GetImageFromArray(VALUES.transpose(2, 1, 0))
    for name in ("0008|0060", "ITK_original_direction", "Comment", "a b"):
        image.SetMetaData(name, "some text: = x")
    assert np.array_equal(read(by_itk(image, ".mha")).values[..., 0], VALUES)


@pytest.mark.parametrize(
    "data", [b"a,b,c\n1,2,3\n", b'{"NDims": 3}', b"Hello: world\n", b"<html>NDims = 3", b"\0NDims = 3"]
)
def test_other_texts_are_not_metaimage(data: bytes) -> None:
    assert not sniff(data)
    assert_refused(data, UnsupportedType)
