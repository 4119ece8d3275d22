"""At which level a request is served that allows a shallower one than it asks for, so that answers do not flicker between levels."""

import math
from collections.abc import Hashable, Sequence

# Once requests are served at a shallower level, a deeper one must leave so much of the time allowed before it is used again.
RETURN = 0.7


class Degradation:
    """Down at once, up only with time to spare.

    Requests of one kind that allow a like time (within a factor of two) share a ceiling: the level served last.
    """

    def __init__(self) -> None:
        self._ceilings: dict[tuple[Hashable, int], int] = {}

    def pick(
        self, kind: Hashable, allowed_s: float, levels: Sequence[int], predicted_s: Sequence[float], *, idle: bool
    ) -> int | None:
        """Index of the deepest level that fits; None if none does.

        Args:
            kind: of requests that are alike, e.g. in model and size.
            allowed_s: until the answer must be there, positive.
            levels: that may be served, deepest first.
            predicted_s: until the answer would be there, per level.
            idle: nobody else waits, so whatever fits is served.
        """
        key = kind, math.frexp(allowed_s)[1]
        # Those before may have allowed less than this one does.
        ceiling = levels[0] if idle else max(self._ceilings.get(key, levels[0]), levels[-1])
        for index, (level, seconds) in enumerate(zip(levels, predicted_s, strict=True)):
            if seconds <= allowed_s * (1 if level <= ceiling else RETURN):
                # Who is served as it asks takes nothing from those who ask for more.
                self._ceilings[key] = max(level, ceiling) if index == 0 else level
                return index
        return None
