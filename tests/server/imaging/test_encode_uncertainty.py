"""Each file read back by the libraries that people use."""

import gzip
import io
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import tifffile
from PIL import Image as Pillow

from server.arrays import Image, Mask, Volume
from server.imaging.encode import ENCODERS, SegmentationResult, choose, without
from tests.server.imaging.conftest import nifti, read
from tests.support.memory import memory_stays_below

STEP = 2**-10


def spread_of(size: tuple[int, ...]) -> np.ndarray:
    """Over all its range, and a bit beyond, as blending and rounding to half precision may go."""
    values = np.random.default_rng(0).random(size).astype(np.float16) / 2
    values.flat[:3] = -1e-4, 0.5005, 0.5
    return np.asfortranarray(values) if len(size) == 3 else values


def result(head_std: np.ndarray, source: Image | Volume | None = None) -> SegmentationResult:
    return SegmentationResult(Mask(np.zeros(head_std.shape, np.uint8), None, head_std), {}, {}, source)


@pytest.mark.parametrize("height", [1, 64, 200])
def test_png(height: int) -> None:
    head_std = spread_of((height, 31))
    shown = Pillow.open(io.BytesIO(ENCODERS["uncertainty_png"].encode(result(head_std))))
    assert shown.mode in ("I;16", "I")
    values = np.asarray(shown).astype(float) / 65535 / 2
    assert np.abs(values - np.clip(head_std.astype(float), 0, 0.5)).max() <= 0.5 / 65535
    assert values.flat[:3] == pytest.approx([0, 0.5, 0.5])


@pytest.mark.parametrize("size", [(5, 7), (5, 7, 3)])
def test_tiff(size: tuple[int, ...]) -> None:
    head_std = spread_of(size)
    body = ENCODERS["uncertainty_tiff"].encode(result(head_std))
    with tifffile.TiffFile(io.BytesIO(body)) as tiff:
        pages = [page.asarray() for page in tiff.pages]
    assert pages[0].dtype == np.float32
    assert np.array_equal(np.stack(pages), head_std.transpose(2, 1, 0) if len(size) == 3 else head_std[None])
    assert np.array_equal(np.asarray(Pillow.open(io.BytesIO(body))), pages[0])


@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti(tmp_path: Path, order: str) -> None:
    affine = np.array([[0, -2, 0, 9], [0.5, 0, 0, -3], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    data = nifti(np.zeros((6, 5, 4), dtype=f"{order}i2"), affine)
    source = read(data)
    assert isinstance(source, Volume)
    head_std = spread_of(source.size)
    body = ENCODERS["uncertainty_nifti"].encode(result(head_std, source))
    assert body == ENCODERS["uncertainty_nifti"].encode(result(head_std, source))
    image = nib.Nifti1Image.from_bytes(gzip.decompress(body))
    assert image.get_data_dtype() == np.uint8
    assert np.array_equal(image.affine, affine)
    wanted = np.clip(head_std.astype(float), 0, 0.5)
    assert np.abs(image.get_fdata() - wanted).max() <= 0.5 / 255 / 2 + 1e-6
    (tmp_path / "u.nii.gz").write_bytes(body)
    # ITK's axes are z, y, x.
    assert np.abs(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "u.nii.gz"))).T - wanted).max() <= 0.5 / 255 / 2 + 1e-6


@pytest.mark.parametrize(("name", "megabytes"), [("uncertainty_png", 70), ("uncertainty_tiff", 90)])
def test_memory(name: str, megabytes: float) -> None:
    asked = result(np.full((3000, 3000), 0.1, dtype=np.float16))
    with memory_stays_below(megabytes):
        ENCODERS[name].encode(asked)


@pytest.mark.parametrize("accept", ["image/png", "image/tiff", "application/gzip", "*/*", "image/*", "application/*"])
@pytest.mark.parametrize("kind", [None, "image", "stack", "volume"])
def test_must_be_asked_for_by_name(accept: str, kind: str | None) -> None:
    from server.errors import UnknownFormat
    from tests.server.imaging.test_encode import EXTENTS

    try:
        chosen = choose(None, accept, EXTENTS[kind] if kind else None)
    except UnknownFormat:
        return
    assert not any(name.startswith("uncertainty") for name in chosen)


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (None, None), ("png", "png"), ("uncertainty_png", "mask"), ("json,uncertainty_tiff,mask", "json,mask"),
        ("uncertainty_png,uncertainty_tiff", "mask"), ("gif,uncertainty_png", "gif"),
    ],
)  # fmt: skip
def test_the_other_formats(wanted: str | None, left: str | None) -> None:
    assert without(wanted, "head_std") == left
