"""Every metric moves when it should, as a scrape of a real server shows."""

import concurrent.futures
import contextlib
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.segment.agreement import Agreement
from server.segment.pipeline import Sample

from server.arrays import Tiles
from server.segment import probe
from tests.support.files import nifti_bytes, picture_bytes
from tests.support.server import serving, until
from tests.support.service import bright, calibrated, fake_app

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
DATA = picture_bytes(GREY)
# Of the 127 pixels above the mean the reference has 64, and no others.
REFERENCE = picture_bytes((GREY >= 192).astype(np.uint8) * 255)
FOUND = int(np.count_nonzero(GREY.mean() < GREY))

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(client: httpx.Client) -> Series:
    """Value by name and labels."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def value(client: httpx.Client, metric: str, **labels: str) -> float:
    return scraped(client)[f"unetpp_{metric}", tuple(sorted(labels.items()))]


class Held:
    """An engine that waits for the test, but for the small tiles of probes."""

    def __init__(self) -> None:
        self.inside, self.leave = threading.Event(), threading.Event()

    def __call__(self, tiles: Tiles) -> np.ndarray:
        if tiles.pixels.shape[-1] > 8:
            self.inside.set()
            assert self.leave.wait(60)
        return bright(tiles)


@contextlib.contextmanager
def crowded(count: int, **settings: Any) -> Iterator[httpx.Client]:
    """So many requests of one tile: one runs, the others wait."""
    engine = Held()
    with (
        serving(fake_app(engine, batching={"max_batch": 1}, **settings)) as client,
        concurrent.futures.ThreadPoolExecutor(count) as pool,
    ):
        posted = [pool.submit(client.post, "/segment?level=1", content=DATA) for _ in range(count)]
        try:
            assert engine.inside.wait(30)
            until(lambda: value(client, "requests_in_flight") == count)
            yield client
        finally:
            engine.leave.set()
        assert [answer.result().status_code for answer in posted] == [200] * count


def test_labels_are_closed_and_there_before_the_first_request() -> None:
    quality = {"agreement_share": 1, "agreement_fewest_per_hour": 0}
    settings: dict[str, Any] = {"limits": {"max_wait_s": 60.0, "max_body_mb": 1}, "quality": quality}
    pace = {"L1": 0.001 / 256, "L2": 0.001 / 256, "L3": 1.0, "L4": 1.0, "accurate": 0.001 / 256}
    with serving(
        fake_app(pace=pace, changes={"calibration": calibrated([("L1", "fp32", 0.9)])}, **settings)
    ) as client:
        before = {key for key in scraped(client) if key[0].startswith("unetpp_")}
        for query, data, status in (
            ("", DATA, 200), ("level=1", DATA, 200), ("level=4&min_level=1", DATA, 200), ("level=4", DATA, 413),
            ("level=9", DATA, 422), ("level=abc", DATA, 422), ("model=evil", DATA, 404), ("level=1", b"evil", 415),
            ("level=1", bytes(2_000_000), 413), ("level=1&deadline_ms=0", DATA, 422),
        ):  # fmt: skip
            assert client.post(f"/segment?{query}", content=data).status_code == status, query
        assert (
            client.post("/segment?level=2", files={"file": DATA, "reference": REFERENCE}).status_code == 200
        )
        job = client.post("/jobs?level=1", content=DATA).json()["id"]
        until(lambda: client.get(f"/jobs/{job}").json()["state"] == "done")
        after = {key for key in scraped(client) if key[0].startswith("unetpp_")}
        assert after == before
        assert not any("evil" in str(key) for key in after)


def test_what_waits_is_shown() -> None:
    with crowded(3) as client:
        until(lambda: value(client, "queue_tiles", urgency="interactive") == 2)
        assert value(client, "queue_oldest_seconds", urgency="interactive") > 0
        assert value(client, "queue_tiles", urgency="batch") == 0
        client.post("/jobs?level=1", content=DATA)
        until(lambda: value(client, "queue_tiles", urgency="batch") == 1)
        assert value(client, "queue_oldest_seconds", urgency="batch") > 0
    # The job may run on, and its client asks no more.


def test_nothing_waits_in_the_end() -> None:
    with crowded(3) as client:
        pass
    with serving(fake_app()) as client:
        assert client.post("/segment", content=DATA).status_code == 200
        for urgency in ("interactive", "batch"):
            assert value(client, "queue_tiles", urgency=urgency) == 0
            assert value(client, "queue_oldest_seconds", urgency=urgency) == 0
        assert value(client, "predicted_wait_seconds") == 0


def test_a_newcomers_wait_is_predicted() -> None:
    """Each of the others has its tile first, at 2 s each as measured; the one that runs is nearly done or not."""
    with crowded(3, pace=2.0 / 256) as client:
        assert 4 <= value(client, "predicted_wait_seconds") <= 6
        assert 4 <= value(client, "backlog_seconds") <= 6


def test_batches_and_how_full_they_are() -> None:
    with serving(fake_app(batching={"max_batch": 4})) as client:
        stack = nifti_bytes(np.stack([GREY] * 6, axis=2).astype(np.float32))
        assert client.post("/segment?level=2", content=stack).status_code == 200
        found = scraped(client)
        graph = (("graph", "L2"),)
        runs = found["unetpp_batch_size_tiles_count", graph]
        assert found["unetpp_batch_size_tiles_sum", graph] == 6
        assert found["unetpp_batch_fill_ratio_count", graph] == runs
        assert found["unetpp_batch_fill_ratio_sum", graph] == 6 / 4
        assert found["unetpp_batch_fill_ratio_count", (("graph", "L1"),)] == 0


class TestRefusals:
    def refused(self, client: httpx.Client) -> dict[str, float]:
        found = scraped(client).items()
        return {
            dict(labels)["reason"]: count
            for (name, labels), count in found
            if name == "unetpp_refusals_total" and count
        }

    def test_of_what_is_too_large(self) -> None:
        with serving(fake_app(limits={"max_body_mb": 1, "max_pixels": 100})) as client:
            # By the length that it has by its own words, by the bytes that came, and by its header.
            assert client.post("/segment", content=bytes(2**20 + 1)).status_code == 413
            assert self.refused(client) == {"too_large": 1}
            pieces = (bytes(2**18) for _ in range(5))
            assert client.post("/segment", content=pieces).status_code == 413
            assert client.post("/segment", content=DATA).status_code == 413
            assert client.post("/jobs", content=DATA).status_code == 413
            assert self.refused(client) == {"too_large": 4}

    def test_of_one_too_many(self) -> None:
        with crowded(2, http={"max_in_flight": 2}) as client:
            assert client.post("/segment", content=DATA).status_code == 429
            assert self.refused(client) == {"in_flight": 1}

    def test_of_what_would_wait_too_long(self) -> None:
        with crowded(3, pace=2.0 / 256, limits={"max_wait_s": 7.5}) as client:
            assert client.post("/segment", content=DATA).status_code == 429
            assert self.refused(client) == {"wait": 1}

    def test_looking_is_not_refused(self) -> None:
        """Neither readiness nor what is not there."""
        with serving(fake_app()) as client:
            assert client.get("/jobs/none").status_code == 404
            assert client.get("/models/none").status_code == 404
            assert client.post("/segment", content=b"nonsense").status_code == 415
            assert self.refused(client) == {}


class TestReadiness:
    def test_what_is_known_is_shown_and_nothing_is_run_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "PROBE_EVERY_S", 0)
        monkeypatch.setattr(probe, "PROBE_RETRY_S", 0)
        broken, calls = threading.Event(), []

        def touchy(tiles: Tiles) -> np.ndarray:
            calls.append(len(tiles))
            if broken.is_set():
                raise RuntimeError("secret")
            return bright(tiles)

        with serving(fake_app(touchy)) as client:
            assert (value(client, "ready"), value(client, "stopping"), calls) == (1, 0, [])
            broken.set()
            assert client.get("/health/ready").status_code == 503
            assert value(client, "ready") == 0
            broken.clear()
            until(lambda: client.get("/health/ready").status_code == 200)
            assert value(client, "ready") == 1

    def test_a_server_that_stops_says_so(self) -> None:
        app = fake_app()
        with serving(app) as client:
            app.state.operations.stopping.begun = True
            assert (value(client, "ready"), value(client, "stopping")) == (0, 1)
            app.state.operations.stopping.begun = False


def test_bundles_are_shown_as_they_are() -> None:
    rows = [("L1", "fp32", 0.8), ("accurate", "fp32", 0.9, "other")]
    with serving(fake_app(changes={"calibration": calibrated(rows)})) as client:
        assert value(client, "bundle_info", model="fake", dims="2", sha256="") == 1
        place = {"model": "fake", "precision": "fp32"}
        assert value(client, "calibrated_iou", mode="fast", level="1", engine="fake", **place) == 0.8
        assert value(client, "calibrated_dice", mode="accurate", level="4", engine="other", **place) == 0.9
        assert (
            value(client, "calibrated_latency_seconds", mode="fast", level="1", engine="fake", **place)
            == 0.001
        )


def test_the_shipped_bundles_manifest_has_its_hash(client: httpx.Client, shipped_bundle: Any) -> None:
    import hashlib

    sha256 = hashlib.sha256((shipped_bundle / "manifest.json").read_bytes()).hexdigest()[:16]
    assert value(client, "bundle_info", model="nuclei", dims="2", sha256=sha256) == 1


class TestReferences:
    LABELS = {"model": "fake", "mode": "fast", "level": "2", "class": "bright"}  # noqa: RUF012

    def both(self, client: httpx.Client, what: str) -> tuple[float, float]:
        return tuple(value(client, f"reference_{what}_{part}", **self.LABELS) for part in ("count", "sum"))  # type: ignore[return-value]

    @pytest.mark.parametrize("send", ["image", "volume", "job"])
    def test_are_observed_as_their_headers_say(self, send: str) -> None:
        files = {"file": DATA, "reference": REFERENCE}
        if send == "volume":
            files = {name: nifti_bytes(np.stack([np.asarray(pixels)] * 2, axis=2).astype(np.float32))
                     for name, pixels in (("file", GREY), ("reference", (GREY >= 192).astype(np.uint8)))}  # fmt: skip
        with serving(fake_app()) as client:
            if send == "job":
                job = client.post("/jobs?level=2", files=files).json()["id"]
                until(lambda: client.get(f"/jobs/{job}").json()["state"] == "done")
            else:
                answer = client.post("/segment?level=2", files=files)
                assert answer.headers["x-segment-iou"] == f"{64 / FOUND:.4f}"
            assert self.both(client, "iou") == (1, pytest.approx(64 / FOUND))
            assert self.both(client, "dice") == (1, pytest.approx(2 * 64 / (64 + FOUND)))
            assert value(client, "reference_samples_total", outcome="compared") == 1

    def test_nothing_where_there_is_nothing_counts_in_the_answer_only(self) -> None:
        nothing = picture_bytes(np.zeros((16, 16), dtype=np.uint8))
        with serving(fake_app()) as client:
            answer = client.post("/segment?level=2", files={"file": nothing, "reference": nothing})
            assert answer.headers["x-segment-iou"] == "1.0000"
            assert self.both(client, "iou") == (0, 0)
            assert value(client, "reference_samples_total", outcome="both_empty") == 1


class TestAgreement:
    def test_a_fast_answer_is_held_against_an_accurate_one(self) -> None:
        with serving(fake_app(quality={"agreement_share": 1})) as client:
            assert client.post("/segment?level=2", content=DATA).status_code == 200
            until(lambda: value(client, "agreement_samples_total", outcome="compared") == 1)
            labels = {"model": "fake", "mode": "fast", "level": "2", "class": "bright"}
            assert value(client, "agreement_iou_sum", **labels) == 1
            # What nobody asked for is no request.
            assert (
                value(
                    client,
                    "requests_total",
                    model="fake",
                    mode="accurate",
                    requested_level="4",
                    served_level="4",
                    outcome="ok",
                )
                == 0
            )

    def test_a_server_that_stops_looks_at_nothing_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        begun: list[Sample] = []

        async def compare(self: Agreement, sample: Sample) -> None:
            pass

        def noted(self: Agreement, sample: Sample) -> Any:
            begun.append(sample)
            return compare(self, sample)

        monkeypatch.setattr(Agreement, "_compare", noted)
        app = fake_app(quality={"agreement_share": 1})
        with serving(app) as client:
            assert client.post("/segment?level=2", content=DATA).status_code == 200
            # Begun before the answer is sent, if at all.
            assert len(begun) == 1
            app.state.operations.drain()
            assert client.post("/segment?level=2", content=DATA).status_code == 200
            assert len(begun) == 1


def test_promtool_finds_nothing_to_say() -> None:
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("needs promtool, which comes with Prometheus")
    with serving(fake_app(changes={"calibration": calibrated([("L1", "fp32", 0.9)])})) as client:
        assert (
            client.post("/segment?level=2", files={"file": DATA, "reference": REFERENCE}).status_code == 200
        )
        text = client.get("/metrics").content
    told = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (told.returncode, told.stdout + told.stderr) == (0, b"")
