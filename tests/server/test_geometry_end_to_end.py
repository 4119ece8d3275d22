"""The mask lies where the input lies: whole requests, against nibabel and SimpleITK."""

import gzip
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
from nibabel import orientations
from scipy.spatial.transform import Rotation

from server.arrays import Tiles
from server.segment.request import Response
from tests.server.imaging.conftest import nifti
from tests.support.service import opened_service
from tests.support.service import segment as segment_on

CODES = [
    "".join(letters)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for letters in itertools.product(*order)
]
NETWORKS = [("RAS", None), ("LPS", (1.0, 1.0, 1.0)), ("PIR", (1.5, 1.0, 2.0))]

SHAPE = (30, 26, 20)
# Of class 0 to 3. Class 2 lies inside of class 1, so that values between neighbours belong to one of the two.
INTENSITIES = np.array([0, 400, 800, -400], dtype=np.int16)


def labels(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Three ellipsoids, none in the middle, none alike: no mirroring or turning goes unseen."""
    at = (np.indices(shape).transpose(1, 2, 3, 0) + 0.5) / shape
    voxels = np.zeros(shape, dtype=np.uint8)
    for value, middle, radii in (
        (1, (0.6, 0.58, 0.38), (0.32, 0.3, 0.3)),
        (2, (0.7, 0.5, 0.4), (0.16, 0.18, 0.2)),
        (3, (0.15, 0.2, 0.8), (0.12, 0.16, 0.16)),
    ):
        voxels[np.square((at - middle) / radii).sum(axis=-1) <= 1] = value
    return voxels


def by_intensity(tiles: Tiles) -> np.ndarray:
    """Scores from each voxel's value alone: 1 at a class's own intensity, shared with the next class between the two."""
    apart = np.abs(
        tiles.pixels - INTENSITIES.reshape(1, 4, *[1] * (tiles.pixels.ndim - 2)).astype(np.float32)
    )
    return np.maximum(1 - apart / 400, 0)


def by_position_too(tiles: Tiles) -> np.ndarray:
    """Scores that also depend on where in its window a voxel lies, differently along each axis."""
    certain = by_intensity(tiles)
    axes = np.meshgrid(
        *(np.linspace(0, 1, side, dtype=np.float32) for side in certain.shape[2:]), indexing="ij"
    )
    ramp = sum(axis * weight for axis, weight in zip(axes, (0.9, 0.5, 0.3), strict=True)) / np.float32(1.7)
    bent = np.stack([1 - ramp, ramp, ramp**2, np.sin(7 * ramp)]).astype(np.float32)
    scores = np.abs(certain * 0.45 + bent * 0.55)
    return scores / scores.sum(axis=1, keepdims=True)


async def segment(
    data: bytes,
    run: Callable[[Tiles], np.ndarray] = by_intensity,
    orientation: str | None = "RAS",
    spacing: tuple[float, ...] | None = None,
    window: int = 16,
    **params: Any,
) -> Response:
    dims = 3 if orientation else 2
    changes = {
        "dims": dims,
        "orientation": orientation,
        "spacing": spacing,
        "activation": "softmax",
        "normalization": "none",
        "classes": [
            {"value": value, "name": f"class {value}", "color": f"#0000{value:02x}"} for value in (1, 2, 3)
        ],
        "window": {"size": [window] * dims, "overlap": 0.5},
    }
    with opened_service(run, changes) as service:
        response: Response = await segment_on(service, data, **params)
    return response


def loaded(body: bytes) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)


def mask_of(body: bytes) -> np.ndarray:
    return np.asarray(loaded(body).dataobj)


def affine_of(
    code: str, mm: tuple[float, ...] = (1, 1, 1), at: tuple[float, ...] = (-91.5, 126.25, -72)
) -> np.ndarray:
    """Array axis k runs along letter k, in steps of mm[k]."""
    affine = np.eye(4)
    for axis, (letter, step) in enumerate(zip(code, mm, strict=True)):
        affine[:3, axis] = [
            step * ((letter == plus) - (letter == minus)) for plus, minus in ("RL", "AP", "SI")
        ]
    affine[:3, 3] = at
    return affine


def turned(
    seed: int, mm: tuple[float, ...] = (1, 1, 1), *, mirrored: bool = False, shear: float = 0
) -> np.ndarray:
    """Any rotation."""
    affine = affine_of("RAS", mm)
    sheared = np.eye(3)
    sheared[1, 2] = shear
    affine[:3, :3] = (
        Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
        @ np.diag([1 - 2 * mirrored, 1, 1])
        @ sheared
        @ affine[:3, :3]
    )
    return affine


def centroids(values: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.array(
        [nib.affines.apply_affine(affine, np.argwhere(values == value).mean(axis=0)) for value in (1, 2, 3)]
    )


def itk_centroids(path: Path) -> np.ndarray:
    """Of the classes in a file, in mm along right, anterior, superior, as ITK sees them."""
    image = sitk.ReadImage(str(path))
    voxels = sitk.GetArrayFromImage(image).T
    indices = [np.argwhere(voxels == value).mean(axis=0) for value in (1, 2, 3)]
    return np.array([image.TransformContinuousIndexToPhysicalPoint(index.tolist()) for index in indices]) * [
        -1,
        -1,
        1,
    ]


async def check(
    affine: np.ndarray,
    orientation: str,
    spacing: tuple[float, ...] | None,
    tmp_path: Path,
    *,
    itk: bool = True,
) -> np.ndarray:
    """Segments the ellipsoids and compares everything that tells where they are."""
    truth = labels()
    data = nifti(INTENSITIES[truth], affine, qform_code=1, sform_code=2)
    body = (await segment(data, orientation=orientation, spacing=spacing)).body
    source, mask = loaded(data), loaded(body)
    assert mask.shape == source.shape
    assert np.array_equal(mask.affine, source.affine)
    for one, other in (
        (mask.get_sform(coded=True), source.get_sform(coded=True)),
        (mask.get_qform(coded=True), source.get_qform(coded=True)),
    ):
        assert one[1] == other[1]
        assert np.array_equal(one[0], other[0])
    voxels = np.asarray(mask.dataobj)
    if spacing is None:
        assert np.array_equal(voxels, truth)
    # Of the caller's voxels, or of the network's where those are coarser.
    half = 0.5 * max(min(nib.affines.voxel_sizes(affine)), min(spacing or (0,)))
    expected = centroids(truth, affine)
    assert np.linalg.norm(centroids(voxels, mask.affine) - expected, axis=1).max() <= half
    if itk:
        (tmp_path / "mask.nii.gz").write_bytes(body)
        assert np.linalg.norm(itk_centroids(tmp_path / "mask.nii.gz") - expected, axis=1).max() <= half
    return voxels


def test_ellipsoids_tell_every_orientation_apart() -> None:
    truth = labels((20, 20, 20))
    assert set(np.unique(truth)) == {0, 1, 2, 3}
    image = nib.Nifti1Image(truth, np.eye(4))
    seen = {
        np.asarray(image.as_reoriented(orientations.axcodes2ornt(tuple(code))).dataobj).tobytes()
        for code in CODES
    }
    assert len(seen) == 48


@pytest.mark.parametrize("code", CODES)
async def test_mask_of_every_axis_code_lies_where_the_input_lies(code: str, tmp_path: Path) -> None:
    for orientation, spacing in NETWORKS:
        await check(affine_of(code), orientation, spacing, tmp_path)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("mm", [(1, 1, 1), (0.5, 1, 3), (3, 0.7, 0.7), (1.004, 0.996, 2)])
@pytest.mark.parametrize("seed", range(2))
async def test_mask_of_oblique_mirrored_and_anisotropic_volumes_lies_where_the_input_lies(
    seed: int, mm: tuple[float, ...], mirrored: bool, tmp_path: Path
) -> None:
    affine = turned(seed, mm, mirrored=mirrored)
    assert (np.linalg.det(affine[:3, :3]) < 0) == mirrored
    for orientation, spacing in NETWORKS:
        await check(affine, orientation, spacing, tmp_path)


@pytest.mark.parametrize("shear", [2e-3, 0.05, 0.3])
@pytest.mark.parametrize("mm", [(1, 1, 1), (0.5, 1, 3)])
async def test_mask_of_sheared_volumes_lies_where_the_input_lies(
    shear: float, mm: tuple[float, ...], tmp_path: Path
) -> None:
    """As a tilted gantry leaves it; ITK takes the qform then, which has no shear."""
    for orientation, spacing in NETWORKS:
        await check(turned(5, mm, shear=shear), orientation, spacing, tmp_path, itk=False)


@pytest.mark.parametrize("scale", [0.5, 2, 4])
async def test_mask_of_resampled_volumes_has_the_same_shapes(scale: float, tmp_path: Path) -> None:
    truth = labels()
    voxels = await check(affine_of("LSP", (1, 1, 1)), "RAS", (scale,) * 3, tmp_path)
    for value in (1, 2, 3):
        both = np.count_nonzero((voxels == value) & (truth == value))
        dice = 2 * both / (np.count_nonzero(voxels == value) + np.count_nonzero(truth == value))
        assert dice > {0.5: 0.95, 2: 0.85, 4: 0.5}[scale]


@pytest.mark.parametrize(("orientation", "spacing"), NETWORKS)
@pytest.mark.parametrize("run", [by_intensity, by_position_too])
async def test_mask_of_a_reoriented_copy_is_the_reoriented_mask(
    run: Any, orientation: str, spacing: tuple[float, ...] | None
) -> None:
    # Several windows, whatever the network's spacing.
    image = loaded(nifti(INTENSITIES[labels((24, 21, 19))], turned(7, (1.2, 1.1, 2.1), mirrored=True)))
    mask = loaded((await segment(image.to_bytes(), run, orientation, spacing)).body)
    whole = (await segment(image.to_bytes(), run, orientation, spacing, window=96)).body
    # Windows matter to the one engine, and not to the other (but for scores that tie).
    assert (np.mean(mask_of(whole) != np.asarray(mask.dataobj)) < 1e-3) == (run is by_intensity)
    for code in CODES[::5]:
        turn = orientations.ornt_transform(
            orientations.io_orientation(image.affine), orientations.axcodes2ornt(tuple(code))
        )
        answer = mask_of(
            (await segment(image.as_reoriented(turn).to_bytes(), run, orientation, spacing)).body
        )
        assert np.array_equal(answer, np.asarray(mask.as_reoriented(turn).dataobj)), code


@pytest.mark.parametrize(("orientation", "spacing"), NETWORKS)
async def test_probabilities_lie_where_the_mask_lies(
    orientation: str, spacing: tuple[float, ...] | None
) -> None:
    truth = labels()
    data = nifti(INTENSITIES[truth], turned(3, (0.8, 1, 1.7), mirrored=True))
    mask = mask_of((await segment(data, orientation=orientation, spacing=spacing)).body)
    with np.load(
        io.BytesIO((await segment(data, orientation=orientation, spacing=spacing, format="npz")).body)
    ) as arrays:
        assert np.array_equal(arrays["mask"], mask)
        scores = arrays["probabilities"].astype(np.float32)
    assert scores.shape == (4, *SHAPE)
    assert np.abs(scores.sum(axis=0) - 1).max() < 2e-3
    best = np.sort(scores, axis=0)
    sure = best[-1] - best[-2] > 2e-3
    assert sure.mean() > 0.9
    assert np.array_equal(scores.argmax(axis=0)[sure], mask[sure])


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 40, 7), (40, 1, 1), (2, 3, 33), (17, 16, 15), (5, 4)])
@pytest.mark.parametrize(("orientation", "spacing"), [*NETWORKS, ("SRA", (0.4, 7.0, 7.0))])
async def test_mask_of_thin_and_tiny_volumes_has_their_size(
    shape: tuple[int, ...], orientation: str, spacing: tuple[float, ...] | None
) -> None:
    values = INTENSITIES[np.random.default_rng(0).integers(0, 4, shape)]
    data = nifti(values, turned(2, (1, 1.3, 2)))
    mask = mask_of((await segment(data, orientation=orientation, spacing=spacing)).body)
    assert mask.shape == shape
    if spacing is None:
        assert np.array_equal(INTENSITIES[mask], values)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("qform_code", "sform_code"), [(0, 0), (2, 0), (0, 3), (4, 1)])
async def test_mask_keeps_codes_and_byte_order(
    version: int, order: str, qform_code: int, sform_code: int
) -> None:
    truth = labels()
    data = nifti(
        INTENSITIES[truth],
        turned(1, (1, 2, 1)),
        version=version,
        order=order,
        qform_code=qform_code,
        sform_code=sform_code,
    )
    kind = nib.Nifti1Image if version == 1 else nib.Nifti2Image
    mask = kind.from_bytes(gzip.decompress((await segment(data, spacing=(1.0, 2.0, 1.0))).body))
    assert mask.header.endianness == order
    assert (int(mask.header["qform_code"]), int(mask.header["sform_code"])) == (qform_code, sform_code)
    assert np.array_equal(mask.affine, kind.from_bytes(data).affine)


@pytest.mark.parametrize("axis", ["auto", "0", "1", "2"])
@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "SLA"])
async def test_mask_by_slices_lies_where_the_input_lies(code: str, axis: str) -> None:
    truth = labels()
    data = nifti(INTENSITIES[truth], affine_of(code, (1, 3, 1)))
    assert np.array_equal(mask_of((await segment(data, orientation=None, axis=axis)).body), truth)


async def test_mask_of_pages_is_pages() -> None:
    truth = labels()
    out = io.BytesIO()
    tifffile.imwrite(out, (INTENSITIES[truth] + 400).astype(np.float32) - 400, photometric="minisblack")
    answer = await segment(out.getvalue(), orientation=None)
    assert answer.media_type == "image/tiff"
    assert np.array_equal(tifffile.imread(io.BytesIO(answer.body)), truth)


@pytest.mark.parametrize("name", ["brain_t1_full", "ct_spleen_anisotropic", "spine_t2_psr"])
async def test_mask_of_real_volumes_lies_where_the_input_lies(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parents[3] / "shared" / "data" / "volumes" / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip("needs the data folder volumes beside the project")
    source = nib.load(path)
    low, high = np.percentile(source.get_fdata(dtype=np.float32), (60, 95))

    def bright(tiles: Tiles) -> np.ndarray:
        values = tiles.pixels[:, 0].astype(np.float32)
        classes = (values > low).astype(int) + (values > high)
        return (classes[:, None] == np.arange(4).reshape(1, 4, 1, 1, 1)).astype(np.float32)

    body = (await segment(path.read_bytes(), bright, "LPS", window=96)).body
    values = source.get_fdata(dtype=np.float32).reshape(mask_of(body).shape)
    assert np.array_equal(mask_of(body), (values > low).astype(np.uint8) + (values > high))
    (tmp_path / "mask.nii.gz").write_bytes(body)
    itk, twin = sitk.ReadImage(str(path)), sitk.ReadImage(str(tmp_path / "mask.nii.gz"))
    assert (itk.GetOrigin(), itk.GetDirection(), itk.GetSpacing()) == (
        twin.GetOrigin(),
        twin.GetDirection(),
        twin.GetSpacing(),
    )
