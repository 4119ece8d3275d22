from typing import Any

import pytest
from pydantic import ValidationError

from server.runtime.curve import CurvePoint, DepthCurve
from tests.support.curves import curve, point
from tests.support.service import manifest

CURVE = DepthCurve.model_validate(
    curve(
        point((1, 2), 0.3, work=0.2, loss=1.5),
        point((2, 3), 0.1, work=0.4, loss=0.2),
        point((2, 4), 0.1, work=0.6, loss=0.05),
    )
)


@pytest.mark.parametrize(
    ("max_loss", "chain"),
    [(100, (1, 2)), (1.5, (1, 2)), (1.49, (2, 3)), (0.2, (2, 3)), (0.19, (2, 4)), (0.05, (2, 4)), (0, (4,))],
)
def test_choose_takes_the_least_work_within_the_loss(max_loss: float, chain: tuple[int, ...]) -> None:
    assert CURVE.choose(max_loss).chain == chain


def test_choose_counts_a_standard_error_as_lost() -> None:
    uncertain = DepthCurve.model_validate(curve(point((2, 3), 0.1, loss=0.2, error=0.1)))
    assert (uncertain.choose(0.29).chain, uncertain.choose(0.31).chain) == ((4,), (2, 3))


def test_choose_loses_a_quarter_of_a_point_by_default() -> None:
    assert CURVE.choose() == CURVE.choose(0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        point((3, 2), 0.1),
        point((2, 2), 0.1),
        point((2, 3)),
        point((2,), 0.1),
        point((), 0.1),
        point((2, 3), 1.1),
        point((2, 3), -1.1),
        point((2, 3), 0.1) | {"going_on": ()},
        point((2, 3), 0.1) | {"unknown": 1},
    ],
)
def test_point_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CurvePoint.model_validate(wrong)


def test_curve_without_a_place_that_loses_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="lose nothing"):
        DepthCurve.model_validate(curve() | {"points": [point((2, 3), 0.1, loss=0.2)]})


def test_curve_that_is_not_sorted_by_work_is_refused() -> None:
    with pytest.raises(ValidationError, match="sorted"):
        DepthCurve.model_validate(curve(point((2, 3), 0.1, work=1.2)))


def test_manifest_has_the_levels_of_its_curve() -> None:
    with pytest.raises(ValidationError, match="level that does not exist"):
        manifest(depth_curve=curve(point((2, 5), 0.1)))


@pytest.mark.parametrize(
    ("steps", "chain", "thresholds", "going_on"),
    [
        (slice(None), (1, 2, 3), (0.1, 0.2), (0.5, 0.25)),
        (slice(2), (1, 2), (0.1,), (0.5,)),
        (slice(1), (1,), (), ()),
        (slice(1, None), (2, 3), (0.2,), (0.25,)),
        (slice(2, None), (3,), (), ()),
    ],
)
def test_limited_keeps_the_thresholds_between_the_levels_that_are_left(
    steps: slice, chain: tuple[int, ...], thresholds: tuple[float, ...], going_on: tuple[float, ...]
) -> None:
    limited = CurvePoint.model_validate(point((1, 2, 3), 0.1, 0.2)).limited(steps)
    assert (limited.chain, limited.thresholds, limited.going_on) == (chain, thresholds, going_on)
