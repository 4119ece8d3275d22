"""The answer lies where its source lies, as SimpleITK and nibabel or pynrrd read both: random headers."""

import gzip
import io
from typing import Any

import hypothesis
import nibabel as nib
import nrrd
import numpy as np
import pytest
from hypothesis import strategies

from server.arrays import Volume
from server.errors import InvalidParameter, Unreadable
from server.imaging import geometry
from server.segment.quality import check_grid
from tests.server.imaging.builders import mha_file
from tests.server.imaging.conftest import deterministic, nifti, read
from tests.server.imaging.encoders import encoded, labelled
from tests.server.imaging.itk import by_itk as written_by_itk
from tests.server.imaging.itk import itk_read

SIZE = (3, 4, 5)
VALUES = np.arange(60, dtype=np.int16).reshape(SIZE)

# Fields that describe the values, and not where they lie.
OF_VALUES = {"datatype", "bitpix", "scl_slope", "scl_inter", "cal_min", "cal_max", "vox_offset"}
OF_VALUES |= {"intent_code", "intent_name", "intent_p1", "intent_p2", "intent_p3"}

Place = tuple[np.ndarray, ...] | str


def volume(data: bytes) -> Volume:
    decoded = read(data)
    assert isinstance(decoded, Volume)
    return decoded


def answers(source: Volume, *names: str) -> list[bytes]:
    """Mask and object numbers of the volume."""
    numbers = np.zeros(SIZE, dtype=np.int32)
    numbers[1, 2, 3] = 1
    result = labelled(numbers, source)
    return [encoded(name, result) for name in names]


def by_itk(data: bytes, suffix: str) -> Place:
    """Origin, spacing and directions, or the error."""
    try:
        image = itk_read(data, suffix)
    except RuntimeError:
        return "unreadable"
    size = image.GetSize()[:3]
    corners = [(0, 0, 0), (size[0] - 1, 0, 0), (0, size[1] - 1, 0), (0, 0, size[2] - 1)]
    whole = [(*corner, *(0,) * (image.GetDimension() - 3)) for corner in corners]
    return (np.array([image.TransformIndexToPhysicalPoint(corner)[:3] for corner in whole]),)


def by_nibabel(data: bytes) -> Place:
    plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    kind = nib.Nifti2Image if b"n+2" in plain[:8] else nib.Nifti1Image
    try:
        image = kind.from_bytes(plain)
    except Exception:  # noqa: BLE001 - nibabel raises many kinds
        return "unreadable"
    return image.affine, np.array(image.header.get_zooms()[:3])


def assert_same(one: Place, other: Place) -> None:
    if isinstance(one, str) or isinstance(other, str):
        assert one == other
        return
    for left, right in zip(one, other, strict=True):
        assert np.allclose(left, right, rtol=1e-6, atol=1e-9 * max(1.0, float(np.abs(right).max()))), (
            one,
            other,
        )


finite = strategies.floats(-200, 200, width=32)
steps = strategies.sampled_from([1.0, 0.5, 3.0, -1.0, -0.25, 5e-5, 0.0])
turns = strategies.sampled_from([0.0, 0.5, -0.5, 0.70710677, 1.0, 0.1])


@strategies.composite
def headers(draw: Any) -> dict[str, Any]:
    """Fields of a NIfTI header that say where it lies, in all combinations that writers and bugs leave behind."""
    b, c, d = (draw(turns) for _ in range(3))
    rows = (
        np.eye(3) if draw(strategies.booleans()) else np.roll(np.eye(3), draw(strategies.integers(1, 2)), 0)
    )
    rows = rows * [draw(steps) for _ in range(3)]
    qfac = draw(strategies.sampled_from([1.0, -1.0, 0.0, 2.0]))
    return {
        "pixdim": [qfac, *(draw(steps) for _ in range(3)), 0, 1, -1, 1],
        "qform_code": draw(strategies.sampled_from([0, 1, 2, 4])),
        "sform_code": draw(strategies.sampled_from([0, 1, 3, 5])),
        "quatern_b": b,
        "quatern_c": c,
        "quatern_d": d,
        **{f"qoffset_{axis}": draw(finite) for axis in "xyz"},
        **{
            f"srow_{axis}": [*row, draw(finite)] if draw(strategies.integers(0, 5)) else [0, 0, 0, 0]
            for axis, row in zip("xyz", rows, strict=True)
        },
        "xyzt_units": draw(strategies.sampled_from([0, 2, 3, 10, 1])),
        "toffset": 3.5,
        "slice_code": draw(strategies.sampled_from([0, 3])),
        "dim_info": 0b111001,
        "slice_duration": 0.25,
    }


