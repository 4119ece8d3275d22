"""What a request asks for becomes a graph to run. One row per mode."""

from collections.abc import Callable
from dataclasses import dataclass

from server.errors import InvalidParameter
from server.runtime.bundle import ACCURATE, Manifest


@dataclass(frozen=True)
class Route:
    """The decision.

    Attributes:
        mode: "accurate" or "fast".
        requested: the level that was asked for, or None.
        level: depth that is served.
        graph: name of the graph in the manifest.
    """

    mode: str
    requested: int | None
    level: int
    graph: str


def _accurate(manifest: Manifest, level: int | None) -> Route:
    if level is not None:
        raise InvalidParameter(
            f"level={level} does not go with mode=accurate, which averages all heads; "
            f"use mode=fast&level={level}, or leave the level out"
        )
    return Route("accurate", None, manifest.graph(ACCURATE).level, ACCURATE)


def _fast(manifest: Manifest, level: int | None) -> Route:
    served = manifest.recommended_level if level is None else level
    if served not in manifest.levels:
        raise InvalidParameter(f"level={level} does not exist in {manifest.name!r}; it has levels {_listed(manifest.levels)}")
    return Route("fast", level, served, f"L{served}")


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


MODES: dict[str, Callable[[Manifest, int | None], Route]] = {"accurate": _accurate, "fast": _fast}


def resolve(manifest: Manifest, mode: str | None, level: int | None) -> Route:
    """The graph for a mode and a level; a level without a mode means fast, neither means accurate.

    Raises:
        InvalidParameter: lists what exists.
    """
    name = mode if mode is not None else ("accurate" if level is None else "fast")
    if name not in MODES:
        raise InvalidParameter(f"mode={name!r} does not exist; there are: {', '.join(MODES)}")
    return MODES[name](manifest, level)


def routes(manifest: Manifest) -> list[Route]:
    """Every route of a bundle."""
    return [_accurate(manifest, None)] + [_fast(manifest, level) for level in manifest.levels]
