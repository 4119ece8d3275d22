"""Predicts how long work takes, from what has been observed of it and of its neighbours."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import NamedTuple

# How much of what is known one observation replaces, and how many times slower than it an observation may be
# and still be believed in full.
SHARE = 0.1
OUTLIER = 4.0

# Observations of a size after which its predictions may refuse a request. Until then the fastest counts,
# because the first run of a new size also prepares the next ones.
CONFIDENT_AFTER = 3

# Factor by which each refusal shrinks the rate that it rests on. Rates that were learned while the machine
# was ten times slower refuse 22 requests, of which each is answered within milliseconds.
DOUBT = 0.9

# Seconds after which an observation no longer refuses or degrades requests, because a level that is degraded
# for its rate is not run, so that a rate from a busy phase would never be replaced.
STALE_S = 600.0

# Powers of two by which an observed size may be larger than a piece of work and still say enough of it.
NEAR = 2

# Pixels of the smallest run that tells seconds per multiply-accumulate: smaller ones mostly pay for starting.
MIN_MAC_PIXELS = 4096


class Prediction(NamedTuple):
    """Seconds of a piece of work.

    Attributes:
        seconds: expected time; 0 where nothing at all is known.
        fastest_s: time in seconds at the best rate ever observed, which a machine that is no longer busy may
            reach again.
        confident: whether enough has been observed to refuse a request because of it.
    """

    seconds: float
    fastest_s: float
    confident: bool


UNKNOWN = Prediction(0.0, 0.0, confident=False)


@dataclass
class _Rate:
    """Seconds per pixel of one key at one size; `doubt` shrinks the fastest one until the next observation."""

    expected: float
    fastest: float
    observed_at: float
    observations: int = 1
    doubt: float = 1.0


class LatencyModel:
    """Seconds per pixel by key and size; sizes of the same power of two share an entry.

    A key is a model instance, or a kind of work on the processor. What was never observed is judged by the
    nearest size of its key, then by the multiply-accumulates of the graph at the rate of the other keys, and
    is then not confident.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rates: dict[Hashable, dict[int, _Rate]] = {}
        self._seconds_per_mac = 0.0

    def predict(self, key: Hashable, pixels: int, macs_per_pixel: float = 0.0) -> Prediction:
        """Predicts a piece of work of `pixels` pixels.

        Args:
            key: kind of work.
            pixels: size of the piece, in pixels or voxels.
            macs_per_pixel: multiply-accumulates per pixel of a graph; 0 for work other than graphs.
        """
        rates = self._rates.get(key)
        if not rates:
            seconds = pixels * macs_per_pixel * self._seconds_per_mac
            return Prediction(seconds, seconds, confident=False)
        size = _nearest(rates, pixels)
        rate = rates[size]
        # Because the start of a run weighs more in a small piece, its rate makes a larger one look slow; that
        # would be refused and never observed.
        near = 0 <= size - pixels.bit_length() <= NEAR
        fresh = self._clock() - rate.observed_at < STALE_S
        confident = near and fresh and rate.observations >= CONFIDENT_AFTER
        return Prediction(pixels * rate.expected, pixels * rate.fastest * rate.doubt, confident)

    def observe(self, key: Hashable, pixels: int, seconds: float, macs_per_pixel: float = 0.0) -> None:
        """Learns from a piece of work of `pixels` pixels that took `seconds`."""
        rates, size, seen = self._rates.setdefault(key, {}), pixels.bit_length(), seconds / pixels
        rate = rates.get(size)
        # A run below the resolution of the clock, which seems to take no time at all, gives no scale for the
        # next one.
        if rate is None or not rate.expected:
            rates[size] = _Rate(seen, seen, self._clock())
        else:
            rate.observations += 1
            rate.observed_at = self._clock()
            # What was doubted is replaced by the next observation.
            rate.fastest = min(rate.fastest, seen) if rate.doubt == 1 else seen
            rate.doubt = 1.0
            rate.expected = (
                rate.fastest if rate.observations <= CONFIDENT_AFTER else _follow(rate.expected, seen)
            )
        if macs_per_pixel and pixels >= MIN_MAC_PIXELS:
            known, per_mac = self._seconds_per_mac, seen / macs_per_pixel
            self._seconds_per_mac = _follow(known, per_mac) if known else per_mac

    def doubt(self, key: Hashable, pixels: int) -> None:
        """Trusts the fastest rate a little less, because work was refused that would have shown whether it still holds."""
        rates = self._rates.get(key)
        if rates:
            rates[_nearest(rates, pixels)].doubt *= DOUBT


def _nearest(rates: dict[int, _Rate], pixels: int) -> int:
    """The observed size that is nearest to a piece of work."""
    return min(rates, key=lambda size: abs(size - pixels.bit_length()))


def _follow(known: float, seen: float) -> float:
    """Moves what is known a little towards what was seen."""
    return (1 - SHARE) * known + SHARE * min(seen, OUTLIER * known)
