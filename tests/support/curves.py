"""Curves of `mode=auto`."""

from typing import Any


def point(
    chain: tuple[int, ...], *thresholds: float, work: float = 0.5, loss: float = 0.1, error: float = 0.0
) -> dict[str, Any]:
    """A place on a curve; half of the inputs go on at each step."""
    going_on = tuple(0.5 ** (step + 1) for step in range(len(thresholds)))
    places = {"chain": chain, "thresholds": thresholds, "going_on": going_on}
    return places | {"work": work, "loss": loss, "error": error}


def curve(*points: dict[str, Any]) -> dict[str, Any]:
    """A curve that ends in the deepest level, L4, which loses nothing."""
    return {
        "data": "d",
        "images": 1,
        "reference": "labels",
        "method": "m",
        "points": [*points, point((4,), work=1.0, loss=0.0)],
    }
