"""Axes and pixel sizes in the private tags of MetaMorph (STK) and Zeiss (LSM), which tifffile reads."""

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import tifffile
from numpy import ndarray

from server.errors import Unreadable
from server.imaging.page_axes import PageAxes, parse_count, parse_spacing
from server.imaging.tiff_planes import COMPRESSIONS, UIC2, tag_value_name

UIC1, LSM_INFO = 33628, 34412

# Whole-slide scanners, whose files are TIFF, by what tifffile tells them by.
SLIDES = {
    "Aperio SVS": operator.attrgetter("is_svs"),
    "Hamamatsu NDPI": operator.attrgetter("is_ndpi"),
    "Leica SCN": operator.attrgetter("is_scn"),
    "Ventana BIF": operator.attrgetter("is_bif"),
    "Philips TIFF": operator.attrgetter("is_philips"),
    "PerkinElmer QPTIFF": operator.attrgetter("is_qpi"),
}

# Relative difference up to which distances of planes count as equal.
TOLERANCE = 0.01


def is_lsm(page: "tifffile.TiffPage") -> bool:
    """Returns whether a page is the first of a Zeiss LSM file, whose samples are channels and no colours."""
    return LSM_INFO in page.tags


def refuse_slide(page: "tifffile.TiffPage") -> None:
    """Refuses a slide of a scanner in a compression that is not read, by the name of its format.

    Raises:
        Unreadable: The page is the first of such a file.
    """
    if page.compression in COMPRESSIONS:
        return
    name = next((name for name, is_slide in SLIDES.items() if is_slide(page)), None)
    if name is not None:
        compression = tag_value_name(tifffile.COMPRESSION, page.compression)
        raise Unreadable(
            f"the file is {name} with compression {compression}, which is not read here; export the region that is to be "
            "segmented as OME-TIFF or TIFF with LZW, deflate or none, e.g. with QuPath",
            reason="compression",
            value=compression,
            format=name,
        )


def describe(page: "tifffile.TiffPage", count: int) -> PageAxes | None:
    """Describes the pages of a file that has such tags; None for other files, and where they do not fit.

    Args:
        page: First page.
        count: Number of planes.
    """
    lsm, stk = page.tags.valueof(LSM_INFO), page.tags.valueof(UIC2)
    try:
        if isinstance(lsm, dict):
            return _lsm(lsm, count)
        if isinstance(stk, dict):
            calibration = page.tags.valueof(UIC1)
            return _stk(stk, calibration if isinstance(calibration, dict) else {}, count)
    except (ValueError, TypeError, KeyError, OverflowError):
        pass
    return None


def _lsm(info: Mapping[str, Any], count: int) -> PageAxes:
    """Reads Zeiss' header: slices follow each other, then times; a voxel is measured in metres."""
    lengths = [parse_count(dict(info), f"Dimension{name}") for name in ("Time", "Z")]
    spacing_mm = parse_spacing({axis: (info[f"VoxelSize{axis}"], "m") for axis in "XYZ"})
    if np.prod(lengths) != count:
        note = "Zeiss' header describes other pages (several positions?); pages were taken as slices"
        return PageAxes("?", np.arange(count), spacing_mm, note, "imagej")
    values = _interval(float(info.get("TimeIntervall", 0.0)))
    return PageAxes("TZ", np.arange(count).reshape(lengths), spacing_mm, dialect="imagej", values=values)


def _stk(planes: Mapping[str, Any], calibration: Mapping[str, Any], count: int) -> PageAxes:
    """Reads MetaMorph's tags: planes are slices where they have distances, else times where they have those."""
    unit = str(calibration.get("CalibrationUnits", ""))
    lengths = {axis: (calibration.get(f"{axis}Calibration", ""), unit) for axis in "XY"}
    # The first plane has no distance where the others' are steps, or is the origin where they are places.
    steps, letter, values = np.asarray(planes["ZDistance"], dtype=np.float64)[1:], "?", {}
    times_ms = np.diff(np.asarray(planes["TimeCreated"], dtype=np.int64))
    if count > 1 and np.isfinite(steps).all() and (steps != 0).all():
        letter, lengths["Z"] = "Z", (_step(steps), unit)
    elif count > 1 and (times_ms != 0).all():
        letter, values = "T", _interval(float(np.median(times_ms)) / 1e3)
    return PageAxes(letter, np.arange(count), parse_spacing(lengths), dialect="imagej", values=values)


def _interval(seconds: float) -> dict[str, str]:
    """Returns ImageJ's line of the time between two frames."""
    return {"finterval": f"{seconds:.9g}"} if 0 < seconds < np.inf else {}


def _step(distances: "ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    """Returns the distance of two planes, from steps or places; 0 where planes are not equally far apart."""
    places = np.diff(distances, prepend=0.0)
    for steps in (distances, places):
        if np.ptp(steps) <= TOLERANCE * abs(steps[0]):
            return float(abs(steps[0]))
    return 0.0
