"""Subtracts an offset (a pedestal) from values whose differences single precision would round."""

import numpy as np
from jaxtyping import Float32, Shaped
from numpy import ndarray

from server.imaging.decode_options import MAX_ABS_VALUE

# Values are counted from the smallest where their range is a smaller part of the largest than this: float32
# has 24 bits, of which fewer than 12 would then tell them apart.
NARROW = 2.0**-12
# Whole numbers up to here are exact in float32.
MAX_EXACT = 2**24
# Values that are changed at a time.
BLOCK = 1024 * 1024


def is_narrow(low: int | float, high: int | float) -> bool:
    """Returns whether values between two numbers lie close together and far from 0."""
    return high - low < max(abs(low), abs(high)) * NARROW


def finite_range(values: Shaped[ndarray, "..."]) -> tuple[int | float, int | float] | None:
    """Returns the smallest and the largest value, exactly; None where no value is finite."""
    if values.dtype.kind != "f":
        return (values.min().item(), values.max().item()) if values.size else None
    # Of double precision, because the limit is infinite in half precision.
    limit = np.float64(MAX_ABS_VALUE)
    finite = (values >= -limit) & (values <= limit)
    low = values.min(where=finite, initial=np.inf).item()
    high = values.max(where=finite, initial=-np.inf).item()
    return (low, high) if low <= high else None


def differences(values: Shaped[ndarray, "..."], zero: int | float) -> Shaped[ndarray, "..."]:
    """Returns values counted from a number, without rounding of whole numbers."""
    if values.dtype.kind == "f":
        floats: Shaped[ndarray, "..."] = np.subtract(values, zero, dtype=np.float64)
        return floats
    # Unsigned arithmetic wraps around, so that differences are exact and those below 0 are negative.
    wide = np.uint64 if values.dtype.kind == "u" else np.int64
    return (values.astype(wide) - wide(zero)).view(np.int64)


class OffsetConverter:
    """Converts one file's values to float32 block by block, in one pass and without a second copy.

    Blocks are counted from the first value as long as all values are narrow, and converted plainly from the
    first block on with which they are not. The blocks before are then put back: the rounding of a narrow range
    is far below that of the values.

    Args:
        out: All values of the file, which are filled in order.
    """

    def __init__(self, out: Float32[ndarray, "count c"]) -> None:
        self._out = out
        self._filled = 0
        self._base: int | float = 0
        self._range: tuple[int | float, int | float] | None = None
        self._narrow = True
        self._whole = True

    def add(self, block: Shaped[ndarray, "n c"]) -> None:
        """Converts the next values, of any real type."""
        if self._narrow:
            self._widen(block)
        first, self._filled = self._filled, self._filled + len(block)
        self._out[first : self._filled] = differences(block, self._base) if self._base else block

    def finish(self) -> None:
        """Makes the smallest value 0 if the values are narrow, and float32 would round them."""
        if self._range is None or not self._base:
            return
        low, high = self._range
        exact = self._whole and max(abs(low), abs(high)) <= MAX_EXACT
        self._move(self._base if low == high or exact else self._base - low)
        self._base = 0

    def _widen(self, block: Shaped[ndarray, "n c"]) -> None:
        found = finite_range(block)
        if found is None:
            return
        if self._range is None:
            self._base, self._range, self._whole = found[0], found, block.dtype.kind != "f"
        self._range = min(self._range[0], found[0]), max(self._range[1], found[1])
        self._narrow = is_narrow(*self._range)
        if not self._narrow:
            self._move(self._base)
            self._base = 0

    def _move(self, by: int | float) -> None:
        """Adds a number to all values so far, in double precision."""
        rows = max(1, BLOCK // max(1, self._out.shape[1]))
        for first in range(0, self._filled, rows):
            part = self._out[first : min(first + rows, self._filled)]
            # Values that are not finite stay so.
            with np.errstate(over="ignore", invalid="ignore"):
                part[:] = part.astype(np.float64) + by
