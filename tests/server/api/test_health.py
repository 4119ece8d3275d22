import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.arrays import Tiles
from server.metrics import OUTCOMES, PHASES
from server.segment import probe
from tests.support.files import picture_bytes
from tests.support.server import serving, until
from tests.support.service import bright, fake_app

DATA = picture_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8))


def samples(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value by name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def requests(found: dict[Any, float], **labels: str) -> float:
    return found["unetpp_requests_total", tuple(sorted(labels.items()))]


class Device:
    """A function of tiles whose faults a test turns on and off: `well`, `raises`, `returns nothing`, `blocks`."""

    def __init__(self) -> None:
        self.calls = 0
        self.works_for = math.inf
        self._state = "well"
        self._free = threading.Event()
        self._free.set()

    def turn(self, state: str) -> None:
        self._state = state
        (self._free.clear if state == "blocks" else self._free.set)()

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.calls += 1
        self._free.wait()
        if self._state == "raises" or self.calls > self.works_for:
            raise RuntimeError("secret")
        return bright(tiles)[: 0 if self._state == "returns nothing" else None]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Asked anew each time, which gives up soon."""
    monkeypatch.setattr(probe, "PROBE_EVERY_S", 0)
    monkeypatch.setattr(probe, "PROBE_RETRY_S", 0)
    monkeypatch.setattr(probe, "PROBE_TIMEOUT_S", 0.2)
    return Device()


@pytest.fixture
def client(device: Device) -> Iterator[httpx.Client]:
    with serving(fake_app(device)) as client:
        yield client
        device.turn("well")


def alive(client: httpx.Client) -> bool:
    return client.get("/health/live").status_code == 200


def ready(client: httpx.Client) -> bool:
    return client.get("/health/ready").status_code == 200


def test_live_and_ready(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health/ready").json() == {"ready": True}


FAULTS = ("raises", "returns nothing", "blocks")


@pytest.mark.parametrize("fault", FAULTS)
class TestDeviceFails:
    def test_first_not_ready_then_not_live(
        self, client: httpx.Client, device: Device, problem: Callable[..., Any], fault: str
    ) -> None:
        assert ready(client)
        device.turn(fault)
        for _ in range(probe.MAX_FAILURES - 1):
            answer = client.get("/health/ready")
            assert "fake" in problem(answer, 503, "not-ready").detail
            assert int(answer.headers["retry-after"]) >= 1
        assert not ready(client)
        answer = client.get("/health/live")
        assert "restart" in problem(answer, 503, "not-ready").detail
        assert "secret" not in answer.text
        device.turn("well")
        until(lambda: ready(client))
        assert alive(client)

    def test_a_single_failure_is_no_reason_to_restart(self, client: httpx.Client, device: Device, fault: str) -> None:
        for _ in range(2 * probe.MAX_FAILURES):
            device.turn(fault)
            assert not ready(client)
            device.turn("well")
            until(lambda: ready(client))
        assert alive(client)

    def test_where_nobody_asks_for_readiness(self, client: httpx.Client, device: Device, fault: str) -> None:
        """Liveness itself sees to it that the device is asked, and never waits for it."""
        device.turn(fault)
        assert alive(client)
        until(lambda: not alive(client))
        device.turn("well")
        until(lambda: alive(client))

    def test_a_callers_success_is_one(
        self, client: httpx.Client, device: Device, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        device.turn(fault)
        until(lambda: not alive(client))
        monkeypatch.setattr(probe, "PROBE_RETRY_S", math.inf)  # no more test tiles
        device.turn("well")
        until(lambda: client.post("/segment?level=2", content=DATA).status_code == 200)
        assert alive(client)

    def test_hammered(self, client: httpx.Client, device: Device, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """However many ask, a failing device is not kept busy with being asked."""
        monkeypatch.setattr(probe, "PROBE_RETRY_S", math.inf)
        device.turn(fault)
        with ThreadPoolExecutor(16) as pool:
            statuses = set(pool.map(lambda _: client.get("/health/ready").status_code, range(64)))
            list(pool.map(lambda _: alive(client), range(64)))
        assert statuses == {503}
        assert device.calls == 1


def test_hammered_while_well(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "PROBE_EVERY_S", 3600)
    with serving(fake_app(device)) as client, ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda _: ready(client), range(64)))
        assert device.calls == 1


class TestCallersOfAFailingDevice:
    def test_are_answered(self, client: httpx.Client, device: Device, problem: Callable[..., Any]) -> None:
        device.works_for = 5
        posts = [client.post("/segment?level=1", content=DATA) for _ in range(8)]
        assert [answer.status_code for answer in posts] == [200] * 5 + [500] * 3
        assert "secret" not in problem(posts[-1], 500, "inference-failed").detail
        assert not ready(client)
        until(lambda: not alive(client))

    def test_are_answered_once_it_goes_on(self, client: httpx.Client, device: Device) -> None:
        device.turn("blocks")
        with ThreadPoolExecutor(4) as pool:
            posted = [pool.submit(client.post, "/segment?level=1", content=DATA) for _ in range(4)]
            until(lambda: not alive(client))
            device.turn("well")
            assert [post.result().status_code for post in posted] == [200] * 4
        assert ready(client)
        assert alive(client)

    def test_a_failure_is_found_out_before_the_last_success_is_old(self, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "PROBE_EVERY_S", 3600)
        with serving(fake_app(device)) as client:
            assert ready(client)
            device.turn("raises")
            assert ready(client)
            assert client.post("/segment?level=1", content=DATA).status_code == 500
            assert not ready(client)


class TestCallersDoNotRestartTheServer:
    def test_with_bad_requests(self, client: httpx.Client) -> None:
        for _ in range(2 * probe.MAX_FAILURES):
            assert client.post("/segment?level=1", content=b"nonsense").status_code == 415
            assert client.post("/segment?level=9", content=DATA).status_code == 422
        assert alive(client)
        assert ready(client)

    def test_with_an_input_that_an_engine_cannot_bear(self, device: Device) -> None:
        """Only our own test tiles count: an overflow to NaN, or memory that is not enough, is the input's doing."""

        def touchy(tiles: Tiles) -> np.ndarray:
            if tiles.pixels.max() == 63:
                raise RuntimeError("out of memory")
            return device(tiles)

        with serving(fake_app(touchy)) as client:
            for _ in range(2 * probe.MAX_FAILURES):
                assert client.post("/segment?level=1", content=DATA).status_code == 500
                assert alive(client)
                assert ready(client)


def test_children_exist_at_the_start() -> None:
    with serving(fake_app()) as client:
        found = samples(client)
        for mode, level in (("accurate", "4"), ("fast", "1"), ("fast", "2"), ("fast", "3"), ("fast", "4")):
            asked = {"model": "fake", "mode": mode, "requested_level": level}
            for outcome in OUTCOMES[1:]:
                assert requests(found, **asked, served_level="none", outcome=outcome) == 0
            for served in range(1, int(level) + 1):
                assert requests(found, **asked, served_level=f"{served}", outcome="ok") == 0
            assert found["unetpp_request_duration_seconds_count", (("level", level), ("mode", mode), ("model", "fake"))] == 0
        for phase in PHASES:
            assert found["unetpp_phase_duration_seconds_count", (("phase", phase),)] == 0
        assert found["unetpp_requests_in_flight", ()] == 0
        engine = {"model": "fake", "graph": "L1", "precision": "fp32", "engine": "fake", "provider": "cpu", "auto": "true"}
        assert found["unetpp_engine_info", tuple(sorted(engine.items()))] == 1


def test_requests_are_counted() -> None:
    with serving(fake_app()) as client:
        for _ in range(3):
            assert client.post("/segment?level=2", content=DATA).status_code == 200
        assert client.post("/segment", content=DATA).status_code == 200
        assert client.post("/segment?level=2", content=b"nonsense").status_code == 415
        for refused in ("level=9", "level=abc", "precision=fp8", "levle=1"):
            assert client.post(f"/segment?{refused}", content=DATA).status_code == 422
        found = samples(client)
        fast = {"model": "fake", "mode": "fast", "requested_level": "2"}
        assert requests(found, **fast, served_level="2", outcome="ok") == 3
        assert requests(found, model="fake", mode="accurate", requested_level="4", served_level="4", outcome="ok") == 1
        assert requests(found, **fast, served_level="none", outcome="client_error") == 1
        unknown = dict.fromkeys(("model", "mode", "requested_level", "served_level"), "none")
        assert requests(found, **unknown, outcome="client_error") == 4
        for mode, level, count in (("fast", "2", 3), ("accurate", "4", 1)):
            place = (("level", level), ("mode", mode), ("model", "fake"))
            assert found["unetpp_request_duration_seconds_count", place] == count
        for phase in PHASES:
            assert found["unetpp_phase_duration_seconds_count", (("phase", phase),)] == 4
        assert found["unetpp_batch_size_tiles_count", (("graph", "L2"),)] == 3
        assert found["unetpp_batch_size_tiles_sum", (("graph", "L2"),)] == 3


def test_callers_cannot_make_labels() -> None:
    with serving(fake_app()) as client:
        before = samples(client).keys()
        for query in ("model=evil", "mode=evil", "level=77", "format=evil", "precision=evil"):
            assert client.post(f"/segment?{query}", content=DATA).status_code >= 400
        new = {labels for name, labels in samples(client).keys() - before if name.startswith("unetpp_requests")}
        assert all("evil" not in str(labels) and "77" not in str(labels) for labels in new)
