"""The soak in short, and the checks by which it judges."""

import random
from pathlib import Path

import pytest

from bench import soak
from bench.soak_clients import LEFT, Ledger, image, volume


@pytest.mark.long
def test_soak_of_a_few_seconds_finds_no_fault() -> None:
    ledger, _ = soak.run(minutes=0.2, clients=3, seed=1, idle_s=2, warm_up=5)
    assert ledger.faults == {}
    assert {kind for kind, _ in ledger.statuses} == set(soak.STEPS)


@pytest.mark.parametrize("make", [image, volume])
def test_inputs_come_from_the_seed_and_can_be_read(make, tmp_path: Path) -> None:
    from server.imaging.decode import decode
    from server.imaging.decode_options import DecodeOptions

    for number in range(3):
        sent = make(random.Random(number))  # noqa: S311 - not secrets
        assert sent == make(random.Random(number))  # noqa: S311
        (tmp_path / "input").write_bytes(sent.body)
        with (tmp_path / "input").open("rb") as file:
            assert decode(file, DecodeOptions(10**7, 10**7)).size == sent.size


def test_ledger_finds_another_answer_to_the_same_request() -> None:
    ledger = Ledger()
    for key, body in (("a", b"1"), ("a", b"1"), ("b", b"2")):
        ledger.same((key,), body, "here")
    assert ledger.faults == {}
    ledger.same(("a",), b"3", "there")
    assert len(ledger.faults["same bytes"]) == 1


@pytest.mark.parametrize(
    ("ok", "error", "faults"),
    [(2, 0, 0), (3, 0, 0), (1, 0, 1), (4, 0, 1), (2, 2, 1)],
    ids=["equal", "the one that left", "too few", "too many", "errors"],
)
def test_check_counts_compares_with_the_metrics(ok: int, error: int, faults: int) -> None:
    ledger = Ledger()
    for status in ("200", "200", "422", LEFT):
        ledger.settle("segment", status, segment=True)
    text = f'# TYPE unetpp_requests counter\nunetpp_requests_total{{outcome="ok"}} {ok}\nunetpp_requests_total{{outcome="error"}} {error}\n'
    soak.check_counts(ledger, text)
    assert len(ledger.faults["metrics"]) == faults


def test_check_log_finds_errors() -> None:
    ledger = Ledger()
    soak.check_log(ledger, "INFO fine\nERROR broken\nTask exception was never retrieved\n")
    assert len(ledger.faults["log"]) == 2


def test_grown_compares_after_settling() -> None:
    assert soak.grown([100.0] * 300 + [200.0] * 1400 + [210.0] * 100) == pytest.approx(0.05)
