"""The table of formats, and which of them a request gets."""

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
SHEARED = np.array([[1, 0, 0, 0], [0, 1, 0.3, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
ROWS = [(name, kind) for name, row in ENCODERS.items() for kind in row.kinds]
MISFITS = [
    (name, kind)
    for name, row in ENCODERS.items()
    for kind in ("image", "stack", "volume")
    if kind not in row.kinds
]


def test_encoders_every_file_has_a_row() -> None:
    helpers = {"__init__", "formats", "mosaic", "negotiate", "outlines", "result", "rounding"}
    files = {path.stem for path in Path(room.__file__).parent.glob("*.py")} - helpers
    assert files <= {name for row in ENCODERS.values() for name in row.encode.__code__.co_names}


def test_encoders_names_are_those_of_their_files() -> None:
    assert len({row.filename for row in ENCODERS.values()}) == len(ENCODERS)
    assert {name for name, row in ENCODERS.items() if "." in name and row.filename != name} == set()
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


@pytest.mark.parametrize("name", [name for name, row in ENCODERS.items() if row.needs - {"report"}])
def test_encoders_row_without_its_needs_says_so(name: str) -> None:
    if name != "json":
        with pytest.raises(LookupError):
            encoded(name, result_of(ENCODERS[name].kinds[0], frozenset()))


@pytest.mark.parametrize(
    ("name", "kind"), [("picture", "volume"), ("labels.nii.gz", "image"), ("mask.seg.nrrd", "stack")]
)
def test_encoders_row_of_another_kind_says_so(name: str, kind: str) -> None:
    with pytest.raises(LookupError):
        encoded(name, result_of(kind))


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
    assert encode((name,), result) == room.Encoded(
        row.encode(result), row.media_type, row.filename, compressible
    )


@pytest.mark.parametrize("names", [("mask.png", "json"), ("coco",), ("geojson",)], ids=",".join)
def test_encode_cancelled_ends(names: tuple[str, ...]) -> None:
    token = CancelToken()
    token.set()
    with pytest.raises(Cancelled):
        encode(names, dataclasses.replace(result_of("image"), cancel=token))


def test_json_is_utf8() -> None:
    body = encoded("json", result_of("image"))
    assert json.loads(body) == {"a": "µ", "b": [1]}
    assert "µ".encode() in body


def test_memory_is_bounded_by_the_largest_row() -> None:
    small, large = InputHeader((10, 10)), InputHeader((100_000, 100_000))
    assert memory(("mask.png", "overlay", "csv"), small) == 75 * math.prod(small.size)
    assert memory(("csv",), large) == ENCODERS["csv"].max_bytes
    assert memory(("csv",), HEADERS["stack"]) == 0


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (
            "mask",
            {"image": "mask.png", "stack": "mask.tiff", "volume": "mask.nii.gz", "nrrd": "mask.seg.nrrd"},
        ),
        (
            "labels",
            {
                "image": "labels.png",
                "stack": "labels.tiff",
                "volume": "labels.nii.gz",
                "nrrd": "labels.nii.gz",
            },
        ),
        (
            "scores",
            {
                "image": "scores.png",
                "stack": "scores.tiff",
                "volume": "scores.nii.gz",
                "nrrd": "scores.nii.gz",
            },
        ),
        (
            "uncertainty",
            {"image": "uncertainty.png", "stack": "uncertainty.tiff", "volume": "uncertainty.nii.gz"},
        ),
    ],
)
def test_choose_family_follows_the_input(name: str, rows: dict[str, str]) -> None:
    assert {kind: choose(name, None, HEADERS[kind])[0] for kind in rows} == rows
    assert choose(name, None) == (rows["image"],)
    for kind, row in rows.items():
        instances = choose(name, None, HEADERS[kind], instances=True)
        assert instances == ((like("labels", HEADERS[kind]) if name == "mask" else row),)


@pytest.mark.parametrize(("alias", "row"), ALIASES.items())
def test_choose_alias_is_its_row(alias: str, row: str) -> None:
    assert choose(alias, None) == choose(row, None) == (row,)


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_choose_name_wins_over_accept(name: str, kind: str) -> None:
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


@pytest.mark.parametrize(
    ("kind", "accept", "row"),
    [
        *(("image", accept, "mask.png") for accept in (None, "", "*/*", "image/*", "image/png", "text/html")),
        *(("image", accept, "json") for accept in ("application/json", "APPLICATION/JSON", "application/*")),
        ("image", "text/html, application/json;q=0.9", "json"),
        ("image", "application/pdf, */*;q=0.1", "mask.png"),
        ("image", "application/json, */*", "json"),
        ("image", "text/html,application/xhtml+xml,*/*;q=0.8", "mask.png"),
        ("image", "application/json;q=0.5, image/png", "mask.png"),
        ("image", "image/png;q=0.2, application/json;q=0.7", "json"),
        ("image", "image/png;q=0, application/json", "json"),
        ("image", "image/png;q=nonsense", "mask.png"),
        ("image", "application/x-npz", "scores.npz"),
        ("image", "image/tiff", "mask.tiff"),
        ("image", "text/csv, image/png;q=0.5", "csv"),
        *(("stack", accept, "mask.tiff") for accept in (None, "*/*", "image/*", "text/html")),
        *(("stack", accept, "json") for accept in ("application/json", "application/*")),
        ("stack", "image/png, */*;q=0.1", "overlay"),
        ("stack", "image/jpeg", "overlay.jpg"),
        *(("volume", accept, "mask.nii.gz") for accept in (None, "*/*", "application/gzip", "application/*")),
        ("volume", "image/*", "overlay"),
        ("volume", "application/json, */*;q=0.9", "json"),
        ("volume", "image/tiff, application/x-npz;q=0.5", "scores.npz"),
        ("volume", "text/html,application/xhtml+xml,image/webp", "mask.nii.gz"),
        ("nrrd", "*/*", "mask.seg.nrrd"),
        ("nrrd", "application/gzip", "mask.nii.gz"),
    ],
)
def test_choose_accept_decides_where_format_is_silent(kind: str, accept: str | None, row: str) -> None:
    assert choose(None, accept, HEADERS[kind]) == (row,)
    if kind == "image" and accept != "application/*":
        assert choose(None, accept) == (row,)


@pytest.mark.parametrize("kind", [None, "image", "stack", "volume"])
@pytest.mark.parametrize("accept", sorted({row.media_type for row in ENCODERS.values()} | {"*/*", "image/*"}))
def test_choose_accept_never_needs_head_std(accept: str, kind: str | None) -> None:
    """The graph for it is not the one of the mask, so it must be asked for by name."""
    try:
        rows = choose(None, accept, kind and HEADERS[kind])
    except UnknownFormat:
        return
    assert "head_std" not in needs(rows)


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
    allowed = [*FAMILIES, *(fitting for fitting, row in ENCODERS.items() if kind in row.kinds)]
    assert caught.value.fields == {"parameter": "format", "value": name, "allowed": allowed}


@pytest.mark.parametrize(
    ("kind", "accept"),
    [
        (None, "application/pdf"),
        (None, "image/png;q=0"),
        ("volume", "image/tiff"),
        ("volume", "application/geo+json"),
        ("image", "application/gzip"),
        ("image", "application/x-nrrd"),
    ],
)
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
