"""Fixtures of the wire contract: applications in the test's own event loop, and one shared server on fake engines."""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest

from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app

InProcess = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]

MAX_BODY_MB, MAX_PIXELS = 1, 100_000


@pytest.fixture(scope="session")
def grey() -> bytes:
    """A PNG of 16 × 16 pixels, of which 127 lie above the mean."""
    return picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))


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