@hypothesis.settings(deterministic, max_examples=100)
@hypothesis.given(
    fields=headers(), version=strategies.sampled_from([1, 2]), order=strategies.sampled_from("<>")
)
def test_nifti_answer_keeps_every_byte_that_says_where_it_lies(
    fields: dict[str, Any], version: int, order: str
) -> None:
    data = nifti(VALUES, version=version, order=order, **fields)
    try:
        source = volume(data)
    except Unreadable:
        return
    stored = (nib.Nifti1Header if version == 1 else nib.Nifti2Header)(
        data[: 348 if version == 1 else 540], check=False
    )
    for answer in answers(source, "mask.nii.gz", "labels.nii.gz"):
        plain = gzip.decompress(answer)
        written = type(stored)(plain[: len(stored.binaryblock)], check=False)
        differing = {name for name in stored if written[name].tobytes() != stored[name].tobytes()}
        assert differing <= OF_VALUES
        assert_same(by_nibabel(data), by_nibabel(answer))
        assert_same(by_itk(data, ".nii"), by_itk(answer, ".nii.gz"))


UNITS = [None, "mm", "um", "µm", "microns", "nm", "cm", "?", ""]
RIGHT_ANGLES = [
    np.eye(3),
    np.eye(3)[[2, 0, 1]],
    np.diag([-1, 1, -1]),
    np.array([[0.6, 0.8, 0], [-0.8, 0.6, 0], [0, 0, 1]]),
]


def written(value: float, style: str) -> str:
    return {"g": f"{value:g}", "full": repr(value), "exponent": f"{value:.17e}"}[style]


@strategies.composite
def nrrd_fields(draw: Any) -> dict[str, Any]:
    """Fields that place an NRRD volume, as Slicer, ITK, Fiji, Teem and pynrrd write them."""
    style = draw(strategies.sampled_from(["g", "full", "exponent"]))
    lengths = [draw(strategies.sampled_from([0.2, 1.0, 0.70710678, 5.0, 3.3])) for _ in range(3)]
    unit = draw(strategies.sampled_from(UNITS))
    units = None if unit is None else " ".join([f'"{unit}"'] * 3)
    place = [draw(strategies.floats(-90, 90)) for _ in range(3)]
    if draw(strategies.booleans()):
        rows = draw(strategies.sampled_from(RIGHT_ANGLES)) * np.array(lengths)[:, None]
        gap = draw(strategies.sampled_from(["", " "]))
        vectors = (f"({f',{gap}'.join(written(v, style) for v in row)})" for row in rows.tolist())
        space = draw(strategies.sampled_from(["RAS", "left-posterior-superior", "LAS", "scanner-xyz", None]))
        return {
            "space": space,
            "space dimension": None if space else 3,
            "space directions": " ".join(vectors),
            "space origin": draw(
                strategies.sampled_from([None, f"({','.join(written(v, style) for v in place)})"])
            ),
            "space units": units,
        }
    return {
        "space": None,
        "space_directions": None,
        "space_origin": None,
        "spacings": " ".join(written(v, style) for v in lengths),
        "axis mins": draw(strategies.sampled_from([None, " ".join(written(v, style) for v in place)])),
        "centerings": draw(strategies.sampled_from([None, "cell cell cell", "node node node"])),
        "units": units,
    }


