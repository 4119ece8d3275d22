import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.runtime.engines.fake import FakeEngine
from server.runtime.line import Caller, Lane, Line
from server.runtime.pace import Pace


def lane_of(tile_s: float, max_batch: int = 4, max_batch_pixels: int = 1000) -> Lane:
    """A lane whose tiles of 4 pixels take so many seconds."""
    return Lane("fake", "L1", "fp32", FakeEngine(lambda tiles: tiles.pixels), Pace({4: tile_s / 4}), max_batch, max_batch_pixels)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Of the line; it stands still."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("server.runtime.line.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("tile", "most"), [((2, 2), 4), ((10, 10), 4), ((15, 15), 4), ((20, 20), 2), ((40, 40), 1), ((10, 10, 4), 2), ((1000, 1000), 1)]
)
def test_tiles_in_one_run(tile: tuple[int, ...], most: int) -> None:
    assert lane_of(1.0).most(tile) == most


def test_an_empty_line() -> None:
    line = Line()
    assert line.idle()
    assert line.wait_s() == line.wait_s(1e9) == line.backlog_s() == 0
    assert not line.coming(lane_of(1.0))


@pytest.mark.parametrize(
    ("cost_s", "wait_s"),
    [
        (0.0, 2 + 3),  # a tile of each
        (1.0, 2 + 3),
        (2.5, 2.5 + 3),  # as much as the newcomer, or the tile that it waits for
        (9.0, 9 + 9),
        (15.0, 15 + 12),  # of one nothing is left
        (100.0, 20 + 12),
        (math.inf, 20 + 12),
    ],
)
def test_a_wait_is_a_fair_share_of_what_the_others_have(cost_s: float, wait_s: float) -> None:
    line = Line()
    with line.join(Caller(), lane_of(2.0), 4, 10), line.join(Caller(), lane_of(3.0), 4, 4):
        assert line.wait_s(cost_s) == pytest.approx(wait_s)
        assert line.backlog_s() == pytest.approx(32)
    assert line.backlog_s() == 0


def test_what_has_run_is_waited_for_no_more() -> None:
    line, caller = Line(), Caller()
    with line.join(caller, lane_of(2.0), 4, 10):
        waits = []
        for caller.ran in range(11):
            waits.append(line.wait_s(math.inf))
    assert waits == [pytest.approx(2.0 * left) for left in range(10, -1, -1)]


def test_jobs_delay_nobody() -> None:
    line = Line()
    with line.join(Caller(urgent=False), lane_of(2.0), 4, 10**6):
        assert line.idle()
        assert line.wait_s(math.inf) == line.backlog_s() == 0
        with line.join(Caller(), lane_of(2.0), 4, 1):
            assert not line.idle()
            assert line.backlog_s() == pytest.approx(2)


def test_the_batch_that_runs_is_waited_for(clock: SimpleNamespace) -> None:
    line = Line()
    line.busy_until = 103.0
    assert line.wait_s() == pytest.approx(3)
    with line.join(Caller(), lane_of(2.0), 4, 2):
        assert line.wait_s(100.0) == pytest.approx(7)
    clock.now = 102.5
    assert line.wait_s() == pytest.approx(0.5)
    # It takes longer than thought.
    clock.now = 200.0
    assert line.wait_s() == 0


def test_who_leaves_in_whatever_way_is_gone() -> None:
    line = Line()
    for error in (KeyError, KeyboardInterrupt, GeneratorExit):
        with contextlib.suppress(error), line.join(Caller(), lane_of(2.0), 4, 10):
            assert line.backlog_s() == pytest.approx(20)
            raise error
        assert line.idle()
        assert line.backlog_s() == 0


@pytest.mark.parametrize("urgent", [True, False])
def test_who_is_on_the_way(urgent: bool) -> None:
    line, lane, other, caller = Line(), lane_of(2.0), lane_of(2.0), Caller(urgent)
    with line.join(caller, lane, 4, 3):
        assert line.coming(lane)
        assert not line.coming(other)
        caller.handed = 1
        assert not line.coming(lane)
        with line.join(Caller(), lane, 4, 3):
            assert line.coming(lane)
    assert not line.coming(lane)


callers = st.fixed_dictionaries(
    {"urgent": st.booleans(), "tile_s": st.floats(0, 100), "promised": st.integers(1, 1000), "ran": st.integers(0, 1000)}
)


@given(st.lists(callers, max_size=10), st.floats(0, 1e6) | st.just(math.inf), st.floats(-10, 10) | st.just(-math.inf))
def test_a_wait_is_never_negative_nor_more_than_all_there_is(specs: list[dict[str, Any]], cost_s: float, busy_s: float) -> None:
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as joined:
        patch.setattr("server.runtime.line.time", SimpleNamespace(monotonic=lambda: 100.0))
        line = Line()
        line.busy_until = 100.0 + busy_s
        running_s = max(0.0, busy_s)
        left_s, tiles_s = 0.0, 0.0
        for spec in specs:
            caller = Caller(spec["urgent"])
            joined.enter_context(line.join(caller, lane_of(spec["tile_s"]), 4, spec["promised"]))
            caller.ran = min(spec["ran"], spec["promised"])
            if caller.urgent:
                left_s += (spec["promised"] - caller.ran) * spec["tile_s"]
                tiles_s += spec["tile_s"]
        wait_s, slack = line.wait_s(cost_s), 1e-6 * (1 + left_s + running_s)
        assert 0 <= wait_s <= left_s + running_s + slack
        # Nobody who shares fairly can take more than the newcomer does, but for a tile.
        assert wait_s <= (len(specs) * cost_s if specs else 0.0) + tiles_s + running_s + slack
        assert line.wait_s(cost_s / 2) <= wait_s + slack
        assert line.backlog_s() == pytest.approx(left_s + running_s)
    assert line.idle()
