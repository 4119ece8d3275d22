import pytest
from server.segment.modes import MODES, Route, resolve, routes, shallower, with_head_std

from server.errors import InvalidParameter
from tests.support.service import calibrated, manifest

FAKE = manifest()
RECOMMENDING = manifest(calibration=calibrated([], recommended=2))


def test_accurate_is_the_default() -> None:
    assert resolve(FAKE, None, None) == resolve(FAKE, "accurate", None) == Route("accurate", 4, "accurate")


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", [None, "fast"])
def test_a_level_means_fast(mode: str | None, level: int) -> None:
    assert resolve(FAKE, mode, level) == Route("fast", level, f"L{level}")


def test_fast_alone_serves_the_recommended_level() -> None:
    assert resolve(RECOMMENDING, "fast", None) == Route("fast", 2, "L2")
    assert resolve(FAKE, "fast", None) == Route("fast", 4, "L4")


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


class TestShallower:
    """What may be served instead."""

    def test_without_consent_nothing_is(self) -> None:
        assert all(shallower(FAKE, route, None) == [] for route in routes(FAKE))

    @pytest.mark.parametrize("least", [1, 2, 3, 4])
    @pytest.mark.parametrize("level", [1, 2, 3, 4])
    def test_is_fast_and_goes_from_deep_to_shallow(self, level: int, least: int) -> None:
        if least > level:
            with pytest.raises(
                InvalidParameter, match=f"min_level={least} must be .* no deeper than the level asked for, which is {level}"
            ):
                shallower(FAKE, resolve(FAKE, "fast", level), least)
            return
        found = shallower(FAKE, resolve(FAKE, "fast", level), least)
        assert found == [Route("fast", k, f"L{k}") for k in range(level - 1, least - 1, -1)]

    def test_accurate_is_followed_by_the_next_level(self) -> None:
        """Its deepest head alone is no cheaper than all of them."""
        assert [route.graph for route in shallower(FAKE, resolve(FAKE, "accurate", None), 1)] == ["L3", "L2", "L1"]
        assert shallower(FAKE, resolve(FAKE, "accurate", None), 4) == []

    def test_the_recommended_level_is_what_was_asked_for(self) -> None:
        assert [route.level for route in shallower(RECOMMENDING, resolve(RECOMMENDING, "fast", None), 1)] == [1]
        with pytest.raises(InvalidParameter, match="which is 2"):
            shallower(RECOMMENDING, resolve(RECOMMENDING, "fast", None), 3)

    @pytest.mark.parametrize("least", [-1, 0, 5, 10**30])
    def test_levels_that_do_not_exist(self, least: int) -> None:
        with pytest.raises(InvalidParameter, match=rf"min_level={least} must be one of 1, 2, 3, 4 and"):
            shallower(FAKE, resolve(FAKE, None, None), least)


class TestWithSpread:
    WITH = manifest(head_std={
        "name": "head_std", "level": 4, "divisor": 16, "parameters": 1, "macs_per_pixel": 4, "files": {"fp32": "head_std.onnx"},
    })  # fmt: skip

    @pytest.mark.parametrize("precision", ["auto", "fp32"])
    def test_is_accurate(self, precision: str) -> None:
        assert with_head_std(self.WITH, resolve(self.WITH, None, None), precision, None) == Route("accurate", 4, "head_std")

    @pytest.mark.parametrize(
        ("level", "precision", "least", "mentioned"),
        [(4, "auto", None, "mode=accurate"), (None, "bf16", None, "fp32"), (None, "auto", 2, "min_level=2")],
    )
    def test_what_does_not_go_with_it(self, level: int | None, precision: str, least: int | None, mentioned: str) -> None:
        with pytest.raises(InvalidParameter, match=mentioned):
            with_head_std(self.WITH, resolve(self.WITH, None, level), precision, least)

    def test_a_bundle_without(self) -> None:
        with pytest.raises(InvalidParameter, match="export it again"):
            with_head_std(FAKE, resolve(FAKE, None, None), "auto", None)

    def test_is_no_route_by_itself(self) -> None:
        assert routes(self.WITH) == routes(FAKE)
