"""Bundles are replaced while requests run."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.arrays import Tiles
from server.errors import BundleDamaged, ReloadFailed, ReloadRunning, UnknownModel
from server.reload import Reload
from server.runtime.deployment import Deployment
from server.segment.request import SegmentParams, Upload
from server.service import open_service
from tests.support import loading
from tests.support.files import SMALL, Sent, mask_of, picture_bytes
from tests.support.server import full_server, until
from tests.support.service import bright, engine_of, fake_deployment, fake_service, quiet_settings

# Several chunks of windows of 64 x 64.
LARGE = picture_bytes(np.random.default_rng(0).integers(0, 256, (200, 300), dtype=np.uint8))


def dark(tiles: Tiles) -> np.ndarray:
    """The next version of `bright`."""
    return 1 - bright(tiles)


class Disk:
    """Bundles as a reload reads them."""

    def __init__(self) -> None:
        self.deployments: dict[str, Deployment] = {}
        self.put()
        self.error: Exception | None = None
        # Reading tells that it has begun, and waits for `go`.
        self.reading, self.go = threading.Event(), threading.Event()
        self.go.set()

    def put(self, run: Callable[[Tiles], np.ndarray] = bright, name: str = "fake") -> None:
        self.deployments = self.deployments | {name: fake_deployment(run, name=name)}

    def __call__(self, before: Mapping[str, Deployment] | None = None) -> dict[str, Deployment]:
        self.reading.set()
        assert self.go.wait(60)
        if self.error:
            raise self.error
        return self.deployments


class Scene:
    """A service on `fake`, how to reload it, and what a reload will read."""

    def __init__(self) -> None:
        self.disk = Disk()
        self.service = fake_service()
        self.service.registry.swap(self.disk.deployments)
        self.reload = Reload(self.disk, self.service)

    async def mask(self, data: bytes = SMALL, **options: Any) -> np.ndarray:
        return mask_of((await self.service.segment(Upload(Sent(data)), SegmentParams(), **options)).body)

    def outcomes(self) -> list[float | None]:
        """Good and failed reloads in the metrics."""
        value = self.service.metrics.registry.get_sample_value
        return [value("unetpp_reloads_total", {"outcome": outcome}) for outcome in ("ok", "failed")]


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    scene = Scene()
    with contextlib.closing(scene.service):
        yield scene


class TestSwap:
    async def test_reload_switches_answers_and_models(self, scene: Scene) -> None:
        before = await scene.mask()
        scene.disk.put(dark)
        scene.disk.put(name="second")
        changes = await scene.reload()
        assert [line.partition(" (")[0] for line in changes] == ["fake has changed", "second is new"]
        assert np.array_equal(await scene.mask(), 1 - before)
        assert scene.service.registry.resolve(SegmentParams(model="second")).model == "second"
        second = scene.disk.deployments["second"]
        assert not second.retired
        scene.disk.deployments = {"fake": scene.disk.deployments["fake"]}
        assert await scene.reload() == ["second is gone"]
        assert second.retired
        with pytest.raises(UnknownModel):
            scene.service.registry.resolve(SegmentParams(model="second"))
        assert scene.outcomes() == [2, 0]

    async def test_reload_keeps_unchanged_deployments(self, scene: Scene) -> None:
        scene.disk.put(name="second")
        await scene.reload()
        before = scene.service.registry.resolve(SegmentParams()).deployment
        scene.disk.put(dark, name="second")
        assert len(await scene.reload()) == 1
        assert scene.service.registry.resolve(SegmentParams()).deployment is before
        assert await scene.reload() == []

    @settings(max_examples=20)
    @given(st.sets(st.integers(0, 40), max_size=5))
    def test_reload_leaves_running_requests_on_the_version_they_began_with(self, swaps: set[int]) -> None:
        async def go() -> None:
            scene = Scene()
            with contextlib.closing(scene.service):
                registry = scene.service.registry
                versions = [registry.deployments, {"fake": fake_deployment(dark)}]
                expected = await scene.mask(LARGE)
                events, running = 0, []

                def begin() -> None:
                    target = registry.resolve(SegmentParams())
                    right = expected if target.deployment is versions[0]["fake"] else 1 - expected
                    running.append(
                        (asyncio.create_task(scene.mask(LARGE, target=target, on_progress=swap)), right)
                    )

                def swap(*_: Any) -> None:
                    nonlocal events
                    events += 1
                    if events in swaps:
                        registry.swap(versions[registry.deployments["fake"] is versions[0]["fake"]])
                        begin()

                for _ in range(3):
                    begin()
                while running:
                    task, right = running.pop()
                    assert np.array_equal(await task, right)

        asyncio.run(go())

    async def test_reload_frees_the_old_engine_after_its_last_request(self, scene: Scene) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def gated(tiles: Tiles) -> np.ndarray:
            begun.set()
            assert go_on.wait(60)
            return bright(tiles)

        gc.disable()  # nothing may wait for it
        try:
            scene.disk.put(gated)
            await scene.reload()
            engine = weakref.ref(engine_of(scene.disk.deployments["fake"]))
            task = asyncio.create_task(scene.mask())
            await asyncio.to_thread(begun.wait, 60)
            scene.disk.put(dark)
            await scene.reload()
            assert engine() is not None
            go_on.set()
            await task
            del task
            await scene.reload.wait()
            assert engine() is None
        finally:
            gc.enable()


class TestFailure:
    @pytest.mark.parametrize(
        "error",
        [BundleDamaged("x", file="weights.safetensors"), OSError(28, "x"), RuntimeError("a bug")],
        ids=repr,
    )
    async def test_reload_that_fails_keeps_the_old(
        self, scene: Scene, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = scene.service.registry.deployments
        scene.disk.error = error
        with pytest.raises(ReloadFailed) as caught:
            await scene.reload()
        assert caught.value.fields == getattr(error, "fields", {})
        assert scene.service.registry.deployments == before
        assert scene.outcomes() == [0, 1]
        assert (await scene.mask()).any()
        assert str(error) in caplog.text
        # And nothing stands in the way of the next one.
        scene.disk.error = None
        scene.disk.put(dark)
        assert len(await scene.reload()) == 1

    async def test_reload_without_the_default_model_fails(self, scene: Scene) -> None:
        scene.disk.deployments = {}
        scene.disk.put(name="other")
        with pytest.raises(ReloadFailed) as caught:
            await scene.reload()
        assert caught.value.fields == {"value": "fake", "allowed": ["other"]}
        assert list(scene.service.registry.deployments) == ["fake"]
        assert scene.outcomes() == [0, 1]

    @pytest.mark.parametrize("damaged", [True, False], ids=["a later one is damaged", "the default is gone"])
    async def test_reload_that_fails_keeps_nothing_of_the_new(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
    ) -> None:
        bundles = loading.Scene(tmp_path, monkeypatch)
        served, opened, broken = (bundles.deployment() for _ in range(3))
        broken.recommended.failure = BundleDamaged("x", file="L2.onnx")
        read = {"other": opened} | ({"fake": broken} if damaged else {})
        service = open_service(quiet_settings(), {"fake": served})
        with contextlib.closing(service), contextlib.closing(bundles):
            service.open()
            with pytest.raises(ReloadFailed):
                await Reload(lambda _: read, service)()
            assert opened.recommended.engine is not None
            assert (service.loader.count_open(), opened.retired, served.retired) == (1, True, False)

    async def test_reload_runs_one_at_a_time_and_outlives_its_caller(self, scene: Scene) -> None:
        scene.disk.go.clear()
        first = asyncio.create_task(scene.reload())
        await asyncio.sleep(0)
        with pytest.raises(ReloadRunning):
            await scene.reload()
        first.cancel()
        scene.disk.go.set()
        await scene.reload.wait()
        assert scene.outcomes() == [1, 0]

    async def test_request_during_a_reload_reloads_once_more(self, scene: Scene) -> None:
        """Its bundle may have come after the running one read. However many requests come, one more reload sees all."""
        scene.disk.go.clear()
        scene.reload.request()
        for _ in range(3):
            scene.reload.request()
        scene.disk.go.set()
        await asyncio.sleep(0)
        scene.disk.put(name="second")
        await scene.reload.wait()
        assert "second" in scene.service.registry.deployments
        assert scene.outcomes() == [2, 0]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Disk]]:
    """A server with an ops port, and the bundles that its reloads read."""
    disk = Disk()
    monkeypatch.setattr("server.app.read_deployments", lambda *given: disk())
    with full_server(http={"ops_port": 1}) as opened:
        yield opened, disk


def test_post_reload_answers_with_the_changes(served: tuple[Any, Disk], problem: Callable[..., Any]) -> None:
    opened, disk = served
    before = mask_of(opened.client.post("/segment", content=SMALL).content)
    disk.put(dark)
    disk.put(name="second")
    answer = opened.ops.post("/reload")
    assert answer.status_code == 200
    assert [line.partition(" (")[0] for line in answer.json()["changed"]] == [
        "fake has changed",
        "second is new",
    ]
    assert np.array_equal(mask_of(opened.client.post("/segment", content=SMALL).content), 1 - before)
    assert {model["name"] for model in opened.client.get("/models").json()} == {"fake", "second"}
    assert opened.ops.get("/health/ready").status_code == 200
    disk.error = BundleDamaged("size differs", file="weights.safetensors")
    assert problem(opened.ops.post("/reload"), 422, "reload-failed").file == "weights.safetensors"
    disk.error = None
    disk.go.clear()
    disk.reading.clear()
    with ThreadPoolExecutor(1) as background:
        first = background.submit(opened.ops.post, "/reload")
        assert disk.reading.wait(60)
        answer = opened.ops.post("/reload")
        problem(answer, 409, "reload-running")
        assert answer.headers["retry-after"]
        disk.go.set()
        assert first.result().status_code == 200
    metrics = opened.ops.get("/metrics").text
    assert 'unetpp_reloads_total{outcome="failed"} 1.0' in metrics
    assert 'graph="L1",model="second"' in metrics


def test_post_reload_while_stopping_gets_503_and_reads_nothing(
    served: tuple[Any, Disk], problem: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    opened, disk = served
    disk.error = AssertionError("the server would wait for this")
    opened.app.state.operations.stopping.begun = True
    problem(opened.ops.post("/reload"), 503, "not-ready")
    opened.app.state.operations.reload.request()
    assert "not reloaded" in caplog.text
    assert 'unetpp_reloads_total{outcome="failed"} 0.0' in opened.ops.get("/metrics").text


def test_post_reload_with_tensorrt_is_refused(problem: Callable[..., Any]) -> None:
    """Its engines are built for minutes, on the device that every request waits for."""
    with full_server(http={"ops_port": 1}, runtime={"provider": "tensorrt"}) as opened:
        problem(opened.ops.post("/reload"), 422, "reload-failed")
        assert opened.client.post("/segment", content=SMALL).status_code == 200


def test_jobs_run_on_the_version_at_their_start(served: tuple[Any, Disk]) -> None:
    """A waiting job whose model is gone fails."""
    opened, disk = served
    begun, go_on = threading.Event(), threading.Event()

    def gated(tiles: Tiles) -> np.ndarray:
        begun.set()
        assert go_on.wait(60)
        return bright(tiles)

    def submit(model: str) -> str:
        answer = opened.client.post(f"/jobs?model={model}&level=1", content=SMALL)
        assert answer.status_code == 202, answer.text
        return answer.headers["location"]

    def result(job: str) -> dict[str, Any] | np.ndarray:
        until(lambda: opened.client.get(job).json()["state"] in ("done", "failed"))
        answer = opened.client.get(job).json()
        return (
            answer["error"]
            if answer["state"] == "failed"
            else mask_of(opened.client.get(f"{job}/result").content)
        )

    expected = mask_of(opened.client.post("/segment?level=1", content=SMALL).content)
    disk.put()
    disk.put(gated, name="second")
    disk.put(name="third")
    assert opened.ops.post("/reload").status_code == 200
    running = submit("second")
    assert begun.wait(60)
    waiting = [submit("second"), submit("third")]
    disk.put(dark, name="second")
    del disk.deployments["third"]
    assert opened.ops.post("/reload").status_code == 200
    go_on.set()
    assert np.array_equal(result(running), expected)
    assert np.array_equal(result(waiting[0]), 1 - expected)
    assert result(waiting[1])["code"] == "unknown-model"
