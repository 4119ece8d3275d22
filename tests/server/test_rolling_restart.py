"""Two servers are restarted in turn while clients call them: no request is lost."""

import contextlib
import itertools
import signal
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.server.processes import Launcher, count_ok, launching
from tests.support.files import mask_of, picture_bytes
from tests.support.server import until

RESTARTS = 3  # of each of two servers


class Caller:
    """A small client that knows all servers and tries again, as the manual asks for; belongs to one thread."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = deque(urls)
        self._client = httpx.Client(timeout=60)
        self.statuses: Counter[int] = Counter()
        self.unanswered: Counter[str] = Counter()

    def call(self, body: bytes) -> httpx.Response:
        for _ in range(1000):
            # The load is spread; and after a failure it is another server's turn, too.
            self._urls.rotate()
            try:
                answer = self._client.post(f"{self._urls[0]}/segment?level=1", content=body)
            except httpx.TransportError as error:
                self.unanswered[type(error).__name__] += 1
                time.sleep(0.01)
                continue
            self.statuses[answer.status_code] += 1
            if answer.status_code not in (429, 503):
                return answer
            time.sleep(int(answer.headers["retry-after"]))
        raise AssertionError("no server answers")

    def call_until(self, enough: threading.Event, seed: int) -> int:
        """Calls with pictures of its own, checks their answers, and returns how many there were."""
        random = np.random.default_rng(seed)
        with self._client:
            for answered in itertools.count():
                if enough.is_set():
                    return answered
                pixels = random.integers(0, 256, (64, 64), dtype=np.uint8)
                answer = self.call(picture_bytes(pixels))
                assert answer.status_code == 200, answer.text
                assert np.array_equal(mask_of(answer.content), pixels.mean() < pixels)
        raise AssertionError


@pytest.mark.long
def test_rolling_restart_loses_no_request(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        launchers = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            fork = stack.enter_context(launching())
            launchers.append(stack.enter_context(contextlib.closing(Launcher(fork, tmp_path / name))))
        servers = [launch(drain_s="0.5") for launch in launchers]
        callers = [Caller([server.url for server in servers]) for _ in range(4)]
        enough = threading.Event()
        pool = stack.enter_context(ThreadPoolExecutor(len(callers)))
        stack.callback(enough.set)
        running = [pool.submit(caller.call_until, enough, seed) for seed, caller in enumerate(callers)]

        def answered() -> int:
            return sum(caller.statuses[200] for caller in callers)

        ok = 0
        for index in [0, 1] * RESTARTS:
            before = answered()
            until(lambda before=before: answered() > before + 20)  # type: ignore[misc]
            servers[index].kill(signal.SIGTERM)
            servers[index].ended_well()
            ok += count_ok(servers[index])
            servers[index] = launchers[index](drain_s="0.5")
        enough.set()
        total = sum(future.result() for future in running)
        for server in servers:
            server.kill(signal.SIGTERM)
            server.ended_well()
            ok += count_ok(server)
    assert set().union(*(caller.statuses for caller in callers)) <= {200, 429, 503}
    # What was worked on was answered: a request that met a closed port was not worked on.
    assert ok == total == answered()
    assert set().union(*(caller.unanswered for caller in callers)) <= {
        "ConnectError",
        "ReadError",
        "RemoteProtocolError",
    }
    # Else the restarts came when nobody called.
    assert all(caller.unanswered for caller in callers)
