"""A TIFF answer has the axes, the pixel size and the times of its source, in the words of its source, as tifffile reads
both."""

import dataclasses
import io
import math
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from server.arrays import Image, Volume
from server.imaging.encode import SegmentationResult
from server.segment.preprocess import with_pixel_size
from tests.server.imaging.builders import SIDES, described, tiff, written
from tests.server.imaging.conftest import numbered, read
from tests.server.imaging.encoders import encoded, labelled, masked
from tests.server.imaging.tiff_by_hand import lsm, stk

LENGTHS = {"T": 2, "Z": 3, "C": 4}
RNG = np.random.default_rng(0)
FORMATS = ("mask.tiff", "labels.tiff", "scores.tiff", "uncertainty.tiff")


def answer(name: str, source: Image | Volume, channels: int = 1) -> bytes:
    """A mask, object numbers, scores or uncertainty on the grid of a source."""
    size, rng = source.size, np.random.default_rng(1)
    if name == "labels.tiff":
        return encoded(name, labelled(numbered(rng.integers(0, 9, size)), source))
    arrays = {
        "scores": rng.random((channels, *size)).astype(np.float16),
        "head_std": rng.random(size).astype(np.float16) / 2,
    }
    return encoded(name, result(rng.integers(0, 3, size).astype(np.uint8), source, arrays, channels))


def result(
    classes: np.ndarray, source: Image | Volume, arrays: dict[str, np.ndarray], channels: int
) -> SegmentationResult:
    names = {number: f"class {number}" for number in range(1, max(2, channels))}
    return dataclasses.replace(masked(classes, source, **arrays), names=names)


def series(data: bytes) -> tifffile.TiffPageSeries:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return file.series[0]


def imagej(data: bytes) -> dict[str, Any]:
    """Values of ImageJ's words and of the resolution tags, read by tifffile."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = {name: file.pages.first.tags.valueof(name) for name in ("XResolution", "YResolution")}
        return {**(file.imagej_metadata or {}), **tags, "ResolutionUnit": file.pages.first.resolutionunit}


def ome(data: bytes) -> dict[str, Any]:
    """The attributes of OME's Pixels, and of its Channels and Planes."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        root = ElementTree.fromstring(file.ome_metadata or "")  # noqa: S314  written by us or tifffile
    (pixels,) = root.findall(".//{*}Pixels")
    parts = {
        name: [dict(part.attrib) for part in pixels.findall(f"{{*}}{name}")] for name in ("Channel", "Plane")
    }
    return dict(pixels.attrib) | parts


def lengths(data: bytes) -> dict[str, int]:
    """Lengths of the axes beyond those of a page."""
    found = series(data)
    return {axis: length for axis, length in zip(found.axes, found.shape, strict=True) if axis not in "YX"}


IMAGEJ_WORDS = {"unit": "um", "spacing": 2.5, "finterval": 0.5, "fps": 2.0}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axes", ["T", "Z", "TZ", "TZC", "ZC", "TC", "C", ""])
def test_answer_to_imagej_has_its_axes_and_sizes(axes: str, name: str) -> None:
    values = RNG.integers(0, 255, (*(LENGTHS[letter] for letter in axes), *SIDES), dtype=np.uint8)
    data = written(values, f"{axes}YX", imagej=True, resolution=(4, 5), metadata=IMAGEJ_WORDS)
    decoded = read(data)
    body = answer(name, decoded)
    expected = {letter: LENGTHS[letter] for letter in axes if letter != "C"}
    assert lengths(body) == expected
    before, after = imagej(data), imagej(body)
    for key in ("unit", "spacing", "finterval", "fps", "XResolution", "YResolution", "ResolutionUnit"):
        assert after.get(key) == before.get(key), key
    # The server reads its own answer as it read the source.
    again = read(body, labels=True)
    assert (again.size, again.spacing_mm) == (decoded.size, decoded.spacing_mm)
    assert again.input_header.time_slices == decoded.input_header.time_slices


