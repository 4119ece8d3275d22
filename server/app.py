"""The composition root: settings and bundles in, ASGI application out."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse

from server import __version__
from server.api import asking, problems
from server.api.limits import BodyLimit
from server.api.request_id import RequestId
from server.api.routes import health, jobs, models, segment
from server.errors import BundleDamaged, UnknownModel
from server.jobs.runner import Runner
from server.jobs.store import Store
from server.metrics import Metrics
from server.runtime.bundle import find_bundles
from server.runtime.opening import OpenBundle, open_bundle
from server.segment import modes
from server.segment.pipeline import Segmenter
from server.settings import Settings

PAGE = Path(__file__).parent / "web" / "index.html"

# Threads for decoding, planning, restoring and encoding, which also wait for disk.
WORKERS = 4


class Server(uvicorn.Server):
    """Lets the watchers of jobs go before it waits for open answers: theirs end with their jobs."""

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn on SIGTERM."""
        self.config.app.state.drain()  # type: ignore[union-attr]  # our own application, never a name to import
        await super().shutdown(sockets)


def open_bundles(settings: Settings) -> dict[str, OpenBundle]:
    """Opens, checks and warms every bundle.

    Raises:
        BundleDamaged, EngineUnavailable: says which bundle and why.
    """
    opened: dict[str, OpenBundle] = {}
    for folder in find_bundles(settings.bundles):
        bundle = open_bundle(folder, settings.runtime, settings.batching)
        name = bundle.bundle.manifest.name
        if name in opened:
            raise BundleDamaged(f"{folder}: a bundle named {name!r} is already open; names must differ")
        opened[name] = bundle
    return opened


def make_segmenter(settings: Settings, bundles: Mapping[str, OpenBundle], metrics: Metrics) -> Segmenter:
    """Joins open bundles, settings and metrics.

    Raises:
        UnknownModel: the configured default model is not among the bundles.
    """
    default = settings.default_model
    if default not in bundles:
        if "default_model" in settings.model_fields_set:
            raise UnknownModel(f"UNETPP_DEFAULT_MODEL={default} is not among the bundles: {', '.join(bundles)}")
        default = next(iter(bundles))
    return Segmenter(bundles, default, settings.batching, settings.limits, WORKERS, metrics)


def create_app(settings: Settings, bundles: Mapping[str, OpenBundle], store: Store | None = None) -> FastAPI:
    """The application over bundles that `open_bundles` has opened, and a store of jobs, which else is opened on start-up."""
    metrics = Metrics()
    segmenter = make_segmenter(settings, bundles, metrics)
    runner = Runner(settings.jobs, settings.http.max_in_flight, segmenter, metrics, asking.headers, problems.explain, store)
    for name, opened in bundles.items():
        metrics.expect(name, [(route.mode, f"{route.level}") for route in modes.routes(opened.bundle.manifest)])
        for (graph, precision), engine in opened.engines.items():
            auto = str(opened.auto[graph] == precision).lower()
            metrics.engines.labels(name, graph, precision, engine.name, engine.provider, auto).set(1)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with runner:
                yield
        finally:
            segmenter.close()

    app = FastAPI(
        title="UNet++ segmentation server",
        summary="One trained UNet++, served at the depth each request can afford.",
        version=__version__,
        lifespan=lifespan,
    )
    app.state.drain = runner.drain
    limits = settings.limits
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_mb * 1024 * 1024, idle_s=limits.idle_upload_s)
    app.add_middleware(RequestId)
    problems.install(app)
    app.include_router(segment.router(segmenter, metrics, settings.http.max_in_flight, limits.max_wait_s))
    app.include_router(jobs.router(runner))
    app.include_router(models.router(segmenter))
    app.include_router(health.router(segmenter, runner, metrics))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    return app
