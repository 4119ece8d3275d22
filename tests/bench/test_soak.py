"""The soak in short, and its own judgement: what it sends is good, and what is wrong it notices."""

import random
import tempfile
from collections import Counter
from contextlib import closing
from sqlite3 import connect

import numpy as np
import pytest

from bench import soak
from bench.soak import Sample, grown
from bench.soak_clients import LEAVES, LOST, Ledger, image, size_of, volume

# Two minutes are less than this server takes to meet every size at every precision: memory still rises to its plateau.
# The rule of the long run, 3 % after five minutes, is bench/soak.py's; here a leak of hundreds of MB a minute must show.
LOOSE = 0.25


@pytest.mark.long
def test_two_minutes() -> None:
    report = soak.run(minutes=2, seed=1)
    # All but memory, of which LOOSE speaks.
    kept = [check for check in report.checks if check.name != "memory"]
    assert {check.name: check.faults for check in kept if not check.met} == {}
    assert {check.name for check in kept} == {
        "5xx",
        "problems",
        "answers",
        "masks",
        "same bytes",
        "metrics",
        "jobs",
        "paths",
        "leaks",
        "exit",
        "log",
    }
    assert report.growth < LOOSE, report.rss_mb
    assert set(report.statuses) >= {"image", "volume", "fixed", "job", "bad", "look", "leaves"}


@pytest.mark.parametrize("make", [image, volume])
def test_inputs_can_be_read_and_come_from_the_seed(make) -> None:
    from server.imaging.decode import decode
    from server.imaging.decode_options import DecodeOptions

    for number in range(20):
        made = make(random.Random(number))  # noqa: S311 - not secrets
        assert made == make(random.Random(number))  # noqa: S311
        for body, labels in ((made.body, False), (made.labels, True)):
            with tempfile.TemporaryFile() as file:
                file.write(body)
                file.seek(0)
                assert decode(file, DecodeOptions(10**7, 10**7, labels=labels)).input_header.size == made.size


def test_masks_are_measured() -> None:
    from server.arrays import Mask
    from server.imaging.encode import npz, png, tiff

    mask = Mask(np.zeros((3, 5), np.uint8), np.zeros((1, 3, 5), np.float16))
    colors = {1: (255, 0, 0)}
    for body, media_type in (
        (png.encode(mask, colors), "image/png"), (tiff.encode(mask, colors), "image/tiff"), (npz.encode(mask), "application/x-npz"),
        (b'{"size": {"height": 3, "width": 5}}', "application/json"),
    ):  # fmt: skip
        assert size_of(body, media_type) == (3, 5)


def test_another_answer_to_the_same_question_is_noticed() -> None:
    ledger = Ledger()
    ledger.same(("a",), b"1", "here")
    ledger.same(("a",), b"1", "there")
    ledger.same(("b",), b"2", "there")
    assert ledger.faults["same bytes"] == []
    ledger.same(("a",), b"3", "elsewhere")
    assert len(ledger.faults["same bytes"]) == 1


def metrics(**outcomes: int) -> str:
    labels = 'mode="a",requested_level="1",served_level="1"'
    lines = [f'unetpp_requests_total{{{labels},outcome="{name}"}} {n}' for name, n in outcomes.items()]
    durations = f'unetpp_request_duration_seconds_count{{level="1"}} {outcomes["ok"]}'
    return "\n".join([
        "# TYPE unetpp_requests counter", *lines, "# TYPE unetpp_request_duration_seconds histogram", durations, ""
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("counted", "met"),
    [
        ({"ok": 2, "client_error": 1}, True),
        ({"ok": 2, "client_error": 1, "cancelled": 1}, True),
        ({"ok": 3, "client_error": 1}, True),
        ({"ok": 3, "client_error": 1, "cancelled": 1}, False),  # one left, so one of the two is too many
        ({"ok": 1, "client_error": 1}, False),
        ({"ok": 2, "client_error": 1, "late": 1}, False),
        # Nobody's leaving makes a request fail.
        ({"ok": 2, "client_error": 1, "error": 1}, False),
    ],
)
def test_what_the_server_counts_is_held_against_what_was_sent(model_info: dict[str, int], met: bool) -> None:
    ledger = Ledger()
    for status in (200, 200, 422, LEAVES):
        ledger.sends()
        ledger.settles("image", "POST /segment", status)
    checks = {check.name: check for check in soak._checks(ledger, metrics(**model_info))}
    assert checks["metrics"].met is met, checks["metrics"].faults
    assert checks["answers"].met


@pytest.mark.parametrize(
    ("minutes", "status", "faults"),
    [
        (2, 200, []),
        (30, 200, ["never met: late or too short", "never met: degraded", "never met: windows dropped", "never met: compared"]),
        (2, 429, ["0 of 1 good requests got a mask, less than 50%"]),
    ],
)  # fmt: skip
def test_a_run_must_have_met_what_it_speaks_of(minutes: int, status: int, faults: list[str]) -> None:
    ledger = Ledger()
    ledger.settles("image", "POST /segment", status)
    assert soak._met(ledger, metrics(ok=1, refused=1, cancelled=1), minutes).faults == faults


def test_what_jobs_leave_behind_is_noticed(tmp_path) -> None:
    with closing(connect(tmp_path / "jobs.sqlite")) as db:
        db.execute("CREATE TABLE jobs (id TEXT, state TEXT, finished REAL)")
        rows = [("kept", "failed", 20), ("old", "failed", 5), ("empty", "done", 20), ("now", "queued", None)]
        db.executemany("INSERT INTO jobs VALUES (?, ?, ?)", rows)
        db.commit()
    (tmp_path / "stray").mkdir()
    found = soak.orphans(tmp_path, Ledger(unsure_jobs=4), expired=10)
    assert found == [
        "folder of job stray, of which no row speaks", "job empty is done and has no files", "job old has expired and is still there"
    ]  # fmt: skip
    assert len(soak.orphans(tmp_path, Ledger(unsure_jobs=3), expired=10)) == 4


def test_a_request_without_an_end_is_noticed() -> None:
    ledger = Ledger()
    ledger.sends()
    assert not {check.name: check.met for check in soak._checks(ledger, metrics(ok=0))}["answers"]
    ledger.settles("image", "POST /segment", LOST)
    assert ledger.statuses == Counter({("image", LOST): 1})


def test_growth_is_from_after_it_has_settled_to_the_end() -> None:
    samples = [Sample(second, 100 if second < 300 else 200 if second < 1700 else 210, 1, 1) for second in range(1800)]
    assert grown(samples, 1800) == pytest.approx(0.05)
