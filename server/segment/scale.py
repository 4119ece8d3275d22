"""How large pixels and voxels are, and what the caller says of it."""

import dataclasses

from server.arrays import Image, InputHeader, Volume
from server.errors import InvalidParameter
from server.imaging import geometry

# µm from pixel to pixel; outside of it the number is in another unit.
LEAST_UM, MOST_UM = 1e-3, 1e5


def steps_mm(source: Image | Volume) -> tuple[float, ...] | None:
    """From pixel to pixel along each axis of the mask, where it is known."""
    if isinstance(source, Volume) and source.affine is not None:
        return geometry.spacing(source.affine)
    return source.spacing_mm


def check(pixel_size_um: str | None, input_header: InputHeader) -> None:
    """Refuses a pixel size that does not fit the input, before it is decoded.

    Raises:
        InvalidParameter: says what would do.
    """
    if pixel_size_um is None:
        return
    if input_header.kind == "volume":
        raise InvalidParameter(
            "pixel_size_um is for images and stacks; of a volume the file's header says the spacing: leave it out"
        )
    _parsed(pixel_size_um, 2 if input_header.planar else 3)


def sized(source: Image | Volume, pixel_size_um: str | None) -> Image | Volume:
    """The input with the pixel size that the caller says, which wins over what its file says.

    Args:
        source: an image or a stack.
        pixel_size_um: see `SegmentRequest`.

    Raises:
        InvalidParameter: it is none; or of a stack, whose file does not say how far apart pages are, it does not either.
    """
    if pixel_size_um is None:
        return source
    planar = source.input_header.planar
    height, width, *page = (um / 1e3 for um in _parsed(pixel_size_um, 2 if planar else 3))
    if isinstance(source, Image):
        return dataclasses.replace(source, spacing_mm=(height, width))
    if planar:
        return dataclasses.replace(source, spacing_mm=(width, height))
    between = page or (source.spacing_mm or ())[2:]
    if not between:
        raise InvalidParameter(
            f"pixel_size_um={pixel_size_um!r:.40} does not say how far apart the pages of the stack are, nor does the file; give "
            "height x width x page, e.g. pixel_size_um=0.5x0.5x2"
        )
    return dataclasses.replace(source, spacing_mm=(width, height, between[0]))


def _parsed(text: str, most: int) -> tuple[float, ...]:
    """Height, width and perhaps page distance; one number is both height and width."""
    if "," in text:
        # Half of the world writes 1,3 for one and three tenths.
        raise InvalidParameter(
            f"pixel_size_um={text!r:.40} has a comma, which may mean two things; write 0.5 with a point, and height x width as 0.5x0.25"
        )
    try:
        found = tuple(float(part) for part in text.split("x"))
    except ValueError:
        found = ()
    if not 1 <= len(found) <= most or not all(LEAST_UM <= um <= MOST_UM for um in found):
        what = "height x width, as 0.5x0.25" if most == 2 else "height x width x page, as 0.5x0.25x2"
        raise InvalidParameter(
            f"pixel_size_um={text!r:.40} is not one number of micrometres, or {what}, each between {LEAST_UM:g} and {MOST_UM:g}"
        )
    return found * 2 if len(found) == 1 else found
