import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server.segment.certainty import Certainty

ONE = np.float32(1)


def certainty_of(scores: np.ndarray, weight: float = 1.0) -> Certainty:
    certainty = Certainty()
    size = np.full(scores.shape[1:], weight, dtype=np.float32)
    certainty.add(scores.astype(np.float32) * size, size)
    return certainty


@pytest.mark.parametrize(
    ("scores", "uncertain", "counted"),
    [
        ([[0.0, 0.1, 0.2]], 0, 0),
        ([[0.8, 0.9, 1.0]], 0, 3),
        ([[0.21, 0.5, 0.79]], 3, 3),
        ([[0.0, 0.5, 1.0, 1.0, 1.0]], 1, 4),
        # Two classes of which none is likely enough, and background that is not.
        ([[0.0, 0.7], [0.5, 0.2], [0.5, 0.1]], 2, 2),
        ([[0.1, 0.9], [0.85, 0.1], [0.05, 0.0]], 0, 1),
    ],
)
def test_certainty_counts_uncertain_and_foreground_pixels(
    scores: list[list[float]], uncertain: int, counted: int
) -> None:
    certainty = certainty_of(np.array(scores))
    assert (certainty.uncertain, certainty.counted) == (uncertain, counted)


def test_share_of_background_alone_is_0() -> None:
    assert certainty_of(np.zeros((1, 4, 4))).share == 0.0
    assert Certainty().share == 0.0


def test_share_is_of_all_parts() -> None:
    certainty = Certainty()
    certainty.add(np.full((1, 2), 0.5, np.float32), np.ones(2, np.float32))
    certainty.add(np.full((1, 6), 0.9, np.float32), np.ones(6, np.float32))
    assert certainty.share == 0.25


def test_sums_of_blended_windows_count_by_their_mean() -> None:
    assert certainty_of(np.array([[0.5, 0.9]]), weight=3.0).share == 0.5


# Eighths lie off the limits, where rounding decides.
SCORES = hnp.arrays(np.float32, (1, 5), elements=st.integers(0, 8).map(lambda eighths: eighths / 8))


@given(SCORES)
def test_background_and_one_class_count_as_one_score(scores: np.ndarray) -> None:
    one, two = certainty_of(scores), certainty_of(np.concatenate([ONE - scores, scores]))
    assert (one.uncertain, one.counted) == (two.uncertain, two.counted)


@given(SCORES)
def test_share_lies_between_0_and_1(scores: np.ndarray) -> None:
    assert 0 <= certainty_of(scores).share <= 1
