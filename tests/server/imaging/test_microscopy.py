"""Axes and pixel sizes of TIFF, as ImageJ, OME and tifffile write them: all written by tifffile, and some by hand."""

import contextlib
import dataclasses
import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Image, Volume
from server.errors import CallerError, InvalidParameter, TooLarge, Unreadable
from server.imaging import microscopy
from tests.server.imaging.conftest import input_header, read
from tests.support.memory import memory_stays_below

SIDES = 9, 7


def written(values: np.ndarray, axes: str = "", **options: Any) -> bytes:
    """A TIFF as tifffile writes it."""
    out = io.BytesIO()
    metadata = ({"axes": axes} if axes else {}) | options.pop("metadata", {})
    tifffile.imwrite(out, values, **{"photometric": "minisblack"} | options, metadata=metadata)
    return out.getvalue()


def described(description: str | bytes, pages: int = 6, **options: Any) -> bytes:
    """Pages under a description of our own."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        for number in range(pages):
            page = np.full(SIDES, number, dtype=np.uint8)
            tiff.write(page, description=description if not number else None, metadata=None, contiguous=False, **options)
    return out.getvalue()


def slices(found: Image | Volume) -> np.ndarray:
    """(slices, H, W) of one channel."""
    if isinstance(found, Image):
        return found.pixels[None, ..., 0]
    return found.voxels[..., 0].transpose(2, 1, 0)


def order(found: Image | Volume) -> list[int]:
    """Of pages that are filled with their number."""
    return slices(found)[:, 0, 0].tolist()


def values(rng: np.random.Generator, *lengths: int) -> np.ndarray:
    return rng.integers(0, 255, (*lengths, *SIDES), dtype=np.uint8)


class TestHyperstacks:
    @pytest.mark.parametrize("kind", ["imagej", "ome", "plain"])
    @pytest.mark.parametrize("axes", ["TZCYX", "TZYX", "ZCYX", "TCYX", "ZYX", "TYX", "CYX"])
    def test_each_channel_is_a_stack_of_times_and_slices(self, rng: np.random.Generator, kind: str, axes: str) -> None:
        lengths = {"T": 2, "Z": 3, "C": 4}
        wanted = values(rng, *(lengths[letter] for letter in axes[:-2]))
        file = written(wanted, axes, **({kind: True} if kind != "plain" else {}))
        at = axes.find("C")
        for channel in range(4 if at >= 0 else 1):
            one = wanted.take(channel, at) if at >= 0 else wanted
            found = read(file, channel=channel)
            assert np.array_equal(slices(found), one.reshape(-1, *SIDES))
            said = input_header(file, channel=channel)
            assert said.size == found.input_header.size
            assert said.channels == found.input_header.channels == 1

    @pytest.mark.parametrize("axes", ["CTZYX", "CZTYX", "TCZYX", "ZCTYX", "ZTCYX"])
    def test_any_order_of_ome(self, rng: np.random.Generator, axes: str) -> None:
        lengths = {"T": 2, "Z": 3, "C": 4}
        wanted = values(rng, *(lengths[letter] for letter in axes[:-2]))
        found = slices(read(written(wanted, axes, ome=True), channel=2))
        moved = np.moveaxis(wanted, [axes.index(letter) for letter in "TZC"], [0, 1, 2])
        assert np.array_equal(found, moved[:, :, 2].reshape(-1, *SIDES))

    def test_several_channels_say_so(self, rng: np.random.Generator) -> None:
        wanted = values(rng, 2, 3)
        found = read(written(wanted, "ZCYX", imagej=True))
        assert np.array_equal(slices(found), wanted[:, 0])
        assert found.note == "the input has 3 channels and the first (0) was read; channel=1 to 2 reads another"

    def test_channels_alone_are_an_image(self, rng: np.random.Generator) -> None:
        wanted = values(rng, 3)
        found = read(written(wanted, "CYX", ome=True), channel=1)
        assert isinstance(found, Image)
        assert np.array_equal(found.pixels[..., 0], wanted[1])

    @pytest.mark.parametrize(
        ("axes", "note"),
        [("TZYX", "2 times of 3 slices follow each other as 6 pages, and objects do not go on from time to time; axes= says otherwise"), ("TYX", "2 times follow each other as 2 pages, and objects do not go on from time to time; axes= says otherwise"), ("ZYX", "")],
    )  # fmt: skip
    def test_times_say_so(self, rng: np.random.Generator, axes: str, note: str) -> None:
        lengths = {"T": 2, "Z": 3}
        found = read(written(values(rng, *(lengths[letter] for letter in axes[:-2])), axes, imagej=True))
        assert found.note == note
        assert isinstance(found, Volume)
        assert found.time_slices == {"TZYX": 3, "TYX": 1, "ZYX": None}[axes]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tifffile, which takes them for colours for now
    @pytest.mark.parametrize("length", [3, 4])
    @pytest.mark.parametrize("axes", ["ZYX", "TYX", "CYX", "TZYX", "TCZYX", "ZTCYX", "CTZYX"])
    def test_planes_that_tifffile_writes_as_colours(self, rng: np.random.Generator, axes: str, length: int) -> None:
        """Three or four of them become the samples of one page; the axes say what they are."""
        lengths = dict(zip(axes[:-3], (2, 5), strict=False)) | {axes[-3]: length}
        wanted = values(rng, *(lengths[letter] for letter in axes[:-2]))
        out = io.BytesIO()
        tifffile.imwrite(out, wanted, metadata={"axes": axes})
        file, at = out.getvalue(), axes.find("C")
        for channel in range(lengths.get("C", 1)):
            one = wanted.take(channel, at) if at >= 0 else wanted
            rest = axes[:-2].replace("C", "")
            if rest == "ZT":
                one = one.swapaxes(0, 1)
            found = read(file, channel=channel)
            assert np.array_equal(slices(found), one.reshape(-1, *SIDES))
            assert input_header(file, channel=channel) == dataclasses.replace(found.input_header, affine=None)
            assert isinstance(found, Image if rest == "" else Volume)
        named = read(file, axes=axes, channel=0 if at >= 0 else None)
        assert np.array_equal(named.values, read(file, channel=0 if at >= 0 else None).values)
        if len(axes) == 3:
            assert isinstance(read(file, axes="YXS"), Image)
            # Whatever the file says, or does not.
            out = io.BytesIO()
            tifffile.imwrite(out, wanted)
            assert isinstance(read(out.getvalue()), Image)
            assert np.array_equal(slices(read(out.getvalue(), axes="ZYX")), wanted)

    @pytest.mark.parametrize("kind", ["imagej", "ome"])
    def test_colours_stay_colours(self, rng: np.random.Generator, kind: str) -> None:
        wanted = rng.integers(0, 255, (3, *SIDES, 3), dtype=np.uint8)
        file = written(wanted, "ZYXS", photometric="rgb", **{kind: True})
        found = read(file)
        assert np.array_equal(found.values.transpose(2, 1, 0, 3), wanted)
        assert found.note == ""
        assert input_header(file).channels == 3
        assert np.array_equal(slices(read(file, channel=1)), wanted[..., 1])

    def test_samples_that_are_no_colours_are_channels(self, rng: np.random.Generator) -> None:
        wanted = rng.integers(0, 255, (*SIDES, 5), dtype=np.uint8)
        file = written(wanted, planarconfig="contig")
        assert read(file).note.startswith("the input has 5 channels")
        assert np.array_equal(slices(read(file, channel=4))[0], wanted[..., 4])

    def test_a_channel_that_does_not_exist(self, rng: np.random.Generator) -> None:
        file = written(values(rng, 2, 3), "ZCYX", ome=True)
        for channel in (3, -1, 10**9):
            with pytest.raises(InvalidParameter, match="does not exist; the input has 3 channels, 0 to 2"):
                input_header(file, channel=channel)

    def test_only_the_largest_level_of_a_pyramid(self, rng: np.random.Generator) -> None:
        out, wanted = io.BytesIO(), values(rng, 3)
        with tifffile.TiffWriter(out, ome=True) as tiff:
            tiff.write(wanted, subifds=1, metadata={"axes": "ZYX"}, photometric="minisblack")
            tiff.write(wanted[:, ::2, ::2], subfiletype=1, photometric="minisblack")
        assert np.array_equal(slices(read(out.getvalue())), wanted)

    def test_only_the_first_of_several_images(self, rng: np.random.Generator) -> None:
        out, wanted = io.BytesIO(), values(rng, 3)
        with tifffile.TiffWriter(out, ome=True) as tiff:
            tiff.write(wanted, metadata={"axes": "ZYX"}, photometric="minisblack")
            tiff.write(rng.integers(0, 9, (5, 5), dtype=np.uint8), metadata={"axes": "YX"}, photometric="minisblack")
        found = read(out.getvalue())
        assert np.array_equal(slices(found), wanted)
        assert found.note == "only the first of 2 images was read"

    def test_big_tiff(self, rng: np.random.Generator) -> None:
        wanted = values(rng, 2, 3)
        assert np.array_equal(slices(read(written(wanted, "TZYX", ome=True, bigtiff=True))), wanted.reshape(-1, *SIDES))


class TestAxes:
    def test_of_plain_pages(self, rng: np.random.Generator) -> None:
        wanted = values(rng, 6)
        file = described("")
        assert order(read(file)) == order(read(file, axes="ZYX")) == [0, 1, 2, 3, 4, 5]
        assert order(read(file, axes="CYX", channel=4)) == [4]
        assert np.array_equal(slices(read(written(wanted), axes="TYX")), wanted)

    def test_win_over_metadata(self, rng: np.random.Generator) -> None:
        wanted = values(rng, 2, 3)
        file = written(wanted, "ZCYX", imagej=True)
        assert np.array_equal(slices(read(file, axes="CZYX", channel=1)), wanted[1])
        assert np.array_equal(slices(read(file, axes="ZYX")), wanted.reshape(-1, *SIDES))
        assert input_header(file, axes="ZYX").size == (7, 9, 6)

    def test_name_the_samples(self, rng: np.random.Generator) -> None:
        wanted = rng.integers(0, 255, (*SIDES, 3), dtype=np.uint8)
        assert np.array_equal(read(written(wanted, photometric="rgb"), axes="YXS").values, wanted)

    @pytest.mark.parametrize("axes", ["XY", "ZYXC", "ZZYX", "QYX", "yx", "YXZ", "TZ", "YX" * 9, "\0"])
    def test_that_are_no_axes(self, axes: str) -> None:
        with pytest.raises(InvalidParameter, match="is not understood; give letters of the axes, slowest first"):
            input_header(described(""), axes=axes)

    @pytest.mark.parametrize("axes", ["YX", "TCYX", "TZCYX", "ZYXS", "YXS"])
    def test_that_do_not_fit_say_what_there_is(self, axes: str) -> None:
        with pytest.raises(
            InvalidParameter, match=rf"axes={axes} does not fit: the file has 6 pages, as 6 × 9 × 7 \(1 axis of pages"
        ):
            input_header(described(""), axes=axes)

    def test_rescue_what_metadata_spoil(self) -> None:
        file = described("ImageJ=1.53t\nimages=900\n")
        with pytest.raises(Unreadable, match="says 900 images and the file lists 6"):
            read(file)
        assert order(read(file, axes="ZYX")) == [0, 1, 2, 3, 4, 5]

    def test_are_for_tiff(self, rng: np.random.Generator) -> None:
        from tests.support.files import nifti_bytes

        with pytest.raises(InvalidParameter, match="axes is for TIFF; the axes of NIfTI are known"):
            input_header(nifti_bytes(np.zeros((3, 3, 3), dtype=np.uint8)), axes="ZYX")


class TestSpacing:
    @pytest.mark.parametrize(
        ("unit", "mm"),
        # µ is written as one of two letters, by itself or as Java and Python escape it.
        [*((unit, 1e-3) for unit in ("micron", "um", "µm", "μm", "\\u00B5m", "\\xb5m")), ("nm", 1e-6), ("mm", 1.0), ("inch", 25.4)],
    )
    def test_of_imagej(self, unit: str, mm: float) -> None:
        text = f"ImageJ=1.53t\nimages=6\nslices=6\nunit={unit}\nspacing=2.5\n"
        found = read(described(text.encode(), resolution=(4.0, 2.0)))
        assert isinstance(found, Volume)
        assert found.spacing_mm == pytest.approx((mm / 4, mm / 2, 2.5 * mm))
        single = read(described(text.replace("=6", "=1").replace("μ", "µ").encode("latin-1"), 1, resolution=(4.0, 2.0)))
        assert isinstance(single, Image)
        assert single.spacing_mm == pytest.approx((mm / 2, mm / 4))

    def test_of_imagej_as_tifffile_writes_it(self, rng: np.random.Generator) -> None:
        file = written(values(rng, 3), "ZYX", imagej=True, resolution=(1 / 0.25, 1 / 0.5), metadata={"spacing": 3.0, "unit": "um"})
        assert read(file).spacing_mm == pytest.approx((0.25e-3, 0.5e-3, 3e-3))

    @pytest.mark.parametrize(("unit", "mm"), [("µm", 1e-3), ("nm", 1e-6), ("mm", 1.0), ("cm", 10.0), (None, 1e-3)])
    def test_of_ome(self, rng: np.random.Generator, unit: str | None, mm: float) -> None:
        sizes = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.5, "PhysicalSizeZ": 3.0}
        units = {f"{name}Unit": unit for name in sizes} if unit else {}
        file = written(values(rng, 3), "ZYX", ome=True, metadata=sizes | units)
        assert read(file).spacing_mm == pytest.approx((0.25 * mm, 0.5 * mm, 3 * mm))
        assert read(file, axes="CYX").spacing_mm == pytest.approx((0.5 * mm, 0.25 * mm))

    def test_of_times_is_no_distance(self, rng: np.random.Generator) -> None:
        tags = {"imagej": True, "resolution": (4, 2), "metadata": {"spacing": 3.0, "unit": "um"}}
        mm = 1e-3
        assert read(written(values(rng, 2), "TYX", **tags)).spacing_mm == pytest.approx((0.25 * mm, 0.5 * mm))
        # Of the slices of each time it is one.
        assert read(written(values(rng, 2, 3), "TZYX", **tags)).spacing_mm == pytest.approx((0.25 * mm, 0.5 * mm, 3 * mm))

    @pytest.mark.parametrize("unit", ["", "pixel", "inches?", "furlong", "sec"])
    def test_without_a_unit_that_is_a_length(self, unit: str) -> None:
        assert read(described(f"ImageJ=1.53t\nimages=1\nunit={unit}\n", 1, resolution=(4.0, 2.0))).spacing_mm is None

    def test_of_plain_tags_counts_nothing(self) -> None:
        assert read(described("", 1, resolution=(72, 72), resolutionunit="INCH")).spacing_mm is None

    @pytest.mark.parametrize("number", ["0", "-1", "nan", "inf", "1e300", "1e-300", "x", ""])
    def test_that_is_none(self, number: str) -> None:
        text = (
            f'<OME><Image><Pixels SizeX="7" SizeY="9" SizeZ="1" SizeC="1" SizeT="1" DimensionOrder="XYZCT" PhysicalSizeX="{number}" '
            'PhysicalSizeY="1"/></Image></OME>'
        )
        assert read(described(text, 1)).spacing_mm is None


def ome(inside: str = "", z: int = 6, c: int = 1, t: int = 1, order: str = "XYZCT") -> str:
    return (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels ID="Pixels:0" SizeX="7" SizeY="9" SizeZ="{z}" '
        f'SizeC="{c}" SizeT="{t}" DimensionOrder="{order}" Type="uint8">{inside}</Pixels></Image></OME>'
    )


class TestOmeHeaders:
    def test_say_which_page_is_which(self) -> None:
        data = "".join(f'<TiffData IFD="{5 - z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(6))
        assert order(read(described(ome(data)))) == [5, 4, 3, 2, 1, 0]

    def test_count_planes(self) -> None:
        data = '<TiffData IFD="3" FirstC="0" FirstZ="0" PlaneCount="3"/><TiffData IFD="0" FirstC="1" FirstZ="0" PlaneCount="3"/>'
        file = described(ome(data, z=3, c=2))
        assert order(read(file, channel=0)) == [3, 4, 5]
        assert order(read(file, channel=1)) == [0, 1, 2]

    @pytest.mark.parametrize("data", ["", "<TiffData/>", '<TiffData IFD="0" PlaneCount="6"/>'])
    def test_may_leave_it_to_the_order(self, data: str) -> None:
        assert order(read(described(ome(data, z=2, c=3, order="XYCZT")), channel=1)) == [1, 4]
        assert order(read(described(ome(data, z=2, c=3, order="XYZCT")), channel=1)) == [2, 3]

    @pytest.mark.parametrize(
        "text",
        [
            ome(z=7), ome(z=3, c=3), ome('<TiffData IFD="0" FirstZ="0"/>'), ome('<TiffData IFD="99" PlaneCount="6"/>'),
            ome("".join(f'<TiffData IFD="{z}" FirstZ="{z}"><UUID FileName="{z}.tif">urn:uuid:{z}</UUID></TiffData>' for z in range(6))),
            ome(z=0), ome(z=2**31 - 1, t=2**31 - 1),
        ],
    )  # fmt: skip
    def test_of_which_a_part_is_elsewhere(self, text: str) -> None:
        with pytest.raises(Unreadable, match="not all of which are in this file"):
            read(described(text))
        assert order(read(described(text), axes="ZYX")) == [0, 1, 2, 3, 4, 5]

    def test_never_make_another_file_open(self, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("a.ome.tif", "b.ome.tif"):
            (tmp_path / name).write_bytes(described("", 3))
        data = "".join(
            f'<TiffData IFD="{z % 3}" FirstZ="{z}" PlaneCount="1"><UUID FileName="{name}">urn:uuid:{name}</UUID></TiffData>'
            for z, name in enumerate(["a.ome.tif"] * 3 + ["b.ome.tif"] * 3)
        )
        opened: list[object] = []
        monkeypatch.setattr("builtins.open", lambda *given, **_: opened.append(given))
        with pytest.raises(Unreadable, match="one of several"):
            read(described(ome(data), 3))
        assert not opened

    @pytest.mark.parametrize(
        "text",
        [ome()[:-40] + "</OME>", "<OME></OME>", "OME>", ome().replace('SizeZ="6"', 'SizeZ="x"'), ome(z=-1), "<" * 9000 + "OME>"],
    )
    def test_that_are_damaged(self, text: str) -> None:
        found = read(described(text))
        assert order(found) == [0, 1, 2, 3, 4, 5]
        assert found.note == "the OME header is damaged; pages were taken as slices"

    @pytest.mark.parametrize("text", [ome().replace('SizeX="7"', 'SizeX="8"'), ome(order="XYXYX"), ome(order="ZCTXY")])
    def test_of_another_image(self, text: str) -> None:
        assert read(described(text)).note == "the OME header describes another image; pages were taken as slices"

    def test_with_entities(self) -> None:
        laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
        text = f'<!DOCTYPE OME [<!ENTITY l0 "ha">{laughs}]>' + ome("&l9;")
        with memory_stays_below(30), pytest.raises(Unreadable, match="document type"):
            read(described(text))

    def test_that_name_other_files_as_entities(self) -> None:
        text = '<!DOCTYPE OME [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + ome("&x;")
        with pytest.raises(Unreadable, match="document type"):
            read(described(text))

    def test_without_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with memory_stays_below(60), pytest.raises(TooLarge, match="more than 100,000 elements"):
            read(described(ome("<a/>" * 200_000)))
        with pytest.raises(TooLarge, match="8,388,608 are read"):
            read(described(ome("<!--" + " " * microscopy.MOST_TEXT + "-->")))

    def test_that_all_pages_share(self) -> None:
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as tiff:
            for _ in range(10):
                tiff.write(np.zeros(SIDES, dtype=np.uint8), description="x" * 2_000_000, metadata=None, contiguous=False)
        with pytest.raises(TooLarge, match="descriptions of the TIFF's pages have more than 16,777,216 characters"):
            read(out.getvalue())


class TestImageJ:
    @pytest.mark.parametrize("line", ["images=x", "images=-1", "channels=1e9", "images=99999999999999999999", "slices="])
    def test_that_is_damaged(self, line: str) -> None:
        found = read(described(f"ImageJ=1.53t\n{line}\n"))
        assert order(found) == [0, 1, 2, 3, 4, 5]
        assert "description is damaged" in found.note

    def test_whose_numbers_do_not_fit(self) -> None:
        assert order(read(described("ImageJ=1.53t\nimages=6\nchannels=5\nslices=2\n"))) == [0, 1, 2, 3, 4, 5]

    def test_that_lists_one_page_for_all(self) -> None:
        with pytest.raises(Unreadable, match=r"written so above 4 GB, or cut off.*save it as OME-TIFF or BigTIFF"):
            read(described("ImageJ=1.53t\nimages=6\nslices=6\n", 1))


@pytest.mark.parametrize(
    "text",
    ['{"shape": [1e400, 2]}', '{"shape": 3}', '{"shape": [0, 0]}', '{"shape": [-6, -1, 9, 7]}', "{" * 60000, '{"shape": [6, 9, 7], "axes": "ZZZZ"}', '{"shape": [[]]}', "{}", "[]"],
)  # fmt: skip
def test_shapes_that_are_none(text: str) -> None:
    assert order(read(described(text))) == [0, 1, 2, 3, 4, 5]


WORDS = ["ImageJ=", "images=", "slices=", "frames=", "channels=", "unit=um\n", "spacing=", "\n", "6", "2", "3", "-1", "1e99", "<OME>", "</OME>", "OME>",
         "<Image>", "<Pixels ", 'SizeX="7" SizeY="9" ', 'SizeZ="6" ', 'SizeC="2" SizeT="1" ', 'DimensionOrder="XYZCT"', "/>", "<TiffData ", 'IFD="2" ',
         'PlaneCount="4" ', 'FirstZ="1" ', '{"shape": [', "6, 9, 7", '], "axes": "', "ZYX", '"}', "&x;", "<!DOCTYPE x>", "µ", "\0"]  # fmt: skip


@settings(max_examples=500, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=25), count=st.integers(1, 9))
def test_any_description(words: list[str], count: int) -> None:
    with contextlib.suppress(CallerError):
        found = microscopy.describe("".join(words), count, (9, 7, 1), (0.0, 3.0))
        assert math.prod(found.table.shape) <= count
        assert 0 <= found.table.min() <= found.table.max() < count
        assert found.table.ndim == len(found.letters)
        assert all(1e-7 <= mm <= 100 for mm in found.spacing.values())


def test_each_combination_of_axes_is_understood_or_refused() -> None:
    file = described(ome(z=2, c=3))
    for length in range(6):
        for letters in itertools.permutations("TZCYXS", length):
            with contextlib.suppress(InvalidParameter):
                assert input_header(file, axes="".join(letters)).size in ((9, 7), (7, 9, 2), (7, 9, 3), (7, 9, 6))
