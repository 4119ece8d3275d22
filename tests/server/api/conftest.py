"""Fixtures of the wire contract: applications in the test's own event loop, and one shared server on fake engines."""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.server.api.jobs_support import Gate
from tests.server.api.sockets import noise, slow
from tests.support.files import GOOD
from tests.support.server import full_server, serving
from tests.support.service import fake_app

InProcess = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]

MAX_BODY_MB, MAX_PIXELS = 1, 100_000


@pytest.fixture(scope="session")
def grey() -> bytes:
    """A PNG of 16 × 16 pixels, of which 127 lie above the mean."""
    return GOOD


@pytest.fixture(scope="session")
def small() -> Iterator[httpx.Client]:
    """A client of a real server on fake engines, which takes bodies of 1 MiB and images of 100,000 pixels."""
    with serving(fake_app(limits={"max_body_mb": MAX_BODY_MB, "max_pixels": MAX_PIXELS})) as client:
        yield client


@pytest.fixture
def in_process() -> InProcess:
    """Opens a client of an application without a socket: `async with in_process(app) as client`."""

    @contextlib.asynccontextmanager
    async def opened(app: Any = None, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app or fake_app(**settings), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client

    return opened


@pytest.fixture
def quiet_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails if clients can fill the log with tracebacks."""
    yield
    assert not [r for r in caplog.get_records("call") if r.exc_info or r.levelno > logging.WARNING]


@pytest.fixture(scope="module")
def opened() -> Iterator[SimpleNamespace]:
    """A server with short time limits."""
    limits = {"head_s": 0.3, "idle_upload_s": 0.5}
    with full_server(slow(0.6), limits=limits, http={"ops_port": 1, "max_in_flight": 2}) as opened:
        yield opened


@pytest.fixture(scope="module")
def noisy() -> Iterator[SimpleNamespace]:
    with full_server(noise, limits={"idle_upload_s": 0.5, "head_s": 0.3}) as opened:
        yield opened


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def limited(gate: Gate) -> Iterator[httpx.Client]:
    """A server that keeps 1 MiB and lets two jobs wait."""
    settings = {"max_disk_mb": 1, "max_queued": 2}
    with serving(fake_app(gate, jobs=settings, http={"max_in_flight": 1})) as client:
        yield client
