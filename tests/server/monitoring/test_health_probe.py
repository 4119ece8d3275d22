import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import NotReady
from server.logs import REQUEST_ID
from server.monitoring import model_info
from server.monitoring.health_probe import MAX_FAILURES, HealthProbe
from tests.support.files import SMALL
from tests.support.service import FakeDevice, bright, engine_of, opened_service, segment


class Engine:
    fails = False

    def __call__(self, tiles: Tiles) -> np.ndarray:
        if self.fails:
            raise RuntimeError("secret")
        return bright(tiles)


class Scene:
    """A probe of a service whose engine fails when a test says so; test tiles run whenever they are asked for, and give up soon."""

    def __init__(self, service: Any, device: FakeDevice) -> None:
        self.service, self.device = service, device
        self.probe = self.make_probe()
        self.deployment = service.registry.get("fake")

    def make_probe(self, fresh_s: float = -1.0, retry_s: float = 0.0) -> HealthProbe:
        return HealthProbe(self.service, fresh_s, timeout_s=0.05, retry_s=retry_s)

    @property
    def batches(self) -> list[int]:
        return engine_of(self.deployment).batches


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def scene(engine: Engine) -> Iterator[Scene]:
    device = FakeDevice()
    with opened_service(engine, device=device) as service:
        yield Scene(service, device)
        device.release()


async def ended(scene: Scene) -> None:
    """Until the test tile that runs has ended."""
    for _ in range(200):
        await asyncio.sleep(0.001)
        if not any(task.get_coro().__name__ == "_probe" for task in asyncio.all_tasks()):  # type: ignore[union-attr]
            return


async def test_check_runs_a_small_tile_for_all_who_ask_at_the_same_time(scene: Scene) -> None:
    await asyncio.gather(*(scene.probe.check() for _ in range(5)))
    assert scene.batches == [1]
    assert scene.probe.is_answering
    assert scene.deployment.instances["L1", "fp32"].last_success > 0


async def test_check_runs_nothing_after_a_recent_success(scene: Scene) -> None:
    probe = scene.make_probe(fresh_s=1000)
    await segment(scene.service, SMALL)
    before = len(scene.batches)
    await probe.check()
    probe.check_device()
    assert len(scene.batches) == before


async def test_check_runs_no_tile_soon_after_another(scene: Scene, engine: Engine) -> None:
    probe = scene.make_probe(retry_s=1000)
    engine.fails = True
    for _ in range(5):
        with pytest.raises(NotReady):
            await probe.check()
    assert scene.batches == [1]


@pytest.mark.parametrize("fault", ["raises", "hangs"])
class TestFaults:
    def start(self, scene: Scene, engine: Engine, fault: str) -> None:
        engine.fails = fault == "raises"
        if fault == "hangs":
            scene.device.hold()

    def mend(self, scene: Scene, engine: Engine) -> None:
        engine.fails = False
        scene.device.release()

    async def test_first_not_ready_then_not_live_until_it_answers_again(
        self, scene: Scene, engine: Engine, fault: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        await scene.probe.check()
        self.start(scene, engine, fault)
        for _ in range(MAX_FAILURES):
            with pytest.raises(NotReady):
                await scene.probe.check()
        assert not scene.probe.is_answering
        with pytest.raises(NotReady):
            scene.probe.check_device()
        # The details once, and not again for each.
        assert [record.exc_info is not None for record in caplog.records] == [True, False, False]
        self.mend(scene, engine)
        await asyncio.sleep(0)
        await scene.probe.check()
        scene.probe.check_device()

    async def test_a_single_failure_is_no_reason_to_restart(
        self, scene: Scene, engine: Engine, fault: str
    ) -> None:
        for _ in range(MAX_FAILURES + 1):
            self.start(scene, engine, fault)
            with pytest.raises(NotReady):
                await scene.probe.check()
            self.mend(scene, engine)
            await asyncio.sleep(0)
            await scene.probe.check()
            scene.probe.check_device()

    async def test_check_device_starts_test_tiles_and_waits_for_none(
        self, scene: Scene, engine: Engine, fault: str
    ) -> None:
        self.start(scene, engine, fault)
        with pytest.raises(NotReady):  # noqa: PT012 - in the end
            for _ in range(MAX_FAILURES + 1):
                scene.probe.check_device()
                await ended(scene)
        self.mend(scene, engine)
        await asyncio.sleep(0)
        await scene.probe.check()

    async def test_a_request_that_succeeds_is_as_good_as_a_test_tile(
        self, scene: Scene, engine: Engine, fault: str
    ) -> None:
        probe = scene.make_probe()
        self.start(scene, engine, fault)
        for _ in range(MAX_FAILURES):
            with pytest.raises(NotReady):
                await probe.check()
        with pytest.raises(NotReady):
            probe.check_device()
        await ended(scene)
        self.mend(scene, engine)
        await segment(scene.service, SMALL, level=2)
        assert probe.is_answering
        probe.check_device()


async def test_failed_requests_alone_never_call_for_a_restart(scene: Scene, engine: Engine) -> None:
    """A batch that fails may be its caller's doing."""
    for _ in range(2 * MAX_FAILURES):
        engine.fails = True
        with pytest.raises(Exception, match="secret"):
            await segment(scene.service, SMALL)
        engine.fails = False
        await scene.probe.check()
        scene.probe.check_device()


async def test_probe_takes_the_cheapest_open_graph_and_opens_none(scene: Scene) -> None:
    for graph in ("L1", "L2"):
        scene.deployment.instances[graph, "fp32"].engine = None
    await scene.probe.check()
    assert scene.deployment.instances["L3", "fp32"].last_success > 0
    assert scene.deployment.instances["L1", "fp32"].engine is None


async def test_log_takes_a_test_tile_for_no_request(
    scene: Scene, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    logging.getLogger("server.monitoring.health_probe").addFilter(
        lambda _: seen.append(REQUEST_ID.get()) or True
    )  # type: ignore[func-returns-value]
    engine.fails = True
    REQUEST_ID.set("of the request")
    with pytest.raises(NotReady):
        await scene.probe.check()
    assert seen == [""]


def test_model_info_describes_routes_engines_and_calibration(shipped_bundle: Any, tmp_path: Any) -> None:
    from server.runtime.deployment import read_deployment
    from server.settings import BatchingSettings, RuntimeSettings

    deployment = read_deployment(shipped_bundle, RuntimeSettings(tuning_folder=tmp_path), BatchingSettings())
    (info,) = model_info.describe({"nuclei": deployment})
    assert (info.model, info.dims, info.sha256) == ("nuclei", 2, deployment.bundle.sha256)
    assert info.routes[0] == ("accurate", 4, "accurate")
    levels = [(level, f"L{level}") for level in (1, 2, 3, 4)]
    assert [route[1:] for route in info.routes[1:]] == levels * 2
    assert [route[0] for route in info.routes[1:]] == ["fast"] * 4 + ["auto"] * 4
    auto = [(graph, precision) for graph, precision, _, _, is_auto, _ in info.engines if is_auto == "true"]
    assert dict(auto) == dict(deployment.selection.auto)
    assert {reason for *_, reason in info.engines} == {"rule"}
    assert len(info.calibrated) == len(deployment.manifest.calibration.rows)
