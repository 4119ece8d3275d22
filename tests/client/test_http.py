import asyncio
import signal
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import Client
from server import errors
from tests.client.conftest import FakeServer
from tests.support.files import picture_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5), dtype=np.uint8)


def test_client_on_a_server(fake_server: FakeServer, tmp_path: Path) -> None:
    with Client(fake_server.url) as client:
        assert client.models()[0]["name"] == client.model("fake")["name"] == "fake"
        result = client.segment(PIXELS, formats="mask")
        assert np.array_equal(result.mask, PIXELS.mean() < PIXELS)
        job = client.submit(PIXELS, formats="mask")
        assert job.wait()["state"] == job.status()["state"] == "done"
        again = client.job(job.id)
        assert again.save(tmp_path / "mask.png").read_bytes() == again.result().files["mask.png"]
        again.cancel()
        with pytest.raises(errors.UnknownJob):
            job.status()


def test_progress_of_job_may_use_the_client(fake_server: FakeServer) -> None:
    """A callback in the event loop's own thread would wait for itself."""
    seen: list[tuple[str, str]] = []
    with Client(fake_server.url) as client:
        job = client.submit(PIXELS)
        job.wait(
            lambda one: seen.append((threading.current_thread().name, job.status()["state"] + one["state"]))
        )
    assert seen == [
        (threading.current_thread().name, f"done{state}") for state in ("queued", "running", "done")
    ]


def test_error_in_progress_of_job_is_raised(fake_server: FakeServer) -> None:
    def fail(one: Any) -> None:
        raise KeyError(one["state"])

    with Client(fake_server.url) as client, pytest.raises(KeyError, match="queued"):
        client.submit(PIXELS).wait(fail)


def test_client_in_many_threads(fake_server: FakeServer) -> None:
    with Client(fake_server.url) as client, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: client.segment(PIXELS, formats="mask").mask, range(8)))
    assert all(np.array_equal(mask, PIXELS.mean() < PIXELS) for mask in results)


def test_close_cancels_requests_of_other_threads(fake_server: FakeServer) -> None:
    fake_server.hold.clear()
    client = Client(fake_server.url)
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(client.segment, PIXELS)
        assert fake_server.held.wait(10)
        client.close()
        client.close()
        with pytest.raises(CancelledError):
            request.result()
    assert fake_server.cancelled.wait(10)


def test_close_comes_before_a_cancelled_request_has_ended(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, submit = Client(fake_server.url), asyncio.run_coroutine_threadsafe

    class Cancelled:
        def result(self) -> None:
            client.close()
            raise CancelledError

    def first(call: Coroutine[Any, Any, Any], _: asyncio.AbstractEventLoop) -> Any:
        call.close()
        monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", submit)
        return Cancelled()

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", first)
    work = asyncio.sleep(0)
    with pytest.raises(CancelledError):
        client.run(work)
    work.close()


def test_client_inside_of_a_running_loop(fake_server: FakeServer) -> None:
    async def cell() -> str:
        with Client(fake_server.url) as client:
            return client.segment(picture_bytes(PIXELS)).model

    assert asyncio.run(cell()) == "fake"


def test_ctrl_c_cancels_the_request(fake_server: FakeServer) -> None:
    fake_server.hold.clear()

    def interrupt() -> None:
        fake_server.held.wait(60)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with Client(fake_server.url) as client:
        with pytest.raises(KeyboardInterrupt):
            client.segment(PIXELS)
        assert fake_server.cancelled.wait(60)
        fake_server.hold.set()
        assert client.segment(PIXELS).model == "fake"