@pytest.mark.parametrize("unit", ["micron", "nm", "mm", "inch", "pixel", "µm", "\\u00B5m", "Å", "weeks", ""])
@pytest.mark.parametrize("images", [1, 3])
def test_answer_to_imagej_has_its_unit(unit: str, images: int) -> None:
    lines = [f"images={images}", f"slices={images}", f"unit={unit}", "zunit=mm", "spacing=-2.5", "xorigin=3"]
    text = "ImageJ=1.53t\n" + "\n".join(lines) + "\nyunit=cm\ntunit=min\nmin=0\nmax=255\n"
    data = described(text.encode(), images, resolution=(4.0, 0.5), resolutionunit=1)
    decoded = read(data)
    for name in FORMATS:
        before, after = imagej(data), imagej(answer(name, decoded))
        # Letters beyond ASCII are escaped as ImageJ does it, because it cannot read them otherwise.
        escaped = {"µm": "\\u00B5m", "Å": "\\u00C5"}
        assert after["unit"] == escaped.get(unit, unit) == escaped.get(before["unit"], before["unit"])
        for key in ("zunit", "yunit", "tunit", "spacing", "xorigin", "XResolution", "YResolution"):
            assert after[key] == before[key], key
        assert not {"min", "max"} & after.keys()


OME_WORDS: dict[str, Any] = {
    "PhysicalSizeX": 0.25,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeY": 250.5,
    "PhysicalSizeYUnit": "nm",
    "PhysicalSizeZ": 3.0,
    "PhysicalSizeZUnit": "Å",
    "TimeIncrement": 1.5,
    "TimeIncrementUnit": "min",
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axes", ["T", "Z", "TZ", "ZT", "TZC", "CZT", "ZTC", "C", ""])
def test_answer_to_ome_has_its_axes_and_sizes(axes: str, name: str) -> None:
    values = RNG.integers(0, 255, (*(LENGTHS[letter] for letter in axes), *SIDES), dtype=np.uint8)
    data = written(values, f"{axes}YX", ome=True, metadata=OME_WORDS)
    decoded = read(data)
    body = answer(name, decoded)
    assert lengths(body) == {letter: LENGTHS[letter] for letter in axes if letter != "C"}
    before, after = ome(data), ome(body)
    assert {key: after[key] for key in OME_WORDS} == {key: before[key] for key in OME_WORDS}
    assert after["Type"] == {"labels.tiff": "uint16", "uncertainty.tiff": "float"}.get(name, "uint8")
    again = read(body, labels=True)
    assert (again.size, again.spacing_mm) == (decoded.size, decoded.spacing_mm)
    assert again.input_header.time_slices == decoded.input_header.time_slices
    # Both dialects follow the same order of pages: times, slices.
    assert np.array_equal(series(body).asarray().reshape(-1, *SIDES), pages(body))


def pages(data: bytes) -> np.ndarray:
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return np.stack([page.asarray() for page in file.pages])


@pytest.mark.parametrize("unit", ["nm", "Å", "pm", "mm", "in", "pixel", "reference frame", "&<\"'"])
def test_answer_to_ome_has_its_unit_word_for_word(unit: str) -> None:
    words = {"PhysicalSizeX": "0.10", "PhysicalSizeXUnit": unit, "PhysicalSizeY": "1E-1"}
    attributes = " ".join(
        f'{k}="{v.replace("&", "&amp;").replace("<", "&lt;").replace(chr(34), "&quot;")}"'
        for k, v in words.items()
    )
    size = 'SizeX="7" SizeY="9" SizeZ="2" SizeC="1" SizeT="1" DimensionOrder="XYZCT" Type="uint8"'
    text = f"<OME><Image><Pixels {size} {attributes}/></Image></OME>"
    after = ome(answer("mask.tiff", read(described(text.encode(), 2))))
    assert {key: after[key] for key in words} == words
    assert after.keys() & {"PhysicalSizeYUnit", "PhysicalSizeZ"} == set()


def test_answer_to_ome_tells_when_and_where_each_plane_was_taken() -> None:
    size = 'SizeX="7" SizeY="9" SizeZ="1" SizeC="2" SizeT="3" DimensionOrder="XYCZT" Type="uint8"'
    planes = "".join(
        f'<Plane TheC="{c}" TheZ="0" TheT="{t}" DeltaT="{t}.{c}" DeltaTUnit="min" PositionX="{c}" ExposureTime="9"/>'
        for t in range(3)
        for c in range(2)
    )
    text = f"<OME><Image><Pixels {size}>{planes}</Pixels></Image></OME>"
    after = ome(answer("mask.tiff", read(described(text.encode()), channel=1)))
    assert after["Plane"] == [
        {"TheC": "0", "TheZ": "0", "TheT": str(t), "DeltaT": f"{t}.1", "DeltaTUnit": "min", "PositionX": "1"}
        for t in range(3)
    ]
    assert (
        ome(answer("mask.tiff", read(described(text.encode()), axes="TZYX".replace("Z", "C"))))["Plane"] == []
    )


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_scores_name_their_channels(kind: str) -> None:
    data = written(RNG.integers(0, 255, (2, 3, *SIDES), dtype=np.uint8), "TZYX", **{kind: True})
    body = answer("scores.tiff", read(data), 3)
    assert lengths(body) == {"T": 2, "Z": 3, "C": 3}
    names = ["background", "class 1", "class 2"]
    if kind == "ome":
        assert [channel["Name"] for channel in ome(body)["Channel"]] == names
    else:
        assert imagej(body)["Labels"] == names * 6


@pytest.mark.parametrize("given", ["0.5x0.25", "0.001", "0.325x0.1083333", "99999"])
@pytest.mark.parametrize("kind", ["imagej", "ome", "plain", "png"])
def test_pixel_size_of_the_request_replaces_that_of_the_file(kind: str, given: str) -> None:
    values = RNG.integers(0, 255, (3, *SIDES), dtype=np.uint8)
    options: dict[str, Any] = {"imagej": {"imagej": True}, "ome": {"ome": True}}.get(kind, {})
    words = {"imagej": IMAGEJ_WORDS, "ome": OME_WORDS}.get(kind, {})
    data = written(values, "TYX", resolution=(4, 5), metadata=words, **options)
    if kind == "png":
        out = io.BytesIO()
        Pillow.fromarray(values[0]).save(out, "PNG")
        data = out.getvalue()
    source = with_pixel_size(read(data), given)
    body = answer("mask.tiff", source)
    height, width = (float(part) for part in (given.split("x") * 2)[:2])
    again = read(body, labels=True).spacing_mm
    expected = (height, width) if kind == "png" else (width, height)
    assert again == pytest.approx([um / 1e3 for um in expected], rel=1e-6)
    if kind == "ome":
        assert ome(body)["PhysicalSizeXUnit"] == ome(body)["PhysicalSizeYUnit"] == "µm"
        assert ome(body)["TimeIncrement"] == "1.5"
        assert "PhysicalSizeZ" not in ome(body)
    else:
        assert imagej(body)["unit"] == "um"
        assert imagej(body).get("finterval") == (0.5 if kind == "imagej" else None)


@pytest.mark.parametrize("unit", [1, 2, 3])
def test_plain_resolution_is_kept(unit: int) -> None:
    for pages_ in (1, 3):
        values = RNG.integers(0, 255, (pages_, *SIDES), dtype=np.uint8)
        data = tiff(
            values,
            photometric="minisblack",
            metadata=None,
            resolution=((25400, 7), (300, 1)),
            resolutionunit=unit,
        )
        body = answer("mask.tiff", read(data))
        with tifffile.TiffFile(io.BytesIO(body)) as file:
            for page in file.pages:
                assert page.tags["XResolution"].value == (25400, 7)
                assert page.tags["YResolution"].value == (300, 1)
                assert page.resolutionunit == unit
                assert page.description == ""


def test_times_of_the_request_are_times_in_the_answer() -> None:
    source = read(described(""), axes="TYX")
    assert lengths(answer("mask.tiff", source)) == {"T": 6}
    assert lengths(answer("mask.tiff", read(described(""), axes="ZYX"))) == {"Z": 6}
    with tifffile.TiffFile(io.BytesIO(answer("mask.tiff", read(described(""))))) as file:
        assert not any(page.description for page in file.pages)


def test_answers_to_stk_and_lsm_are_calibrated() -> None:
    planes = RNG.integers(0, 255, (4, *SIDES)).astype(np.uint16)
    times = stk(planes, times_ms=[0, 500, 1000, 1500], pixel=(0.25, "um"))
    body = answer("mask.tiff", read(times))
    assert lengths(body) == {"T": 4}
    assert {"unit": "um", "finterval": 0.5, "XResolution": (4, 1)}.items() <= imagej(body).items()
    slices = stk(planes, distances=[2.0] * 4, pixel=(65.0, "nm"))
    assert {"unit": "um", "spacing": 0.002, "slices": 4}.items() <= imagej(
        answer("mask.tiff", read(slices))
    ).items()
    both = lsm(planes[:, None], planes[0], axes="TZ", lengths={"T": 2, "Z": 2}, interval_s=2.5)
    body = answer("mask.tiff", read(both))
    assert lengths(body) == {"T": 2, "Z": 2}
    assert {"unit": "um", "finterval": 2.5, "spacing": 0.5, "XResolution": (10, 1)}.items() <= imagej(
        body
    ).items()


@pytest.mark.parametrize("number", range(1, 9))
def test_orientation_is_noted_and_kept(number: int) -> None:
    """The mask lies on the pixels as stored, and has the same tag: it lies on its source in readers of both kinds."""
    values = RNG.integers(0, 2, SIDES, dtype=np.uint8) * 255
    data = tiff(values, metadata=None, extratags=[(274, "H", 1, number, True)])
    decoded = read(data)
    assert np.array_equal(decoded.values[..., 0], values)
    assert (f"orientation tag ({number})" in decoded.note) == (number != 1)
    body = encoded("mask.tiff", masked((values > 0).astype(np.uint8), decoded))
    with tifffile.TiffFile(io.BytesIO(body)) as file:
        assert file.pages.first.tags.valueof(274, 1) == number
    # Pillow turns both.
    by_pillow = [np.asarray(Pillow.open(io.BytesIO(file))) > 0 for file in (data, body)]
    assert np.array_equal(*by_pillow)


PLACE = [
    (286, 5, 1, (12, 5), True),
    (287, 5, 1, (7, 1), True),
    (33550, 12, 3, (0.3, 0.3, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 440720.0, 100000.0, 0.0), True),
    (34735, 3, 8, (1, 1, 0, 1, 1024, 0, 1, 1), True),
    (34737, 2, 0, "WGS 84|", True),
]


def test_place_is_kept() -> None:
    """On the slide, and on the earth."""
    data = tiff(RNG.integers(0, 255, SIDES, dtype=np.uint8), metadata=None, extratags=PLACE)
    body = answer("mask.tiff", read(data))
    with tifffile.TiffFile(io.BytesIO(data)) as before, tifffile.TiffFile(io.BytesIO(body)) as after:
        for code, *_ in PLACE:
            assert after.pages.first.tags[code].value == before.pages.first.tags[code].value
            assert after.pages.first.tags[code].dtype == before.pages.first.tags[code].dtype


ODD_TAGS = {
    "zero": (282, 5, 1, (0, 1)),
    "over zero": (282, 5, 1, (1, 0)),
    "a float": (282, 12, 1, 4.0),
    "two": (282, 5, 2, (1, 2, 3, 4)),
    "unit": (296, 3, 1, 77),
    "unit as text": (296, 2, 0, "cm"),
    "place as text": (33550, 2, 0, "there"),
    "place nowhere": (33550, 12, 1, math.nan),
    "many": (33922, 12, 6000, tuple(range(6000))),
    "orientation": (274, 3, 1, 9),
    "orientations": (274, 3, 2, (6, 6)),
}


@pytest.mark.parametrize("name", ODD_TAGS)
def test_odd_tags_cost_no_answer(name: str) -> None:
    code, dtype, count, value = ODD_TAGS[name]
    data = bytearray(
        tiff(np.zeros(SIDES, np.uint8), metadata=None, extratags=[(60000, dtype, count, value, True)])
    )
    # The tag is written under a number of its own, which then changes, because tifffile writes the others itself.
    where = data.index((60000).to_bytes(2, "little") + dtype.to_bytes(2, "little"))
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as file:
        other = file.pages.first.tags.get(code)
        if other is not None:
            data[other.offset : other.offset + 2] = (60001).to_bytes(2, "little")
    data[where : where + 2] = code.to_bytes(2, "little")
    decoded = read(bytes(data))
    assert decoded.note == ""
    assert np.array_equal(pages(answer("labels.tiff", decoded)).shape, (1, *SIDES))