def nrrd_by_hand(fields: dict[str, Any], values: np.ndarray, first: dict[str, Any]) -> bytes:
    """Fields in the order in which Teem needs them."""
    head = {"type": "short", "dimension": values.ndim, "sizes": " ".join(map(str, values.shape))}
    lines = head | fields | first | {"encoding": "raw", "endian": "little"}
    known = "".join(
        f"{name.replace('_', ' ')}: {value}\n" for name, value in lines.items() if value is not None
    )
    return f"NRRD0005\n{known}\n".encode() + values.tobytes(order="F")


PLACE = [
    "space",
    "space directions",
    "space origin",
    "space units",
    "spacings",
    "axis mins",
    "centerings",
    "units",
]


def by_pynrrd(data: bytes) -> dict[str, Any]:
    # pynrrd does not read blanks in vectors, which Teem allows.
    header = nrrd.read_header(io.BytesIO(data.replace(b", ", b",")))
    return {name: header.get(name) for name in PLACE}


@hypothesis.settings(deterministic, max_examples=60)
@hypothesis.given(fields=nrrd_fields())
def test_nrrd_answer_has_the_words_of_the_source(fields: dict[str, Any]) -> None:
    data = nrrd_by_hand(fields, VALUES, {})
    source = volume(data)
    mask, scores = (*answers(source, "mask.seg.nrrd"), *answers(source, "labels.nii.gz"))
    known, made = by_pynrrd(data), by_pynrrd(mask)
    for name in PLACE:
        assert np.array_equal(known[name], made[name]), name
    assert_same(by_itk(data, ".nrrd"), by_itk(mask, ".nrrd"))
    # Numbers as the source has them, also where readers take them for mm.
    assert_same(by_itk(data, ".nrrd"), by_itk(scores, ".nii.gz"))
    again = read(mask, labels=True)
    assert np.allclose(np.asarray(source.affine), again.affine, rtol=1e-9)
    for answer in (mask, scores):
        check_grid(source.input_header, read(answer, labels=True).input_header)


def test_nrrd_answer_leaves_out_the_axis_of_channels() -> None:
    values = np.stack([VALUES, VALUES])
    fields = {
        "space": "left-posterior-superior",
        "space directions": "none (0.2,0,0) (0,0.3,0) (0,0,1.5)",
        "space origin": "(1,2,3)",
        "space units": '"um" "um" "um"',
        "kinds": "vector domain domain domain",
    }
    source = read(nrrd_by_hand(fields, values, {}), channel=1)
    assert isinstance(source, Volume)
    (mask,) = answers(source, "mask.seg.nrrd")
    assert by_pynrrd(mask)["space directions"].tolist() == [[0.2, 0, 0], [0, 0.3, 0], [0, 0, 1.5]]
    assert b"space directions: (0.2,0,0) (0,0.3,0) (0,0,1.5)\n" in mask
    fields = {
        "spacings": "nan 0.2 0.3 1.5",
        "units": '"" "um" "um" "um"',
        "kinds": "vector domain domain domain",
    }
    source = read(nrrd_by_hand(fields, values, {}), channel=1)
    assert isinstance(source, Volume)
    (mask,) = answers(source, "mask.seg.nrrd")
    assert b"\nspacings: 0.2 0.3 1.5\n" in mask
    assert b'\nunits: "um" "um" "um"\n' in mask


def test_units_without_quotes_are_quoted_in_the_answer() -> None:
    fields = {"space": "LPS", "space directions": "(2,0,0) (0,2,0) (0,0,9)", "space units": "um um um"}
    (mask,) = answers(volume(nrrd_by_hand(fields, VALUES, {})), "mask.seg.nrrd")
    assert b'\nspace units: "um" "um" "um"\n' in mask
    assert np.allclose(itk_read(mask, ".nrrd").GetSpacing(), (2, 2, 9))


