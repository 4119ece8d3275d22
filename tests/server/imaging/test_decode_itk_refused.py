"""NRRD and MetaImage that are refused: headers that say nothing sensible, limits, bombs, damage."""

import bz2
import gzip
import zlib
from typing import Any

import numpy as np
import pytest

from server.errors import TooLarge, UnetppError, Unreadable
from tests.server.imaging.builders import RAW, VALUES, mha_file, nrrd_file
from tests.server.imaging.conftest import assert_refused, read, refusals
from tests.support.memory import memory_stays_below

# Fields of a header that are refused, by reason and field.
NRRD = {
    "header byte skip": [{"byte_skip": -2}, {"encoding": "gzip", "byte_skip": -1}],
    "header line skip": [{"line_skip": -1}],
    "encoding encoding": [{"encoding": "ascii"}, {"encoding": "hex"}],
    "sample-type type": [{"type": "block"}],
    "header endian": [{"type": "ushort", "endian": None}],
    "missing-field type": [{"type": None}],
    "missing-field dimension": [{"sizes": None, "dimension": None}],
    "header sizes": [{"dimension": 4}, {"sizes": "3 4 0"}, {"sizes": "3 4 -5"}],
    "dimensions": [
        {"sizes": 60, "dimension": 1, "space_directions": None},
        {"sizes": "2 2 3 5", "dimension": 4, "space_directions": None},
    ],
    "dimensions sizes": [
        {"sizes": "2 2 3 5", "dimension": 4, "space_directions": f"{directions} (0,1,0) (0,0,1)"}
        for directions in ("(1,0,0) none", "none none")
    ],
    "detached-header data file": [{"data_file": "/etc/passwd"}, {"datafile": "x"}, {"DATA_FILE": "LIST"}],
    "header kinds": [{"kinds": "domain domain"}, {"content": "x" * 5000, "kinds": "domain " * 1000}],
    "header space directions": [{"space_directions": "(1,0,0) (0,1,0)"}],
    "header space origin": [{"space_directions": "(1,0) (0,1) (1,1)"}, {"space_origin": "(1,0)"}],
    "header space": [{"space_directions": "(1,0,0,0) (0,1,0,0) (0,0,1,0)", "space_origin": "(0,0,0,0)"}],
    "affine-flat": [{"space_directions": "(1,0,0) (1,0,0) (0,0,1)"}],
    "spacing": [{"space_directions": "(0,0,0) (0,1,0) (0,0,1)"}],
    "affine-nonfinite": [{"space_directions": "(1,0,0) (0,inf,0) (0,0,1)"}, {"space_origin": "(nan,0,0)"}],
}
METAIMAGE = {
    "header ObjectType": [{"ObjectType": "Tube"}],
    "missing-field DimSize": [{"DimSize": None}],
    "missing-field ElementType": [{"ElementType": None}],
    "sample-type ElementType": [{"ElementType": "MET_STRING"}],
    "header NDims": [{"NDims": 2}],
    "no-pixels": [{"DimSize": "3 4 0"}, {"DimSize": "3 4 -5"}],
    "dimensions": [{"DimSize": 60, "NDims": 1}],
    "encoding BinaryData": [{"BinaryData": "False"}],
    "header HeaderSize": [{"HeaderSize": -2}, {"HeaderSize": -1, "CompressedData": "True"}],
    "header ElementNumberOfChannels": [{"ElementNumberOfChannels": 0}],
    "header Offset": [{"Origin": "1 2"}, {"Offset": "0 0 0", "Origin": "1 1 1"}, {"Offset": "9" * 5000}],
    "header ElementSpacing": [{"ElementSpacing": "1 1"}],
    "spacing": [{"ElementSpacing": "0 1 1"}],
    "affine-nonfinite": [{"ElementSpacing": "nan 1 1"}],
    "affine-flat": [{"TransformMatrix": "1 0 0 1 0 0 0 0 1"}],
    "damaged": [{"DimSize": "x y z"}],
    "detached-header ElementDataFile": [
        {"ElementDataFile": f} for f in ("/etc/passwd", "LIST", "a%03d.raw 1 5 1")
    ],
}


@pytest.mark.parametrize(
    ("make", "table"), [(nrrd_file, NRRD), (mha_file, METAIMAGE)], ids=["nrrd", "metaimage"]
)
def test_header_that_is_refused_names_reason_and_field(make: Any, table: dict[str, Any]) -> None:
    for expected, rows in table.items():
        reason, _, field = expected.partition(" ")
        for fields in rows:
            assert_refused(
                make(**fields), Unreadable, {"reason": reason} | ({"field": field} if field else {})
            )


