import threading
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.arrays import Tiles
from server.metrics import OUTCOMES, PHASES
from tests.conftest import serving
from tests.server.conftest import bright, fake_app, picture_bytes

DATA = picture_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8))


def samples(client: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value by name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def requests(found: dict[Any, float], **labels: str) -> float:
    return found["unetpp_requests_total", tuple(sorted(labels.items()))]


def test_live_and_ready(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"live": True}
    assert client.get("/health/ready").json() == {"ready": True}


@pytest.mark.parametrize("failing", ["raises", "returns nothing"])
def test_not_ready_where_an_engine_fails(problem: Callable[..., Any], failing: str) -> None:
    broken = threading.Event()
    broken.set()

    def touchy(tiles: Tiles) -> np.ndarray:
        if broken.is_set() and failing == "raises":
            raise RuntimeError("secret")
        return bright(tiles)[: 0 if broken.is_set() else None]

    with serving(fake_app(touchy)) as client:
        answer = client.get("/health/ready")
        assert "fake" in problem(answer, 503, "not-ready").detail
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/health/live").status_code == 200
        broken.clear()
        assert client.get("/health/ready").status_code == 200


def test_children_exist_at_the_start() -> None:
    with serving(fake_app()) as client:
        found = samples(client)
        for mode, level in (("accurate", "4"), ("fast", "1"), ("fast", "2"), ("fast", "3"), ("fast", "4")):
            for outcome in OUTCOMES:
                assert requests(found, model="fake", mode=mode, level=level, outcome=outcome) == 0
            assert found["unetpp_request_duration_seconds_count", (("level", level), ("mode", mode))] == 0
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
        assert requests(found, model="fake", mode="fast", level="2", outcome="ok") == 3
        assert requests(found, model="fake", mode="accurate", level="4", outcome="ok") == 1
        assert requests(found, model="fake", mode="fast", level="2", outcome="client_error") == 1
        assert requests(found, model="none", mode="none", level="none", outcome="client_error") == 4
        assert found["unetpp_request_duration_seconds_count", (("level", "2"), ("mode", "fast"))] == 3
        assert found["unetpp_request_duration_seconds_count", (("level", "4"), ("mode", "accurate"))] == 1
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
