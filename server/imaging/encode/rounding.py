"""Half-precision probabilities as integers, by a table of all 65,536: four times as fast."""

import functools

import numpy as np
from jaxtyping import Float16, Shaped, UInt8, UInt16
from numpy import ndarray


def eight_bits(values: Float16[ndarray, "*size"], largest: float = 1.0) -> UInt8[ndarray, "*size"]:
    """Integers from 0 to 255 for values from 0 to `largest`; values beyond are clipped."""
    rounded: UInt8[ndarray, "*size"] = _table(np.uint8, largest, False)[values.view(np.uint16)]
    return rounded


def sixteen_bits(
    values: Float16[ndarray, "*size"], largest: float = 1.0, *, complement: bool = False
) -> UInt16[ndarray, "*size"]:
    """Integers from 0 to 65535 for values from 0 to `largest`, or for their complement; clipped beyond."""
    rounded: UInt16[ndarray, "*size"] = _table(np.uint16, largest, complement)[values.view(np.uint16)]
    return rounded


@functools.cache
def _table(dtype: type[np.unsignedinteger], largest: float, complement: bool) -> Shaped[ndarray, "65536"]:
    numbers = np.nan_to_num(np.arange(65536, dtype=np.uint16).view(np.float16).astype(np.float32))
    share = np.clip(numbers, 0, largest) / largest
    table: Shaped[ndarray, "65536"] = np.rint(
        (1 - share if complement else share) * np.iinfo(dtype).max
    ).astype(dtype)
    return table
