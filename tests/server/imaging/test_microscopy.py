"""Axes and pixel sizes of TIFF, as ImageJ, OME and tifffile write them: all written by tifffile, and some by hand."""

import contextlib
import io
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from server.arrays import Image
from server.errors import CallerError, InvalidParameter, TooLarge, UnetppError, Unreadable
from server.imaging import microscopy
from tests.server.imaging.builders import SIDES, described, written
from tests.server.imaging.conftest import assert_refused, deterministic, header, read
from tests.support.files import nifti_bytes
from tests.support.memory import memory_stays_below

LENGTHS = {"T": 2, "Z": 3, "C": 4}
RNG = np.random.default_rng(0)


def random(*lengths: int) -> np.ndarray:
    return RNG.integers(0, 255, (*lengths, *SIDES), dtype=np.uint8)


def slices(data: bytes, **choices: Any) -> np.ndarray:
    """(slices, H, W) of one channel, after a comparison with the header."""
    decoded, known = read(data, **choices), header(data, **choices)
    assert known == decoded.input_header
    assert known.channels == 1
    return (
        decoded.pixels[None, ..., 0]
        if isinstance(decoded, Image)
        else decoded.voxels[..., 0].transpose(2, 1, 0)
    )


def order(data: bytes, **choices: Any) -> list[int]:
    """Of pages that are filled with their number."""
    return slices(data, **choices)[:, 0, 0].tolist()


def stacks(values: np.ndarray, axes: str) -> dict[int | None, np.ndarray]:
    """Per channel its slices, times first; `axes` without YX."""
    letters = [letter for letter in "TZ" if letter in axes]
    channels = ["C"] if "C" in axes else []
    moved = np.moveaxis(values, [axes.index(letter) for letter in channels + letters], range(len(axes)))
    if not channels:
        return {None: moved.reshape(-1, *SIDES)}
    return {channel: moved[channel].reshape(-1, *SIDES) for channel in range(len(moved))}


@pytest.mark.parametrize(
    ("kind", "axes"),
    [
        *itertools.product(["imagej", "ome", "plain"], ["TZC", "TZ", "ZC", "TC", "Z", "T", "C"]),
        *(("ome", axes) for axes in ("CTZ", "CZT", "TCZ", "ZCT", "ZTC")),
    ],
)
def test_hyperstack_gives_each_channel_as_times_and_slices(kind: str, axes: str) -> None:
    values = random(*(LENGTHS[letter] for letter in axes))
    data = written(values, f"{axes}YX", **({kind: True} if kind != "plain" else {}))
    for channel, expected in stacks(values, axes).items():
        assert np.array_equal(slices(data, channel=channel), expected)
    decoded = read(data)
    assert ("channel=1 to 3" in decoded.note) == ("C" in axes)
    assert ("2 times" in decoded.note) == ("T" in axes)
    expected_slices = (LENGTHS["Z"] if "Z" in axes else 1) if "T" in axes else None
    assert decoded.input_header.time_slices == expected_slices


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tifffile, which takes them for colours for now
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("axes", ["Z", "T", "C", "TZ", "TCZ", "ZTC", "CTZ"])
def test_planes_that_tifffile_writes_as_colours_are_what_their_axes_say(axes: str, length: int) -> None:
    """Three or four of them become the samples of one page."""
    lengths = dict(zip(axes[:-1], (2, 5), strict=False)) | {axes[-1]: length}
    values, out, bare = random(*lengths.values()), io.BytesIO(), io.BytesIO()
    tifffile.imwrite(out, values, metadata={"axes": f"{axes}YX"})
    for channel, expected in stacks(values, axes).items():
        assert np.array_equal(slices(out.getvalue(), channel=channel), expected)
        assert np.array_equal(slices(out.getvalue(), channel=channel, axes=f"{axes}YX"), expected)
    if len(axes) == 1:
        assert isinstance(read(out.getvalue(), axes="YXS"), Image)
        tifffile.imwrite(bare, values)
        assert isinstance(read(bare.getvalue()), Image)
        assert np.array_equal(slices(bare.getvalue(), axes="ZYX"), values)


@pytest.mark.parametrize("kind", ["imagej", "ome"])
def test_colours_of_a_stack_stay_colours(kind: str) -> None:
    values = RNG.integers(0, 255, (3, *SIDES, 3), dtype=np.uint8)
    data = written(values, "ZYXS", photometric="rgb", **{kind: True})
    decoded = read(data)
    assert np.array_equal(decoded.values.transpose(2, 1, 0, 3), values)
    assert decoded.note == ""
    assert header(data).channels == 3
    assert np.array_equal(slices(data, channel=1), values[..., 1])


def test_samples_that_are_no_colours_are_channels() -> None:
    values = RNG.integers(0, 255, (*SIDES, 5), dtype=np.uint8)
    data = written(values, planarconfig="contig")
    assert "5 channels" in read(data).note
    assert np.array_equal(slices(data, channel=4)[0], values[..., 4])


