"""Calibration that a TIFF answer repeats: words of ImageJ or OME, and tags that tell where pixels lie."""

from typing import Any

import tifffile

from server.arrays import Calibration
from server.imaging.page_axes import TIME_KEYS, PageAxes

ORIENTATION, X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 274, 282, 283, 296

# Tags that an answer repeats, with the type that each must have: the place on the slide (XPosition,
# YPosition), and on the earth (GeoTIFF).
ASCII, SHORT, RATIONAL, DOUBLE = 2, 3, 5, 12
PLACE_TAGS = {
    **dict.fromkeys((286, 287), RATIONAL),
    **dict.fromkeys((33550, 33922, 34264, 34736), DOUBLE),
    34735: SHORT,
    34737: ASCII,
}
# Values of such a tag.
MAX_TAG_VALUES = 1024

LARGEST_NUMBER = 2**32 - 1

INCH = 2


def read_calibration(
    page: "tifffile.TiffPage", described: PageAxes, spacing_mm: tuple[float, ...] | None
) -> Calibration:
    """Reads the tags of the first plane's page.

    Args:
        page: The page.
        described: What the description says.
        spacing_mm: Spacing of the decoded image or stack.
    """
    x, y = _fraction(page, X_RESOLUTION), _fraction(page, Y_RESOLUTION)
    unit = page.tags.valueof(RESOLUTION_UNIT, 1 if described.dialect else INCH)
    return Calibration(
        described.dialect,
        described.values,
        described.planes,
        (x, y) if x and y else None,
        int(unit) if unit in (1, INCH, 3) else 1,
        orientation(page),
        tuple(_place_tags(page)),
        # The private tags of microscopes tell sizes in no words that an answer could repeat.
        spacing_mm if described.values.keys() - TIME_KEYS or not described.dialect else None,
    )


def orientation(page: "tifffile.TiffPage") -> int:
    """Returns the orientation tag; 1 where it is missing or means nothing."""
    value = page.tags.valueof(ORIENTATION, 1)
    return int(value) if value in range(1, 9) else 1


def _fraction(page: "tifffile.TiffPage", code: int) -> tuple[int, int] | None:
    """Returns numerator and denominator of a resolution; None where they are not positive."""
    tag = page.tags.get(code)
    if tag is None or tag.dtype != RATIONAL or tag.count != 1:
        return None
    numerator, denominator = (int(part) for part in tag.value)
    return (numerator, denominator) if min(numerator, denominator) > 0 else None


def _place_tags(page: "tifffile.TiffPage") -> list[tuple[int, int, int, Any, bool]]:
    """Returns the place tags that have the type that they should."""
    kept: list[tuple[int, int, int, Any, bool]] = []
    for code, dtype in PLACE_TAGS.items():
        tag = page.tags.get(code)
        if tag is None or tag.dtype != dtype or not 0 < tag.count <= MAX_TAG_VALUES:
            continue
        if dtype == ASCII and not (isinstance(tag.value, str) and tag.value.isascii()):
            continue
        # tifffile counts the text itself, because it was read without what follows its end.
        kept.append((code, dtype, 0 if dtype == ASCII else tag.count, tag.value, True))
    return kept
