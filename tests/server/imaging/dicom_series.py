"""Synthetic DICOM instances, and results of segmenting them. Places are computed from the headers, not by the server."""

import dataclasses
import datetime
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.arrays import DicomSource, Image, Mask, Volume
from server.imaging.encode.result import Algorithm, Code, SegmentationResult, SegmentCodes

CT, MR, DX, XA = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.1.1",
    "1.2.840.10008.5.1.4.1.1.12.1",
)
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"

# Row cosine, column cosine.
A = np.pi / 7
ORIENTATIONS: dict[str, tuple[float, ...]] = {
    "axial": (1, 0, 0, 0, 1, 0),
    "axial, columns to the front": (1, 0, 0, 0, -1, 0),
    "sagittal": (0, 1, 0, 0, 0, -1),
    "coronal": (1, 0, 0, 0, 0, -1),
    "oblique": (np.cos(A), np.sin(A), 0, -np.sin(A) * np.cos(A), np.cos(A) ** 2, np.sin(A)),
}
ORIGIN, SPACING, GAP = np.array([-91.5, 126.25, -72.0]), (0.75, 0.5), 2.5
COLORS, NAMES = (
    {1: (31, 119, 180), 2: (255, 127, 14), 3: (44, 160, 44)},
    {1: "liver", 2: "spleen", 3: "kidney"},
)
CODES = {
    1: SegmentCodes(
        Code("91723000", "SCT", "Anatomical Structure"),
        Code("10200004", "SCT", "Liver"),
        Code("255549009", "SCT", "Anterior"),
    )
}
ALGORITHM = Algorithm(
    "organs",
    "Organs in CT",
    "0123456789abcdef" * 4,
    "fast",
    2,
    "int8",
    {"engine": "onnxruntime", "fill_holes": True},
)


def instances(
    size: tuple[int, int, int] = (7, 6, 5),
    orientation: Sequence[float] = ORIENTATIONS["axial"],
    sop_class: str = CT,
    **fields: Any,
) -> list[Any]:
    """Headers of single-frame instances, ascending along the normal: (X, Y, Z) are columns, rows, slices."""
    from pydicom import Dataset

    normal = np.cross(orientation[:3], orientation[3:])
    series = []
    for k in range(size[2]):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class, f"1.2.3.{k + 1}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.4", "1.2.5"
        dataset.FrameOfReferenceUID, dataset.Modality = "1.2.6", "MR" if sop_class == MR else "CT"
        dataset.PatientID, dataset.PatientName, dataset.PatientSex = "P1", "Doe^Jane", "F"
        dataset.PatientBirthDate, dataset.StudyDate, dataset.StudyTime = "19700203", "20240102", "101112"
        dataset.AccessionNumber, dataset.StudyID, dataset.ReferringPhysicianName = "A7", "S8", "Ref^Erring"
        dataset.SeriesNumber, dataset.InstanceNumber = 3, k + 1
        dataset.AcquisitionDate, dataset.AcquisitionTime = "20240103", f"1213{k:02d}.5"
        dataset.Manufacturer, dataset.PositionReferenceIndicator = "Scanners", None
        dataset.Rows, dataset.Columns = size[1], size[0]
        dataset.ImageOrientationPatient = [f"{c:.10g}" for c in orientation]
        dataset.ImagePositionPatient = [f"{c:.10g}" for c in ORIGIN + k * GAP * normal]
        dataset.PixelSpacing, dataset.SliceThickness = list(SPACING), 2
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        for name, value in fields.items():
            setattr(dataset, name, value)
        series.append(dataset)
    return series


