"""Bundles are replaced while requests are worked on."""

import asyncio
import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server.runtime.opening import OpenBundle
from server.segment.pipeline import Segmenter

from server.arrays import Tiles
from server.errors import BundleDamaged, NotReady, ReloadFailed, ReloadRunning, UnknownModel
from server.metrics import Metrics
from server.reload import Reload
from server.segment.request import SegmentRequest
from server.settings import BatchingSettings, LimitsSettings
from tests.conftest import ROOT
from tests.support.bundles import rewrite_hashes
from tests.support.files import Sent, mask_of, picture_bytes
from tests.support.server import full_server, until
from tests.support.service import bright

Bundles = dict[str, OpenBundle]

# Several steps of windows of 64 x 64.
LARGE = picture_bytes(np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8))
SMALL = picture_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8))


def dark(tiles: Tiles) -> np.ndarray:
    """The next version of `bright`."""
    return 1 - bright(tiles)


class Disk:
    """Bundles as a reload would find them."""

    def __init__(self) -> None:
        self.found: Bundles = fake_bundles()
        self.go = threading.Event()
        self.go.set()
        self.fails: Exception | None = None

    def __call__(self, before: Any) -> Bundles:
        self.go.wait()
        if self.fails:
            raise self.fails
        return self.found


@contextlib.contextmanager
def reloading() -> Iterator[tuple[Segmenter, Reload, Disk, list[bool]]]:
    """A segmenter on `fake`, how to reload it, what that will find, and what the metrics were told."""
    disk, told = Disk(), []

    class Told(Metrics):
        def reloaded(self, ok: bool) -> None:
            told.append(ok)

    metrics = Told()
    segmenter = Segmenter(disk.found, "fake", BatchingSettings(), LimitsSettings(), 2, metrics)
    with contextlib.closing(segmenter):
        yield segmenter, Reload(disk, segmenter, metrics), disk, told


async def mask(segmenter: Segmenter, data: bytes = SMALL, **options: Any) -> np.ndarray:
    return mask_of((await segmenter.segment(Sent(data), SegmentRequest(), **options)).body)


async def closed(reload: Reload) -> None:
    """Until all that was replaced is closed."""
    while reload._closing:
        await asyncio.wait(reload._closing)


class TestSwap:
    def test_answers_switch(self) -> None:
        async def go() -> None:
            with reloading() as (segmenter, reload, disk, told):
                before = await mask(segmenter)
                disk.found = fake_bundles(dark) | fake_bundles(name="second")
                assert await reload() == [
                    "fake has changed (levels 1, 2, 3, 4, precisions fp32)",
                    "second is new (levels 1, 2, 3, 4, precisions fp32)",
                ]
                assert np.array_equal(await mask(segmenter), 1 - before)
                assert segmenter.choose(SegmentRequest("second")).model == "second"
                disk.found = {"fake": disk.found["fake"]}
                assert await reload() == ["second is gone"]
                with pytest.raises(UnknownModel):
                    segmenter.choose(SegmentRequest("second"))
                assert told == [True, True]
                await closed(reload)

        asyncio.run(go())

    def test_what_has_not_changed_goes_on_as_it_is(self) -> None:
        async def go() -> None:
            with reloading() as (segmenter, reload, disk, _):
                disk.found |= fake_bundles(name="second")
                await reload()
                before = segmenter.choose(SegmentRequest()).lane
                disk.found = disk.found | fake_bundles(dark, name="second")
                assert len(await reload()) == 1
                # Its pace and its successes are known.
                assert segmenter.choose(SegmentRequest()).lane is before
                assert await reload() == []

        asyncio.run(go())

    @settings(max_examples=25)
    @given(st.sets(st.integers(0, 60), max_size=6))
    def test_a_request_ends_on_what_it_began_with(self, swaps: set[int]) -> None:
        """Whenever bundles are swapped, each answer is all of one version: the one that was open when the request began."""

        async def go() -> None:
            with reloading() as (segmenter, _, disk, _):
                versions = [disk.found, fake_bundles(dark)]
                expected = await mask(segmenter, LARGE)
                events, running = 0, []

                def begin() -> None:
                    choice = segmenter.choose(SegmentRequest())
                    right = expected if choice.served.opened is versions[0]["fake"] else 1 - expected
                    running.append((asyncio.create_task(mask(segmenter, LARGE, choice=choice, progress=tell)), right))

                def tell(*_: Any) -> None:
                    nonlocal events
                    events += 1
                    if events in swaps:
                        segmenter.swap(versions[segmenter.bundles["fake"] is versions[0]["fake"]])
                        begin()

                for _ in range(3):
                    begin()
                while running:
                    task, right = running.pop()
                    assert np.array_equal(await task, right)

        asyncio.run(go())

    def test_memory_is_freed_after_the_last_request(self) -> None:
        begun, go_on = threading.Event(), threading.Event()

        def gated(tiles: Tiles) -> np.ndarray:
            begun.set()
            go_on.wait()
            return bright(tiles)

        async def go() -> None:
            with reloading() as (segmenter, reload, disk, _):
                disk.found = fake_bundles(gated)
                await reload()
                await closed(reload)
                engine = weakref.ref(disk.found["fake"].engines["L1", "fp32"])
                task = asyncio.create_task(mask(segmenter))
                await asyncio.to_thread(begun.wait)
                disk.found = fake_bundles(dark)
                await reload()
                assert engine() is not None
                assert reload._closing
                go_on.set()
                await task
                del task
                await closed(reload)
                assert engine() is None

        gc.disable()  # nothing may wait for it
        try:
            asyncio.run(go())
        finally:
            gc.enable()

    def test_probes_follow(self) -> None:
        async def go() -> None:
            with reloading() as (segmenter, reload, disk, _):
                await segmenter.probe.check()

                def broken(tiles: Tiles) -> np.ndarray:
                    raise RuntimeError

                disk.found = fake_bundles(broken)
                await reload()
                with pytest.raises(NotReady):
                    await segmenter.probe.check()
                disk.found = fake_bundles()
                await reload()
                await segmenter.probe.check()

        asyncio.run(go())


