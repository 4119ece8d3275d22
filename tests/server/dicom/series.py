"""Series of DICOM files for the tests of PACS, and how an answer lies over them."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from tests.server.imaging.dicom_series import ORIENTATIONS, file_of, instances

SIZE = (14, 20, 9)


def voxels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8)


def write_series(folder: Path, seed: int = 1, **fields: Any) -> list[Path]:
    """Writes a series whose UIDs follow from its number: study 1.2.826.N, series 1.2.826.N.1."""
    folder.mkdir(parents=True, exist_ok=True)
    voxels, paths = voxels_of(seed), []
    study = f"1.2.826.{seed}"
    fields = {
        "StudyInstanceUID": study,
        "SeriesInstanceUID": f"{study}.1",
        "FrameOfReferenceUID": f"{study}.2",
    } | fields
    for k, dataset in enumerate(instances(SIZE, ORIENTATIONS["oblique"], **fields)):
        dataset.SOPInstanceUID = f"{study}.1.{k + 1}"
        # In an order that says nothing.
        paths.append(folder / f"{k * 37 % 101:03}.dcm")
        paths[-1].write_bytes(file_of(dataset, voxels[:, :, k]))
    return sorted(paths)


def check_answer(seg: bytes, seed: int) -> None:
    """Lays an answer of the network `bright` over its source, instance by instance."""
    import highdicom

    voxels = voxels_of(seed)
    uids = [f"1.2.826.{seed}.1.{k + 1}" for k in range(SIZE[2])]
    dataset = highdicom.seg.segread(io.BytesIO(seg))
    assert dataset.StudyInstanceUID == f"1.2.826.{seed}"
    planes = dataset.get_pixels_by_source_instance(uids, combine_segments=True)
    assert np.array_equal(planes > 0, (voxels > voxels.mean()).T)
