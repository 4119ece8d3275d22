"""Liveness, readiness and metrics, for orchestrators and Prometheus."""

import functools
from typing import Any

from fastapi import APIRouter, Response

from server.api.schemas import Problem
from server.api.stopping import Stopping
from server.errors import NotReady
from server.jobs.runner import Runner
from server.metrics import Metrics
from server.monitoring.health_probe import HealthProbe

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "the metrics", "content": {MEDIA_TYPE.partition(";")[0]: {}}}
}


def router(probe: HealthProbe, runner: Runner, metrics: Metrics, stopping: Stopping) -> APIRouter:
    """Makes the routes.

    Args:
        probe: knows whether the device answers.
        runner: knows whether jobs are worked on.
        metrics: are scraped.
        stopping: whether the server stops.
    """
    routes = APIRouter()
    metrics.set_function(metrics.stopping, lambda: stopping.begun)
    metrics.set_function(metrics.ready, functools.partial(_is_ready, probe, runner, stopping))

    @routes.head("/health/live", include_in_schema=False)
    @routes.get(
        "/health/live",
        summary="The process answers, and its device has not failed again and again: otherwise restart it",
        response_description="`true`",
        responses={503: {"model": Problem}},
    )
    async def live() -> dict[str, bool]:
        """Answers 503 after three test tiles in a row have failed: for liveness probes."""
        probe.check_device()
        return {"live": True}

    @routes.head("/health/ready", include_in_schema=False)
    @routes.get(
        "/health/ready",
        summary="The default model answers a real forward pass, jobs are worked on, and the server is not stopping",
        response_description="`true`",
        responses={503: {"model": Problem}},
    )
    async def ready() -> dict[str, bool]:
        """Answers 503 while the server starts, stops or does not compute: for load balancers."""
        await check_ready(probe, runner, stopping)
        return {"ready": True}

    @routes.head("/metrics", include_in_schema=False)
    @routes.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=METRICS)
    async def scrape() -> Response:
        """Answers in the text format of Prometheus; a scrape computes nothing."""
        return Response(await metrics.scrape(), media_type=MEDIA_TYPE)

    return routes


async def check_ready(probe: HealthProbe, runner: Runner, stopping: Stopping) -> None:
    """Checks that requests should be sent here.

    Raises:
        NotReady: has the reason.
    """
    stopping.check()
    runner.check()
    await probe.check()


def _is_ready(probe: HealthProbe, runner: Runner, stopping: Stopping) -> bool:
    """The answer of /health/ready by what is known, because a scrape does not wait for a test tile."""
    try:
        stopping.check()
        runner.check()
    except NotReady:
        return False
    return probe.is_answering
