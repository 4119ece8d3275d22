"""Liveness and readiness, in the test's own event loop: the device answers, fails, and recovers."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from server.api import problems
from server.api.routes import health
from server.api.stopping import Stopping
from server.arrays import Tiles
from server.errors import NotReady
from server.monitoring.health_probe import MAX_FAILURES, HealthProbe
from tests.server.api.conftest import InProcess
from tests.support.files import SMALL
from tests.support.service import FakeDevice, bright, fake_service

FAULTS = ("raises", "returns nothing", "blocks")


class Device:
    """A service whose device a test breaks and repairs, and the application with its health."""

    def __init__(self) -> None:
        self.calls = 0
        self.fault = ""
        self.device = FakeDevice()
        self.service = fake_service(self._run, device=self.device)
        self.stopping = Stopping()
        self.jobs_work = True
        self.app = FastAPI()
        problems.install(self.app)
        probe = HealthProbe(self.service, fresh_s=0, timeout_s=0.05, retry_s=0)
        runner: Any = SimpleNamespace(check=self._check_jobs)
        self.app.include_router(health.router(probe, runner, self.service.metrics, self.stopping))

    def set(self, fault: str) -> None:
        self.fault = fault
        (self.device.hold if fault == "blocks" else self.device.release)()

    def _run(self, tiles: Tiles) -> np.ndarray:
        self.calls += 1
        if self.fault == "raises":
            raise RuntimeError("secret")
        return bright(tiles)[: 0 if self.fault == "returns nothing" else None]

    def _check_jobs(self) -> None:
        if not self.jobs_work:
            raise NotReady("jobs are no longer worked on")


async def status(client: httpx.AsyncClient, name: str) -> int:
    return (await client.get(f"/health/{name}")).status_code


async def until_status(client: httpx.AsyncClient, name: str, expected: int) -> None:
    for _ in range(3000):
        if await status(client, name) == expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{name} is not {expected}")


async def test_health_of_a_good_device(in_process: InProcess) -> None:
    async with in_process(Device().app) as client:
        assert (await client.get("/health/live")).json() == {"live": True}
        assert (await client.get("/health/ready")).json() == {"ready": True}


@pytest.mark.parametrize("fault", FAULTS)
async def test_device_that_fails_is_first_not_ready_then_not_live(in_process: InProcess, fault: str) -> None:
    device = Device()
    async with in_process(device.app) as client:
        assert await status(client, "ready") == 200
        device.set(fault)
        for _ in range(MAX_FAILURES):
            answer = await client.get("/health/ready")
            assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
            assert answer.headers["content-type"] == "application/problem+json"
            assert int(answer.headers["retry-after"]) >= 1
        answer = await client.get("/health/live")
        assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
        assert "secret" not in answer.text
        device.set("")
        await until_status(client, "ready", 200)
        assert await status(client, "live") == 200


@pytest.mark.parametrize("reason", ["stopping", "jobs"])
async def test_server_that_stops_or_has_no_workers_is_not_ready(in_process: InProcess, reason: str) -> None:
    device = Device()
    device.stopping.begun, device.jobs_work = reason == "stopping", reason != "jobs"
    async with in_process(device.app) as client:
        answer = await client.get("/health/ready")
        assert (answer.status_code, answer.json()["code"]) == (503, "not-ready")
        assert await status(client, "live") == 200
        metrics = (await client.get("/metrics")).text
    assert "unetpp_ready 0.0" in metrics
    assert f"unetpp_stopping {float(reason == 'stopping')}" in metrics


async def test_scrape_runs_no_test_tile(in_process: InProcess) -> None:
    device = Device()
    async with in_process(device.app) as client:
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert "unetpp_ready 1.0" in answer.text
        assert device.calls == 0


def test_server_with_a_failing_device_answers_requests(
    small: httpx.Client, problem: Callable[..., Any]
) -> None:
    """On a real server: bad requests neither count as failures of the device nor as reasons to restart."""
    for _ in range(2 * MAX_FAILURES):
        problem(small.post("/segment?level=1", content=b"nonsense"), 415)
        problem(small.post("/segment?level=5", content=SMALL), 422)
    assert small.get("/health/live").json() == {"live": True}
    assert small.get("/health/ready").json() == {"ready": True}
