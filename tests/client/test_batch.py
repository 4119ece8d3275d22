import asyncio
from pathlib import Path
from typing import Any

import pytest

from client.aio import AsyncClient
from client.batch import Batch, Segmenter, model_card
from client.display import Display
from client.errors import TimedOut, TransportError
from client.inputs import collect
from client.remote import Remote
from client.report import Report
from client.result import Result
from server import errors
from tests.client.conftest import CARD, FakeServer


class FakeSegmenter:
    """Answers every input but "b.png", for which it raises an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def models(self) -> list[dict[str, Any]]:
        return [CARD | {"name": "other", "default": False}, CARD]

    async def model(self, name: str) -> dict[str, Any]:
        return CARD | {"name": name}

    async def segment(self, source: Path, *, progress: Any = None, **parameters: Any) -> Result:
        progress("infer", 1, 4)
        if source.name == "b.png":
            raise self._error
        return Result({"mask.png": b"mask"}, "fake", "fast", 1, "fp32", {}, note="a note")


def batch(folder: Path, segmenter: Segmenter, display: Display) -> Batch:
    report = Report(None, {"version": "1", "options": {}, "model": {}})
    report.begin(collect([str(folder)], recursive=True, out=None), {})
    return Batch(segmenter, CARD, {"formats": "mask"}, report, display)


def states(run: Batch) -> list[str]:
    return [entry["status"] for entry in run.report.entries.values()]


@pytest.mark.parametrize(
    "error", [TimedOut("x"), errors.TooLarge("x", limit=1), OSError("x")], ids=["late", "refused", "disk"]
)
async def test_failure_affects_its_own_input_only(folder: Path, error: Exception, capsys: Any) -> None:
    display = Display()
    run = batch(folder, FakeSegmenter(error), display)
    await run.run()
    assert states(run) == ["done", "failed", "done", "done"]
    assert display.failures == [(str(folder / "b.png"), "x")]
    assert capsys.readouterr().out.count("note: a note") == 3


@pytest.mark.parametrize("error", [TransportError("x"), errors.Unauthorized("x")], ids=["gone", "key"])
async def test_failure_of_everything_ends_the_run(folder: Path, error: Exception) -> None:
    run = batch(folder, FakeSegmenter(error), Display())
    with pytest.raises(type(error)):
        await run.run()
    assert states(run) == ["done", "failed", "pending", "pending"]


async def test_progress_moves_the_bar(folder: Path) -> None:
    updates: list[dict[str, Any]] = []
    await batch(folder, FakeSegmenter(OSError("x")), Display(lambda **update: updates.append(update))).run()
    assert updates[:2] == [{"description": "a.png: infer 1/4"}, {"advance": 1}]
    assert updates.count({"advance": 1}) == 4


async def test_card_is_that_of_the_default_model() -> None:
    segmenter = FakeSegmenter(OSError())
    assert (await model_card(segmenter, None))["name"] == "fake"
    assert (await model_card(segmenter, "lungs"))["name"] == "lungs"


@pytest.mark.parametrize(
    ("options", "parameters", "path"),
    [
        ({}, {}, "/segment"),
        ({"as_job": True}, {}, "/jobs"),
        ({"job_bytes": 1}, {}, "/jobs"),
        ({"job_bytes": 1}, {"min_level": 1}, "/segment"),
        ({"job_bytes": 1}, {"deadline_ms": 9e9}, "/segment"),
        ({"as_job": True}, {"deadline_ms": 9e9}, "/jobs"),
    ],
)
async def test_long_inputs_are_jobs(
    folder: Path, fake_server: FakeServer, options: dict[str, Any], parameters: dict[str, Any], path: str
) -> None:
    async with Remote(AsyncClient(fake_server.url), **options) as remote:
        steps: list[Any] = []
        await remote.segment(folder / "a.png", progress=lambda *step: steps.append(step), **parameters)
    assert fake_server.requests == [(path, "upload")]
    assert steps == ([("infer", 0, 4), ("infer", 2, 4), ("infer", 4, 4)] if path == "/jobs" else [])
    assert fake_server.jobs == {}


async def test_cancelled_job_is_removed(folder: Path, fake_server: FakeServer) -> None:
    async with Remote(AsyncClient(fake_server.url), as_job=True) as remote:
        reached = asyncio.Event()
        task = asyncio.create_task(remote.segment(folder / "a.png", progress=lambda *_: reached.set()))
        await reached.wait()
        assert fake_server.jobs
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert fake_server.jobs == {}
