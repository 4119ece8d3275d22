"""Every metric moves when it should, as a scrape of a real server shows."""

import concurrent.futures
import contextlib
import hashlib
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.arrays import Tiles
from server.metrics import OUTCOMES, PHASES
from tests.server.api.scraping import counted, scrape, value
from tests.support.files import nifti_bytes, picture_bytes
from tests.support.server import serving, until
from tests.support.service import FixedLatency, bright, calibrated, fake_app

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DATA = picture_bytes(GREY)
# Of the 127 pixels above the mean the reference has 64, and no others.
TRUTH = (GREY >= 192).astype(np.uint8)
REFERENCE = picture_bytes(TRUTH * 255)
FOUND = int(np.count_nonzero(GREY.mean() < GREY))


class Held:
    """An engine that waits for the test, but not for the small tiles of probes."""

    def __init__(self) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()

    def __call__(self, tiles: Tiles) -> np.ndarray:
        if tiles.pixels.shape[-1] > 8:
            self.inside.set()
            assert self.leave.wait(60)
        return bright(tiles)


@contextlib.contextmanager
def crowded(count: int, **settings: Any) -> Iterator[httpx.Client]:
    """A client, while so many requests of one tile are in flight: one runs, the others wait."""
    engine = Held()
    with (
        serving(fake_app(engine, **settings)) as client,
        concurrent.futures.ThreadPoolExecutor(count) as pool,
    ):
        posted = [pool.submit(client.post, "/segment?level=1", content=DATA)]
        try:
            assert engine.inside.wait(30)
            posted += [pool.submit(client.post, "/segment?level=1", content=DATA) for _ in range(count - 1)]
            until(lambda: value(client, "queue_tiles", priority="interactive") == count - 1)
            yield client
        finally:
            engine.leave.set()
        assert [answer.result().status_code for answer in posted] == [200] * count


def test_labels_exist_before_the_first_request_and_are_closed() -> None:
    latency = FixedLatency({"L1": 0.001, "L2": 0.001, "L3": 256.0, "L4": 256.0, "accurate": 0.001})
    changes = {"calibration": calibrated([("L1", "fp32", 0.9)])}
    limits = {"max_wait_s": 60.0, "max_body_mb": 1}
    with serving(fake_app(latency=latency, changes=changes, limits=limits)) as client:
        before = {key for key in scrape(client) if key[0].startswith("unetpp_")}
        for query, data, status in (
            ("", DATA, 200), ("level=1", DATA, 200), ("level=4&min_level=1", DATA, 200), ("level=4", DATA, 413),
            ("level=5", DATA, 422), ("level=abc", DATA, 422), ("model=evil", DATA, 404), ("level=1", b"evil", 415),
            ("level=1", bytes(2_000_000), 413), ("level=1&deadline_ms=0", DATA, 422),
        ):  # fmt: skip
            assert client.post(f"/segment?{query}", content=data).status_code == status, query
        assert (
            client.post("/segment?level=2", files={"file": DATA, "reference": REFERENCE}).status_code == 200
        )
        job = client.post("/jobs?level=1", content=DATA).json()["id"]
        until(lambda: client.get(f"/jobs/{job}").json()["state"] == "done")
        after = {key for key in scrape(client) if key[0].startswith("unetpp_")}
    assert after == before
    assert not any("evil" in str(key) for key in after)


def test_counters_start_at_zero() -> None:
    with serving(fake_app()) as client:
        found = scrape(client)
    for mode, level in (("accurate", 4), ("fast", 1), ("fast", 2), ("fast", 3), ("fast", 4)):
        ends = [("none", outcome) for outcome in OUTCOMES[1:]] + [(f"{s}", "ok") for s in range(1, level + 1)]
        for served, outcome in ends:
            labels = {"model": "fake", "mode": mode, "requested_level": f"{level}"}
            labels |= {"served_level": served, "outcome": outcome}
            assert found["unetpp_requests_total", tuple(sorted(labels.items()))] == 0


def test_requests_and_phases_are_counted() -> None:
    with serving(fake_app()) as client:
        for query in ("level=2", "level=2", ""):
            assert client.post(f"/segment?{query}", content=DATA).status_code == 200
        assert client.post("/segment?level=2", content=b"nonsense").status_code == 415
        assert counted(client, "requests", "outcome") == {"ok": 3, "client_error": 1}
        assert counted(client, "requests", "served_level") == {"2": 2, "4": 1, "none": 1}
        for mode, level, count in (("fast", "2", 2), ("accurate", "4", 1)):
            assert (
                value(client, "request_duration_seconds_count", model="fake", mode=mode, level=level) == count
            )
        counts = {phase: value(client, "phase_duration_seconds_count", phase=phase) for phase in PHASES}
        # Nothing had to be opened.
        assert counts == dict.fromkeys(PHASES, 3) | {"open": 0}


def test_queue_is_shown_by_priority() -> None:
    with crowded(3, latency=FixedLatency(2.0)) as client:
        assert value(client, "queue_oldest_seconds", priority="interactive") > 0
        assert value(client, "queue_tiles", priority="batch") == 0
        # Each of the others has its tile first, at 2 s each; the one that runs may be nearly done.
        assert 4 <= value(client, "predicted_wait_seconds") <= 6
        assert 4 <= value(client, "backlog_seconds") <= 6
        client.post("/jobs?level=1", content=DATA)
        until(lambda: value(client, "queue_tiles", priority="batch") == 1)
    with serving(fake_app()) as client:
        assert client.post("/segment", content=DATA).status_code == 200
        for priority in ("interactive", "batch"):
            assert value(client, "queue_tiles", priority=priority) == 0
            assert value(client, "queue_oldest_seconds", priority=priority) == 0
        assert value(client, "predicted_wait_seconds") == value(client, "backlog_seconds") == 0


