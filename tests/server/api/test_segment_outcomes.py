"""Ends of a request to POST /segment: deadlines, degradation, refusals, disconnects, faults; and their metrics."""

import concurrent.futures
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from server.arrays import Tiles
from tests.server.api.conftest import InProcess
from tests.server.api.scraping import counted, value
from tests.support.files import GOOD, pages_bytes
from tests.support.server import serving, until
from tests.support.service import FixedLatency, bright, fake_app

Checked = Callable[..., Any]

L1 = "/segment?mode=fast&level=1"
# Predicted seconds of a tile by graph, none of which really pass.
SLOW = FixedLatency({"L1": 0.001, "L2": 5.0, "L3": 100.0, "L4": 100.0, "accurate": 100.0})


class Held:
    """An engine that waits for the test, and counts its batches."""

    def __init__(self) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()
        self.batches = 0

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.batches += 1
        self.inside.set()
        assert self.leave.wait(60)
        return bright(tiles)


@contextlib.contextmanager
def busy(engine: Held, url: str = "/segment?level=4", **settings: Any) -> Iterator[httpx.Client]:
    """A client, while a request waits for the engine; it is answered at the end."""
    with serving(fake_app(engine, **settings)) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, url, content=GOOD)
        try:
            assert engine.inside.wait(30)
            yield client
        finally:
            engine.leave.set()
        assert first.result().status_code == 200


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)


@pytest.fixture(scope="module")
def slow() -> Iterator[httpx.Client]:
    """A server whose deeper graphs are predicted to be slow."""
    with serving(fake_app(latency=SLOW)) as client:
        yield client


@pytest.mark.parametrize(
    "given",
    [
        {"params": {"deadline_ms": "60000"}},
        {"params": {"deadline_ms": "6e4"}},
        {"headers": {"X-Deadline-Ms": "60000"}},
        {"headers": {"x-deadline-ms": "60000.5"}},
    ],
    ids=range(4),
)
def test_deadline_that_is_met(slow: httpx.Client, given: dict[str, Any]) -> None:
    params = {"level": "1"} | given.get("params", {})
    answer = slow.post("/segment", content=GOOD, params=params, headers=given.get("headers"))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "abc", "", "1 2", "0x10", "1e999"])
@pytest.mark.parametrize("where", ["params", "headers"])
def test_deadline_that_is_no_time_is_refused(
    slow: httpx.Client, problem: Checked, text: str, where: str
) -> None:
    before = counted(slow, "requests", "outcome").get("client_error", 0)
    name = "deadline_ms" if where == "params" else "X-Deadline-Ms"
    answer = slow.post("/segment", content=GOOD, **{where: {name: text}})
    assert problem(answer, 422, "invalid-parameter").parameter == "deadline_ms"
    assert counted(slow, "requests", "outcome")["client_error"] == before + 1


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("&deadline_ms=9000", [("X-Deadline-Ms", "9000")]),
        ("", [("X-Deadline-Ms", "1000"), ("X-Deadline-Ms", "9000")]),
    ],
)
def test_deadline_that_is_given_twice_is_refused(
    slow: httpx.Client, problem: Checked, query: str, headers: list[tuple[str, str]]
) -> None:
    refused = problem(slow.post(L1 + query, content=GOOD, headers=headers), 422, "invalid-parameter")
    assert (refused.parameter, refused.actual, refused.limit) == ("deadline_ms", 2, 1)


def test_deadline_that_could_never_be_met_is_refused(slow: httpx.Client, problem: Checked) -> None:
    answer = slow.post("/segment?level=4&deadline_ms=30000", content=GOOD)
    refused = problem(answer, 422, "deadline-too-short")
    assert (refused.actual, refused.unit) == (100, "s")
    assert 29 < refused.limit <= 30
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("milliseconds", ["0.000001", "0.001"])
async def test_deadline_of_no_time_is_no_overload(in_process: InProcess, milliseconds: str) -> None:
    """The server is idle, so trying again later would not help."""
    async with in_process(latency=SLOW) as client:
        answer = await client.post(f"{L1}&deadline_ms={milliseconds}", content=GOOD)
        assert answer.json()["code"] in ("deadline-too-short", "deadline-passed")


