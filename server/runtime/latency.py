"""Predicts how long work takes, from what has been observed of it and of its neighbours."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

# How much of what is known one observation replaces, and how many times slower than it an observation may be and still be
# believed in full, because the first run of a new size also prepares the next ones.
SHARE = 0.1
OUTLIER = 4.0

# Observations of a key and size after which its predictions may refuse a request.
CONFIDENT_AFTER = 3


class Prediction(NamedTuple):
    """Seconds of a piece of work.

    Attributes:
        seconds: expected; 0 where nothing at all is known.
        fastest_s: at the best rate ever observed, which a machine that is no longer busy may reach again.
        confident: whether enough has been observed to refuse a request because of it.
    """

    seconds: float
    fastest_s: float
    confident: bool


UNKNOWN = Prediction(0.0, 0.0, confident=False)


@dataclass
class _Rates:
    """Seconds per pixel of one key, by size; sizes of the same power of two share an entry."""

    expected: dict[int, float] = field(default_factory=dict)
    fastest: dict[int, float] = field(default_factory=dict)
    observations: Counter[int] = field(default_factory=Counter)


class LatencyModel:
    """Seconds per pixel by key and size: small tiles pay more for starting, large ones for memory.

    A key is a model instance, or a kind of work on the processor. What was never observed is judged by the nearest size of
    its key, then by the multiply-accumulates of the graph at the rate of the other keys, and is then not confident.
    """

    def __init__(self) -> None:
        self._rates: dict[Hashable, _Rates] = {}
        self._seconds_per_mac = 0.0

    def predict(self, key: Hashable, pixels: int, macs_per_pixel: float = 0.0) -> Prediction:
        """Predicts a piece of work of `pixels` pixels.

        Args:
            key: the kind of work.
            pixels: size of the piece.
            macs_per_pixel: multiply-accumulates per pixel of a graph; 0 for work that is no graph.
        """
        rates = self._rates.get(key)
        if rates is None:
            seconds = pixels * macs_per_pixel * self._seconds_per_mac
            return Prediction(seconds, seconds, confident=False)
        size = min(rates.expected, key=lambda known: abs(known - pixels.bit_length()))
        # What a small piece pays for starting makes a much larger one look slow, which would be refused and never observed.
        confident = size >= pixels.bit_length() and rates.observations[size] >= CONFIDENT_AFTER
        return Prediction(pixels * rates.expected[size], pixels * rates.fastest[size], confident)

    def observe(self, key: Hashable, pixels: int, seconds: float, macs_per_pixel: float = 0.0) -> None:
        """Learns from a piece of work of `pixels` pixels that took `seconds`."""
        rates, size, rate = self._rates.setdefault(key, _Rates()), pixels.bit_length(), seconds / pixels
        # A run below the resolution of the clock, which seems to take no time at all, is no scale for the next one.
        before = rates.expected.get(size, 0.0)
        rates.expected[size] = (1 - SHARE) * before + SHARE * min(rate, OUTLIER * before) if before else rate
        rates.fastest[size] = min(rate, rates.fastest.get(size, rate))
        rates.observations[size] += 1
        if macs_per_pixel:
            per_mac = rate / macs_per_pixel
            known = self._seconds_per_mac
            self._seconds_per_mac = per_mac if not known else (1 - SHARE) * known + SHARE * min(per_mac, OUTLIER * known)

    def forget(self, key: Hashable) -> None:
        """Drops what is known of a key."""
        self._rates.pop(key, None)
