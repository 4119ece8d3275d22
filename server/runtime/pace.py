"""How fast a graph runs here: its row of the cost table, measured at warm-up and kept current. And what such predictions are worth."""

from collections.abc import Mapping

# How much of what is known a run replaces, and how many times slower than it a run may be and still be believed: the first
# run of a new size also prepares the next ones.
SHARE = 0.1
OUTLIER = 4.0


class Pace:
    """Seconds per pixel or voxel, by the size of what is run: small tiles pay more for starting, large ones for memory.

    Sizes of the same power of two share an entry, so there are few; what was never run is judged by the nearest.

    Args:
        measured: seconds per pixel, by pixels of a tile; those that are 0 are not known.
    """

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        self._known = {pixels.bit_length(): pace for pixels, pace in (measured or {}).items() if pace}

    def seconds(self, pixels: int) -> float:
        """Of one tile; 0 where nothing is known."""
        return pixels * self._nearest(pixels.bit_length())

    def learn(self, pixels: int, seconds: float) -> None:
        """Follows a run of so many pixels, as a machine's load changes."""
        size = pixels.bit_length()
        latest, before = seconds / pixels, self._nearest(size)
        self._known[size] = (1 - SHARE) * before + SHARE * min(latest, OUTLIER * before) if before else latest

    def _nearest(self, size: int) -> float:
        if size in self._known or not self._known:
            return self._known.get(size, 0.0)
        return self._known[min(self._known, key=lambda known: abs(known - size))]


class Margin:
    """How many times longer than predicted an answer may take: mean and mean deviation, followed as TCP's timer does (RFC 6298).

    Without it a queue that is filled up to a deadline would miss it half of the time.
    """

    MOST = 4.0
    # Of shorter ones the ratio says more about the event loop than about the line.
    LEAST_S = 0.05

    def __init__(self) -> None:
        self._mean, self._deviation = 1.0, 0.1

    @property
    def factor(self) -> float:
        """By which a prediction is multiplied that must hold."""
        return min(max(1.0, self._mean + 2 * self._deviation), self.MOST)

    def learn(self, predicted_s: float, taken_s: float) -> None:
        """Compares a prediction with what became of it."""
        if predicted_s < self.LEAST_S:
            return
        ratio = min(taken_s / predicted_s, self.MOST)
        self._deviation += (abs(ratio - self._mean) - self._deviation) / 8
        self._mean += (ratio - self._mean) / 16