class TestFailures:
    @pytest.mark.parametrize("error", [BundleDamaged("this file"), OSError(28, "this file"), RuntimeError("a bug")])
    def test_the_old_is_kept(self, error: Exception, caplog: pytest.LogCaptureFixture) -> None:
        async def go() -> None:
            with reloading() as (segmenter, reload, disk, told):
                before = segmenter.bundles
                disk.fails = error
                with pytest.raises(ReloadFailed, match=r"this file|the log"):
                    await reload()
                assert segmenter.bundles == before
                assert told == [False]
                assert (await mask(segmenter)).any()
                assert str(error) in caplog.text
                # And nothing stands in the way of the next one.
                disk.fails, disk.found = None, fake_bundles(dark)
                assert len(await reload()) == 1

        asyncio.run(go())

    def test_the_default_must_stay(self) -> None:
        async def go() -> None:
            with reloading() as (segmenter, reload, disk, told):
                disk.found = fake_bundles(name="other")
                with pytest.raises(ReloadFailed, match="default model 'fake'"):
                    await reload()
                assert list(segmenter.bundles) == ["fake"]
                assert told == [False]

        asyncio.run(go())

    def test_one_at_a_time(self) -> None:
        async def go() -> None:
            with reloading() as (_, reload, disk, told):
                disk.go.clear()
                first = asyncio.create_task(reload())
                await asyncio.sleep(0)
                with pytest.raises(ReloadRunning):
                    await reload()
                # Who asked may leave: it goes on.
                first.cancel()
                disk.go.set()
                await asyncio.wait([reload._running])
                await reload()
                assert told == [True, True]

        asyncio.run(go())


class TestSignals:
    def test_one_that_comes_while_another_runs_is_not_lost(self) -> None:
        """Its bundle may have come after that one looked. However many come, one more look sees all."""

        async def go() -> None:
            with reloading() as (segmenter, reload, disk, told):
                disk.go.clear()
                first = reload.begin()
                for _ in range(3):
                    reload.soon()
                disk.go.set()
                await first
                disk.found = fake_bundles(name="second") | disk.found
                while reload._running:
                    await asyncio.wait([reload._running])
                assert "second" in segmenter.bundles
                assert told == [True, True]

        asyncio.run(go())

    def test_alone(self) -> None:
        async def go() -> None:
            with reloading() as (_, reload, _, told):
                reload.soon()
                await asyncio.wait([reload._running])
                assert reload._running is None
                assert told == [True]

        asyncio.run(go())


