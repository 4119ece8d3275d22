import email.utils
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.retry import Retries, read_date, read_retry_after


@given(st.integers(1, 10_000))
def test_waits_are_bounded_and_scattered(tried: int) -> None:
    waits = [Retries(first_s=0.5, longest_s=30).wait_s(tried, None) for _ in range(3)]
    assert all(0.25 <= wait <= 30 for wait in waits)


def test_waits_double() -> None:
    assert [Retries(first_s=1, longest_s=8).wait_s(tried, None) <= 2 ** (tried - 1) for tried in range(1, 6)] == [True] * 5
    assert Retries(first_s=1, longest_s=8).wait_s(4, None) >= 4


@given(st.integers(1, 10), st.floats(0, 1e6))
def test_what_is_asked_is_kept(tried: int, asked_s: float) -> None:
    assert asked_s <= Retries(longest_s=1).wait_s(tried, asked_s) <= asked_s + 1


@given(st.integers(0, 10**9 - 1))
def test_seconds(seconds: int) -> None:
    assert read_retry_after(f"{seconds}") == seconds


@given(st.integers(-(10**6), 10**6))
def test_dates(seconds: int) -> None:
    now = datetime(2026, 11, 20, 12, tzinfo=UTC)
    header = email.utils.format_datetime(now + timedelta(seconds=seconds), usegmt=True)
    assert read_retry_after(header, now) == max(0, seconds)
    assert read_date(header) == now + timedelta(seconds=seconds)


@pytest.mark.parametrize("header", ["", "soon", "-5", "1.5", "1e3", "Fri", "9" * 40, "Thu, 99 Jan 2026 00:00:00 GMT"])
def test_what_is_neither(header: str) -> None:
    assert read_retry_after(header) is None


def test_none() -> None:
    assert read_retry_after(None) is None
