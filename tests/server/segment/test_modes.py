import pytest

from server.errors import InvalidParameter
from server.segment.modes import MODES, Route, resolve, routes
from tests.server.conftest import calibrated, manifest

FAKE = manifest()
RECOMMENDING = manifest(calibration=calibrated([], recommended=2))


def test_accurate_is_the_default() -> None:
    assert resolve(FAKE, None, None) == resolve(FAKE, "accurate", None) == Route("accurate", None, 4, "accurate")


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", [None, "fast"])
def test_a_level_means_fast(mode: str | None, level: int) -> None:
    assert resolve(FAKE, mode, level) == Route("fast", level, level, f"L{level}")


def test_fast_alone_serves_the_recommended_level() -> None:
    assert resolve(RECOMMENDING, "fast", None) == Route("fast", None, 2, "L2")
    assert resolve(FAKE, "fast", None) == Route("fast", None, 4, "L4")


@pytest.mark.parametrize("level", [-1, 0, 5, 9, 10**30])
def test_levels_that_do_not_exist(level: int) -> None:
    with pytest.raises(InvalidParameter, match=rf"level={level} does not exist in 'fake'; it has levels 1, 2, 3, 4"):
        resolve(FAKE, "fast", level)


def test_accurate_takes_no_level() -> None:
    with pytest.raises(InvalidParameter, match="use mode=fast&level=3"):
        resolve(FAKE, "accurate", 3)


@pytest.mark.parametrize("mode", ["", "FAST", "auto", "best"])
def test_modes_that_do_not_exist(mode: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        resolve(FAKE, mode, None)
    assert all(name in str(caught.value) for name in MODES)


def test_routes_lists_everything_that_can_be_served() -> None:
    assert [(r.mode, r.level, r.graph) for r in routes(FAKE)] == [
        ("accurate", 4, "accurate"), ("fast", 1, "L1"), ("fast", 2, "L2"), ("fast", 3, "L3"), ("fast", 4, "L4"),
    ]  # fmt: skip
    assert {route.mode for route in routes(FAKE)} == set(MODES)
