"""DICOM Segmentation images, written by highdicom from the instances of the source.

Segments are the classes of the network, in the order of the mask's values. A class without pixels keeps its
description and has no frames.
"""

import io
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from server.errors import InvalidParameter
from server.imaging import dicom_library
from server.imaging.encode import dicom_identity, dicom_sources
from server.imaging.encode.result import SegmentationResult
from server.imaging.encode.rounding import eight_bits

Type = Literal["BINARY", "LABELMAP", "FRACTIONAL"]
EXPLICIT, JPEG_LS = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.80"
# 255 means a probability of 1.
LARGEST = 255
# Attributes that an error may name, which never repeats other words of a header; and how much of a message is searched.
ATTRIBUTES = (
    *("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "Rows", "Columns"),
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"),
    *("StudyDate", "StudyTime", "ReferringPhysicianName", "Modality", "SeriesNumber", "InstanceNumber"),
    *("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
)
MAX_TEXT = 2000


def binary(result: SegmentationResult) -> bytes:
    """Writes one bit per pixel, one frame per segment and plane that has some; all readers know it."""
    return _write(result, "BINARY")


def labelmap(result: SegmentationResult) -> bytes:
    """Writes one byte per pixel, compressed; newer readers know it."""
    return _write(result, "LABELMAP")


def fractional(result: SegmentationResult) -> bytes:
    """Writes the probability of each class."""
    return _write(result, "FRACTIONAL")


def note(result: SegmentationResult) -> str:
    """Remark on the answer: classes without pixels, and objects that it does not number."""
    number = counts(result)
    # Headers of HTTP hold no other characters.
    empty = [
        "".join(one if one.isascii() and one.isprintable() else "?" for one in name)
        for value, name in result.names.items()
        if not number[value]
    ]
    notes = (
        [f"no pixels of: {', '.join(empty)}; the segments are described and have no frames"] if empty else []
    )
    if "instances" in result.postprocessing:
        notes.append("segments in DICOM are classes; format=labels has the numbers of objects")
    return "; ".join(notes)


def counts(result: SegmentationResult) -> Int64[ndarray, " 256"]:
    """Number of pixels of each value."""
    total = np.zeros(256, dtype=np.int64)
    for plane in np.atleast_3d(result.mask.classes).T:
        total += np.bincount(plane.ravel(), minlength=256)
    return total


def checked(build: Callable[[SegmentationResult], Any], result: SegmentationResult) -> Any:
    """Builds a dataset.

    Raises:
        InvalidParameter: the headers of the source do not suffice.
    """
    dicom_library.load()
    try:
        return build(result)
    except LookupError as error:
        if not isinstance(error, KeyError | IndexError):
            raise
        raise _insufficient(error) from error
    # highdicom raises these where a header of the source lacks something, or has it twice or wrong.
    except (AttributeError, TypeError, ValueError) as error:
        raise _insufficient(error) from error


def _insufficient(error: Exception) -> InvalidParameter:
    # The text of the error may repeat what the header says of a patient.
    words = set(re.findall(r"\w+", str(error)[:MAX_TEXT]))
    name = next((name for name in ATTRIBUTES if name in words), "")
    shown = ": ".join(filter(None, (type(error).__name__, name)))
    return InvalidParameter(
        f"the headers of the DICOM instances do not suffice for an answer in DICOM ({shown}); "
        "use format=mask, or repair them",
        parameter="format",
        remedy="mask",
    )


def identity(result: SegmentationResult, type_: Type, head: Any) -> dicom_identity.Identity:
    """UIDs of the segmentation of that type."""
    values = result.scores if type_ == "FRACTIONAL" else result.mask.classes
    # Transposed, because the first axis varies fastest in volumes as they are decoded.
    return dicom_identity.identify(type_, result, head, np.ascontiguousarray(values.T).data.cast("B"))


def _build(result: SegmentationResult, type_: Type) -> Any:
    import highdicom as hd

    sources = headers(result)
    made = identity(result, type_, sources[0])
    name = dicom_identity.take_name(sources[0])
    dataset = hd.seg.Segmentation(
        segmentation_type=type_,
        segment_descriptions=segments(result, sources[0]),
        transfer_syntax_uid=EXPLICIT,
        max_fractional_value=LARGEST,
        content_label="SEGMENTATION",
        content_description=dicom_identity.algorithm_name(result),
        contributing_equipment=[dicom_identity.equipment(result)],
        **_pixels(result, sources, type_),
        **dicom_identity.series(result, sources[0], made),
    )
    dicom_identity.finish(dataset, name, made)
    _complete(dataset, sources[0])
    if type_ == "FRACTIONAL":
        _fill_probabilities(result, dataset)
    if type_ == "LABELMAP":
        _compress(dataset)
    return dataset


def _complete(dataset: Any, head: Any) -> None:
    """Adds and removes what highdicom leaves to do for images without a place in space."""
    shared = dataset.SharedFunctionalGroupsSequence[0]
    if "PixelMeasuresSequence" in shared and "PixelSpacing" not in shared.PixelMeasuresSequence[0]:
        del shared.PixelMeasuresSequence
    if "PlaneOrientationSequence" not in shared:
        dataset.PatientOrientation = head.get("PatientOrientation") or ""


def headers(result: SegmentationResult) -> list[Any]:
    """Headers of the source, as highdicom needs them."""
    return dicom_sources.headers(result.dicom, result.affine if result.mask.classes.ndim == 3 else None)


def _numbers(result: SegmentationResult) -> UInt8[ndarray, " 256"]:
    """Segment number of each value of the mask: 1, 2, ..."""
    numbers = np.zeros(256, dtype=np.uint8)
    numbers[list(result.names)] = np.arange(1, len(result.names) + 1)
    return numbers


def _pixels(result: SegmentationResult, sources: list[Any], type_: Type) -> dict[str, Any]:
    """The planes and the source images that they lie on.

    Of a mask without any pixel, one plane is written for each segment, because an image has at least one
    frame. Of probabilities the planes are empty, because highdicom then writes every frame of every segment;
    their pixels follow.
    """
    classes = result.mask.classes
    if type_ == "FRACTIONAL":
        planes = dicom_sources.planes(np.zeros_like(classes), result.dicom)
        return {"pixel_array": planes, "source_images": sources, "omit_empty_frames": False}
    numbers = _numbers(result)
    if not np.array_equal(numbers[: len(result.names) + 1], np.arange(len(result.names) + 1)):
        classes = numbers[classes]
    planes = dicom_sources.planes(classes, result.dicom)
    if type_ == "BINARY" and planes[0].size < 8:
        # highdicom fills each of them up to a byte, which readers do not expect.
        raise ValueError("frames of less than 8 pixels")
    if planes.any():
        return {"pixel_array": planes, "source_images": sources}
    written = {"pixel_array": planes[:1], "source_images": sources[:1], "omit_empty_frames": False}
    if len(sources) < len(planes):
        return {**written, "plane_positions": [dicom_sources.position(sources[0])]}
    return {**written, "further_source_images": sources[1:]}


def segments(result: SegmentationResult, head: Any) -> list[Any]:
    """Description of each class."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    described = []
    for number, (value, name) in enumerate(result.names.items(), 1):
        terms = dicom_identity.codes_of(result, value)
        identifier, tracking_uid = dicom_identity.tracking(result, head, value)
        algorithm = hd.AlgorithmIdentificationSequence(
            dicom_identity.algorithm_name(result),
            codes.DCM.ArtificialIntelligence,
            result.made_by.bundle_sha256 or "unknown",
            source=dicom_identity.SERVER,
            parameters=dicom_identity.parameters(result),
        )
        segment = hd.seg.SegmentDescription(
            number,
            dicom_identity.short(name),
            dicom_identity.concept(terms.category),
            dicom_identity.concept(terms.type),
            "AUTOMATIC",
            algorithm,
            tracking_uid,
            identifier,
            anatomic_regions=[dicom_identity.concept(terms.region)] if terms.region else None,
            display_color=hd.color.CIELabColor.from_rgb(*result.colors[value]),
        )
        if terms.modifier:
            kind = segment.SegmentedPropertyTypeCodeSequence[0]
            kind.SegmentedPropertyTypeModifierCodeSequence = [dicom_identity.concept(terms.modifier)]
        described.append(segment)
    return described


def _fill_probabilities(result: SegmentationResult, dataset: Any) -> None:
    """Writes the pixels of the frames that belong to slices, and removes the other frames."""
    slices = {
        (str(result.dicom.datasets[index].SOPInstanceUID), frame): k
        for k, (index, frame) in enumerate(result.dicom.frames)
    }
    scores, frames, pixels = result.scores, [], []
    offset = len(scores) - len(result.names)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        source = frame.DerivationImageSequence[0].SourceImageSequence[0]
        k = slices.get((str(source.ReferencedSOPInstanceUID), int(source.get("ReferencedFrameNumber") or 1)))
        if k is None:
            continue
        # One segment stands among the shared groups.
        groups = (
            frame if "SegmentIdentificationSequence" in frame else dataset.SharedFunctionalGroupsSequence[0]
        )
        number = int(groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber)
        plane = scores[number - 1 + offset]
        frames.append(frame)
        pixels.append(eight_bits(plane if plane.ndim == 2 else plane[..., k].T).tobytes())
    dataset.PerFrameFunctionalGroupsSequence = frames
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = b"".join(pixels)


def _compress(dataset: Any) -> None:
    """Compresses each frame without loss.

    Not by pydicom, because of the packages that it calls one ends the process on small frames in RLE, and
    another one refuses small frames in JPEG-LS.
    """
    import imagecodecs
    from pydicom.encaps import encapsulate
    from pydicom.uid import UID

    stored = np.frombuffer(dataset.PixelData, np.uint8)[
        : dataset.NumberOfFrames * dataset.Rows * dataset.Columns
    ]
    # With room for noise, which grows.
    frames = [
        _without_spiff(bytes(imagecodecs.jpegls_encode(frame, out=2 * frame.size + 1024)))
        for frame in stored.reshape(-1, dataset.Rows, dataset.Columns)
    ]
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset.file_meta.TransferSyntaxUID = UID(JPEG_LS)


def _without_spiff(stream: bytes) -> bytes:
    """The stream without SPIFF's header, segments APP8 behind the first marker, which DICOM has no use for."""
    start = 2
    while stream[start : start + 2] == b"\xff\xe8":
        start += 2 + int.from_bytes(stream[start + 2 : start + 4], "big")
    return stream[:2] + stream[start:]


def _write(result: SegmentationResult, type_: Type) -> bytes:
    file = io.BytesIO()
    checked(lambda result: _build(result, type_), result).save_as(file)
    return file.getvalue()
