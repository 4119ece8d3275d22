"""The frames of DICOM instances: place, spacing and meaning of values, whether written once, per frame or in groups."""

import math
from dataclasses import dataclass
from typing import Any

from server.errors import TooLarge, Unreadable
from server.imaging.dicom_files import Instance
from server.imaging.dicom_stream import FORMAT

# Items of the sequences that describe frames. Each becomes an object of a kilobyte.
MAX_ITEMS = 300_000
ITEM = b"\xfe\xff\x00\xe0"
GROUPS = ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")

MAX_FRAMES = 100_000

# Modalities whose values have a unit, so that "low values are white" is advice for display alone.
MEASURED = ("CT", "PT", "NM")
# Modalities whose frames follow each other in time.
MOVIES = ("US", "IVUS", "XA", "RF", "ES", "OP", "XC", "GM", "ECHO")
# Length of a unit of ultrasound regions: cm.
CENTIMETRES = 3
# Values of PhotometricInterpretation that errors repeat. Others may be text about a patient.
PHOTOMETRIC = (
    *("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "HSV", "ARGB", "CMYK", "XYB"),
    *("YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT"),
)

Vector = tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """Describes one picture of an instance.

    Attributes:
        instance: Index of the instance.
        number: Frame number from 1.
        position: Centre of the first pixel in mm along left, posterior, superior; None where it has no place.
        orientation: Directions of a row and of a column; None where it has no place.
        spacing: Distance from row to row and from column to column in mm; None where unknown.
        slope: Factor from stored to real values.
        intercept: Real value of the stored 0.
    """

    instance: int
    number: int
    position: Vector | None
    orientation: Vector | None
    spacing: Vector | None
    slope: float
    intercept: float

    @property
    def placed(self) -> bool:
        """Whether its place in space is known."""
        return None not in (self.position, self.orientation, self.spacing)


@dataclass(frozen=True)
class PixelFormat:
    """Describes how the pixels of an instance are stored.

    Attributes:
        rows: Height in pixels.
        columns: Width in pixels.
        samples: Values per pixel.
        allocated: Bits of a stored value.
        bits: Bits of it that are used.
        high_bit: Number of the highest of these.
        signed: Whether they are signed.
        photometric: Meaning of the values, as PhotometricInterpretation says.
        planar: Whether the colours are stored in planes.
        modality: Kind of device.
        modality_lut: Whether a table turns stored into real values.
    """

    rows: int
    columns: int
    samples: int
    allocated: int
    bits: int
    high_bit: int
    signed: bool
    photometric: str
    planar: int
    modality: str
    modality_lut: bool

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest stored value."""
        half = 1 << (self.bits - 1)
        return (-half, half - 1) if self.signed else (0, 2 * half - 1)

    @property
    def colors(self) -> str:
        """Meaning of the values, as an error shows it."""
        return self.photometric if self.photometric in PHOTOMETRIC else "unknown"

    @property
    def inverted(self) -> bool:
        """Whether low values are bright, and are made dark."""
        return self.photometric == "MONOCHROME1" and self.modality not in MEASURED


def pixel_format(dataset: Any) -> PixelFormat:
    """Returns how pixels are stored.

    Raises:
        Unreadable: The header describes no pixels.
    """
    allocated = int(dataset.get("BitsAllocated") or 0)
    bits = int(dataset.get("BitsStored") or allocated)
    high = dataset.get("HighBit")
    found = PixelFormat(
        rows=int(dataset.get("Rows") or 0),
        columns=int(dataset.get("Columns") or 0),
        samples=int(dataset.get("SamplesPerPixel") or 1),
        allocated=allocated,
        bits=bits,
        high_bit=bits - 1 if high is None else int(high),
        signed=int(dataset.get("PixelRepresentation") or 0) == 1,
        photometric=str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip(),
        planar=int(dataset.get("PlanarConfiguration") or 0),
        modality=str(dataset.get("Modality") or "")[:16],
        modality_lut="ModalityLUTSequence" in dataset,
    )
    if found.allocated not in (1, 8, 16, 32, 64) or not 1 <= bits <= allocated or found.samples not in (1, 3):
        raise Unreadable(
            f"DICOM pixels of {found.samples} samples of {bits} in {allocated} bits are not read; save them with 8, 16 or 32 "
            "bits, grey or RGB",
            reason="sample-type",
            format=FORMAT,
            actual=[found.samples, bits, allocated],
            allowed=[8, 16, 32],
        )
    return found


def frame_count(dataset: Any) -> int:
    """Returns the number of frames.

    Raises:
        TooLarge: There are too many.
    """
    count = max(1, int(dataset.get("NumberOfFrames") or 1))
    if count > MAX_FRAMES:
        raise TooLarge(
            f"the DICOM instance has {count:,} frames; the limit is {MAX_FRAMES:,}. Send fewer",
            limit=MAX_FRAMES,
            actual=count,
            unit="frames",
            format=FORMAT,
        )
    return count


def frames_of(instance: Instance, index: int) -> list[Frame]:
    """Returns the frames of an instance.

    Args:
        instance: Instance.
        index: Its index, which the frames repeat.

    Raises:
        TooLarge: It has too many frames, or descriptions of them.
    """
    dataset = instance.dataset
    count = frame_count(dataset)
    _check_items(dataset)
    shared = _first(dataset, "SharedFunctionalGroupsSequence")
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) not in (0, count):
        raise Unreadable(
            f"the DICOM header describes {len(per_frame)} frames and counts {count}; send the file again, whole",
            reason="header",
            format=FORMAT,
            limit=count,
            actual=len(per_frame),
            unit="frames",
        )
    alone = count == 1
    return [
        _frame(
            index,
            number,
            (per_frame[number - 1] if per_frame else None, shared),
            dataset if alone else None,
            dataset,
        )
        for number in range(1, count + 1)
    ]


def image_spacing(dataset: Any, frame: Frame) -> tuple[tuple[float, float] | None, str]:
    """Returns the distance from row to row and from column to column in mm, None where unknown; and a note."""
    if frame.spacing:
        return (frame.spacing[0], frame.spacing[1]), ""
    if detector := numbers(dataset.get("ImagerPixelSpacing"), 2):
        return (detector[0], detector[1]), "the pixel size is that at the detector"
    if scanned := numbers(dataset.get("NominalScannedPixelSpacing"), 2):
        return (scanned[0], scanned[1]), ""
    steps = {
        (abs(float(region.PhysicalDeltaY)) * 10, abs(float(region.PhysicalDeltaX)) * 10)
        for region in dataset.get("SequenceOfUltrasoundRegions") or []
        if region.get("PhysicalUnitsXDirection") == region.get("PhysicalUnitsYDirection") == CENTIMETRES
    }
    if len(steps) == 1 and min(step := steps.pop()) > 0:
        return step, ""
    return None, ""


def are_times(dataset: Any) -> bool:
    """Returns whether the frames of an instance are a movie."""
    return dataset.get("Modality") in MOVIES or "FrameTime" in dataset or "FrameTimeVector" in dataset


def numbers(value: Any, count: int) -> Vector | None:
    """Returns so many finite numbers; None where the value is something else."""
    if value is None or isinstance(value, str | bytes):
        return None
    try:
        found = tuple(float(number) for number in value)
    except (TypeError, ValueError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def _frame(index: int, number: int, groups: tuple[Any, Any], alone: Any, dataset: Any) -> Frame:
    """Returns one frame, whose description is looked for in its group, in the shared one, and in the instance."""
    plane = _macro(groups, "PlanePositionSequence") or alone
    volume = _macro(groups, "PlanePositionVolumeSequence")
    turned = _macro(groups, "PlaneOrientationSequence") or alone
    volume_turned = _macro(groups, "PlaneOrientationVolumeSequence")
    measures = _macro(groups, "PixelMeasuresSequence") or dataset
    values = _macro(groups, "PixelValueTransformationSequence") or dataset
    position = numbers(_value(plane, "ImagePositionPatient") or _value(volume, "ImagePositionVolume"), 3)
    orientation = numbers(
        _value(turned, "ImageOrientationPatient") or _value(volume_turned, "ImageOrientationVolume"), 6
    )
    spacing = numbers(_value(measures, "PixelSpacing"), 2)
    slope, intercept = _number(values, "RescaleSlope", 1.0), _number(values, "RescaleIntercept", 0.0)
    if spacing and min(spacing) <= 0:
        spacing = None
    if slope == 0:
        slope = _without_slope(dataset, number)
    return Frame(index, number, position, orientation, spacing, slope, intercept)


def _without_slope(dataset: Any, number: int) -> float:
    """Returns 1 for a slope of 0 that no value is multiplied with: of colours, palettes and tables.

    Raises:
        Unreadable: All values of the frame would be the same.
    """
    form = pixel_format(dataset)
    if form.samples > 1 or form.modality_lut or not form.photometric.startswith("MONOCHROME"):
        return 1.0
    raise Unreadable(
        f"RescaleSlope of frame {number} is 0, which makes all its values the same; set it to the factor of the device, or to 1, or "
        "remove it",
        reason="header",
        format=FORMAT,
        field="RescaleSlope",
        actual=0,
    )


def _number(dataset: Any, name: str, default: float) -> float:
    value = _value(dataset, name)
    if value is None or value == "":
        return default
    number = float(value)
    if not math.isfinite(number) or abs(number) > 1e15:
        raise Unreadable(
            f"the DICOM header's {name} is no finite number; repair it",
            reason="header",
            format=FORMAT,
            field=name,
        )
    return number


def _macro(groups: tuple[Any, Any], name: str) -> Any:
    return next(
        (item for group in groups if group is not None and (item := _first(group, name)) is not None), None
    )


def _first(dataset: Any, name: str) -> Any:
    sequence = dataset.get(name)
    return sequence[0] if sequence else None


def _value(dataset: Any, name: str) -> Any:
    return None if dataset is None else dataset.get(name)


def _check_items(dataset: Any) -> None:
    """Refuses descriptions of frames that would take much memory, before they are parsed."""
    for name in GROUPS:
        element = dataset.get_item(name)
        raw = getattr(element, "value", None)
        if isinstance(raw, bytes) and raw.count(ITEM) > MAX_ITEMS:
            raise TooLarge(
                f"the DICOM header describes its frames in more than {MAX_ITEMS:,} items; send fewer frames",
                limit=MAX_ITEMS,
                unit="items",
                format=FORMAT,
            )