def test_deadline_that_others_prevent_is_refused_before_the_body(problem: Checked) -> None:
    engine = Held()
    with busy(engine, latency=SLOW, limits={"max_wait_s": 200.0}) as client:
        with connect(client) as raw:
            raw.sendall(
                b"POST /segment?level=2&deadline_ms=50000 HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
            )
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            assert answer.status == 429
            # 100 s for the batch that runs; 50 s would be of use.
            assert 40 <= int(answer.headers["retry-after"]) <= 120
        # By its own cost, which its header tells.
        refused = client.post("/segment?level=4", content=GOOD)
        assert problem(refused, 429, "overloaded").actual > 200
        assert counted(client, "requests", "outcome") == {"refused": 2}
        assert counted(client, "refusals", "reason") == {"wait": 2}
    assert engine.batches == 1


@pytest.mark.parametrize(("query", "headers"), [("&deadline_ms=200", {}), ("", {"X-Deadline-Ms": "200"})])
def test_deadline_that_passes_is_answered_at_once(
    problem: Checked, query: str, headers: dict[str, str]
) -> None:
    engine = Held()
    with busy(engine) as client:
        # While the engine is still at work.
        problem(
            client.post("/segment?level=4" + query, content=GOOD, headers=headers), 504, "deadline-passed"
        )
        assert counted(client, "windows_dropped", "reason") == {"late": 1}
        assert counted(client, "cancellations", "reason") == {"deadline": 1}
        labels = {
            "model": "fake",
            "mode": "fast",
            "requested_level": "4",
            "served_level": "none",
            "outcome": "late",
        }
        assert value(client, "requests_total", **labels) == 1
        engine.leave.set()
        assert client.post("/segment?level=4", content=GOOD).status_code == 200
    assert engine.batches == 2


@pytest.mark.parametrize(
    ("query", "requested", "served"),
    [
        ("level=4&min_level=1", ("fast", "4"), ("fast", "2")),
        ("level=4&min_level=2", ("fast", "4"), ("fast", "2")),
        ("min_level=1", ("accurate", "4"), ("fast", "2")),
        ("level=2&min_level=1", ("fast", "2"), ("fast", "2")),
        ("level=1&min_level=1", ("fast", "1"), ("fast", "1")),
    ],
)
def test_min_level_headers_tell_what_was_requested_and_served(
    slow: httpx.Client, query: str, requested: tuple[str, str], served: tuple[str, str]
) -> None:
    answer = slow.post(f"/segment?{query}&deadline_ms=60000&format=json", content=GOOD)
    assert answer.status_code == 200, answer.text
    headers, report = answer.headers, answer.json()
    assert (headers["x-segment-mode-requested"], headers["x-segment-level-requested"]) == requested
    assert (headers["x-segment-mode"], headers["x-segment-level"]) == served
    degraded = None if requested == served else "deadline"
    assert headers.get("x-segment-degraded") == report.get("degraded") == degraded
    assert (report["mode"], report["level"]) == (served[0], int(served[1]))


def test_min_level_degrades_what_would_wait_too_long(problem: Checked) -> None:
    with serving(fake_app(latency=SLOW, limits={"max_wait_s": 60.0})) as client:
        answer = client.post("/segment?level=4&min_level=1", content=GOOD)
        assert (answer.headers["x-segment-level"], answer.headers["x-segment-degraded"]) == ("2", "load")
        refused = problem(client.post("/segment?level=4", content=GOOD), 413, "too-large")
        assert (refused.limit, refused.actual, refused.remedy) == (60, 100, "POST /jobs")
        assert counted(client, "degraded", "reason") == {"load": 1}


def test_request_over_the_limit_in_flight_is_refused(problem: Checked) -> None:
    engine = Held()
    with busy(engine, http={"max_in_flight": 1}) as client:
        refused = client.post("/segment", content=GOOD)
        fields = vars(problem(refused, 429, "overloaded"))
        assert (fields["limit"], fields["actual"], fields["setting"]) == (1, 1, "UNETPP_HTTP__MAX_IN_FLIGHT")
        assert int(refused.headers["retry-after"]) >= 1
        assert value(client, "requests_in_flight") == 1
        assert counted(client, "requests", "model") == {"none": 1}
        assert counted(client, "refusals", "reason") == {"in_flight": 1}
        engine.leave.set()
        until(lambda: client.post("/segment", content=GOOD).status_code == 200)
        until(lambda: value(client, "requests_in_flight") == 0)


async def test_engine_that_fails_is_a_server_fault(
    in_process: InProcess, caplog: pytest.LogCaptureFixture, problem: Checked
) -> None:
    def fails(_: Tiles) -> np.ndarray:
        raise RuntimeError("secret: /home/operator/weights")

    async with in_process(fake_app(fails)) as client:
        answer = await client.post("/segment?level=2", content=GOOD, headers={"x-request-id": "mine"})
        failed = problem(answer, 500, "inference-failed")
        assert "secret" not in answer.text
        assert "X-Request-Id" in failed.detail
        assert "request mine failed" in caplog.text
        assert "secret" in caplog.text
        labels = 'mode="fast",model="fake",outcome="error",requested_level="2",served_level="none"'
        assert f"unetpp_requests_total{{{labels}}} 1.0" in (await client.get("/metrics")).text