@pytest.mark.parametrize("channel", [3, -1, 10**9])
def test_channel_that_does_not_exist_is_refused(channel: int) -> None:
    data = written(random(2, 3), "ZCYX", ome=True)
    fields = {"parameter": "channel", "value": channel, "limit": 2}
    assert_refused(data, InvalidParameter, fields, by=(read, header), channel=channel)


@pytest.mark.parametrize(
    ("other", "note"), [({"subfiletype": 1}, False), ({"metadata": {"axes": "ZYX"}}, True)]
)
def test_only_the_first_image_of_a_file_is_read(other: dict[str, Any], note: bool) -> None:
    """Of a pyramid that is the largest level; of several images a note tells their number."""
    out, values = io.BytesIO(), random(3)
    with tifffile.TiffWriter(out, ome=True, bigtiff=True) as tiff:
        subifds = 0 if note else 1
        tiff.write(values, subifds=subifds, metadata={"axes": "ZYX"}, photometric="minisblack")
        tiff.write(values[:, ::2, ::2], photometric="minisblack", **other)
    assert np.array_equal(slices(out.getvalue()), values)
    assert ("2 images" in read(out.getvalue()).note) == note


def test_axes_of_the_caller_win_over_what_the_file_says() -> None:
    assert order(described("")) == order(described(""), axes="ZYX") == [0, 1, 2, 3, 4, 5]
    assert order(described(""), axes="CYX", channel=4) == [4]
    values = random(2, 3)
    data = written(values, "ZCYX", imagej=True)
    assert np.array_equal(slices(data, axes="CZYX", channel=1), values[1])
    assert np.array_equal(slices(data, axes="ZYX"), values.reshape(-1, *SIDES))


@pytest.mark.parametrize("axes", ["XY", "ZYXC", "ZZYX", "QYX", "yx", "YXZ", "TZ", "YX" * 9, "\0"])
def test_axes_that_are_not_understood_are_refused(axes: str) -> None:
    fields = {"parameter": "axes", "value": axes, "allowed": list("TZCYXS")}
    assert_refused(described(""), InvalidParameter, fields, by=(header,), axes=axes)


@pytest.mark.parametrize("axes", ["YX", "TCYX", "TZCYX", "ZYXS", "YXS"])
def test_axes_that_do_not_fit_are_refused_with_what_there_is(axes: str) -> None:
    fields = {"parameter": "axes", "value": axes, "actual": [6, 9, 7]}
    assert_refused(described(""), InvalidParameter, fields, by=(header,), axes=axes)


def test_axes_of_another_format_are_refused() -> None:
    data = nifti_bytes(np.zeros((3, 3, 3), dtype=np.uint8))
    assert_refused(data, InvalidParameter, {"parameter": "axes", "format": "NIfTI"}, by=(header,), axes="ZYX")


def ome(inside: str = "", z: int = 6, c: int = 1, t: int = 1, order: str = "XYZCT") -> str:
    sizes = f'SizeX="7" SizeY="9" SizeZ="{z}" SizeC="{c}" SizeT="{t}" DimensionOrder="{order}" Type="uint8"'
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    image = f'<Image ID="Image:0"><Pixels ID="Pixels:0" {sizes}>{inside}</Pixels></Image>'
    return f'<OME xmlns="{schema}">{image}</OME>'