def test_header_never_makes_another_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda *arguments, **_: opened.append(arguments))
    for name in ("/etc/passwd", "LIST\n/etc/passwd", "a%03d.raw 1 5 1"):
        data = nrrd_file(data_file=name)
        for file in (data, data[: -len(RAW) - 1], mha_file(ElementDataFile=name)):
            assert_refused(file, Unreadable, "detached-header")
    assert not opened


SPACES = "none (1,0,0) (0,1,0) (0,0,1)"
HUGE = {"sizes": "1000 400 400 400", "dimension": 4, "space_directions": SPACES}
WIDE = {"sizes": "60000 60000", "dimension": 2, "space_directions": None}
HEADER = {"limit": 2**20, "unit": "bytes"}


@pytest.mark.parametrize(
    ("data", "error", "expected"),
    [
        *refusals(
            TooLarge,
            {"unit": "voxels"},
            {n: nrrd_file(sizes=n) for n in ("2000 2000 2000", "999999999999 1 1")},
        ),
        *refusals(TooLarge, {"unit": "voxels"}, {"mha": mha_file(DimSize="2000 2000 2000")}),
        *refusals(
            TooLarge,
            {"unit": "pixels"},
            {"nrrd": nrrd_file(**WIDE), "mha": mha_file(VALUES[0], DimSize="60000 60000")},
        ),
        *refusals(TooLarge, {"unit": "channels", "limit": 64, "actual": 1000}, {"nrrd": nrrd_file(**HUGE)}),
        *refusals(TooLarge, {"unit": "channels"}, {"mha": mha_file(ElementNumberOfChannels=100_000)}),
        *refusals(TooLarge, {"actual": 10**12}, {"skip": nrrd_file(byte_skip=10**12)}),
        *refusals(TooLarge, HEADER, {"nrrd": b"NRRD0004\n" + b"#\n" * 2**20}),
        *refusals(TooLarge, HEADER, {"mha": b"ObjectType = Image\nNDims = 3\n" + b"x" * 2**21}),
        *refusals(Unreadable, "missing-field", {"mha": b"ObjectType = Image\nNDims = 3\n"}),
    ],
)
def test_file_over_a_limit_is_refused(data: bytes, error: type[UnetppError], expected: Any) -> None:
    with memory_stays_below(20):
        assert_refused(data, error, expected)


@pytest.mark.parametrize("encoding", ["gzip", "bzip2", "zlib"])
def test_bomb_is_inflated_no_further_than_its_header_says(encoding: str) -> None:
    pack = {"gzip": gzip.compress, "bzip2": bz2.compress, "zlib": zlib.compress}[encoding]
    body, zeros = pack(bytes(100_000_000), 1), np.zeros((3, 4, 5), np.uint8)
    zipped = encoding != "zlib"
    data = (
        nrrd_file(zeros, body=body, encoding=encoding)
        if zipped
        else mha_file(zeros, body, CompressedData="True")
    )
    with memory_stays_below(40):
        assert not read(data).values.any()


@pytest.mark.parametrize("make", [nrrd_file, mha_file])
def test_truncated_file_is_refused(make: Any) -> None:
    whole = make()
    for length in range(16, len(whole)):
        assert_refused(whole[:length], Unreadable)


@pytest.mark.parametrize("make", [nrrd_file, mha_file])
def test_values_that_are_not_finite_are_refused_or_zero(make: Any) -> None:
    data = make(np.array([[[1.0, np.nan, np.inf, 2.0]]], np.float32))
    assert_refused(data, Unreadable, {"reason": "nonfinite", "actual": 2, "total": 4})
    assert np.array_equal(read(data, zero_nonfinite=True).values[..., 0], [[[1, 0, 0, 2]]])


@pytest.mark.parametrize(("pack", "at"), [(gzip.compress, -6), (zlib.compress, -1)])
def test_checksum_that_is_wrong_is_refused(pack: Any, at: int) -> None:
    body = bytearray(pack(RAW))
    body[at] ^= 1
    zipped = pack is gzip.compress
    data = (
        nrrd_file(encoding="gzip", body=bytes(body))
        if zipped
        else mha_file(body=bytes(body), CompressedData="True")
    )
    assert_refused(data, Unreadable)
