import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.segment.degradation import RETURN, Degradation

LEVELS = [4, 3, 2, 1]
IDLE = [0.4, 0.3, 0.2, 0.1]


def served(
    degradation: Degradation,
    predicted: list[float],
    allowed_s: float = 1.0,
    levels: list[int] | None = None,
    model: str = "m",
    *,
    idle: bool = False,
) -> int | None:
    """The level picked."""
    levels = levels or LEVELS
    index = degradation.pick(model, allowed_s, levels, predicted[-len(levels) :], idle=idle)
    return None if index is None else levels[index]


@pytest.mark.parametrize(
    ("predicted", "level"),
    [(IDLE, 4), ([1.0, 0.9, 0.8, 0.7], 4), ([1.01, 1.0, 0.1, 0.1], 3), ([9.0, 9.0, 9.0, 1.0], 1), ([9.0, 9.0, 9.0, 1.01], None),
     ([0.0, 0.0, 0.0, 0.0], 4)],
)  # fmt: skip
def test_the_deepest_that_fits(predicted: list[float], level: int | None) -> None:
    assert served(Degradation(), predicted) == level


def test_down_at_once_and_up_with_time_to_spare() -> None:
    degradation, close = Degradation(), [0.99, 0.95, 0.9, 0.8]
    assert served(degradation, close) == 4
    assert served(degradation, [1.2, 1.1, 0.9, 0.8]) == 2
    # What fits, but hardly, is not returned to.
    assert served(degradation, close) == 2
    assert served(degradation, [RETURN + 0.01, RETURN + 0.01, 0.5, 0.4]) == 2
    assert served(degradation, [RETURN + 0.01, RETURN - 0.01, 0.5, 0.4]) == 3
    assert served(degradation, [RETURN - 0.01, 0.5, 0.4, 0.3]) == 4
    assert served(degradation, close) == 4


def test_where_nobody_waits_whatever_fits_is_served() -> None:
    degradation, close = Degradation(), [0.99, 0.95, 0.9, 0.8]
    assert served(degradation, [9.0, 9.0, 0.9, 0.8]) == 2
    assert served(degradation, close) == 2
    assert served(degradation, close, idle=True) == 4
    # And from there on.
    assert served(degradation, close) == 4
    assert served(degradation, [9.0, 9.0, 9.0, 0.8], idle=True) == 1
    assert served(degradation, [9.0, 9.0, 9.0, 9.0], idle=True) is None


def test_where_nothing_fits_nothing_changes() -> None:
    degradation = Degradation()
    assert served(degradation, [9.0, 9.0, 0.9, 0.8]) == 2
    assert served(degradation, [9.0, 9.0, 9.0, 9.0]) is None
    assert served(degradation, [0.99, 0.95, 0.9, 0.8]) == 2


def test_who_allows_no_less_than_the_ceiling_is_served_all_the_same() -> None:
    """The ceiling is for choosing, never a reason to refuse: at the least level that is allowed, all of the time counts."""
    degradation = Degradation()
    assert served(degradation, [9.0, 9.0, 9.0, 0.9]) == 1
    assert served(degradation, [9.0, 0.95], levels=[4, 3]) == 3


@pytest.mark.parametrize(
    ("first_s", "second_s", "shared"),
    [(1.0, 1.9, True), (0.6, 0.9, True), (1.0, 2.1, False), (1.0, 0.4, False), (1.0, 30.0, False)],
)
def test_like_allowances_share_a_ceiling(first_s: float, second_s: float, shared: bool) -> None:
    degradation = Degradation()
    assert served(degradation, [9.0, 9.0, first_s, first_s], first_s) == 2
    assert served(degradation, [0.9 * second_s] * 4, second_s) == (2 if shared else 4)


def test_models_do_not() -> None:
    degradation = Degradation()
    assert served(degradation, [9.0, 9.0, 0.9, 0.9], model="a") == 2
    assert served(degradation, [0.9] * 4, model="b") == 4


def test_a_caller_who_asks_for_less_takes_nothing_from_the_others() -> None:
    degradation, load = Degradation(), [0.8, 0.6, 0.4, 0.2]
    assert served(degradation, load) == 4
    # Served as it asks.
    assert served(degradation, load, levels=[2, 1]) == 2
    assert served(degradation, load) == 4


PREDICTED = st.lists(st.floats(0, 3), min_size=4, max_size=4).map(lambda times: sorted(times, reverse=True))


@given(st.lists(PREDICTED, max_size=5), PREDICTED, st.floats(0.01, 100))
def test_under_a_steady_load_the_level_is_steady(before: list[list[float]], steady: list[float], allowed_s: float) -> None:
    degradation = Degradation()
    for load in [*before, steady]:
        served(degradation, [seconds * allowed_s for seconds in load], allowed_s)
    seen = {served(degradation, [seconds * allowed_s for seconds in steady], allowed_s) for _ in range(5)}
    assert len(seen) == 1


@given(st.lists(st.tuples(PREDICTED, st.integers(1, 4), st.floats(0.5, 1)), max_size=20))
def test_what_is_served_is_allowed_and_in_time(requests: list[tuple[list[float], int, float]]) -> None:
    degradation = Degradation()
    for predicted, least, allowed_s in requests:
        levels = [level for level in LEVELS if level >= least]
        level = served(degradation, predicted[: len(levels)], allowed_s, levels)
        fits = [known for known, seconds in zip(levels, predicted, strict=False) if seconds <= allowed_s]
        # Nobody is refused because of how others were served.
        assert (level is None) == (not fits)
        assert level is None or level in fits


@given(st.floats(0.5, 1), st.floats(-0.14, 0.14))
def test_a_load_that_wavers_around_a_border_does_not_flicker(border: float, swing: float) -> None:
    """Where L4 fits one time and not the next, by up to 14 % each way, it is left once and not returned to."""
    degradation, seen = Degradation(), []
    for turn in range(20):
        factor = 1 + swing * (-1) ** turn
        seen.append(served(degradation, [border * factor, 0.3 * border, 0.1, 0.1], border))
    assert sum(now != after for now, after in itertools.pairwise(seen)) <= 1
