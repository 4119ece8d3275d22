"""Axes, pixel size and times of a TIFF answer, as its source has them: ImageJ's lines, OME-XML or plain tags.

Viewers then lay the answer over its source, in the same unit, and count times as times.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from server.arrays import Calibration, Image, Volume
from server.imaging.page_axes import TIME_KEYS

OME_SCHEMA = "http://www.openmicroscopy.org/Schemas/OME/2016-06"

ORIENTATION = 274

# Values of a resolution tag have 32 bits.
LARGEST_NUMBER = 2**32 - 1

OME_TYPES = {"uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "float32": "float"}


@dataclass(frozen=True)
class Description:
    """Options of `tifffile.TiffWriter.write`.

    Attributes:
        first: options of the first page.
        every: options of all pages.
    """

    first: dict[str, Any] = field(default_factory=dict)
    every: dict[str, Any] = field(default_factory=dict)


def describe(source: Image | Volume, dtype: "np.dtype[Any]", names: Sequence[str] = ()) -> Description:
    """Describes the pages of an answer, which follow each other as times, slices, channels.

    Args:
        source: decoded input.
        dtype: type of a value of the answer.
        names: name of each channel of the answer, if it has several pages per slice or names them.
    """
    known = source.calibration or Calibration()
    # A request may give the pixel size, and other formats and private tags give it in other words.
    as_read = known.spacing_mm == source.spacing_mm
    sizes_um = () if as_read else _sizes_um(source)
    timed = isinstance(source, Volume) and source.time_slices is not None
    dialect = known.dialect or ("imagej" if timed or sizes_um else "")
    values = {key: value for key, value in known.values.items() if as_read or key in TIME_KEYS}
    turned = [(ORIENTATION, "H", 1, known.orientation, False)] if known.orientation != 1 else []
    first: dict[str, Any] = {"extratags": [*turned, *known.tags]}
    every: dict[str, Any] = {"extratags": turned}
    if as_read and known.resolution:
        every |= {"resolution": known.resolution, "resolutionunit": known.resolution_unit}
    if dialect == "ome":
        first["description"] = _ome(source, values, sizes_um, known.planes, dtype, names)
    if dialect == "imagej":
        if sizes_um:
            every |= {"resolution": (_per_um(sizes_um[0]), _per_um(sizes_um[1])), "resolutionunit": 1}
        first["description"] = _imagej(source, values, sizes_um, len(names) or 1)
        labels = list(names) * math.prod(_lengths(source))
        if labels:
            first["extratags"] += tifffile.tifffile.imagej_metadata_tag({"Labels": labels}, "<")
    return Description(first, every)


def _lengths(source: Image | Volume) -> tuple[int, int]:
    """Returns the number of times, and of slices per time."""
    if isinstance(source, Image):
        return 1, 1
    count = source.size[2]
    depth = source.time_slices or count
    return count // depth, depth


def _sizes_um(source: Image | Volume) -> tuple[float, ...]:
    """Returns the size of a pixel along X, Y and, where it is known, Z; nothing where it is unknown."""
    spacing_mm = source.spacing_mm or ()
    xyz = spacing_mm[::-1] if isinstance(source, Image) else spacing_mm
    return tuple(float(f"{mm * 1e3:.12g}") for mm in xyz)


def _per_um(size_um: float) -> tuple[int, int]:
    """Returns the pixels per micrometre as numerator and denominator."""
    pixels = 1 / Fraction(str(size_um))
    fraction = pixels.limit_denominator(int(LARGEST_NUMBER / max(1.0, float(pixels))))
    return fraction.numerator, fraction.denominator


def _imagej(
    source: Image | Volume, values: Mapping[str, str], sizes_um: tuple[float, ...], channels: int
) -> bytes:
    """Returns lines as ImageJ writes them: letters beyond ASCII are escaped as in Java."""
    times, depth = _lengths(source)
    lengths = {"channels": channels, "slices": depth, "frames": times}
    lines = {"ImageJ": "1.53t", "images": str(channels * depth * times)}
    lines |= {name: str(length) for name, length in lengths.items() if length > 1}
    if times > 1 or channels > 1:
        lines |= {"hyperstack": "true", "mode": "grayscale"}
    if sizes_um:
        lines |= {"unit": "um"} | ({"spacing": str(sizes_um[2])} if len(sizes_um) > 2 else {})
    lines |= values
    text = "".join(f"{name}={value}\n" for name, value in lines.items())
    return "".join(c if c == "\n" or " " <= c <= "~" else f"\\u{ord(c):04X}" for c in text).encode("ascii")


def _ome(
    source: Image | Volume,
    values: Mapping[str, str],
    sizes_um: tuple[float, ...],
    planes: Sequence[Mapping[str, str]],
    dtype: "np.dtype[Any]",
    names: Sequence[str],
) -> bytes:
    """Returns an OME-XML header in ASCII."""
    times, depth = _lengths(source)
    height, width = source.size if isinstance(source, Image) else source.size[1::-1]
    channels = len(names) or 1
    lengths = {"X": width, "Y": height, "C": channels, "Z": depth, "T": times}
    root = ElementTree.Element("OME", {"xmlns": OME_SCHEMA, "Creator": "unetpp"})
    image = ElementTree.SubElement(root, "Image", {"ID": "Image:0"})
    pixels = {
        "ID": "Pixels:0",
        "DimensionOrder": "XYCZT",
        "Type": OME_TYPES[dtype.name],
        "BigEndian": "false",
    }
    pixels |= {f"Size{axis}": str(length) for axis, length in lengths.items()} | dict(values)
    for axis, size in zip("XYZ", sizes_um, strict=False):
        pixels |= {f"PhysicalSize{axis}": str(size), f"PhysicalSize{axis}Unit": "µm"}
    element = ElementTree.SubElement(image, "Pixels", pixels)
    for number in range(channels):
        channel = {"ID": f"Channel:0:{number}", "SamplesPerPixel": "1"}
        name = {"Name": names[number]} if names else {}
        ElementTree.SubElement(element, "Channel", channel | name)
    ElementTree.SubElement(element, "TiffData", {"IFD": "0", "PlaneCount": str(channels * depth * times)})
    for plane in planes:
        ElementTree.SubElement(element, "Plane", dict(plane))
    return bytes(ElementTree.tostring(root, "us-ascii", xml_declaration=False))