def test_a_server_that_stops_reloads_no_more(problem: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with full_server(http={"ops_port": 1}) as opened:
        opened.app.state.operations.stopping.begun = True
        problem(opened.ops.post("/reload"), 503, "not-ready")
        opened.app.state.operations.reload.soon()
        assert "not reloaded: the server is stopping" in caplog.text
        assert opened.app.state.operations.reload._running is None
        opened.app.state.operations.stopping.begun = False


def test_not_with_tensorrt(problem: Callable[..., Any]) -> None:
    """Its engines are built for minutes, on the device that everybody waits for."""
    with full_server(http={"ops_port": 1}, runtime={"provider": "tensorrt"}) as opened:
        assert "restart the server" in problem(opened.ops.post("/reload"), 422, "reload-failed").detail
        assert opened.client.post("/segment", content=SMALL).status_code == 200


def test_over_the_ops_port(problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    monkeypatch.setattr("server.app.open_bundles", lambda settings, before, in_turn: disk(before))
    with full_server(http={"ops_port": 1}) as opened, ThreadPoolExecutor() as background:
        before = mask_of(opened.client.post("/segment", content=SMALL).content)
        disk.found = fake_bundles(dark) | fake_bundles(name="second")
        answer = opened.ops.post("/reload")
        assert answer.status_code == 200
        assert [line.partition(" (")[0] for line in answer.json()["changed"]] == ["fake has changed", "second is new"]
        assert np.array_equal(mask_of(opened.client.post("/segment", content=SMALL).content), 1 - before)
        assert {model["name"] for model in opened.client.get("/models").json()} == {"fake", "second"}
        assert opened.ops.get("/health/ready").status_code == 200
        disk.fails = BundleDamaged("weights.safetensors: size differs")
        assert "weights.safetensors" in problem(opened.ops.post("/reload"), 422, "reload-failed").detail
        disk.fails = None
        disk.go.clear()
        first = background.submit(opened.ops.post, "/reload")
        until(lambda: opened.app.state.operations.reload._running)
        answer = opened.ops.post("/reload")
        problem(answer, 409, "reload-running")
        assert answer.headers["retry-after"]
        disk.go.set()
        assert first.result().status_code == 200
        lines = opened.ops.get("/metrics").text.splitlines()
        assert 'unetpp_reloads_total{outcome="ok"} 2.0' in lines
        assert 'unetpp_reloads_total{outcome="failed"} 1.0' in lines
        assert any(line.startswith('unetpp_engine_info{auto="true",engine="fake",graph="L1",model="second"') for line in lines)


def test_a_server_that_stops_begins_none(problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.app.open_bundles", lambda *_: pytest.fail("it would wait for this in the end"))
    with full_server(http={"ops_port": 1}) as opened:
        opened.app.state.operations.stopping.begun = True
        problem(opened.ops.post("/reload"), 503, "not-ready")
        assert 'unetpp_reloads_total{outcome="failed"} 0.0' in opened.ops.get("/metrics").text


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that runs ends on what it began with; one that waits runs on what is there then, or fails where nothing is."""
    begun, go_on = threading.Event(), threading.Event()

    def gated(tiles: Tiles) -> np.ndarray:
        begun.set()
        go_on.wait()
        return bright(tiles)

    disk = Disk()
    monkeypatch.setattr("server.app.open_bundles", lambda settings, before, in_turn: disk(before))
    with full_server(http={"ops_port": 1}) as opened:

        def submit(model: str) -> str:
            answer = opened.client.post(f"/jobs?model={model}&level=1", content=SMALL)
            assert answer.status_code == 202, answer.text
            return answer.headers["location"]

        def ended(job: str) -> dict[str, Any]:
            until(lambda: opened.client.get(job).json()["state"] in ("done", "failed"))
            return opened.client.get(job).json()

        expected = mask_of(opened.client.post("/segment?level=1", content=SMALL).content)
        disk.found = fake_bundles() | fake_bundles(gated, name="second") | fake_bundles(name="third")
        assert opened.ops.post("/reload").status_code == 200
        running = submit("second")
        begun.wait()
        waiting = [submit("second"), submit("third")]
        disk.found = fake_bundles() | fake_bundles(dark, name="second")
        assert opened.ops.post("/reload").status_code == 200
        go_on.set()
        assert ended(running)["state"] == "done"
        assert np.array_equal(mask_of(opened.client.get(f"{running}/result").content), expected)
        assert ended(waiting[0])["state"] == "done"
        assert np.array_equal(mask_of(opened.client.get(f"{waiting[0]}/result").content), 1 - expected)
        failed = ended(waiting[1])
        assert failed["state"] == "failed"
        assert failed["error"]["type"] == "urn:unetpp:unknown-model"


SETTINGS = {"RUNTIME__ENGINE": "onnxruntime", "RUNTIME__PRECISION": "fp32", "RUNTIME__THREADS": "1", "DEFAULT_MODEL": "tiny"}


class Process:
    """`unetpp serve` on a folder of bundles."""

    def __init__(self, bundles: Path, folder: Path) -> None:
        self._log = folder / "log"
        # Bound and not listening: nobody else gets this port.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port = self._held.getsockname()[1]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
        chosen = SETTINGS | {"BUNDLES": str(bundles), "HTTP__PORT": str(self.port), "JOBS__FOLDER": str(folder / "jobs")}
        environment = inherited | {f"UNETPP_{name}": value for name, value in chosen.items()} | {"PYTHONPATH": str(ROOT)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "serve"], stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def ready(self) -> bool:
        assert self._process.poll() is None, self.said
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200
        return False

    def reload(self, outcome: str) -> None:
        """Asks for it, and waits until the log says how it went."""
        before = self.said.count(outcome)
        self._process.send_signal(signal.SIGHUP)
        until(lambda: self.said.count(outcome) > before)

    def close(self) -> None:
        self._process.terminate()
        assert self._process.wait(60) == 0, self.said
        self._held.close()


@pytest.fixture
def served(tiny_bundle: Path, tmp_path: Path) -> Iterator[tuple[Process, Path]]:
    """A server, and its bundle."""
    (tmp_path / "bundles").mkdir()
    live = tmp_path / "bundles" / "tiny"
    shutil.copytree(tiny_bundle, live)
    process = Process(live.parent, tmp_path)
    with contextlib.closing(process):
        until(process.ready)
        yield process, live


def replace(live: Path, edit: Callable[[Path], None]) -> None:
    """As the README has it: copied beside, and renamed."""
    new, old = (live.parents[1] / name for name in ("new", "old"))
    shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(live, new)
    edit(new)
    live.rename(old)
    new.rename(live)


def threshold(value: float) -> Callable[[Path], None]:
    """An edit that makes everything foreground, or nothing."""

    def edit(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": value}))

    return edit


def damage(folder: Path) -> None:
    """The weights are nonsense, and the hashes agree with them."""
    path = folder / "weights.safetensors"
    written = path.read_bytes()
    path.write_bytes(written[:-4096] + bytes(4096))
    rewrite_hashes(folder)


@pytest.mark.long
def test_under_load_no_request_fails(served: tuple[Process, Path]) -> None:
    process, live = served
    picture = picture_bytes(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    done = threading.Event()
    statuses: Counter[int] = Counter()

    def ask(connection: HTTPConnection) -> np.ndarray:
        connection.request("POST", "/segment?level=2", picture)
        answer = connection.getresponse()
        body = answer.read()
        statuses[answer.status] += 1
        assert answer.status == 200, body
        return mask_of(body)

    def client() -> int:
        with contextlib.closing(HTTPConnection("127.0.0.1", process.port, timeout=60)) as connection:
            asked = 0
            while not done.is_set():
                # One version or the other, never both.
                assert len(np.unique(ask(connection))) == 1 or asked == 0
                asked += 1
            return asked

    with ThreadPoolExecutor(4) as clients, contextlib.closing(HTTPConnection("127.0.0.1", process.port)) as own:
        replace(live, threshold(1e-6))
        process.reload("tiny has changed")
        assert ask(own).all()
        steady = [clients.submit(client) for _ in range(4)]
        try:
            for value in (1 - 1e-6, 1e-6):
                replace(live, threshold(value))
                process.reload("tiny has changed")
                assert ask(own).all() == (value < 0.5)
            before = ask(own)
            replace(live, damage)
            process.reload("reload failed, all is served as before")
            assert np.array_equal(ask(own), before)
            shutil.rmtree(live)
            process.reload("reload failed, all is served as before")
            assert np.array_equal(ask(own), before)
            (live.parents[1] / "old").rename(live)
            process.reload("nothing has changed")
        finally:
            done.set()
        assert all(asked.result() > 0 for asked in steady)
    assert set(statuses) == {200}
    until(lambda: process.said.count("its memory is returned") == 3)
    assert "Traceback" not in process.said
