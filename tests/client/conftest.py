"""What tests of the client share: the shell, servers on fake engines, and both clients by one name."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from client import AsyncClient, Client
from server import cli
from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app


@contextmanager
def served(**changes: Any) -> Iterator[str]:
    """The address of a real server on fake engines."""
    with serving(fake_app(**changes)) as own:
        yield str(own.base_url)


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    with served() as address:
        yield address


@pytest.fixture(params=["sync", "async"])
def either(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls `use` with a client of a kind: `either(url, use, **options)`."""

    def sync(url: str, use: Callable[[Any], Any], **options: Any) -> Any:
        with Client(url, **options) as client:
            return use(client)

    def awaited(url: str, use: Callable[[Any], Any], **options: Any) -> Any:
        async def work() -> Any:
            async with AsyncClient(url, **options) as client:
                return await use(client)

        return asyncio.run(work())

    return sync if request.param == "sync" else awaited


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """Tries follow each other at once; what each would have waited for: (how often tried, seconds asked)."""
    waits: list[tuple[int, float | None]] = []

    def wait_s(self: object, tried: int, asked_s: float | None) -> float:
        waits.append((tried, asked_s))
        return 0.0

    monkeypatch.setattr("client.retry.Retries.wait_s", wait_s)
    return waits


def answer(**headers: str) -> httpx.Response:
    """A small good answer."""
    mask = picture_bytes(np.eye(4, dtype=np.uint8))
    told = {"X-Segment-Model": "fake", "X-Segment-Mode": "fast", "X-Segment-Level": "1", "X-Segment-Precision": "fp32",
            "Content-Type": "image/png", "Content-Disposition": 'inline; filename="mask.png"'}  # fmt: skip
    return httpx.Response(200, headers=told | headers, content=mask)


def problem(status: int, detail: str = "said so", **headers: str) -> httpx.Response:
    """A problem document."""
    document = {"type": "urn:unetpp:test", "title": "Test", "status": status, "detail": detail}
    return httpx.Response(
        status, json=document, headers={"X-Request-Id": "abc"} | {k.replace("_", "-"): v for k, v in headers.items()}
    )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The shell's own bundles are fakes: `fakes(engine, **changes)`."""
    monkeypatch.setenv("COLUMNS", "200")

    def use(*engine: Any, **changes: Any) -> None:
        monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles(*engine, **changes))

    use()
    return use


def run(*arguments: object) -> Result:
    """As a person types it."""
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def done(*arguments: object) -> str:
    """What is said by a command that succeeds."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments: object, code: int = 1) -> str:
    """What is said by a command that fails, without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert "error: " in result.stderr
    return result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four small images, two of them in a folder of the folder."""
    home = tmp_path / "images"
    (home / "day 2").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "day 2/a.png", "day 2/ü.tif"]):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 20 + number), dtype=np.uint8)
        (home / name).write_bytes(picture_bytes(pixels, "TIFF" if name.endswith("tif") else "PNG"))
    return home
