"""An engine made of a function, for tests."""

from collections.abc import Callable

from server.arrays import Scores, Tiles


class FakeEngine:
    """Runs `function` on the tiles; remembers the size of every batch."""

    name = "fake"
    provider = "cpu"

    def __init__(self, function: Callable[[Tiles], Scores]) -> None:
        self._function = function
        self.batches: list[int] = []

    def run(self, tiles: Tiles) -> Scores:
        """See `Engine.run`."""
        self.batches.append(len(tiles))
        return self._function(tiles)

    def release(self) -> None:
        """See `Engine.release`."""
