"""Which pages of a TIFF are planes, and planes that only a tag counts; tifffile and ImageIO read the same files."""

import io
import itertools
import struct
from typing import Any

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile

from server.arrays import Image, Volume
from server.errors import TooLarge, Unreadable
from tests.server.imaging.conftest import assert_refused, header, read
from tests.server.imaging.tiff_by_hand import Tags, assembled, long, lsm, page_tags, short, stk
from tests.support.memory import memory_stays_below

RNG = np.random.default_rng(0)
PLANES = RNG.integers(0, 60000, (4, 24, 32)).astype(np.uint16)
SMALL = RNG.integers(0, 255, (6, 8)).astype(np.uint8)
FULL, THUMBNAIL, PAGE, MASK = 0, 1, 2, 4


def stack(data: bytes, **choices: Any) -> np.ndarray:
    """(slices, H, W) of one channel, after a comparison with the header."""
    decoded = read(data, **choices)
    assert header(data, **choices) == decoded.input_header
    if isinstance(decoded, Image):
        return decoded.pixels[None, ..., 0]
    return decoded.voxels[..., 0].transpose(2, 1, 0)


def marked(*pages: tuple[int, np.ndarray], **options: Any) -> bytes:
    """Pages with their NewSubfileType."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        for kind, page in pages:
            meaning = {"photometric": "mask"} if kind & MASK else {}
            tiff.write(page, subfiletype=kind, metadata=None, contiguous=False, **meaning | options)
    return out.getvalue()


WHOLE = [(FULL, page) for page in PLANES]
SMALLER = [(THUMBNAIL, page[::4, ::4]) for page in PLANES]
ALIKE = [(THUMBNAIL, page // 2) for page in PLANES]
# A mask has one bit and a meaning of its own.
BITS = np.arange(24 * 32).reshape(24, 32) % 3 > 0
MASKS = [(MASK, BITS)] * 4


@pytest.mark.parametrize(
    "pages",
    {
        "thumbnail after each": list(itertools.chain(*zip(WHOLE, SMALLER, strict=True))),
        "thumbnail before each": list(itertools.chain(*zip(SMALLER, WHOLE, strict=True))),
        "thumbnails last": WHOLE + SMALLER,
        "thumbnails first": SMALLER + WHOLE,
        "thumbnails of one size": list(itertools.chain(*zip(ALIKE, WHOLE, strict=True))),
        "masks": list(itertools.chain(*zip(WHOLE, MASKS, strict=True))),
        "masks first": MASKS + WHOLE,
        "label and macro": [*WHOLE, (THUMBNAIL, SMALL), (9, SMALL)],
        "pages of a document": [(PAGE, page) for page in PLANES],
        "reduced masks": WHOLE + [(THUMBNAIL | MASK, BITS)] * 2,
    }.items(),
    ids=lambda pair: pair[0],
)
def test_thumbnails_and_masks_are_no_planes(pages: tuple[str, list[tuple[int, np.ndarray]]]) -> None:
    data = marked(*pages[1])
    assert np.array_equal(stack(data), PLANES)
    assert read(data).note == ""
    # The oracle: planes as tifffile's tags mark them.
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        full = [page.asarray() for page in tiff.pages if not (page.is_reduced or page.is_mask)]
    assert np.array_equal(full, PLANES)


def test_thumbnails_between_the_planes_of_ome() -> None:
    """Its header counts pages where it names them, and planes where it does not."""
    pages = list(itertools.chain(*zip(WHOLE, SMALLER, strict=True)))
    size = 'SizeX="32" SizeY="24" SizeZ="4" SizeC="1" SizeT="1" DimensionOrder="XYZCT"'
    named = "".join(f'<TiffData IFD="{2 * z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(4))
    for where in ("", "<TiffData/>", named):
        text = f"<OME><Image><Pixels {size}>{where}</Pixels></Image></OME>"
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as tiff:
            for number, (kind, page) in enumerate(pages):
                description = None if number else text
                tiff.write(page, subfiletype=kind, metadata=None, contiguous=False, description=description)
        assert np.array_equal(stack(out.getvalue()), PLANES)


@pytest.mark.parametrize(("kind", "planes"), [(1, 2), (2, 1), (3, 2)])
def test_older_tag_for_thumbnails_is_read(kind: int, planes: int) -> None:
    """SubfileType, which came before NewSubfileType: 1 image, 2 thumbnail, 3 page."""
    pages: list[Tags] = []
    for number, page in enumerate(PLANES[:2]):
        tags = page_tags(page, 8 + number * page.nbytes) | {255: short(kind if number == 0 else 1)}
        pages.append({code: tag for code, tag in tags.items() if code != 254})
    data = assembled(PLANES[:2].tobytes(), *pages)
    assert np.array_equal(stack(data), PLANES[2 - planes : 2])


def test_mask_page_by_its_meaning_is_no_plane() -> None:
    """Photometric 4, as Photoshop and scanners write transparency."""
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as tiff:
        for page in PLANES[:2]:
            tiff.write(page, metadata=None, contiguous=False)
        tiff.write((PLANES[0] > 30000).astype(np.uint8), photometric=4, metadata=None, contiguous=False)
    assert np.array_equal(stack(out.getvalue()), PLANES[:2])


@pytest.mark.parametrize("kind", [THUMBNAIL, MASK, THUMBNAIL | MASK])
def test_file_of_thumbnails_alone_is_read_with_a_note(kind: int) -> None:
    planes = [BITS, ~BITS] if kind & MASK else PLANES
    data = marked(*((kind, page) for page in planes))
    decoded = read(data)
    assert isinstance(decoded, Volume)
    assert np.array_equal(decoded.voxels[..., 0].transpose(2, 1, 0) > 0, np.asarray(planes) > 0)
    assert "NewSubfileType" in decoded.note


def test_image_below_a_thumbnail_is_the_image() -> None:
    """Cameras put the image into a SubIFD of its thumbnail; pyramids put smaller levels there."""
    for first, below in [((THUMBNAIL, SMALL), (FULL, PLANES[0])), ((FULL, PLANES[0]), (THUMBNAIL, SMALL))]:
        out = io.BytesIO()
        with tifffile.TiffWriter(out) as tiff:
            tiff.write(first[1], subfiletype=first[0], subifds=1, metadata=None)
            tiff.write(below[1], subfiletype=below[0], metadata=None)
        assert np.array_equal(stack(out.getvalue()), PLANES[:1])


def test_pyramid_of_unmarked_levels_gives_the_first_with_a_note() -> None:
    """Aperio SVS has the image, a thumbnail and smaller levels, all without a mark."""
    levels = [PLANES[0], PLANES[0, ::4, ::4], PLANES[0, ::2, ::2]]
    data = marked(*((FULL, level) for level in levels), description="Aperio Image Library v11.2.1")
    assert np.array_equal(stack(data), PLANES[:1])
    assert "only the first of 3 pages" in read(data).note


@pytest.mark.parametrize("strips", [1, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_metamorph_stack_gives_all_planes(dtype: type[np.generic], strips: int) -> None:
    planes = PLANES.astype(dtype)
    data = stk(planes, strips=strips)
    assert np.array_equal(stack(data), planes)
    assert np.array_equal(tifffile.imread(io.BytesIO(data)), planes)
    assert np.array_equal(imageio.imread(data, plugin="tifffile"), planes)
    assert np.array_equal(stack(data, axes="CYX", channel=2), planes[2:3])


@pytest.mark.parametrize(
    ("distances", "times", "time_slices", "z_mm"),
    [
        ([0.0] * 4, [0, 500, 1000, 1500], 1, None),
        ([2.0] * 4, [0, 500, 1000, 1500], None, 2e-3),
        ([0.0, 1.5, 1.5, 1.5], [0] * 4, None, 1.5e-3),
        ([0.0, 1.0, 2.0, 3.0], [0] * 4, None, 1e-3),
        ([0.0] * 4, [0] * 4, None, None),
    ],
)
def test_metamorph_stack_tells_times_slices_and_sizes(
    distances: list[float], times: list[int], time_slices: int | None, z_mm: float | None
) -> None:
    decoded = read(stk(PLANES, distances=distances, times_ms=times, pixel=(0.25, "um")))
    assert isinstance(decoded, Volume)
    assert decoded.time_slices == time_slices
    expected = (0.25e-3, 0.25e-3) if time_slices else (0.25e-3, 0.25e-3, z_mm)
    assert decoded.spacing_mm == (None if None in expected else pytest.approx(expected))


def test_metamorph_file_of_one_plane_is_an_image() -> None:
    decoded = read(stk(PLANES[:1], pixel=(0.5, "um")))
    assert isinstance(decoded, Image)
    assert decoded.spacing_mm == pytest.approx((0.5e-3, 0.5e-3))


def iplab(count: int, **more: int) -> bytes:
    return assembled(PLANES.tobytes(), page_tags(PLANES[0], **more) | {34122: long(count)})


def nih_image(count: int) -> bytes:
    head = bytearray(512)
    # ImageJ reads the number of slices there.
    head[260:262] = count.to_bytes(2, "little")
    return assembled(PLANES.tobytes(), page_tags(PLANES[0]) | {43314: (3, 256, bytes(head))})


def described(**options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(
        out, PLANES, photometric="minisblack", truncate=True, metadata={"axes": "ZYX"}, **options
    )
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(iplab(4), id="IPLab"),
        pytest.param(nih_image(4), id="NIH Image"),
        pytest.param(described(), id="tifffile"),
        pytest.param(described(imagej=True), id="ImageJ"),
        pytest.param(described(bigtiff=True, byteorder=">"), id="big endian"),
    ],
)
def test_planes_that_only_a_tag_counts_are_read(data: bytes) -> None:
    assert np.array_equal(stack(data), PLANES)
    assert read(data).note == ""


def values_beyond_the_file(data: bytes) -> bytes:
    """A MetaMorph stack whose tag UIC2 points behind its end."""
    entry = data.index(struct.pack("<2H", 33629, 5))
    return data[: entry + 8] + struct.pack("<I", len(data) + 100) + data[entry + 12 :]


def test_planes_that_a_tag_without_values_counts_are_read() -> None:
    assert np.array_equal(stack(values_beyond_the_file(stk(PLANES))), PLANES)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(iplab(5), id="IPLab: cut off"),
        pytest.param(iplab(4, compression=5), id="IPLab: compressed"),
        pytest.param(nih_image(9), id="NIH Image: cut off"),
        pytest.param(stk(PLANES, count=5), id="MetaMorph: cut off"),
        pytest.param(stk(PLANES, compression=32773), id="MetaMorph: compressed"),
        pytest.param(iplab(2**31), id="IPLab: endless"),
        pytest.param(stk(PLANES, count=2**31 - 1), id="MetaMorph: endless"),
        pytest.param(values_beyond_the_file(stk(PLANES[:2], count=4)), id="MetaMorph: cut off, values lost"),
    ],
)
def test_planes_that_are_counted_and_not_there_are_refused_unless_the_caller_names_the_axes(
    data: bytes,
) -> None:
    with memory_stays_below(60):
        assert_refused(data, Unreadable, {"reason": "missing-pages", "parameter": "axes"}, by=(read, header))
    assert header(data, axes="YX").size == (24, 32)


def test_counted_planes_are_within_the_limit_of_voxels() -> None:
    assert_refused(stk(PLANES), TooLarge, {"unit": "voxels"}, voxels=PLANES.size - 1)


@pytest.mark.parametrize("photometric", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("axes", "lengths"), [("Z", {"Z": 6}), ("T", {"T": 6}), ("TZ", {"T": 2, "Z": 3})])
def test_lsm_gives_each_channel_as_times_and_slices(
    axes: str, lengths: dict[str, int], channels: int, photometric: int
) -> None:
    """The channels differ from colours, though Zeiss marks three of them as RGB."""
    planes = RNG.integers(0, 60000, (6, channels, 24, 32)).astype(np.uint16)
    data = lsm(planes, SMALL, axes=axes, lengths=lengths, photometric=photometric)
    by_tifffile = tifffile.imread(io.BytesIO(data)).reshape(planes.shape)
    assert np.array_equal(by_tifffile, planes)
    for channel in range(channels):
        assert np.array_equal(stack(data, channel=channel), planes[:, channel])
    decoded = read(data)
    assert isinstance(decoded, Volume)
    assert decoded.time_slices == (6 // lengths["T"] if "T" in axes else None)
    assert decoded.spacing_mm == pytest.approx((1e-4, 1e-4, 5e-4)[: 2 if axes == "T" else 3])
    assert (f"{channels} channels" in decoded.note) == (channels > 1)


def test_lsm_of_several_positions_is_a_stack_with_a_note() -> None:
    data = lsm(PLANES[:, None], SMALL, axes="TZ", lengths={"T": 1, "Z": 2})
    assert np.array_equal(stack(data), PLANES)
    assert "several positions" in read(data).note


def test_pages_of_other_strips_and_compressions_are_one_stack() -> None:
    """Tools append pages to files of other tools."""
    out = io.BytesIO()
    options: list[dict[str, Any]] = [{"rowsperstrip": 5}, {"compression": "zlib"}, {"tile": (16, 16)}, {}]
    with tifffile.TiffWriter(out) as tiff:
        for page, more in zip(PLANES, options, strict=True):
            tiff.write(page, metadata=None, contiguous=False, **more)
    assert np.array_equal(stack(out.getvalue()), PLANES)


@pytest.mark.parametrize("other", [PLANES[1, :12], PLANES[1].astype(np.uint8), np.stack([PLANES[1]] * 3, -1)])
def test_pages_of_another_size_or_type_are_left_out_with_a_note(other: np.ndarray) -> None:
    data = marked((FULL, PLANES[0]), (FULL, other))
    assert np.array_equal(stack(data), PLANES[:1])
    assert "only the first of 2 pages" in read(data).note


@pytest.mark.parametrize("empty", [1, 3])
def test_strips_without_data_are_noted(empty: int) -> None:
    """A writer that stopped half-way leaves them; libtiff and tifffile read zeros."""
    sizes = [8 * 32 * 2 * (number >= empty) for number in range(3)]
    tags = page_tags(PLANES[0], strips=3) | {279: long(*sizes)}
    data = assembled(PLANES[0].tobytes(), tags)
    expected = PLANES[0].copy()
    expected[: 8 * empty] = 0
    assert np.array_equal(stack(data)[0], expected)
    assert f"{empty} strips" in read(data).note


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tifffile, which takes them for colours for now
@pytest.mark.parametrize("count", [3, 4])
def test_planes_that_may_be_colours_are_noted(count: int) -> None:
    """skimage.io.imsave writes a stack of three slices so."""
    out = io.BytesIO()
    tifffile.imwrite(out, PLANES[:count])
    assert f"the {count} planes were read as colours" in read(out.getvalue()).note
    assert np.array_equal(stack(out.getvalue(), axes="ZYX"), PLANES[:count])
    assert read(out.getvalue(), axes="YXS").note == ""
