"""Palettes: which are ramps of colours ("fire", "viridis", a tint) over a grey picture, whose indices are its values."""

import numpy as np
from jaxtyping import Shaped, UInt8
from numpy import ndarray

# Entries of the shortest palette that is taken for a ramp; the colours of any short palette are a smooth row.
MIN_ENTRIES = 64
# Entries at each end that may differ, because viewers mark black and saturated pixels by them.
MARKED = 1
# Changes of direction of a channel along a ramp, and mean change of its step from entry to entry. The ramps of
# matplotlib and ImageJ have up to 6 and 0.7; palettes made for the colours of photographs and histology at
# least 12 and 1.2.
MAX_TURNS, MAX_BEND = 8, 1.0
# Red, green and blue in the brightness of a colour.
BRIGHTNESS = np.array([0.299, 0.587, 0.114])


def ramp_note(palette: UInt8[ndarray, "n 3"]) -> str:
    """Returns the note that a palette is a ramp of colours; "" where it is none.

    Palettes of grey are none, because their colours are the values.
    """
    ramp = ramp_direction(palette) != 0
    return "false colour: the palette is a ramp of colours; its indices were read as grey" if ramp else ""


def ramp_values(
    indices: Shaped[ndarray, "*size"], palette: UInt8[ndarray, "n 3"]
) -> Shaped[ndarray, "*size"]:
    """Returns the values of a grey picture that is shown through a ramp of colours, larger where they are lighter."""
    if ramp_direction(palette) > 0:
        return indices
    return (len(palette) - 1 - indices.astype(np.int64)).astype(indices.dtype)


def ramp_direction(palette: UInt8[ndarray, "n 3"]) -> int:
    """Returns 1 for a ramp of colours from dark to light, -1 from light to dark, 0 for other palettes."""
    entries = _without_padding(palette).astype(np.int64)
    different = len(np.unique(entries, axis=0))
    if len(entries) < MIN_ENTRIES or different < len(entries) / 2 or not np.ptp(entries, axis=1).any():
        return 0
    steps = np.diff(entries[MARKED : len(entries) - MARKED], axis=0)
    turns = max(_turns(steps[:, channel]) for channel in range(3))
    if turns > MAX_TURNS or np.abs(np.diff(steps, axis=0)).mean() > MAX_BEND:
        return 0
    ends = entries[MARKED] @ BRIGHTNESS, entries[-1 - MARKED] @ BRIGHTNESS
    return 1 if ends[0] <= ends[1] else -1


def _without_padding(palette: UInt8[ndarray, "n 3"]) -> UInt8[ndarray, "m 3"]:
    """Returns the entries up to the last that differs from its successors, because short palettes are filled up."""
    differ = np.flatnonzero((palette != palette[-1:]).any(axis=1))
    return palette[: differ[-1] + 2] if differ.size else palette[:1]


def _turns(steps: Shaped[ndarray, " n"]) -> int:
    """Returns how often steps change their direction; a step by 1 is rounding."""
    signs = np.sign(steps[np.abs(steps) > 1])
    return int(np.count_nonzero(np.diff(signs)))
