"""Values of the pages of one TIFF: palettes, "white is zero", and numbers that single precision would round."""

import numpy as np
import tifffile
from jaxtyping import Shaped, UInt8
from numpy import ndarray

from server.errors import Unreadable
from server.imaging.decode_options import DecodeOptions, zero_nonfinite
from server.imaging.palette import ramp_note, ramp_values
from server.imaging.value_offset import MAX_EXACT, differences, finite_range, is_narrow

# Types that are decoded as stored; values of all others become float32.
EXACT_DTYPES = (np.uint8, np.uint16)

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


class PageValues:
    """Decodes the pages of one file to values that can be compared from page to page.

    The first page decides what must be the same for all: whether the palette is a ramp of colours, and the
    number that is 0 where single precision would round the values or "white is zero" has no other black.

    Args:
        options: Choices; labels are the values as stored.

    Attributes:
        note: Remark on the palette, for the caller; "" before the first page.
    """

    def __init__(self, options: DecodeOptions) -> None:
        self._options = options
        self._ramp: UInt8[ndarray, "n 3"] | None = None
        self._zero: int | float | None = None
        self._pages = 0
        self.note = ""

    def read(self, page: "tifffile.TiffPage", samples: slice) -> tuple[Pixels, int]:
        """Returns some samples of all pixels, contiguous, and how many of them were not finite and became 0.

        They are uint8, uint16 or float32; labels that are whole numbers are as stored.

        Raises:
            Unreadable: Samples are of a type that is not read.
        """
        pixels = page.asarray(maxworkers=1)
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not self._options.labels:
            pixels = self._palette_values(page, pixels)
        elif page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
        # A ramp of colours has one value where its tags promise three.
        pixels = pixels[..., samples] if self._ramp is None else pixels
        values = self._converted(pixels, page.photometric == tifffile.PHOTOMETRIC.MINISWHITE)
        self._pages += 1
        return values, zero_nonfinite(values) if values.dtype == np.float32 else 0

    def _palette_values(
        self, page: "tifffile.TiffPage", indices: Shaped[ndarray, "..."]
    ) -> Shaped[ndarray, "..."]:
        """Returns the colours of a palette, or the values behind a ramp of colours."""
        if self._pages == 0 and self._options.channel is None:
            palette = _palette(page)
            self.note = ramp_note(palette)
            self._ramp = palette if self.note else None
        return _palette(page)[indices] if self._ramp is None else ramp_values(indices, self._ramp)

    def _converted(self, pixels: Pixels, white_is_zero: bool) -> Pixels:
        """Converts to uint8, uint16 or float32, contiguous."""
        kind = pixels.dtype.kind
        if kind == "b":
            white = np.uint8(255)
            dark = white_is_zero and not self._options.labels
            return np.ascontiguousarray(pixels != dark, dtype=np.uint8) * white
        if kind not in "iuf":
            raise Unreadable(
                f"TIFF samples of type {pixels.dtype} are not read; save it as 8 or 16 bits or float",
                reason="sample-type",
                value=str(pixels.dtype),
            )
        if self._options.labels:
            return np.ascontiguousarray(pixels, dtype=np.float32 if kind == "f" else None)
        if kind == "f":
            return self._floats(pixels, white_is_zero)
        if white_is_zero:
            pixels = np.invert(pixels)
        return np.ascontiguousarray(pixels) if pixels.dtype in EXACT_DTYPES else self._whole_numbers(pixels)

    def _floats(self, pixels: Pixels, white_is_zero: bool) -> Pixels:
        """Returns float32; white that is zero becomes the largest value of the first page.

        Numbers of double precision count from the smallest value of the first page where float32 would round them.
        """
        if self._zero is None:
            self._zero = self._float_zero(pixels, white_is_zero)
        # Values beyond float32 become infinite here, and are counted as such.
        with np.errstate(over="ignore", invalid="ignore"):
            if white_is_zero:
                pixels = np.subtract(self._zero, pixels, dtype=np.float64)
            elif self._zero:
                pixels = differences(pixels, self._zero)
            return np.array(pixels, dtype=np.float32, order="C")

    @staticmethod
    def _float_zero(pixels: Pixels, white_is_zero: bool) -> int | float:
        wide = pixels.dtype.itemsize > 4
        found = finite_range(pixels) if wide or white_is_zero else None
        if found is None:
            return 0
        low, high = found
        far = wide and low < high and is_narrow(low, high)
        if white_is_zero:
            return high if far else max(0, high)
        return low if far else 0

    def _whole_numbers(self, pixels: Pixels) -> Pixels:
        """Returns float32, counted from the smallest value of the first page where that is too large for it."""
        if self._zero is None:
            low, high = int(pixels.min()), int(pixels.max())
            largest = max(abs(low), abs(high))
            # Where the range is as long, as with a mark of -2**31 among small numbers, it would round those.
            self._zero = low if largest > MAX_EXACT and high - low < largest else 0
        if not self._zero:
            return np.array(pixels, dtype=np.float32, order="C")
        return np.array(differences(pixels, self._zero), dtype=np.float32, order="C")


def _palette(page: "tifffile.TiffPage") -> UInt8[ndarray, "n 3"]:
    """Returns the colours of a page at 8 bits; some writers store them so, though the tag has 16."""
    colors = np.asarray(page.colormap)
    return np.ascontiguousarray((colors if colors.max() < 256 else colors >> 8).astype(np.uint8).T)
