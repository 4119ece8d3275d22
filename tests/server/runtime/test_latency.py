import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.runtime.latency import CONFIDENT_AFTER, DOUBT, OUTLIER, STALE_S, UNKNOWN, LatencyModel
from tests.support.service import ManualClock


def observed(*runs: tuple[int, float], key: str = "L1", macs: float = 0.0) -> LatencyModel:
    """A model that has seen runs of (pixels, seconds)."""
    model = LatencyModel()
    for pixels, seconds in runs:
        model.observe(key, pixels, seconds, macs)
    return model


def test_predict_nothing_observed_is_unknown() -> None:
    assert LatencyModel().predict("L1", 4096, 100.0) == UNKNOWN


def test_predict_after_one_run_is_that_run_without_confidence() -> None:
    assert observed((4096, 0.5)).predict("L1", 4096) == (0.5, 0.5, False)


def test_predict_is_confident_after_enough_runs() -> None:
    assert not observed(*[(4096, 0.5)] * (CONFIDENT_AFTER - 1)).predict("L1", 4096).confident
    assert observed(*[(4096, 0.5)] * CONFIDENT_AFTER).predict("L1", 4096).confident


@pytest.mark.parametrize(("pixels", "confident"), [(256, True), (100, True), (600, False), (10**6, False)])
def test_predict_small_pieces_say_nothing_of_larger_ones_with_confidence(
    pixels: int, confident: bool
) -> None:
    assert observed(*[(300, 0.02)] * 9).predict("L1", pixels).confident is confident


def test_predict_each_size_has_its_own_rate() -> None:
    model = observed((256, 1.0), (65536, 2.0))
    assert (model.predict("L1", 256).seconds, model.predict("L1", 65536).seconds) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("pixels", "rate"), [(1, 1 / 256), (300, 1 / 256), (30_000, 2 / 65536), (10**6, 2 / 65536)]
)
def test_predict_unseen_size_uses_the_rate_of_the_nearest(pixels: int, rate: float) -> None:
    assert observed((256, 1.0), (65536, 2.0)).predict("L1", pixels).seconds == pytest.approx(pixels * rate)


def test_predict_unseen_graph_uses_the_macs_of_its_neighbours_without_confidence() -> None:
    model = observed(*[(10_000, 2.0)] * 5, macs=10.0)
    assert model.predict("L4", 5000, 40.0) == (pytest.approx(4.0), pytest.approx(4.0), False)


def test_predict_work_beside_the_device_says_nothing_of_a_graph() -> None:
    model = observed((1000, 2.0), key="decode")
    assert model.predict("L4", 500, 40.0) == UNKNOWN


def test_observe_follows_a_change_and_settles() -> None:
    model = observed(*[(100, 1.0)] * 5)
    for _ in range(60):
        model.observe("L1", 100, 2.0)
    assert model.predict("L1", 100).seconds == pytest.approx(2.0, rel=0.01)
    assert model.predict("L1", 100).fastest_s == 1.0


def test_observe_one_run_of_an_hour_is_not_believed() -> None:
    assert observed((100, 1.0), (100, 3600.0)).predict("L1", 100).seconds <= 1 + 0.1 * OUTLIER


def test_observe_run_below_the_resolution_of_the_clock_is_replaced_by_the_next() -> None:
    model = observed((10_000, 0.0), (10_000, 1.0), macs=10.0)
    assert model.predict("L1", 10_000).seconds > 0
    assert model.predict("L2", 10_000, 10.0).seconds > 0


def test_predict_what_was_observed_long_ago_is_not_confident_until_it_is_observed_again() -> None:
    clock = ManualClock()
    model = LatencyModel(clock)
    for _ in range(CONFIDENT_AFTER):
        model.observe("L1", 100, 1.0)
    clock.advance(STALE_S - 1)
    assert model.predict("L1", 100) == (1.0, 1.0, True)
    clock.advance(1)
    assert model.predict("L1", 100) == (1.0, 1.0, False)
    model.observe("L1", 100, 0.5)
    assert model.predict("L1", 100).confident
    assert model.predict("L1", 100).fastest_s == 0.5


def test_doubt_shrinks_the_fastest_rate_of_the_key_alone_until_the_next_observation() -> None:
    model = observed(*[(100, 1.0)] * CONFIDENT_AFTER)
    model.observe("L2", 100, 2.0)
    for _ in range(2):
        model.doubt("L1", 100)
    model.doubt("never observed", 100)
    assert model.predict("L1", 100) == (1.0, pytest.approx(DOUBT**2), True)
    assert model.predict("L2", 100).fastest_s == 2.0
    model.observe("L1", 100, 0.5)
    assert model.predict("L1", 100).fastest_s == 0.5


def test_doubt_that_proves_unfounded_is_replaced_by_what_was_observed() -> None:
    model = observed(*[(100, 1.0)] * CONFIDENT_AFTER)
    for _ in range(20):
        model.doubt("L1", 100)
    model.observe("L1", 100, 1.1)
    assert model.predict("L1", 100).fastest_s == pytest.approx(1.1)


RUNS = st.lists(st.tuples(st.integers(1, 10**7), st.floats(1e-6, 1e4)), min_size=1, max_size=20)


@given(RUNS, st.integers(1, 10**7))
def test_predict_stays_within_what_was_observed(runs: list[tuple[int, float]], pixels: int) -> None:
    rates = [seconds / size for size, seconds in runs]
    seconds, fastest_s, _ = observed(*runs).predict("L1", pixels)
    low, high = pixels * min(rates) * 0.999, pixels * max(rates) * 1.001
    assert low <= fastest_s <= seconds * 1.001
    assert seconds <= high


def test_predict_far_from_anything_observed_is_not_confident() -> None:
    model = observed(*[(4096, 0.001)] * 10)
    confident = [model.predict("L1", 2**power).confident for power in range(8, 15)]
    assert confident == [False, False, True, True, True, False, False]


def test_predict_first_run_of_a_size_that_also_prepares_is_forgotten_by_the_second() -> None:
    assert observed((4096, 1.0), (4096, 0.01)).predict("L1", 4096).seconds == pytest.approx(0.01)