# As Slicer, unu and Windows write them; ITK reads them all.
BY_HAND = {
    "Slicer": "# Complete NRRD file format specification at:\n# http://teem.sourceforge.net/nrrd/format.html\ntype: short\n"
    "dimension: 3\nspace: left-posterior-superior\nsizes: 3 4 5\nspace directions: (0.9,0,0) (0,0.9,0) (0,0,1.3)\n"
    "kinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (1,2,3)\nmeasurement frame: (1,0,0) (0,1,0) (0,0,1)\n",
    "upper case": "Type: int16\nDimension: 3\nSpace: LPS\nSizes: 3 4 5\nSpace Directions: (0.9,0,0) (0,0.9,0) (0,0,1.3)\n"
    "Endian: Little\nEncoding: RAW\n",
    "unu": "content: brain\ntype: short\ndimension: 3\nsizes: 3 4 5\nspacings: 0.5 0.5 2\naxis mins: -10 -20 -30\n"
    'centers: cell cell cell\nlabels: "x" "y" "z"\nendian: little\nencoding: raw\n',
    "no place": "type: short\ndimension: 3\nsizes: 3 4 5\nendian: little\nencoding: raw\n",
    "thicknesses": "type: short\ndimension: 3\nsizes: 3 4 5\nspace: RAS\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
    "thicknesses: nan nan 3\nkinds: space space space\nendian: little\nencoding: raw\n",
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", BY_HAND)
def test_nrrd_by_hand_is_answered_where_itk_reads_it(name: str, end: str) -> None:
    head = f"NRRD0005\n{BY_HAND[name]}\n".replace("\n", end)
    data = head.encode() + VALUES.tobytes(order="F")
    mask, labels = answers(volume(data), "mask.seg.nrrd", "labels.nii.gz")
    place = by_itk(data, ".nrrd")
    assert not isinstance(place, str)
    assert_same(place, by_itk(mask, ".nrrd"))
    assert_same(place, by_itk(labels, ".nii.gz"))


def test_reference_that_itk_wrote_for_a_volume_in_micrometres_fits() -> None:
    fields = {
        "space": "LPS",
        "space directions": "(20,0,0) (0,20,0) (0,0,100)",
        "space units": '"um" "um" "um"',
    }
    data = nrrd_by_hand(fields, VALUES, {})
    source = volume(data)
    assert np.allclose(geometry.spacing(np.asarray(source.affine)), (0.02, 0.02, 0.1))
    assert "space units" in source.note
    for suffix in (".nrrd", ".mha", ".nii"):
        check_grid(source.input_header, read(written_by_itk(itk_read(data, ".nrrd"), suffix)).input_header)
    elsewhere = itk_read(data, ".nrrd")
    elsewhere.SetOrigin((50, 0, 0))
    with pytest.raises(InvalidParameter):
        check_grid(source.input_header, read(written_by_itk(elsewhere, ".nrrd")).input_header)


metaimage = strategies.fixed_dictionaries(
    {
        "ElementSpacing": strategies.sampled_from(["0.2 0.2 1", "1 2 3", "5e-4 5e-4 2e-3", "-1 2 3"]),
        "TransformMatrix": strategies.sampled_from(
            ["1 0 0 0 1 0 0 0 1", "0 1 0 0 0 -1 1 0 0", "0.6 0.8 0 -0.8 0.6 0 0 0 1"]
        ),
        "Offset": strategies.sampled_from(["0 0 0", "-18.5 25.25 1e3"]),
        "DistanceUnits": strategies.sampled_from([None, "mm", "um", "cm", "?"]),
        "CenterOfRotation": strategies.sampled_from([None, "0 0 0", "9 9 9"]),
        "AnatomicalOrientation": strategies.sampled_from([None, "RAI", "LPS"]),
    }
)


@deterministic
@hypothesis.given(fields=metaimage)
def test_metaimage_answer_lies_where_itk_reads_the_source(fields: dict[str, Any]) -> None:
    data = mha_file(VALUES, **fields)
    source = volume(data)
    for name, suffix in (("mask.seg.nrrd", ".nrrd"), ("labels.nii.gz", ".nii.gz")):
        (answer,) = answers(source, name)
        assert_same(by_itk(data, ".mha"), by_itk(answer, suffix))
        check_grid(source.input_header, read(answer, labels=True).input_header)
