"""The path of a request: what is done once, where, and what becomes of one that is given up."""

import asyncio
import gc
import json
import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

import server.segment.admission
import server.segment.service
from server.arrays import Tiles
from server.errors import (
    DeadlinePassed,
    InferenceFailed,
    NotReady,
    UnknownModel,
)
from server.imaging import encode as encoding
from server.metrics import PHASES
from server.segment.request import QoS, Response, SegmentParams, Upload
from tests.server.segment.inputs import (
    IMAGE,
    INPUTS,
    TWO,
    VOLUME,
    Counted,
    answer,
    counted,
    thirds,
)
from tests.support.curves import curve, point
from tests.support.files import Sent, nifti_bytes, pages_bytes, picture_bytes
from tests.support.memory import memory_stays_below
from tests.support.service import FakeDevice, FixedLatency, bright, engine_of, opened_service, segment


class TestOnce:
    @pytest.mark.parametrize("name", INPUTS)
    async def test_headers_are_read_and_formats_and_placement_chosen_once(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data, changes, params = INPUTS[name]
        calls: Counter[str] = Counter()

        def count(module: Any, function: str) -> None:
            original = getattr(module, function)

            def wrapper(*args: Any, **kwargs: Any) -> Any:
                calls[function] += 1
                return original(*args, **kwargs)

            monkeypatch.setattr(module, function, wrapper)

        count(server.segment.service, "read_headers")
        count(server.segment.service, "decode_upload")
        count(server.segment.admission, "place")
        count(encoding, "choose")
        await answer(data, changes=changes, min_level=1, **params)
        assert calls == {"read_headers": 1, "decode_upload": 1, "place": 1, "choose": 1}

    @pytest.mark.parametrize("name", INPUTS)
    async def test_estimate_is_what_is_run(self, name: str) -> None:
        data, changes, params = INPUTS[name]
        counter, progress = Counted(), []
        with opened_service(counter, changes, latency=FixedLatency(0.5)) as service:
            upload = Upload(Sent(data))
            estimate = await service.estimate(upload, SegmentParams(**params))
            assert upload.file.tell() == 0
            assert counted(service, "pixels_total", kind="input") == 0
            await segment(service, data, on_progress=lambda *now: progress.append(now), **params)
            assert counter.tiles == estimate.windows == progress[-1][2]
            assert estimate.seconds == 0.5 * estimate.windows
            pixels = sum(counted(service, "pixels_total", kind=kind) for kind in ("input", "padding"))
            assert counter.pixels == pixels == estimate.windows * estimate.tile_pixels
            assert counted(service, "pixels_total", kind="padding") == estimate.padding
        # Of the grid that has more: of a resampled volume that may be the network's.
        least = {"long image": 28000, "image": 1240}.get(name, VOLUME.size)
        assert estimate.pixels > least if name == "resampled" else estimate.pixels == least

    @pytest.mark.parametrize("name", INPUTS)
    async def test_progress_goes_up_to_the_end(self, name: str) -> None:
        data, changes, params = INPUTS[name]
        seen: list[tuple[str, int, int]] = []
        await answer(data, changes=changes, on_progress=lambda *now: seen.append(now), **params)
        stages, done, totals = zip(*seen, strict=True)
        assert list(dict.fromkeys(stages)) == ["decode", "infer", "encode"]
        assert stages == tuple(sorted(stages, key=["decode", "infer", "encode"].index))
        assert done == tuple(sorted(done))
        assert done[0] == 0
        assert set(totals) == {done[-1]}
        assert done[-2] == done[-1]

    @pytest.mark.parametrize("name", INPUTS)
    async def test_timings_name_every_phase(self, name: str) -> None:
        data, changes, params = INPUTS[name]
        timings = (await answer(data, changes=changes, **params)).timings
        assert set(timings) == {"decode", "queue", "infer", "restore", "postprocess", "encode"} <= set(PHASES)
        assert all(seconds >= 0 for seconds in timings.values())

    @pytest.mark.parametrize(
        ("changes", "params"),
        [
            ({"dims": 3, **TWO}, {"format": "npz"}),
            ({"dims": 3, "spacing": (0.7, 0.7, 0.7), **TWO}, {}),
            (TWO, {"format": "json", "axis": "0"}),
            ({"dims": 3, **TWO}, {"format": "csv", "instances": True}),
            (TWO, {"fill_holes": True, "keep_largest": True, "threshold": 0.2}),
            ({"dims": 3, **TWO}, {"tta": "flips"}),
            (
                {"dims": 3, **TWO, "depth_curve": curve(point((1, 2), -1.0))},
                {"mode": "auto", "format": "npz"},
            ),
        ],
    )
    async def test_memory_is_no_more_than_estimated(
        self, changes: dict[str, Any], params: dict[str, Any]
    ) -> None:
        voxels = np.random.default_rng(0).normal(1, 1, (90, 90, 90)).clip(0, 2).round().astype(np.float32)
        data = nifti_bytes(voxels)
        with opened_service(thirds, changes) as service:
            estimate = await service.estimate(Upload(Sent(data)), SegmentParams(**params))
            await segment(service, nifti_bytes(VOLUME % 3), **params)
            with memory_stays_below(estimate.memory_bytes / 1e6 + 10):
                await segment(service, data, **params)


class TestThreads:
    """Small PNGs stay on the event loop; volumes and long work have threads of their own."""

    @pytest.mark.parametrize(
        ("data", "params", "thread"),
        [
            (IMAGE, {}, "MainThread"),
            (IMAGE, {"format": "json"}, "worker"),
            (IMAGE, {"threshold": 0.4}, "worker"),
            (picture_bytes(np.zeros((200, 200), np.uint8)), {}, "worker"),
            (picture_bytes(VOLUME[0], "TIFF"), {}, "worker"),
            (picture_bytes(Pillow.new("L", (1100, 1000))), {"instances": True}, "volume"),
            (picture_bytes(Pillow.new("L", (1100, 1000))), {"format": "coco"}, "volume"),
            (nifti_bytes(VOLUME), {}, "volume"),
            (pages_bytes(VOLUME), {}, "volume"),
        ],
        ids=["small", "json", "threshold", "larger", "TIFF", "instances", "outlines", "volume", "stack"],
    )  # fmt: skip
    async def test_work_is_done_in_the_threads_that_suit_it(
        self, data: bytes, params: dict[str, Any], thread: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish, names = server.segment.service.finish_mask, []

        def noted(*args: Any) -> Any:
            names.append(threading.current_thread().name)
            return finish(*args)

        monkeypatch.setattr(server.segment.service, "finish_mask", noted)
        await answer(data, changes={"window": {"size": [512, 512], "overlap": 0.25}}, **params)
        assert names[0].startswith(thread)


class TestDegraded:
    async def test_response_metrics_and_report_tell_what_was_served(self) -> None:
        latency = FixedLatency({"accurate": 100.0, "L4": 100.0, "L3": 1.0})
        with opened_service(latency=latency) as service:
            response = await segment(service, IMAGE, min_level=1, format="json", qos=QoS(30.0))
            assert (response.requested.graph, response.target.graph, response.degraded) == (
                "accurate",
                "L3",
                "load",
            )
            report = json.loads(response.body)
            assert (report["mode"], report["level"], report["degraded"]) == ("fast", 3, "load")
            assert report["requested"] == {"mode": "accurate", "level": 4}
            labels = {"model": "fake", "requested_level": "4", "served_level": "3", "reason": "load"}
            assert counted(service, "degraded_total", **labels) == 1
            assert counted(service, "level_deficit_total", model="fake") == 1
            assert counted(service, "batch_size_tiles_count", graph="L3") == 1

    async def test_what_was_asked_for_says_nothing_of_it(self) -> None:
        report = json.loads((await answer(IMAGE, format="json", min_level=1)).body)
        assert not report.keys() & {"requested", "degraded"}


# 600 slices: three chunks of windows, of which one is cut ahead.
LONG = pages_bytes(np.random.default_rng(0).integers(0, 256, (600, 4, 4), dtype=np.uint8))


async def until(condition: Any) -> None:
    while not condition():  # noqa: ASYNC110 - threads have no event of the loop
        await asyncio.sleep(0.001)


class TestGivenUp:
    """What nobody waits for is not run, and nothing of it stays behind."""

    @pytest.fixture(autouse=True)
    def no_warnings(self, caplog: pytest.LogCaptureFixture) -> Any:
        yield
        gc.collect()
        assert not caplog.records

    async def serves_the_next(self, service: Any) -> None:
        """Which needs the whole budget of memory."""
        assert service.scheduler.is_idle
        assert (await segment(service, pages_bytes(VOLUME[:2]), qos=QoS(60.0))).body

    async def test_windows_of_a_caller_who_leaves_are_not_run(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device, limits={"pixels_in_flight": 1}) as service:
            task = asyncio.create_task(segment(service, LONG))
            await until(lambda: device.waiting)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            batches = engine_of(service.registry.get("fake")).batches
            device.release()
            await self.serves_the_next(service)
            # The batch that was running, and that of the next caller.
            assert len(batches) == 2
            assert counted(service, "windows_dropped_total", reason="cancelled") == 600 - batches[0]

    async def test_windows_of_a_failed_request_are_not_run(self) -> None:
        def fails(tiles: Tiles) -> np.ndarray:
            if len(tiles) > 2:
                raise RuntimeError("broken")
            return bright(tiles)

        with opened_service(fails, device=FakeDevice()) as service:
            with pytest.raises(InferenceFailed):
                await segment(service, LONG)
            assert len(engine_of(service.registry.get("fake")).batches) <= 2
            await self.serves_the_next(service)

    async def test_progress_that_raises_ends_the_work(self) -> None:
        def tell(stage: str, done: int, total: int) -> None:
            if done:
                raise KeyError

        with opened_service(device=FakeDevice()) as service:
            with pytest.raises(KeyError):
                await segment(service, LONG, on_progress=tell)
            assert sum(engine_of(service.registry.get("fake")).batches) < 600
            await self.serves_the_next(service)

    async def test_a_deadline_that_passes_while_it_waits(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            with pytest.raises(DeadlinePassed):
                await segment(service, LONG, qos=QoS(deadline=time.monotonic() + 2))
            device.release()
            await self.serves_the_next(service)
            assert counted(service, "windows_dropped_total", reason="late") >= 500

    async def test_closing_tells_who_waits(self) -> None:
        device = FakeDevice(held=True)
        with opened_service(device=device) as service:
            tasks = [asyncio.create_task(segment(service, IMAGE)) for _ in range(3)]
            await until(lambda: device.waiting)
            service.scheduler.close()
            device.release()
            late = asyncio.create_task(segment(service, IMAGE))
            results = await asyncio.gather(*tasks, late, return_exceptions=True)
            # The batch that ran is answered.
            assert all(isinstance(result, NotReady | Response) for result in results)
            assert isinstance(results[-1], NotReady)


class TestDoors:
    async def test_on_completed_is_called_with_each_finished_request(self) -> None:
        seen: list[Any] = []
        with opened_service() as service:
            service.on_completed = lambda *args: seen.append(args)
            await segment(service, IMAGE, level=1, threshold=0.4)
            with pytest.raises(UnknownModel):
                await segment(service, IMAGE, model="other")
        ((ticket, source, mask, params),) = seen
        assert (ticket.target.level, source.size, params.threshold) == (1, (40, 31), 0.4)
        assert np.array_equal(mask.classes, VOLUME[0] > VOLUME[0].mean())

    @pytest.mark.parametrize("name", ["image", "stack", "volume"])
    async def test_infer_decoded_gives_the_mask_of_the_same_input(self, name: str) -> None:
        data, changes, _ = INPUTS[name]
        seen: list[Any] = []
        with opened_service(changes=changes) as service:
            service.on_completed = lambda *args: seen.append(args)
            await segment(service, data)
            ((_, source, mask, params),) = seen
            again = await service.infer_decoded(
                source, service.registry.resolve(params), params, QoS(priority="batch")
            )
        assert np.array_equal(again.classes, mask.classes)

    async def test_accept_chooses_the_format_where_none_is_named(self) -> None:
        assert (await answer(IMAGE, accept="application/json")).media_type == "application/json"

    async def test_cpu_work_is_observed(self) -> None:
        with opened_service() as service:
            for _ in range(3):
                await segment(service, IMAGE)
            estimate = await service.estimate(Upload(Sent(IMAGE)), SegmentParams())
        assert estimate.cpu_s > 0
        assert estimate.device_s > 0
        assert estimate.fastest_s > 0


async def test_open_in_background_leaves_open_graphs_alone() -> None:
    with opened_service() as service:
        engine = engine_of(service.registry.get("fake"))
        service.open_in_background()
        assert (await segment(service, IMAGE)).body
        assert engine_of(service.registry.get("fake")) is engine


async def test_open_reads_the_shipped_bundles_and_serves(shipped_bundle: Any) -> None:
    from server.app import open_service
    from tests.support.service import quiet_settings

    service = open_service(quiet_settings(bundles=shipped_bundle, runtime={"precision": "fp32"}))
    service.open()
    deployment = service.registry.get(service.registry.default)
    assert deployment.recommended.engine is not None
    graph = deployment.recommended.graph
    other = next(level for level in deployment.manifest.levels if level != graph.level)
    try:
        response = await segment(service, IMAGE, level=other)
        assert response.timings["open"] > 0
        assert "open" not in (await segment(service, IMAGE, level=other)).timings
    finally:
        service.close()
