"""The table of formats, and which of them a request gets."""

import contextlib
import dataclasses
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest

from server.arrays import InputHeader
from server.cancel import Cancelled, CancelToken
from server.errors import UnknownFormat
from server.imaging import encode as room
from server.imaging.encode import (
    ALIASES,
    ENCODERS,
    FAMILIES,
    choose,
    encode,
    like,
    memory,
    needs,
    requires,
    without,
)
from tests.server.imaging.encoders import encoded, result_of

HEADERS = {
    "image": InputHeader((2, 3)),
    "stack": InputHeader((2, 3, 4)),
    "volume": InputHeader((2, 3, 4), affine=np.eye(4)),
    "nrrd": InputHeader((2, 3, 4), affine=np.eye(4), family="nrrd"),
}
HEADERS |= {kind: result_of(kind).source.input_header for kind in ("dicom image", "dicom volume")}
SHEARED = np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])


def fits(name: str, kind: str) -> bool:
    """Whether a row answers a kind of input; DICOM input is also what its pixels are."""
    return not {kind, kind.removeprefix("dicom ")}.isdisjoint(ENCODERS[name].kinds)


ROWS = [(name, kind) for name, row in ENCODERS.items() for kind in row.kinds]
KINDS = ("image", "stack", "volume", "dicom image", "dicom volume")
MISFITS = [(name, kind) for name in ENCODERS for kind in KINDS if not fits(name, kind)]
READ = [(name, row.kinds[0]) for name, row in ENCODERS.items() if row.needs and name != "json"]
READ += [("picture", "volume"), ("mask.nii.gz", "image"), ("mask.seg.nrrd", "stack")]


def test_encoders_every_file_has_a_row() -> None:
    helpers = {"__init__", "calibration", "dicom_identity", "dicom_sources", "formats", "mosaic", "negotiate"}
    helpers |= {"outlines", "result", "rounding"}
    files = {path.stem for path in Path(room.__file__).parent.glob("*.py")} - helpers
    named = {name for row in ENCODERS.values() for name in row.encode.__code__.co_names}
    assert files <= named | {row.encode.__module__.rpartition(".")[2] for row in ENCODERS.values()}


def test_encoders_names_are_those_of_their_files() -> None:
    assert len({row.filename for row in ENCODERS.values()}) == len(ENCODERS)
    variants = {"dicomseg.labelmap", "dicomseg.fractional"}
    assert {name for name, row in ENCODERS.items() if "." in name and row.filename != name} == variants
    assert not (ALIASES.keys() | FAMILIES.keys()) & ENCODERS.keys()
    rows = {*ALIASES.values(), *(row for family in FAMILIES.values() for row in family.values())}
    assert rows <= ENCODERS.keys()


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_encoders_row_reads_only_what_it_needs_and_repeats_its_bytes(
    monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    body = encoded(name, result_of(kind, ENCODERS[name].needs))
    monkeypatch.setattr("time.time", lambda: 1e9)
    result = result_of(kind)
    assert encoded(name, result) == encoded(name, result) == body


@pytest.mark.parametrize(("name", "kind"), READ)
def test_encoders_row_without_what_it_reads_says_so(name: str, kind: str) -> None:
    with pytest.raises(LookupError):
        encoded(name, result_of(kind, frozenset()))


def test_encode_several_formats_is_a_zip_of_their_files() -> None:
    result, names = result_of("image"), ("json", "mask.png", "scores.npz")
    answer = encode(names, result)
    assert (answer.media_type, answer.filename, answer.compressible) == ("application/zip", "mask.zip", False)
    with zipfile.ZipFile(io.BytesIO(answer.body)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == {
            ENCODERS[name].filename: encoded(name, result) for name in names
        }
    assert needs(names) == {"report", "objects", "scores"}


@pytest.mark.parametrize(("name", "compressible"), [("json", True), ("mask.png", False)])
def test_encode_one_format_is_its_file(name: str, compressible: bool) -> None:
    result, row = result_of("image"), ENCODERS[name]
    body = row.encode(result)
    assert encode((name,), result) == room.Encoded(body, row.media_type, row.filename, compressible)
    assert name != "json" or (json.loads(body) == {"a": "µ", "b": [1]} and "µ".encode() in body)


@pytest.mark.parametrize("names", [("mask.png", "json"), ("coco",), ("geojson",)], ids=",".join)
def test_encode_cancelled_ends(names: tuple[str, ...]) -> None:
    token = CancelToken()
    token.set()
    with pytest.raises(Cancelled):
        encode(names, dataclasses.replace(result_of("image"), cancel=token))


def test_memory_is_bounded_by_the_largest_row() -> None:
    small, large = InputHeader((10, 10)), InputHeader((100_000, 100_000))
    assert memory(("mask.png", "overlay", "csv"), small) == 75 * math.prod(small.size)
    assert memory(("csv",), large) == ENCODERS["csv"].max_bytes
    assert memory(("csv",), HEADERS["stack"]) == 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("mask", ["mask.png", "mask.tiff", "mask.nii.gz", "mask.seg.nrrd"]),
        ("labels", ["labels.png", "labels.tiff", "labels.nii.gz", "labels.nii.gz"]),
        ("scores", ["scores.png", "scores.tiff", "scores.nii.gz", "scores.nii.gz"]),
        ("uncertainty", ["uncertainty.png", "uncertainty.tiff", "uncertainty.nii.gz", "uncertainty.nii.gz"]),
    ],
)
def test_choose_family_follows_the_input(name: str, rows: list[str]) -> None:
    assert choose(name, None) == (rows[0],)
    for header, row in zip(HEADERS.values(), [*rows, rows[0], rows[2]], strict=True):
        assert choose(name, None, header) == (row,)
        assert choose(name, None, header, instances=True) == (
            (like("labels", header) if name == "mask" else row),
        )


