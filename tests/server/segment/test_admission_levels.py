"""Which level is served: the deepest in time, where the caller consents to less."""

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import (
    DeadlineTooShort,
    Overloaded,
    TooLarge,
)
from server.segment.admission import RETURN, SAFETY
from tests.support.admission import GRAPHS, Scene
from tests.support.service import FixedLatency


class TestConsent:
    """Level 4 takes 40 s, each shallower one 10 s less, accurate 50 s, times the safety factor; 150 s are allowed."""

    @pytest.mark.parametrize(
        ("wait", "params", "served"),
        [
            (0, {}, "accurate"), (45, {}, "accurate"), (55, {}, "L3"), (65, {}, "L3"), (75, {}, "L2"), (85, {}, "L1"), (95, {}, None),
            (55, {"level": 4}, "L4"), (65, {"level": 4}, "L3"), (85, {"level": 3}, "L1"), (85, {"level": 1}, "L1"),
            (75, {"min_level": 2}, "L2"), (85, {"min_level": 2}, None), (55, {"min_level": 3}, "L3"), (75, {"min_level": 3}, None),
            (55, {"min_level": 4}, None), (45, {"min_level": 4}, "accurate"), (65, {"level": 4, "min_level": 4}, None),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("limit", ["within_s", "timeout_s"])
    async def test_the_deepest_level_in_time_is_served(
        self, wait: int, params: dict[str, Any], served: str | None, limit: str
    ) -> None:
        scene, allowed = Scene(), {"timeout_s": 1e6, limit: 150.5}
        with scene.crowd(wait):
            if served is None:
                with pytest.raises(Overloaded):
                    await scene.admit(**allowed, **{"min_level": 1} | params)
                return
            ticket = await scene.admit(**allowed, **{"min_level": 1} | params)
        requested = f"L{params['level']}" if "level" in params else "accurate"
        assert (ticket.target.graph, ticket.requested.graph, ticket.flow.instance) == (
            served,
            requested,
            ticket.target.instance,
        )
        assert ticket.degraded == (
            "" if served == requested else "deadline" if limit == "within_s" else "load"
        )

    @settings(max_examples=60)
    @given(st.integers(0, 150), st.sampled_from([None, 1, 2, 3, 4]), st.floats(1, 300), st.booleans())
    async def test_nothing_is_degraded_without_consent(
        self, wait: int, level: int | None, allowed: float, dated: bool
    ) -> None:
        scene = Scene()
        with scene.crowd(wait), contextlib.suppress(Overloaded, DeadlineTooShort, TooLarge):
            ticket = await scene.admit(**{"within_s" if dated else "timeout_s": allowed}, level=level)  # type: ignore[arg-type]
            assert ticket.target is ticket.requested
            assert ticket.degraded == ""

    @settings(max_examples=40)
    @given(st.sampled_from([None, 2, 3, 4]), st.integers(1, 2), st.floats(1.02, 100))
    async def test_an_idle_server_degrades_nothing_that_it_can_do_in_time(
        self, level: int | None, least: int, spare: float
    ) -> None:
        seconds = SAFETY * GRAPHS[f"L{level}" if level else "accurate"]
        assert (await Scene().admit(within_s=seconds * spare, level=level, min_level=least)).degraded == ""

    async def test_where_not_even_the_shallowest_is_in_time_the_error_is_about_that_one(self) -> None:
        for least, seconds in ((1, 10.0), (2, 20.0)):
            with pytest.raises(DeadlineTooShort) as caught:
                await Scene().admit(within_s=seconds - 1, min_level=least)
            assert caught.value.fields["actual"] == seconds

    async def test_a_precision_that_is_named_is_kept(self) -> None:
        scene = Scene()
        with scene.crowd(65):
            ticket = await scene.admit(timeout_s=150.5, min_level=1, precision="fp32")
        assert (ticket.target.precision, ticket.target.graph) == ("fp32", "L3")


class TestHysteresis:
    """After a degraded answer a deeper level must fit with time to spare, so that answers do not flicker."""

    @staticmethod
    async def level(scene: Scene, wait: int, allowed_s: float = 150.5, **params: Any) -> int:
        with scene.crowd(wait):
            return (
                await scene.admit(timeout_s=allowed_s, **{"min_level": 1, "level": 4} | params)
            ).target.level

    async def test_down_at_once_and_up_with_time_to_spare(self) -> None:
        scene = Scene()
        assert await self.level(scene, 55) == 4
        assert await self.level(scene, 75) == 2
        # L4 and L3 would fit, but hardly.
        assert await self.level(scene, 55) == 2
        spare = int(RETURN * 150 / SAFETY)
        assert await self.level(scene, spare - 29) == 2
        assert await self.level(scene, spare - 31) == 3
        assert await self.level(scene, spare - 41) == 4
        assert await self.level(scene, 55) == 4

    async def test_an_idle_server_forgets(self) -> None:
        scene = Scene(FixedLatency({"L1": 1.0, "L2": 2.0, "L3": 3.0, "L4": 90.0}))
        assert [await self.level(scene, wait) for wait in (20, 5, 0, 5)] == [3, 3, 4, 4]

    async def test_never_a_reason_to_refuse(self) -> None:
        scene = Scene()
        assert await self.level(scene, 85) == 1
        assert await self.level(scene, 65, min_level=3) == 3

    @pytest.mark.parametrize(
        ("changes", "shared"),
        [({}, True), ({"allowed_s": 160.0}, True), ({"allowed_s": 300.0}, False), ({"level": None}, False)],
    )
    async def test_requests_that_are_alike_share_it(self, changes: dict[str, Any], shared: bool) -> None:
        scene = Scene()
        assert await self.level(scene, 75) == 2
        allowed_s = changes.get("allowed_s", 150.5)
        wait = int(allowed_s / SAFETY) - (45 if "level" not in changes else 55)
        assert (await self.level(scene, wait, **changes) == 2) is shared

    @settings(max_examples=30)
    @given(st.lists(st.integers(0, 95), max_size=5), st.integers(1, 89))
    async def test_under_a_steady_load_the_level_is_steady(self, before: list[int], steady: int) -> None:
        scene = Scene()
        for wait in before:
            with contextlib.suppress(Overloaded):
                await self.level(scene, wait)
        assert len({await self.level(scene, steady) for _ in range(4)}) == 1
