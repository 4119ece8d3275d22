"""DICOM files made with pydicom: series of any orientation, frames in groups, colours, and zips of them."""

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, generate_uid

CT, MR, ENHANCED_CT, SECONDARY = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.7",
)
SR = "1.2.840.10008.5.1.4.1.1.88.11"
SERIES = "1.2.826.0.1.3680043.8.498.1"

# Text that no answer, log or name may repeat.
PATIENT = {
    "PatientName": "Mustermann^Erika",
    "PatientID": "PID-Kx4711q",
    "PatientBirthDate": "19640812",
    "StudyDescription": "Kopfschmerz seit Dienstag",
    "SeriesDescription": "Schaedel nativ Erika",
    "AccessionNumber": "ACC-Kx90210",
    "ReferringPhysicianName": "Hausarzt^Dr",
    "InstitutionName": "Klinik am Wald",
    "StudyDate": "20240229",
}
SECRETS = (
    "Mustermann",
    "Erika",
    "Kx4711q",
    "19640812",
    "Kopfschmerz",
    "Schaedel",
    "Kx90210",
    "Hausarzt",
    "20240229",
)


def instance(pixels: np.ndarray | None, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """One DICOM file.

    Args:
        pixels: (rows, columns[, 3]), or with frames before them; None for an object without pixels.
        syntax: transfer syntax of native pixels.
        elements: elements by keyword, which replace those that follow from the pixels; None leaves one out.
    """
    dataset: Any = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.SOPClassUID = elements.pop("SOPClassUID", CT)
    dataset.SOPInstanceUID = elements.pop("SOPInstanceUID", generate_uid())
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta.TransferSyntaxUID = syntax
    values: dict[str, Any] = {
        **PATIENT,
        "SeriesInstanceUID": SERIES,
        "StudyInstanceUID": "1.2.3",
        "Modality": "CT",
    }
    if pixels is not None:
        values |= _described(pixels, syntax)
    for name, value in (values | elements).items():
        if value is not None:
            setattr(dataset, name, value)
    if pixels is not None:
        dataset["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    out = io.BytesIO()
    pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


def _described(pixels: np.ndarray, syntax: str) -> dict[str, Any]:
    colors = pixels.ndim > 2 and pixels.shape[-1] == 3
    rows, columns = pixels.shape[-3:-1] if colors else pixels.shape[-2:]
    frames = pixels.shape[0] if pixels.ndim == 3 + colors else 1
    bits = pixels.dtype.itemsize * 8
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    values = {
        "Rows": rows,
        "Columns": columns,
        "SamplesPerPixel": 3 if colors else 1,
        "PhotometricInterpretation": "RGB" if colors else "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": data + b"\0" * (len(data) % 2),
    }
    return (
        values
        | ({"PlanarConfiguration": 0} if colors else {})
        | ({"NumberOfFrames": frames} if frames > 1 else {})
    )


AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def places(
    count: int,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-10.0, 20.0, 30.0),
    step: float = 3.0,
) -> list[list[float]]:
    """ImagePositionPatient of slices in ascending order along the normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [[round(float(x), 6) for x in np.array(origin) + k * step * normal] for k in range(count)]


def series(
    volume: np.ndarray,
    *,
    orientation: Sequence[float] = AXIAL,
    origin: Sequence[float] = (-10.0, 20.0, 30.0),
    spacing: Sequence[float] = (0.7, 0.9),
    step: float = 3.0,
    **elements: Any,
) -> list[bytes]:
    """Files of a series, in the order of the slices.

    Args:
        volume: (columns, rows, slices) stored values.
        orientation: ImageOrientationPatient.
        origin: ImagePositionPatient of the first slice.
        spacing: PixelSpacing: from row to row, and from column to column.
        step: mm from slice to slice.
        elements: further elements of all; a list gives each slice its own.
    """
    positions = places(volume.shape[2], orientation, origin, step)
    files = []
    for k, position in enumerate(positions):
        own = {name: value[k] if isinstance(value, list) else value for name, value in elements.items()}
        values: dict[str, Any] = {
            "ImagePositionPatient": position,
            "ImageOrientationPatient": [round(float(x), 8) for x in orientation],
            "PixelSpacing": list(spacing),
            "SliceThickness": 99.0,
            "InstanceNumber": volume.shape[2] - k,
        }
        files.append(instance(np.ascontiguousarray(volume[:, :, k].T), **(values | own)))
    return files


def affine_of(
    orientation: Sequence[float], origin: Sequence[float], spacing: Sequence[float], step: float
) -> np.ndarray:
    """The affine in RAS of a series, written down from the standard (C.7.6.2.1.1)."""
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    affine = np.eye(4)
    affine[:3] = np.stack(
        [row * spacing[1], column * spacing[0], np.cross(row, column) * step, np.array(origin)], axis=1
    )
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def enhanced(volume: np.ndarray, *, slopes: Sequence[float] | None = None, **elements: Any) -> bytes:
    """An enhanced CT of (columns, rows, frames), whose frames lie in reversed order, with a rescaling of each."""
    frames = np.ascontiguousarray(volume.transpose(2, 1, 0)[::-1])
    positions = places(len(frames))[::-1]
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures.PixelSpacing = [0.7, 0.9]
    shared = Dataset()
    shared.PlaneOrientationSequence = Items([orientation])
    shared.PixelMeasuresSequence = Items([measures])
    per_frame = []
    for k, position in enumerate(positions):
        plane, values, group = Dataset(), Dataset(), Dataset()
        plane.ImagePositionPatient = position
        values.RescaleSlope = (slopes or [1.0] * len(frames))[::-1][k]
        values.RescaleIntercept = -1024
        group.PlanePositionSequence = Items([plane])
        group.PixelValueTransformationSequence = Items([values])
        per_frame.append(group)
    groups: dict[str, Any] = {
        "SharedFunctionalGroupsSequence": Items([shared]),
        "PerFrameFunctionalGroupsSequence": Items(per_frame),
    }
    return instance(frames, SOPClassUID=ENHANCED_CT, **(groups | elements))


def zipped(files: Iterable[bytes] | Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip of files, under meaningless names unless they have some."""
    named = (
        files
        if isinstance(files, Mapping)
        else {f"x/{(k * 37) % 1009:04}": data for k, data in enumerate(files)}
    )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in named.items():
            archive.writestr(name, data)
    return out.getvalue()