def test_choose_one_name_is_its_row_whatever_accept_says() -> None:
    for alias, row in ALIASES.items():
        assert choose(alias, None) == (row,)
    for name, kind in ROWS:
        assert choose(name, "application/pdf", HEADERS[kind], instances=True) == (name,)
        assert choose(name, "application/pdf") == (name,)


@pytest.mark.parametrize(
    ("names", "kind", "rows"),
    [
        ("json,mask,overlay,json,mask.png,png", "image", ("json", "mask.png", "overlay")),
        (" mask , json", "stack", ("mask.tiff", "json")),
        ("geojson_gz,geojson", "image", ("geojson",)),
        ("labels.tif,mask.nrrd", None, ("labels.tiff", "mask.seg.nrrd")),
    ],
)
def test_choose_several_names_once_each(names: str, kind: str | None, rows: tuple[str, ...]) -> None:
    assert choose(names, None, kind and HEADERS[kind]) == rows


# Kind of the input and row, and headers Accept that choose it.
ACCEPTED = """
    image mask.png: */* | image/* | image/png | text/html | image/png;q=nonsense | application/pdf, */*;q=0.1
    image mask.png: text/html,application/xhtml+xml,*/*;q=0.8 | application/json;q=0.5, image/png
    image json: APPLICATION/JSON | text/html, application/json;q=0.9 | application/json, */*
    image json: image/png;q=0.2, application/json;q=0.7 | image/png;q=0, application/json
    image scores.npz: application/x-npz
    image mask.tiff: image/tiff
    image csv: text/csv, image/png;q=0.5
    stack mask.tiff: */* | image/* | text/html
    stack json: application/json | application/*
    stack mask.tiff: image/png, */*;q=0.1 | image/jpeg, image/*;q=0.1
    volume mask.nii.gz: */* | application/gzip | application/* | text/html,application/xhtml+xml,image/webp
    volume mask.nii.gz: image/*, */*;q=0.1 | image/webp,image/avif,video/*;q=0.8,image/png,*/*;q=0.5
    volume json: application/json, */*;q=0.9
    volume scores.npz: image/tiff, application/x-npz;q=0.5
    nrrd mask.seg.nrrd: */*
    nrrd mask.nii.gz: application/gzip"""


