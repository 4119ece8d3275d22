"""The composition root: settings and bundles in, ASGI application out."""

import asyncio
import faulthandler
import functools
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse

from server import __version__
from server.api import asking, problems
from server.api.limits import BodyLimit
from server.api.request_id import RequestId
from server.api.routes import health, jobs, models, segment
from server.api.stopping import LastAnswers, Stopping
from server.errors import BundleDamaged, UnknownModel
from server.jobs.runner import Runner
from server.jobs.store import Store
from server.metrics import Metrics
from server.runtime.bundle import find_bundles
from server.runtime.opening import OpenBundle, open_bundle
from server.segment import labels
from server.segment.agreement import Agreement
from server.segment.pipeline import Segmenter
from server.settings import Settings

PAGE = Path(__file__).parent / "web" / "index.html"

# Threads for decoding, planning, restoring and encoding, which also wait for disk.
WORKERS = 4

# What closing may take beyond the time of open requests: the batch that runs, and the store.
CLOSING_S = 10

log = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """Stops in steps, and with exit status 0, unlike uvicorn's own, which ends itself by the signal.

    1. A signal: not ready, and each answer closes its connection. After SIGTERM it listens on for `drain_s`, until those who send
       requests have noticed; whoever pressed Ctrl-C does not wait for that. Jobs are worked on, as they may come to their end.
    2. It listens no more. Jobs that run are put back, so that their watchers are let go; open requests have their time
       (`timeout_graceful_shutdown`), after which they get 503.
    3. Lifespan ends, which waits for the batch that runs.

    Args:
        config: of an application by `create_app`.
        drain_s: see above.
    """

    def __init__(self, config: uvicorn.Config, drain_s: float = 0.0) -> None:
        super().__init__(config)
        self._drain_s = drain_s
        self._listens_until = 0.0

    def run(self, sockets: list[socket] | None = None) -> None:
        """Serves until it is asked to stop."""
        try:
            super().run(sockets)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread, between any two of its steps: flags only, no locks."""
        del frame
        if self.should_exit:
            # Whoever asks twice wants no more waiting, and has the state of a kill -9: jobs survive that, and files without
            # a name go with the process.
            os._exit(128 + sig)
        self.should_exit = True
        self.config.app.state.stopping.begun = True  # type: ignore[union-attr]  # our own application, never a name to import
        drain_s = self._drain_s if sig == signal.SIGTERM else 0.0
        self._listens_until = time.monotonic() + drain_s
        if (patience_s := self.config.timeout_graceful_shutdown) is not None:
            # A thread whose device never returns would keep the process; this says where it is and ends both.
            faulthandler.dump_traceback_later(drain_s + patience_s + CLOSING_S, exit=True)
        asyncio.get_running_loop().call_soon_threadsafe(
            log.info, "%s: not ready any more, listening for %g s, then finishing", signal.Signals(sig).name, drain_s
        )

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: whether to listen no more."""
        return await super().on_tick(counter) and time.monotonic() >= self._listens_until

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Called by uvicorn then."""
        state = self.config.app.state  # type: ignore[union-attr]
        state.stopping.begun = True
        state.drain()
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
    stopping = Stopping()
    segmenter = make_segmenter(settings, bundles, metrics)
    runner = Runner(settings.jobs, settings.http.max_in_flight, segmenter, metrics, asking.headers, problems.explain, store)
    agreement = Agreement(settings.quality, segmenter, metrics)
    metrics.expect(labels.known(bundles))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with agreement, runner:
                yield
        finally:
            segmenter.close()

    app = FastAPI(
        title="UNet++ segmentation server",
        summary="One trained UNet++, served at the depth each request can afford.",
        version=__version__,
        lifespan=lifespan,
    )
    app.state.drain, app.state.stopping = functools.partial(_drain, runner, agreement), stopping
    limits = settings.limits
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_mb * 1024 * 1024, idle_s=limits.idle_upload_s, refuse=metrics.refuse)
    # Outermost last.
    app.add_middleware(LastAnswers, stopping=stopping)
    app.add_middleware(RequestId)
    problems.install(app, metrics.refuse)
    app.include_router(segment.router(segmenter, metrics, settings.http.max_in_flight, limits.max_wait_s))
    app.include_router(jobs.router(runner))
    app.include_router(models.router(segmenter))
    app.include_router(health.router(segmenter, runner, metrics, stopping))

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE)

    return app


def _drain(runner: Runner, agreement: Agreement) -> None:
    """Ends what no request waits for."""
    agreement.drop()
    runner.drain()
