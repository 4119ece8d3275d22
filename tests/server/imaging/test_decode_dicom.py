"""The values of DICOM: rescaled, signed, inverted, without padding, in colours; and all codecs, by the files that pydicom ships."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.pixels.processing import apply_rescale
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from server.arrays import Image, Volume
from server.errors import InvalidParameter, TooLarge, Unreadable, UnsupportedType
from tests.server.imaging.conftest import assert_refused, header, read
from tests.support.dicom import enhanced, instance, series, zipped

pytestmark = pytest.mark.filterwarnings("ignore")  # pydicom warns about what it tolerates

RANDOM = np.random.default_rng(7)
GREY = RANDOM.integers(0, 4096, (12, 10), dtype=np.uint16)
SIGNED = RANDOM.integers(-2048, 2048, (12, 10)).astype(np.int16)
COLORS = RANDOM.integers(0, 256, (12, 10, 3), dtype=np.uint8)
TWELVE = {"BitsStored": 12, "HighBit": 11}


def values(data: bytes, **choices: Any) -> np.ndarray:
    decoded = read(data, **choices)
    known = header(data, **choices)
    assert (known.size, known.channels) == (decoded.size, decoded.values.shape[-1])
    assert known.sample_bytes == decoded.values.itemsize
    return np.asarray(decoded.values)


@pytest.mark.parametrize(
    ("pixels", "elements", "expected"),
    [
        (GREY, {}, GREY),
        (GREY, TWELVE | {"RescaleSlope": 1, "RescaleIntercept": -1024}, GREY.astype(np.int16) - 1024),
        (GREY, TWELVE | {"RescaleSlope": 2, "RescaleIntercept": -1024}, GREY.astype(np.int16) * 2 - 1024),
        (GREY, {"RescaleSlope": 0.1, "RescaleIntercept": 3}, (GREY * 0.1 + 3).astype(np.float32)),
        (SIGNED, {"RescaleSlope": 1, "RescaleIntercept": -1024}, (SIGNED - 1024.0).astype(np.float32)),
        (SIGNED & 0xFFF, TWELVE | {"PixelRepresentation": 1}, SIGNED),
        (GREY | 0xF000, TWELVE, GREY),
        (GREY << 4, {"BitsStored": 12, "HighBit": 15}, GREY),
        (GREY, TWELVE | {"PhotometricInterpretation": "MONOCHROME1", "Modality": "CR"}, 4095 - GREY),
        (GREY, TWELVE | {"PhotometricInterpretation": "MONOCHROME1"}, GREY),
        (GREY.astype(np.uint32) * 1000, {}, (GREY * 1000.0).astype(np.float32)),
    ],
    ids=[
        "plain",
        "HU",
        "slope",
        "fraction",
        "signed",
        "12 bits",
        "overlay",
        "high bits",
        "inverted",
        "CT",
        "32",
    ],
)
@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_stored_values_become_real_ones(
    pixels: np.ndarray, elements: dict[str, Any], expected: np.ndarray, syntax: str
) -> None:
    decoded = values(instance(pixels.astype(pixels.dtype), syntax, **elements))[..., 0]
    assert np.array_equal(decoded, expected)
    assert decoded.dtype == expected.dtype


def test_each_frame_has_its_own_rescaling() -> None:
    voxels = RANDOM.integers(0, 1000, (6, 5, 4)).astype(np.int16)
    slopes = [1.0, 2.0, 0.5, 4.0]
    decoded = values(enhanced(voxels, slopes=slopes))[..., 0]
    assert np.array_equal(decoded, (voxels * np.array(slopes) - 1024).astype(np.float32))


def test_slope_of_0_is_refused_where_it_would_be_used() -> None:
    fields = {"reason": "header", "field": "RescaleSlope", "actual": 0}
    voxels = RANDOM.integers(0, 1000, (6, 5, 4)).astype(np.int16)
    for data in (instance(GREY, RescaleSlope=0), enhanced(voxels, slopes=[1.0, 0.0, 1.0, 1.0])):
        assert_refused(data, Unreadable, fields, by=(read, header))
    assert np.array_equal(values(instance(COLORS, RescaleSlope=0)), COLORS)


def test_padding_beyond_other_values_is_read_as_the_lowest() -> None:
    padded = SIGNED.copy()
    padded[0] = -30000
    decoded = read(instance(padded, PixelPaddingValue=-30000))
    assert np.array_equal(decoded.values[1:, :, 0], SIGNED[1:])
    assert (decoded.values[0] == SIGNED[1:].min()).all()
    assert "10 values of padding" in decoded.note
    inside = SIGNED.copy()
    inside[0] = 5
    assert np.array_equal(values(instance(inside, PixelPaddingValue=5))[..., 0], inside)


@pytest.mark.parametrize("told", [-2000, 63536, 2096])
def test_padding_of_signed_values_may_be_told_as_an_unsigned_number(told: int) -> None:
    padded = np.abs(SIGNED) % 1000
    padded[0] = -2000
    elements: dict[str, Any] = {"PixelRepresentation": 1, **TWELVE}
    data = instance(padded & 0xFFF, **elements)
    # pydicom writes a number beyond 32767 for unsigned values alone.
    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.add_new("PixelPaddingValue", "SS" if told < 0 else "US", told)
    out = io.BytesIO()
    dataset.save_as(out)
    assert (values(out.getvalue())[0] == padded[1:].min()).all()


@pytest.mark.parametrize("planar", [0, 1])
def test_colours(planar: int) -> None:
    stored = np.ascontiguousarray(COLORS.transpose(2, 0, 1)) if planar else COLORS
    data = instance(COLORS, PlanarConfiguration=planar, PixelData=stored.tobytes())
    assert np.array_equal(values(data), COLORS)
    assert np.array_equal(values(data, channel=1), COLORS[..., 1:2])


def stack_of(pixels: list[np.ndarray], **elements: Any) -> np.ndarray:
    """The (X, Y, Z[, C]) values of slices, of which each may have its own elements."""
    places = [[0.0, 0.0, 3.0 * k] for k in range(len(pixels))]
    files = []
    for k, one in enumerate(pixels):
        own: dict[str, Any] = {
            name: value[k] if isinstance(value, list) else value for name, value in elements.items()
        }
        files.append(
            instance(
                one,
                ImagePositionPatient=places[k],
                ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                PixelSpacing=[1, 1],
                **own,
            )
        )
    return values(zipped(files))


@pytest.mark.parametrize("order", [1, -1])
def test_each_slice_is_read_in_its_own_format(order: int) -> None:
    flat = np.full((4, 4), -100, np.int16)
    bits: list[int] = [12, 13][::order]
    stored = [flat & np.int16((1 << bit) - 1) for bit in bits]
    signed = stack_of(stored, BitsStored=bits, HighBit=[bit - 1 for bit in bits])
    assert np.unique(signed[:, :, 0]).tolist() == np.unique(signed[:, :, 1]).tolist() == [-100]
    bits = [10, 12][::order]
    inverted = stack_of(
        [np.full((4, 4), (1 << bit) - 1, np.uint16) for bit in bits],
        BitsStored=bits,
        HighBit=[bit - 1 for bit in bits],
        PhotometricInterpretation="MONOCHROME1",
        Modality="MR",
    )
    assert np.unique(inverted).tolist() == [0]
    planes = np.ascontiguousarray(COLORS.transpose(2, 0, 1)).tobytes()
    data = [COLORS.tobytes(), planes][::order]
    colors = stack_of([COLORS, COLORS], PlanarConfiguration=[0, 1][::order], PixelData=data)
    assert np.array_equal(colors, COLORS.transpose(1, 0, 2)[:, :, None].repeat(2, 2))


@pytest.mark.parametrize("order", [1, -1])
def test_padding_of_each_slice_has_its_own_bits(order: int) -> None:
    padded = np.full((4, 4), 7, np.int16)
    padded[0] = -100
    bits: list[int] = [12, 13][::order]
    wrapped: list[int] = [(1 << bit) - 100 for bit in bits]
    stored = [padded & np.int16((1 << bit) - 1) for bit in bits]
    decoded = stack_of(stored, BitsStored=bits, HighBit=[bit - 1 for bit in bits], PixelPaddingValue=wrapped)
    assert np.unique(decoded).tolist() == [7]


def test_table_of_one_slice_alone_is_refused() -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [4096, 0, 16], "US", bytes(8192)
    files = series(
        GREY.reshape(6, 5, 4).astype(np.uint16),
        ModalityLUTSequence=[[table], None, None, None],
    )
    assert_refused(zipped(files), Unreadable, "mixed-formats", by=(read, header))


def test_slices_of_whole_and_of_broken_numbers_are_refused() -> None:
    whole = np.ones((4, 4), np.uint32)
    elements: dict[str, Any] = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}
    files = [instance(whole, ImagePositionPatient=[0, 0, 3 * k], **elements) for k in range(2)]
    # (7FE0,0010) PixelData becomes (7FE0,0008) FloatPixelData.
    files[1] = files[1].replace(b"\xe0\x7f\x10\x00OW", b"\xe0\x7f\x08\x00OF")
    for order in (1, -1):
        assert_refused(zipped(files[::order]), Unreadable, "mixed-formats", by=(read, header))


def test_palette_is_decoded_to_colours_and_labels_are_its_indices() -> None:
    indices = RANDOM.integers(0, 4, (12, 10), dtype=np.uint8)
    tables = RANDOM.integers(0, 256, (3, 4), dtype=np.uint16)
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = (table << 8).tobytes()
    data = instance(indices, **palette)
    assert np.array_equal(values(data), tables.T[indices])
    assert np.array_equal(values(data, labels=True)[..., 0], indices)


@pytest.mark.parametrize(("scale", "expected"), [(257, [255, 0, 0]), (1, [255, 200, 200])])
def test_bits_of_a_palette_are_those_of_its_largest_entry(scale: int, expected: list[int]) -> None:
    """Green and blue of 200 are nearly black where red goes up to 65535."""
    palette: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entry in (("Red", 255 * scale), ("Green", 200), ("Blue", 200)):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [1, 0, 16]
        palette[f"{name}PaletteColorLookupTableData"] = entry.to_bytes(2, "little")
    assert values(instance(np.zeros((4, 4), np.uint8), **palette))[0, 0].tolist() == expected


def test_pixel_size_of_an_image() -> None:
    for elements, expected in (
        ({"PixelSpacing": [0.5, 0.25]}, (0.5, 0.25)),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1)),
        ({}, None),
    ):
        decoded = read(instance(GREY, Modality="DX", **elements))
        assert isinstance(decoded, Image)
        assert decoded.spacing_mm == expected


def test_frames_of_a_movie_are_times() -> None:
    decoded = read(instance(COLORS[None].repeat(3, 0), Modality="US"))
    assert isinstance(decoded, Volume)
    assert (decoded.affine, decoded.time_slices, decoded.size) == (None, 1, (10, 12, 3))


def test_limits_hold_before_pixels_are_decoded() -> None:
    for data in (instance(GREY), zipped(series(GREY.reshape(6, 5, 4).astype(np.int16)))):
        assert_refused(data, TooLarge, {"actual": 120}, limit=100, voxels=100)


@pytest.mark.parametrize(
    ("data", "fields"),
    [
        (instance(GREY, PhotometricInterpretation="HSV"), {"reason": "photometric", "value": "HSV"}),
        (instance(GREY, BitsAllocated=12), {"reason": "sample-type"}),
        (instance(GREY)[:-20], {"reason": "truncated", "actual": 220, "limit": 240}),
        (instance(GREY, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"), {"reason": "no-pixels", "value": "SEG"}),
        (
            instance(GREY, NumberOfFrames=4, TotalPixelMatrixColumns=20, PixelData=bytes(960)),
            {"reason": "tiles"},
        ),
    ],
    ids=["colours", "bits", "truncated", "SEG", "tiles"],
)
def test_what_is_not_read_is_named(data: bytes, fields: dict[str, Any]) -> None:
    assert_refused(data, Unreadable, fields)


@pytest.mark.parametrize("name", ["PhotometricInterpretation", "TransferSyntaxUID"])
@pytest.mark.parametrize("slices", [1, 2])
def test_errors_repeat_no_text_of_the_header(name: str, slices: int) -> None:
    """Two slices of which one is sound are refused as mixed."""
    data = instance(GREY, PhotometricInterpretation="MONOCHROME2")
    old = {"PhotometricInterpretation": b"MONOCHROME2 ", "TransferSyntaxUID": b"1.2.840.10008.1.2.1\0"}[name]
    assert old in data
    broken = data.replace(old, b"Mustermann 4711 Erika"[: len(old)].ljust(len(old)))
    sent = broken if slices == 1 else zipped([data, broken])
    with pytest.raises(Unreadable) as caught:
        read(sent)
    told = f"{caught.value} {caught.value.fields}"
    assert "unknown" in told
    assert [word for word in ("Muster", "4711", "Erika") if word in told] == []


def test_parameters_of_other_formats() -> None:
    for choices in ({"axes": "YX"}, {"series": "2"}):
        assert_refused(instance(GREY), InvalidParameter, {"parameter": next(iter(choices))}, **choices)


FOLDER = Path(pydicom.data.get_testdata_file("CT_small.dcm", download=False) or "").parent
# Of the files beside these some are inverted, palettes, or of 12 bits in JPEG, which pydicom does not read.
OTHERWISE = {
    "JPEG-lossy.dcm",
    "JPGExtended.dcm",
    "SC_rgb_rle_32bit.dcm",
    "SC_rgb_rle_32bit_2frame.dcm",
    "examples_palette.dcm",
}


def test_files_of_pydicom_are_read_as_by_pydicom() -> None:
    read_by_both, syntaxes = 0, set()
    for path in sorted(FOLDER.glob("*.dcm")):
        try:
            decoded = read(path.read_bytes(), zero_nonfinite=True)
        except (Unreadable, UnsupportedType):
            continue
        if path.name in OTHERWISE:
            continue
        dataset = pydicom.dcmread(path, force=True)
        expected = np.asarray(apply_rescale(dataset.pixel_array, dataset), np.float32)
        mine = decoded.values.transpose(2, 1, 0, 3) if isinstance(decoded, Volume) else decoded.values
        assert np.array_equal(mine.reshape(expected.shape), expected), path.name
        read_by_both += 1
        syntaxes.add(dataset.file_meta.get("TransferSyntaxUID"))
    assert read_by_both > 35
    assert len(syntaxes) > 9


def test_jpeg_of_twelve_bits() -> None:
    decoded = read((FOLDER / "JPGExtended.dcm").read_bytes())
    assert (decoded.size, decoded.values.dtype, decoded.values.max()) == ((1024, 256), np.uint16, 264)


def test_headers_are_kept_without_pixels() -> None:
    decoded = read(instance(GREY))
    assert decoded.dicom is not None
    (dataset,) = decoded.dicom.datasets
    assert dataset.PatientID
    assert "PixelData" not in dataset
    assert decoded.dicom.frames == ((0, 1),)
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True)