def test_unexpected_error_is_a_problem_and_closes_the_connection(
    problem: Checked, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise ZeroDivisionError("secret")

    with serving(fake_app()) as client:
        with monkeypatch.context() as patch:
            patch.setattr("server.segment.service.decode_upload", bug)
            for _ in range(3):
                answer = client.post("/segment", content=GOOD, headers={"x-request-id": "mine"})
                problem(answer, 500, "internal")
                assert "secret" not in answer.text
                assert (answer.headers["x-request-id"], answer.headers["connection"]) == ("mine", "close")
        assert "request mine failed" in caplog.text
        assert client.post("/segment", content=GOOD).status_code == 200


def test_client_that_leaves_while_it_sends_is_cancelled() -> None:
    with serving(fake_app()) as client:
        for declared in (b"image/png", b"multipart/form-data; boundary=x"):
            with connect(client) as leaving:
                head = b"POST /segment HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\nContent-Type: "
                leaving.sendall(head + declared + b"\r\n\r\n--x\r\n")
        until(lambda: counted(client, "cancellations", "reason") == {"client_left": 2})
        labels = {"model": "fake", "mode": "accurate", "requested_level": "4", "served_level": "none"}
        assert value(client, "requests_total", **labels, outcome="cancelled") == 2
        assert value(client, "requests_in_flight") == 0


def test_client_that_leaves_while_it_waits_frees_the_device() -> None:
    """Only the windows of the batch that runs are done, of 48."""
    pages = np.random.default_rng(0).integers(0, 256, (48, 64, 64), dtype=np.uint8)
    data, engine = pages_bytes(pages), Held()
    with serving(fake_app(engine)) as client:
        with connect(client) as leaving:
            leaving.sendall(
                f"POST {L1} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
            )
            assert engine.inside.wait(30)
            assert value(client, "requests_in_flight") == 1
        # The engine is still at work.
        until(lambda: counted(client, "requests", "outcome") == {"cancelled": 1})
        assert counted(client, "windows_dropped", "reason")["cancelled"] > 0
        assert counted(client, "cancellations", "reason") == {"client_left": 1}
        assert value(client, "requests_in_flight") == 0
        engine.leave.set()
        assert client.post(L1, content=GOOD).status_code == 200
        assert engine.batches == 2


def test_client_that_keeps_its_connection_has_not_left() -> None:
    with serving(fake_app()) as client:
        for _ in range(3):
            assert client.post(L1, content=GOOD).status_code == 200
            assert client.post(L1, files={"file": GOOD}).status_code == 200
        assert counted(client, "requests", "outcome") == {"ok": 6}


async def test_every_request_is_counted_once(in_process: InProcess) -> None:
    expected: dict[str, int] = {}
    async with in_process(latency=SLOW) as client:
        for query, data, status in (
            ("level=1", GOOD, 200), ("level=1&deadline_ms=60000&min_level=1", GOOD, 200), ("level=abc", GOOD, 422),
            ("level=9", GOOD, 422), ("model=none", GOOD, 404), ("format=gif", GOOD, 406), ("levle=1", GOOD, 422),
            ("level=1", b"nonsense", 415), ("level=1", GOOD[:45], 422), ("level=4&deadline_ms=30000", GOOD, 422),
            ("deadline_ms=0", GOOD, 422), ("min_level=9", GOOD, 422), ("level=1&precision=int9", GOOD, 422),
        ):  # fmt: skip
            answer = await client.post(f"/segment?{query}", content=data)
            assert answer.status_code == status, (query, answer.content)
            outcome = "ok" if status == 200 else "client_error"
            expected[outcome] = expected.get(outcome, 0) + 1
        text = (await client.get("/metrics")).text
    lines = [
        line for line in text.splitlines() if line.startswith("unetpp_requests_total") and line[-3:] != "0.0"
    ]
    assert sum(float(line.rpartition(" ")[2]) for line in lines) == sum(expected.values())
    ok = [float(line.rpartition(" ")[2]) for line in lines if 'outcome="ok"' in line]
    assert sum(ok) == expected["ok"]
    assert "unetpp_requests_in_flight 0.0" in text
    # Callers make no labels.
    assert 'model="none",outcome="client_error"' in text
    assert not [line for line in lines if "abc" in line or '"9"' in line]
