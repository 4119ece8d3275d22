"""Foreground probability as 16-bit grey PNG: 0 is 0, 65535 is 1."""

from server.arrays import Mask
from server.imaging.encode import png
from server.imaging.encode.rounding import sixteen_bits


def encode(mask: Mask) -> bytes:
    """Probability of the class, or, of several, of any foreground class (1 - background)."""
    assert mask.scores is not None  # noqa: S101 - the table asks for scores
    return png.write(sixteen_bits(mask.scores[0], rest=len(mask.scores) > 1))
