"""Liveness, readiness and metrics, for orchestrators and Prometheus."""

import functools

from fastapi import APIRouter, Response

from server.api.schemas import Problem
from server.api.stopping import Stopping
from server.errors import NotReady
from server.jobs.runner import Runner
from server.metrics import Metrics
from server.monitoring.health_probe import HealthProbe


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
        responses={503: {"model": Problem}},
    )
    async def live() -> dict[str, bool]:
        probe.check_device()
        return {"live": True}

    @routes.head("/health/ready", include_in_schema=False)
    @routes.get(
        "/health/ready",
        summary="The default model answers a real forward pass, jobs are worked on, and the server is not stopping",
        responses={503: {"model": Problem}},
    )
    async def ready() -> dict[str, bool]:
        stopping.check()
        runner.check()
        await probe.check()
        return {"ready": True}

    @routes.head("/metrics", include_in_schema=False)
    @routes.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def scrape() -> Response:
        return Response(await metrics.scrape(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _is_ready(probe: HealthProbe, runner: Runner, stopping: Stopping) -> bool:
    """The answer of /health/ready by what is known, because a scrape does not wait for a test tile."""
    try:
        stopping.check()
        runner.check()
    except NotReady:
        return False
    return probe.is_answering