@pytest.mark.parametrize("line", [line.strip() for line in ACCEPTED.strip().split("\n")])
def test_choose_accept_decides_where_format_is_silent(line: str) -> None:
    (kind, row), accepted = line.split(": ", maxsplit=1)[0].split(), line.split(": ")[1].split(" | ")
    for accept in accepted:
        assert choose(None, accept, HEADERS[kind]) == (row,)
        assert kind != "image" or choose(None, accept) == (row,)
    default = (like("mask", HEADERS[kind]),)
    assert choose(None, None, HEADERS[kind]) == choose(None, "", HEADERS[kind]) == default


@pytest.mark.parametrize("accept", sorted({row.media_type for row in ENCODERS.values()} | {"*/*", "image/*"}))
def test_choose_accept_never_needs_head_std(accept: str) -> None:
    """The graph for it is not the one of the mask, so it must be requested by name."""
    for header in (None, *HEADERS.values()):
        with contextlib.suppress(UnknownFormat):
            assert "head_std" not in needs(choose(None, accept, header))


@pytest.mark.parametrize("name", ["gif", "", "PNG", "mask.png,", ",", "mask.png,gif", "pn g"])
def test_choose_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(UnknownFormat) as caught:
        choose(name, None)
    assert caught.value.fields["parameter"] == "format"
    assert caught.value.fields["value"] in {part.strip() for part in name.split(",")}
    assert caught.value.fields["allowed"] == [*FAMILIES, *ENCODERS]


@pytest.mark.parametrize(("name", "kind"), MISFITS)
def test_choose_name_of_another_kind_is_refused(name: str, kind: str) -> None:
    with pytest.raises(UnknownFormat) as caught:
        choose(f"mask,{name}", None, HEADERS[kind])
    fields = {
        "parameter": "format",
        "value": name,
        "allowed": [*FAMILIES, *(n for n in ENCODERS if fits(n, kind))],
    }
    if name.startswith("dicom"):
        fields["remedy"] = "mask" if kind in ("image", "stack", "volume") else "dicomseg"
    assert caught.value.fields == fields


NOT_ACCEPTED = [(None, "application/pdf"), (None, "image/png;q=0"), ("volume", "image/tiff")]
NOT_ACCEPTED += [
    ("volume", "application/geo+json"),
    ("image", "application/gzip"),
    ("image", "application/x-nrrd"),
]


@pytest.mark.parametrize(("kind", "accept"), NOT_ACCEPTED)
def test_choose_accept_that_nothing_fits_is_refused(kind: str | None, accept: str) -> None:
    with pytest.raises(UnknownFormat) as caught:
        choose(None, accept, kind and HEADERS[kind])
    allowed = [name for name, row in ENCODERS.items() if kind is None or kind in row.kinds]
    assert caught.value.fields == {"parameter": "Accept", "value": accept, "allowed": allowed}


@pytest.mark.parametrize("family", ["nifti", "nrrd"])
def test_choose_sheared_volume_is_never_nrrd(family: str) -> None:
    """ITK would read the mask elsewhere, or not at all."""
    header = InputHeader((4, 5, 6), affine=SHEARED, family=family)
    assert choose(None, None, header) == choose("mask", None, header) == ("mask.nii.gz",)
    assert choose(None, "application/x-nrrd, */*;q=0.1", header) == ("mask.nii.gz",)
    with pytest.raises(UnknownFormat) as caught:
        choose("json,nrrd", None, header)
    assert caught.value.fields["remedy"] == "mask.nii.gz"
    assert "mask.seg.nrrd" not in caught.value.fields["allowed"]


def test_choose_rounded_affine_is_not_sheared() -> None:
    affine = np.diag([0.5, 1, 3, 1.0]) + 1e-6 * np.eye(4, k=1)
    header = InputHeader((4, 5, 6), affine=affine, family="nrrd")
    assert choose(None, None, header) == choose("nrrd", None, header) == ("mask.seg.nrrd",)


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (None, None),
        ("png", "png"),
        ("uncertainty", "mask"),
        ("uncertainty_png", "mask"),
        ("json,uncertainty.tiff,mask", "json,mask"),
        ("uncertainty.png,uncertainty.tiff", "mask"),
        ("gif,uncertainty.nii", "gif"),
    ],
)
def test_without_head_std_keeps_the_other_formats(names: str | None, left: str | None) -> None:
    assert without(names, "head_std") == left
    assert requires(names, "head_std") == (names != left)
