"""Segmentations of all kinds of DICOM input, and readers that know pydicom alone."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from server.arrays import DicomSource
from server.imaging.encode import ENCODERS
from server.imaging.encode.result import SegmentationResult
from tests.server.imaging import dicom_series as dicom
from tests.server.imaging.dicom_series import ORIENTATIONS, classes_of, instances, of_series

pydicom = pytest.importorskip("pydicom")

SIZE = (7, 6, 5)
FORMATS = ["dicomseg", "dicomseg.labelmap", "dicomseg.fractional", "dicomsr"]
SEGMENTATIONS = FORMATS[:3]


def written(result: SegmentationResult, name: str = "dicomseg") -> bytes:
    return ENCODERS[name].encode(result)


def read(data: bytes) -> Any:
    return pydicom.dcmread(io.BytesIO(data))


def with_scores(result: SegmentationResult) -> SegmentationResult:
    scores = np.random.default_rng(3).random((len(result.names) + 1, *result.mask.classes.shape))
    return dataclasses.replace(
        result, mask=dataclasses.replace(result.mask, scores=scores.astype(np.float16))
    )


def enhanced(
    orientation: str, *, reverse: bool = False, classes: np.ndarray | None = None
) -> SegmentationResult:
    """A segmentation of one multi-frame instance."""
    whole = dicom.multi_frame(SIZE, ORIENTATIONS[orientation], reverse=reverse)
    frames = tuple((0, n) for n in range(1, SIZE[2] + 1))
    source = DicomSource((whole,), frames[::-1] if reverse else frames)
    affine = dicom.affine_of(instances(SIZE, ORIENTATIONS[orientation]))
    return dicom.result(classes_of(SIZE) if classes is None else classes, source, affine)


def radiograph(classes: np.ndarray | None = None, sop_class: str = dicom.DX) -> SegmentationResult:
    """A segmentation of a single image without geometry."""
    (one,) = instances((7, 6, 1), sop_class=sop_class)
    for name in ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
        delattr(one, name)
    del one.PixelSpacing
    mask = np.ascontiguousarray(classes_of((7, 6, 3))[..., 1].T) if classes is None else classes
    return dicom.result(mask, DicomSource((one,), ((0, 1),)), None)


CASES: dict[str, Callable[[], SegmentationResult]] = {
    **{name: lambda o=o: of_series(instances(SIZE, o), classes_of(SIZE)) for name, o in ORIENTATIONS.items()},  # type: ignore[misc]
    "MR": lambda: of_series(instances(SIZE, sop_class=dicom.MR), classes_of(SIZE)),
    "one class": lambda: of_series(instances(SIZE), classes_of(SIZE, [1]), names={1: "liver"}),
    "single slice": lambda: of_series(instances((7, 6, 1)), classes_of((7, 6, 1))),
    "empty": lambda: of_series(instances(SIZE), np.zeros(SIZE, dtype=np.uint8, order="F")),
    "enhanced": lambda: enhanced("oblique"),
    "enhanced, frames descending": lambda: enhanced("sagittal", reverse=True),
    "enhanced, empty": lambda: enhanced("axial", classes=np.zeros(SIZE, dtype=np.uint8)),
    "radiograph": radiograph,
    "radiograph, empty": lambda: radiograph(np.zeros((6, 7), dtype=np.uint8)),
    "angiograph": lambda: radiograph(sop_class=dicom.XA),
}
SPATIAL = [name for name in CASES if "graph" not in name]
FULL = [name for name in SPATIAL if "empty" not in name]


def fits(name: str, case: str) -> bool:
    return name != "dicomsr" or case in SPATIAL


def pixels(result: SegmentationResult, value: int) -> np.ndarray:
    """Indices (column, row, slice) of the pixels of a class."""
    classes = result.mask.classes
    return np.argwhere((classes if classes.ndim == 3 else classes.T[..., None]) == value)


def places(result: SegmentationResult, value: int) -> np.ndarray:
    """Where the pixels of a class lie, in mm, from the headers of the source."""
    source = result.dicom
    heads = [source.datasets[index] for index, _ in source.frames]
    if len(source.datasets) == 1 and len(source.frames) > 1:
        heads = [
            frame_head(source.datasets[0].PerFrameFunctionalGroupsSequence[n - 1]) for _, n in source.frames
        ]
    found = pixels(result, value)
    by_slice = [(head, found[found[:, 2] == k]) for k, head in enumerate(heads)]
    return np.concatenate([dicom.place(head, part[:, 1], part[:, 0]) for head, part in by_slice])


def frame_head(frame: Any, shared: Any = None) -> Any:
    """The attributes that place a frame, as a header of a single image."""
    head, shared = pydicom.Dataset(), shared or frame
    head.ImagePositionPatient = frame.PlanePositionSequence[0].ImagePositionPatient
    head.ImageOrientationPatient = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    head.PixelSpacing = shared.PixelMeasuresSequence[0].PixelSpacing
    return head


def segments_of(dataset: Any) -> dict[int, np.ndarray]:
    """Where the pixels of each segment lie, from the headers of the segmentation alone."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    planes = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    found: dict[int, list[np.ndarray]] = {}
    for plane, frame in zip(planes, dataset.PerFrameFunctionalGroupsSequence, strict=True):
        head = frame_head(frame, shared)
        for value in np.unique(plane[plane > 0]).tolist():
            group = frame if "SegmentIdentificationSequence" in frame else shared
            number = value
            if dataset.SegmentationType == "BINARY":
                number = int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
            found.setdefault(number, []).append(dicom.place(head, *np.nonzero(plane == value)))
    return {number: np.concatenate(points) for number, points in found.items()}


def in_order(points: np.ndarray) -> np.ndarray:
    return points[np.lexsort(points.round(3).T)]