def test_batches_are_counted_with_their_fill() -> None:
    with serving(fake_app()) as client:
        stack = nifti_bytes(np.stack([GREY] * 6, axis=2).astype(np.float32))
        assert client.post("/segment?level=2", content=stack).status_code == 200
        assert value(client, "batch_size_tiles_sum", graph="L2") == 6
        runs = value(client, "batch_size_tiles_count", graph="L2")
        assert value(client, "batch_fill_ratio_count", graph="L2") == runs >= 1
        assert 0 < value(client, "batch_fill_ratio_sum", graph="L2") <= runs
        assert value(client, "batch_fill_ratio_count", graph="L1") == 0


def test_refusals_are_counted_by_reason() -> None:
    with serving(fake_app(limits={"max_body_mb": 1, "max_pixels": 100})) as client:
        # By the declared length, by the bytes that came, and by the header of the image.
        assert client.post("/segment", content=bytes(2**20 + 1)).status_code == 413
        assert counted(client, "refusals", "reason") == {"too_large": 1}
        assert client.post("/segment", content=(bytes(2**18) for _ in range(5))).status_code == 413
        for route in ("/segment", "/jobs"):
            assert client.post(route, content=DATA).status_code == 413
        # These ask for no work, or are wrong.
        for path in ("/jobs/none", "/models/none"):
            assert client.get(path).status_code == 404
        assert client.post("/segment", content=b"nonsense").status_code == 415
        assert counted(client, "refusals", "reason") == {"too_large": 4}


def test_deployments_are_shown() -> None:
    rows = [("L1", "fp32", 0.8), ("accurate", "fp32", 0.9, "other")]
    with serving(fake_app(changes={"calibration": calibrated(rows)})) as client:
        labels = {"model": "fake", "precision": "fp32"}
        assert value(client, "calibrated_iou", mode="fast", level="1", engine="onnxruntime", **labels) == 0.8
        assert value(client, "calibrated_dice", mode="accurate", level="4", engine="other", **labels) == 0.9
        instance = {"engine": "onnxruntime", "provider": "cpu", "auto": "true", "selected_by": "rule"}
        assert value(client, "model_instance_info", graph="L1", **labels, **instance) == 1
        shared = re.findall(
            r'^unetpp_engine_info\{.*graph="L1".*tuned="false",tuning_key="([0-9a-f]{16})"\} 1',
            client.get("/metrics").text,
            re.MULTILINE,
        )
        assert len(shared) == 1


def test_bundle_is_shown_with_its_hash(client: httpx.Client, shipped_bundle: Path) -> None:
    sha256 = hashlib.sha256((shipped_bundle / "manifest.json").read_bytes()).hexdigest()[:16]
    assert value(client, "bundle_info", model="nuclei", dims="2", sha256=sha256) == 1


@pytest.mark.parametrize("kind", ["image", "volume", "job"])
def test_reference_is_observed_as_the_headers_say(kind: str) -> None:
    files = {"file": DATA, "reference": REFERENCE}
    if kind == "volume":
        pairs = (("file", GREY.astype(np.float32)), ("reference", TRUTH))
        files = {name: nifti_bytes(np.stack([pixels] * 2, axis=2)) for name, pixels in pairs}
    with serving(fake_app()) as client:
        if kind == "job":
            job = client.post("/jobs?level=2", files=files).json()["id"]
            until(lambda: client.get(f"/jobs/{job}").json()["state"] == "done")
        else:
            answer = client.post("/segment?level=2", files=files)
            assert answer.headers["x-segment-iou"] == f"{64 / FOUND:.4f}"
        labels = {"model": "fake", "mode": "fast", "level": "2", "class": "bright"}
        for name, expected in (("iou", 64 / FOUND), ("dice", 2 * 64 / (64 + FOUND))):
            assert value(client, f"reference_{name}_count", **labels) == 1
            assert value(client, f"reference_{name}_sum", **labels) == pytest.approx(expected)
        assert counted(client, "reference_samples", "outcome") == {"compared": 1}


def test_reference_that_is_empty_like_the_mask_is_no_sample() -> None:
    nothing = picture_bytes(np.zeros((16, 16), dtype=np.uint8))
    with serving(fake_app()) as client:
        answer = client.post("/segment?level=2", files={"file": nothing, "reference": nothing})
        assert answer.headers["x-segment-iou"] == "1.0000"
        assert counted(client, "reference_samples", "outcome") == {"both_empty": 1}


def test_shadow_evaluation_compares_until_the_server_drains() -> None:
    app = fake_app(quality={"agreement_share": 1})
    with serving(app) as client:
        assert client.post("/segment?level=2", content=DATA).status_code == 200
        until(lambda: counted(client, "agreement_samples", "outcome") == {"compared": 1})
        labels = {"model": "fake", "mode": "fast", "level": "2", "class": "bright"}
        assert value(client, "agreement_iou_sum", **labels) == 1
        # Its accurate run is not a request.
        assert counted(client, "requests", "mode") == {"fast": 1}
        app.state.operations.drain()
        assert client.post("/segment?level=2", content=DATA).status_code == 200
        assert counted(client, "agreement_samples", "outcome") == {"compared": 1}


def test_promtool_accepts_the_metrics() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("needs promtool, which comes with Prometheus")
    with serving(fake_app(changes={"calibration": calibrated([("L1", "fp32", 0.9)])})) as client:
        assert (
            client.post("/segment?level=2", files={"file": DATA, "reference": REFERENCE}).status_code == 200
        )
        text = client.get("/metrics").content
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")