BACKWARDS = "".join(f'<TiffData IFD="{5 - z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(6))
SWAPPED = (
    '<TiffData IFD="3" FirstC="0" PlaneCount="3"/><TiffData IFD="0" FirstC="1" FirstZ="0" PlaneCount="3"/>'
)
ALL = '<TiffData IFD="0" PlaneCount="6"/>'


@pytest.mark.parametrize(
    ("text", "channel", "expected"),
    [
        (ome(BACKWARDS), 0, [5, 4, 3, 2, 1, 0]),
        (ome(SWAPPED, z=3, c=2), 0, [3, 4, 5]),
        (ome(SWAPPED, z=3, c=2), 1, [0, 1, 2]),
        *((ome(data, z=2, c=3, order="XYCZT"), 1, [1, 4]) for data in ("", "<TiffData/>", ALL)),
        *((ome(data, z=2, c=3, order="XYZCT"), 1, [2, 3]) for data in ("", "<TiffData/>", ALL)),
    ],
)
def test_ome_header_says_which_page_is_which(text: str, channel: int, expected: list[int]) -> None:
    assert order(described(text), channel=channel) == expected


UUID = '<UUID FileName="{0}.tif">urn:uuid:{0}</UUID>'
FILES = "".join(f'<TiffData IFD="{z % 3}" FirstZ="{z}">{UUID.format(z)}</TiffData>' for z in range(6))
MISSING = {
    "7 slices": ome(z=7),
    "9 planes": ome(z=3, c=3),
    "1 of 6": ome('<TiffData IFD="0" FirstZ="0"/>'),
    "page 99": ome('<TiffData IFD="99" PlaneCount="6"/>'),
    "files": ome(FILES),
    "no slices": ome(z=0),
    "endless": ome(z=2**31 - 1, t=2**31 - 1),
    "imagej": "ImageJ=1.53t\nimages=900\n",
}


@pytest.mark.parametrize("name", MISSING)
def test_pages_that_are_missing_are_refused_unless_the_caller_names_the_axes(name: str) -> None:
    data = described(MISSING[name])
    assert_refused(data, Unreadable, {"reason": "missing-pages", "limit": 6, "parameter": "axes"})
    assert order(data, axes="ZYX") == [0, 1, 2, 3, 4, 5]


def test_ome_header_never_makes_another_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for z in range(6):
        Path(f"{z}.tif").write_bytes(described("", 3))
    opened: list[object] = []
    monkeypatch.setattr("builtins.open", lambda *arguments, **_: opened.append(arguments))
    assert_refused(described(ome(FILES), 6), Unreadable, "missing-pages")
    assert not opened


IMAGEJ = "ImageJ=1.53t\n"
DAMAGED = [
    *(
        ome()[:-40] + "</OME>",
        "<OME></OME>",
        "OME>",
        ome().replace('"6"', '"x"'),
        ome(z=-1),
        "<" * 9000 + "OME>",
    ),
    *(ome().replace('"7"', '"8"'), ome(order="XYXYX"), ome(order="ZCTXY")),
    *(
        IMAGEJ + line
        for line in ("images=x", "images=-1", "channels=1e9", "images=99999999999999999999", "slices=")
    ),
]
WITHOUT_AXES = [
    *(
        IMAGEJ + "images=6\nchannels=5\nslices=2",
        "{" * 60000,
        "{}",
        "[]",
        '{"shape": [6, 9, 7], "axes": "ZZZZ"}',
    ),
    *(f'{{"shape": {shape}}}' for shape in ("[1e400, 2]", "3", "[0, 0]", "[-6, -1, 9, 7]", "[[]]")),
]


@pytest.mark.parametrize("texts", [DAMAGED, WITHOUT_AXES], ids=["damaged", "without axes"])
def test_description_that_does_not_help_leaves_slices(texts: list[str]) -> None:
    for text in texts:
        data = described(text)
        assert order(data) == [0, 1, 2, 3, 4, 5]
        assert bool(read(data).note) == (texts is DAMAGED)


def test_ome_header_in_another_file_is_noted() -> None:
    text = '<OME><BinaryOnly MetadataFile="cells.companion.ome" UUID="urn:uuid:1"/></OME>'
    assert order(described(text)) == [0, 1, 2, 3, 4, 5]
    assert "lies in another file" in read(described(text)).note


LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
FILE = '<!DOCTYPE OME [<!ENTITY x SYSTEM "file:///etc/passwd">]>'
HOSTILE: dict[str, tuple[bytes, type[UnetppError], dict[str, Any] | str]] = {
    "laughs": (described(f"<!DOCTYPE OME [{LAUGHS}]>{ome('&l9;')}"), Unreadable, "xml-entities"),
    "file": (described(FILE + ome("&x;")), Unreadable, "xml-entities"),
    "elements": (described(ome("<a/>" * 100_001)), TooLarge, {"unit": "elements", "limit": 100_000}),
    "long": (described(ome(" " * 2**23)), TooLarge, {"unit": "characters", "limit": 2**23}),
    "shared": (described("x" * 6_000_000, 3, every=True), TooLarge, {"unit": "characters", "limit": 2**24}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_description_that_is_hostile_is_refused_within_bounded_memory(name: str) -> None:
    data, error, expected = HOSTILE[name]
    with memory_stays_below(60):
        assert_refused(data, error, expected)


# Descriptions in pieces.
GOOD = f'{ome(BACKWARDS, z=2, c=3)} {IMAGEJ}images=6\nslices=2\n {{"shape": [6, 9], "axes": "ZYX"}}'
WORDS = [*re.split(r"(?<=[\s=,])", GOOD), "1e99", "-1", "&x;", "OME>"]


@deterministic
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=25), st.integers(1, 9))
def test_describe_any_text_gives_each_page_once_or_refuses(words: list[str], count: int) -> None:
    with contextlib.suppress(CallerError):
        result = microscopy.describe("".join(words), count, (9, 7, 1), (0.0, 3.0))
        assert math.prod(result.pages.shape) <= count
        assert 0 <= result.pages.min() <= result.pages.max() < count
        assert result.pages.ndim == len(result.letters)
        assert all(1e-7 <= mm <= 100 for mm in result.spacing_mm.values())


def test_axes_in_each_combination_are_understood_or_refused() -> None:
    data = described(ome(z=2, c=3))
    for letters in itertools.chain(*(itertools.permutations("TZCYXS", length) for length in range(5))):
        with contextlib.suppress(InvalidParameter):
            assert header(data, axes="".join(letters)).size in ((9, 7), (7, 9, 2), (7, 9, 3), (7, 9, 6))