def file_of(dataset: Any, plane: np.ndarray) -> bytes:
    """A DICOM file of a header and of its pixels (columns, rows), uint8."""
    import pydicom

    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = 7, 0, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelData = np.ascontiguousarray(plane.T).tobytes()
    dataset["PixelData"].VR = "OB"
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def multi_frame(size: tuple[int, int, int], orientation: Sequence[float], *, reverse: bool = False) -> Any:
    """Header of one enhanced instance, whose frames may descend; orientation and sizes stand in each frame."""
    from pydicom import Dataset

    single = instances(size, orientation, ENHANCED_MR)
    whole = single[0]
    frames = []
    for one in reversed(single) if reverse else single:
        frame, place, plane, measures = (Dataset() for _ in range(4))
        place.ImagePositionPatient = one.ImagePositionPatient
        plane.ImageOrientationPatient = one.ImageOrientationPatient
        measures.PixelSpacing, measures.SliceThickness = one.PixelSpacing, one.SliceThickness
        frame.PlanePositionSequence, frame.PlaneOrientationSequence, frame.PixelMeasuresSequence = (
            [place],
            [plane],
            [measures],
        )
        frames.append(frame)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(whole, name)
    whole.PerFrameFunctionalGroupsSequence, whole.SharedFunctionalGroupsSequence = frames, [Dataset()]
    whole.NumberOfFrames = len(frames)
    return whole


def place(dataset: Any, rows: Any, columns: Any) -> np.ndarray:
    """Where pixels of an instance lie, in mm towards left, posterior, superior (PS3.3 C.7.6.2.1.1)."""
    cosines = np.array(dataset.ImageOrientationPatient, dtype=float)
    dy, dx = (float(one) for one in dataset.PixelSpacing)
    along = np.multiply.outer(columns, cosines[:3] * dx) + np.multiply.outer(rows, cosines[3:] * dy)
    return np.array(dataset.ImagePositionPatient, dtype=float) + along


def affine_of(series: list[Any]) -> np.ndarray:
    """Voxel index (column, row, slice) to mm towards right, anterior, superior."""
    origin = place(series[0], 0, 0)
    next_slice = place(series[1], 0, 0) if len(series) > 1 else origin + np.array([0, 0, 1])
    affine = np.eye(4)
    affine[:3] = np.stack(
        [place(series[0], 0, 1) - origin, place(series[0], 1, 0) - origin, next_slice - origin, origin], 1
    )
    return np.diag([-1, -1, 1, 1.0]) @ affine


def classes_of(size: tuple[int, int, int], values: Sequence[int] = (1, 2)) -> np.ndarray:
    """A lopsided block per class, so that no mirrored or turned mask is equal."""
    classes = np.zeros(size, dtype=np.uint8, order="F")
    for n, value in enumerate(values):
        classes[n : n + 3, 1 + n : 3 + n, n : n + 2] = value
    return classes


def result(
    classes: np.ndarray,
    source: DicomSource,
    affine: np.ndarray | None,
    names: dict[int, str] = NAMES,
    **fields: Any,
) -> SegmentationResult:
    """A finished segmentation of a volume, or of an image."""
    if classes.ndim == 2:
        decoded: Image | Volume = Image(np.zeros((*classes.shape, 1), dtype=np.uint8), dicom=source)
    else:
        decoded = Volume(np.zeros((*classes.shape, 1), dtype=np.int16, order="F"), affine, dicom=source)
    colors = {value: COLORS.get(value, (value % 256, 9, 99)) for value in names}
    made = SegmentationResult(decoded, Mask(classes), colors, names, codes=CODES, algorithm=ALGORITHM)
    scores = fields.pop("scores", None)
    return dataclasses.replace(made, mask=Mask(classes, scores=scores), **fields)


def of_series(series: list[Any], classes: np.ndarray, **fields: Any) -> SegmentationResult:
    """A finished segmentation of single-frame instances."""
    source = DicomSource(tuple(series), tuple((k, 1) for k in range(len(series))))
    return result(classes, source, affine_of(series), **fields)


def now() -> str:
    """Today, as DICOM writes dates."""
    return datetime.datetime.now().strftime("%Y%m%d")
