"""Headers of the source instances as highdicom needs them: complete, of one orientation, without what it would refuse.

Files from practice lack attributes that the standard demands, or hold values that it forbids. What answers do
not need is left out, and what may be empty becomes empty.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped
from numpy import ndarray

from server.arrays import DicomSource

# Attributes of the further instances of a series; of the first one all are kept.
INSTANCE = (
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
)
# Attributes that must be present, and may be empty.
TYPE_2 = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
SEXES = ("", "M", "F", "O")

# Groups of all frames that many files repeat in each frame.
FRAME_GROUPS = ("PlaneOrientationSequence", "PixelMeasuresSequence")


def headers(source: DicomSource, affine: Float64[ndarray, "4 4"] | None) -> list[Any]:
    """Returns one dataset per slice of a series in the order of the slices, or one of a multi-frame instance.

    The distance between slices is left to highdicom, which measures it, because scanners state wrong ones.

    Args:
        source: instances of the input.
        affine: voxel index to mm; None for images.

    Raises:
        ValueError: highdicom takes several instances of one frame, or one of several.
    """
    first, rest = source.datasets[source.frames[0][0]], source.frames[1:]
    if len(source.datasets) not in (1, len(source.frames)):
        raise ValueError("several instances of several frames")
    head = _first(first, None if affine is None else float(np.linalg.norm(affine[:3, 2])))
    if len(source.datasets) == 1:
        return [head]
    return [head, *(_instance(source.datasets[index], head) for index, _ in rest)]


def planes(values: Shaped[ndarray, "*size"], source: DicomSource) -> Shaped[ndarray, "Z Y X"]:
    """Returns the values as the planes of the source: one per slice, or per frame of a multi-frame instance.

    Args:
        values: (H, W) of an image, or (X, Y, Z) of a volume.
        source: instances of the input.
    """
    if values.ndim == 2:
        return values[None]
    stacked = values.T
    frames = [frame for _, frame in source.frames]
    if len(source.datasets) > 1 or frames == list(range(1, len(frames) + 1)) == _all_frames(source):
        return stacked
    in_file = np.zeros((len(_all_frames(source)), *stacked.shape[1:]), stacked.dtype)
    for plane, frame in zip(stacked, frames, strict=True):
        in_file[frame - 1] = plane
    return in_file


def _all_frames(source: DicomSource) -> list[int]:
    """Numbers of the frames that the one instance holds."""
    return list(range(1, int(source.datasets[0].get("NumberOfFrames") or 1) + 1))


def position(head: Any) -> Any:
    """Place of the first frame of a multi-frame instance."""
    from highdicom import PlanePositionSequence

    return PlanePositionSequence.from_sequence(head.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence)


def has_place(source: DicomSource) -> bool:
    """Whether the instances have a frame of reference, without which DICOM places one frame alone."""
    return bool(source.datasets[0].get("FrameOfReferenceUID"))


def _instance(dataset: Any, head: Any) -> Any:
    """A further instance of a series, with the first one's orientation: they differ by rounding alone."""
    from pydicom import Dataset

    copy = Dataset()
    for keyword in INSTANCE:
        if keyword in dataset:
            copy[keyword] = dataset[keyword]
    copy["ImageOrientationPatient"] = head["ImageOrientationPatient"]
    copy["SliceThickness"] = head["SliceThickness"]
    return copy


def _first(dataset: Any, spacing_mm: float | None) -> Any:
    from pydicom import Dataset
    from pydicom.valuerep import DA, TM

    copy = Dataset()
    copy.update(dict(_public(dataset)))
    for keyword in TYPE_2:
        if keyword not in copy:
            setattr(copy, keyword, None)
    if copy.PatientSex not in SEXES:
        _set(copy, "PatientSex", "")
    _check(copy, ("StudyDate", "PatientBirthDate"), DA)
    _check(copy, ("StudyTime",), TM)
    if "SpacingBetweenSlices" in copy:
        del copy.SpacingBetweenSlices
    if not copy.get("SliceThickness"):
        _set(copy, "SliceThickness", None if spacing_mm is None else f"{spacing_mm:.6g}")
    if not copy.get("FrameOfReferenceUID") and "FrameOfReferenceUID" in copy:
        del copy.FrameOfReferenceUID
    if "NumberOfFrames" not in copy:
        copy.NumberOfFrames = 1
    _share_groups(copy)
    return copy


def _public(dataset: Any) -> Iterator[tuple[Any, Any]]:
    """The elements that can be read, without private ones."""
    for tag in dataset.keys():  # noqa: SIM118 - iterating reads every element
        if not tag.is_private:
            with contextlib.suppress(ValueError, TypeError, AttributeError, NotImplementedError):
                yield tag, dataset[tag]


def _set(dataset: Any, keyword: str, value: Any) -> None:
    """Replaces an element, because assigning would change the one that the input's dataset has too."""
    if keyword in dataset:
        del dataset[keyword]
    setattr(dataset, keyword, value)


def _check(dataset: Any, keywords: Sequence[str], read: Callable[[Any], Any]) -> None:
    """Empties dates and times that are none."""
    for keyword in keywords:
        try:
            read(dataset.get(keyword))
        except (ValueError, TypeError):
            _set(dataset, keyword, None)


def _share_groups(dataset: Any) -> None:
    """Moves what all frames repeat to the shared groups, where highdicom looks for it.

    Older kinds of several frames, e.g. angiography, have no groups, also where they hold one frame alone.
    """
    from pydicom import Dataset

    shared, frames = Dataset(), dataset.get("PerFrameFunctionalGroupsSequence") or [Dataset()]
    for item in dataset.get("SharedFunctionalGroupsSequence") or ():
        shared.update({element.tag: element for element in item})
    for group in FRAME_GROUPS:
        if group not in shared and all(
            group in frame and frame[group] == frames[0][group] for frame in frames
        ):
            shared[group] = frames[0][group]
    measures = [_measures(item) for item in shared.get("PixelMeasuresSequence") or (dataset,)]
    _set(shared, "PixelMeasuresSequence", measures)
    _set(dataset, "SharedFunctionalGroupsSequence", [shared])


def _measures(dataset: Any) -> Any:
    """The sizes of a pixel."""
    from pydicom import Dataset

    copy = Dataset()
    for keyword in ("PixelSpacing", "SliceThickness"):
        if dataset.get(keyword):
            copy[keyword] = dataset[keyword]
    return copy
