import pytest
from hypothesis import given
from hypothesis import strategies as st
from server.runtime.pace import OUTLIER, SHARE, Margin, Pace

SECONDS = st.floats(1e-6, 1e3)
PIXELS = st.integers(1, 2**30)


@pytest.mark.parametrize("measured", [None, {}, {4096: 0.0}])
@pytest.mark.parametrize("pixels", [0, 1, 10**9])
def test_nothing_is_known_at_first(measured: dict[int, float] | None, pixels: int) -> None:
    assert Pace(measured).seconds(pixels) == 0


def test_what_was_measured_is_known_from_the_first() -> None:
    pace = Pace({128 * 128: 1e-6, 64: 0.0})
    assert pace.seconds(128 * 128) == pytest.approx(128 * 128 * 1e-6)
    # Of 64 pixels nothing is known, so the other counts.
    assert pace.seconds(64) == pytest.approx(64e-6)


@given(PIXELS, SECONDS)
def test_the_first_run_is_believed_as_it_is(pixels: int, seconds: float) -> None:
    pace = Pace()
    pace.learn(pixels, seconds)
    assert pace.seconds(pixels) == pytest.approx(seconds)


def test_each_size_has_its_own() -> None:
    pace = Pace({16 * 16: 1e-5, 512 * 512: 1e-7})
    assert pace.seconds(16 * 16) == pytest.approx(16 * 16 * 1e-5)
    assert pace.seconds(512 * 512) == pytest.approx(512 * 512 * 1e-7)
    pace.learn(16 * 16, 16 * 16 * 2e-5)
    assert pace.seconds(16 * 16) == pytest.approx(16 * 16 * 1.1e-5)
    assert pace.seconds(512 * 512) == pytest.approx(512 * 512 * 1e-7)


@pytest.mark.parametrize(("pixels", "nearest"), [(1, 1e-5), (16, 1e-5), (100, 1e-5), (1000, 1e-5), (40_000, 1e-7), (10**7, 1e-7)])
def test_what_was_never_run_is_judged_by_the_nearest(pixels: int, nearest: float) -> None:
    assert Pace({256: 1e-5, 262_144: 1e-7}).seconds(pixels) == pytest.approx(pixels * nearest)


def test_sizes_of_one_power_of_two_share_an_entry() -> None:
    pace = Pace()
    for pixels in (512, 1023, 700):
        pace.learn(pixels, pixels * 1e-6)
        pace.learn(2 * pixels, 2 * pixels * 3e-6)
    assert pace.seconds(600) == pytest.approx(600 * 1e-6)
    # Another power: it began with the pace of the nearest, and follows its own.
    assert 1.5e-6 < pace.seconds(1100) / 1100 < 3e-6


def test_follows_a_change_and_settles() -> None:
    pace = Pace({4096: 1.0})
    seen = []
    for _ in range(100):
        pace.learn(4096, 4096 * 2.0)
        seen.append(pace.seconds(4096) / 4096)
    assert seen[0] == pytest.approx((1 - SHARE) + SHARE * 2)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(2, rel=1e-3)


def test_one_run_of_an_hour_is_not_believed() -> None:
    pace = Pace({4096: 1.0})
    pace.learn(4096, 4096 * 3600.0)
    assert pace.seconds(4096) / 4096 == pytest.approx(1 - SHARE + SHARE * OUTLIER)
    # But it is where it goes on.
    for _ in range(100):
        pace.learn(4096, 4096 * 3600.0)
    assert pace.seconds(4096) / 4096 == pytest.approx(3600, rel=1e-2)


@given(st.lists(st.tuples(PIXELS, SECONDS), max_size=20), PIXELS)
def test_is_never_beyond_what_was_seen(runs: list[tuple[int, float]], pixels: int) -> None:
    pace = Pace()
    for run in runs:
        pace.learn(*run)
    found = pace.seconds(pixels) / pixels
    paces = [seconds / size for size, seconds in runs] or [0.0]
    assert min(paces) * (1 - 1e-9) <= found <= max(paces) * (1 + 1e-9)


class TestMargin:
    """How much longer than predicted an answer may take."""

    def learnt(self, ratios: list[float], predicted_s: float = 2.0) -> Margin:
        margin = Margin()
        for ratio in ratios:
            margin.learn(predicted_s, ratio * predicted_s)
        return margin

    def test_at_first_predictions_are_nearly_believed(self) -> None:
        assert 1 <= Margin().factor < 1.5

    @pytest.mark.parametrize("ratio", [0.5, 1.0, 1.7, 3.0])
    def test_where_they_err_steadily_it_is_by_so_much(self, ratio: float) -> None:
        assert self.learnt([ratio] * 300).factor == pytest.approx(max(1.0, ratio), rel=0.01)

    def test_where_they_waver_there_is_room_for_that(self) -> None:
        assert self.learnt([0.5, 1.5] * 300).factor > 1.5

    def test_one_that_was_far_off_is_no_reason_to_refuse_everybody(self) -> None:
        assert self.learnt([1.0] * 100 + [1e6]).factor < 2.5
        assert self.learnt([1.0] * 100 + [1e6] + [1.0] * 100).factor == pytest.approx(1, rel=0.05)

    @pytest.mark.parametrize("predicted_s", [0.0, -1.0])
    def test_where_nothing_was_known_nothing_is_learnt(self, predicted_s: float) -> None:
        margin = Margin()
        before = margin.factor
        margin.learn(predicted_s, 10.0)
        assert margin.factor == before

    @given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), max_size=50))
    def test_it_stays_within_bounds(self, seen: list[tuple[float, float]]) -> None:
        margin = Margin()
        for predicted_s, taken_s in seen:
            margin.learn(predicted_s, taken_s)
        assert 0 <= margin.factor <= Margin.MOST
