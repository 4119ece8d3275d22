"""What a request asks for becomes a graph to run. One row per mode."""

from collections.abc import Callable
from dataclasses import dataclass

from server.errors import InvalidParameter
from server.runtime.bundle import ACCURATE, HEAD_STD, Manifest


@dataclass(frozen=True)
class Route:
    """The decision.

    Attributes:
        mode: "accurate" or "fast".
        level: depth of the graph.
        graph: name of the graph in the manifest.
    """

    mode: str
    level: int
    graph: str


def _accurate(manifest: Manifest, level: int | None) -> Route:
    if level is not None:
        raise InvalidParameter(
            f"level={level} does not go with mode=accurate, which averages all heads; "
            f"use mode=fast&level={level}, or leave the level out"
        )
    return Route("accurate", manifest.graph(ACCURATE).level, ACCURATE)


def _fast(manifest: Manifest, level: int | None) -> Route:
    served = manifest.recommended_level if level is None else level
    if served not in manifest.levels:
        raise InvalidParameter(f"level={level} does not exist in {manifest.name!r}; it has levels {_listed(manifest.levels)}")
    return Route("fast", served, f"L{served}")


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


def shallower(manifest: Manifest, route: Route, least: int | None) -> list[Route]:
    """What may be served instead of a route, deepest first, down to the level that the caller accepts.

    Raises:
        InvalidParameter: `least` is not a level at or above which there is something to choose.
    """
    if least is None:
        return []
    if least not in manifest.levels or least > route.level:
        raise InvalidParameter(
            f"min_level={least} must be one of {_listed(manifest.levels)} and no deeper than the level asked for, which is {route.level}"
        )
    return [_fast(manifest, level) for level in sorted(manifest.levels, reverse=True) if least <= level < route.level]


def with_head_std(manifest: Manifest, route: Route, precision: str, least: int | None) -> Route:
    """The same route, by the graph that gives the spread of the heads too.

    Args:
        manifest: of the network.
        route: as asked for.
        precision: as asked for.
        least: the level down to which the caller lets the server go.

    Raises:
        InvalidParameter: says what does not go with it, or that the bundle has no such graph.
    """
    if route.graph != ACCURATE:
        raise InvalidParameter(
            "formats uncertainty_* show how far the heads of all levels differ, which mode=fast does not run; use mode=accurate and "
            "leave the level out"
        )
    if least is not None:
        raise InvalidParameter(f"min_level={least} does not go with formats uncertainty_*, which need all levels; leave it out")
    if precision not in ("auto", "fp32"):
        raise InvalidParameter(
            f"precision={precision!r} does not go with formats uncertainty_*, which are computed at fp32; leave it out"
        )
    if manifest.head_std is None:
        raise InvalidParameter(
            f"model={manifest.name!r} has no graph for formats uncertainty_*: its network has one head, or its bundle is of an earlier "
            "version; then whoever runs the server can export it again, or add the graph with: unetpp add-uncertainty"
        )
    return Route(route.mode, route.level, HEAD_STD)


def routes(manifest: Manifest) -> list[Route]:
    """Every route of a bundle."""
    return [_accurate(manifest, None)] + [_fast(manifest, level) for level in manifest.levels]
