"""The composition root: settings and bundles in, ASGI application out."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from socket import socket

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.security import APIKeyHeader, HTTPBearer

from server import __version__
from server.api import auth, params, problems, traces
from server.api.access import AccessLogMiddleware
from server.api.connections import Connection, ConnectionLimits
from server.api.limits import BodyLimit, HeadLimit
from server.api.request_id import RequestId
from server.api.routes import docs, health, jobs, models, page, segment
from server.api.routes import ops as ops_routes
from server.api.schemas import Problem
from server.api.stopping import DrainMiddleware, Stopping
from server.errors import BundleDamaged, EngineUnavailable, UnknownModel
from server.jobs.runner import Runner
from server.jobs.store import Store
from server.metrics import Metrics
from server.reload import Reload
from server.runtime.bundle import MANIFEST, find_bundles, sha256
from server.runtime.opening import OpenBundle, Turns, at_once, open_bundle
from server.segment import model_info
from server.segment.agreement import Agreement
from server.segment.pipeline import Segmenter
from server.serving import Operations, OpsServer, Server
from server.settings import Settings

WEB = Path(__file__).parent / "web"

# Threads for decoding, planning, restoring and encoding, which also wait for disk.
WORKERS = 4

# Connections of the ops port, beside those of the other one; and what a scrape may take that runs in the end.
OPS_CONNECTIONS, OPS_STOP_S = 64, 1

# For the documentation; `auth` is what asks for a key.
KEY_SCHEMES = [Depends(HTTPBearer(auto_error=False)), Depends(APIKeyHeader(name="X-API-Key", auto_error=False))]


def open_bundles(
    settings: Settings, before: Mapping[str, OpenBundle] | None = None, in_turn: Turns = at_once
) -> dict[str, OpenBundle]:
    """Opens, checks and warms every bundle.

    Args:
        settings: where they are, and how they are to run.
        before: those that are open, of which the ones that have not changed are kept.
        in_turn: see `open_bundle`.

    Raises:
        BundleDamaged, EngineUnavailable: says which bundle and why.
    """
    unchanged = {bundle.bundle.sha256: bundle for bundle in (before or {}).values()}
    opened: dict[str, OpenBundle] = {}
    for folder in find_bundles(settings.bundles):
        manifest = folder / MANIFEST
        bundle = unchanged.get(sha256(manifest)) if unchanged and manifest.is_file() else None
        bundle = bundle or open_bundle(folder, settings.runtime, settings.batching, in_turn)
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
    traced = traces.start()
    segmenter = make_segmenter(settings, bundles, metrics)
    runner = Runner(settings.jobs, settings.http.max_in_flight, segmenter, metrics, params.headers, problems.explain, store)
    agreement = Agreement(settings.quality, segmenter, metrics)
    metrics.expect(model_info.known(bundles))

    def look(before: Mapping[str, OpenBundle]) -> dict[str, OpenBundle]:
        if settings.runtime.provider == "tensorrt":
            raise EngineUnavailable(
                "TensorRT builds engines for minutes, in which nobody would be served; restart the server instead"
            )
        return open_bundles(settings, before, segmenter.in_turn)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            async with agreement, runner:
                yield
        finally:
            segmenter.close()
            if traced:
                await asyncio.to_thread(traced.close)

    app = FastAPI(
        title="UNet++ segmentation server",
        summary="One trained UNet++, served at the depth each request can afford.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    keys = auth.Keys(settings.auth.keys_file) if settings.auth.keys_file else None
    operating = health.router(segmenter, runner, metrics, stopping)
    has_ops_port = settings.http.ops_port is not None

    guard = functools.partial(_guard, settings=settings, stopping=stopping, keys=keys, refuse=metrics.refuse, traced=traced)
    static = auth.STATIC | page.paths()
    guard(app, free=static if has_ops_port else static | auth.HEALTH)
    # For what runs the application, and for the ops port.
    app.state.operations = Operations(
        stopping, functools.partial(_drain, runner, agreement), Reload(look, segmenter, metrics, stopping.check), operating, guard
    )
    for routes in (
        segment.router(segmenter, metrics, settings.http.max_in_flight, settings.limits.max_wait_s),
        jobs.router(runner),
        models.router(segmenter),
    ):
        app.include_router(routes, dependencies=KEY_SCHEMES if keys else [], responses={401: {"model": Problem}} if keys else {})
    if not has_ops_port:
        app.include_router(operating)
    problems.describe(app)

    app.include_router(docs.router(app.openapi))
    app.include_router(page.router(page.read(WEB)))

    return app


def create_ops_app(app: FastAPI) -> FastAPI:
    """The application of the ops port: health and metrics of an application by `create_app`, and what only operators do."""
    operations: Operations = app.state.operations
    ops = FastAPI(title="Operate", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    operations.guard(ops, free=auth.HEALTH)
    ops.include_router(operations.routes)
    ops.include_router(ops_routes.router(operations.reload))
    return ops


def make_server(settings: Settings, app: FastAPI, sockets: list[socket], ops_sockets: list[socket]) -> Server:
    """The server of an application by `create_app` on bound sockets; without sockets for it there is no ops port."""
    http = settings.http
    ops = None
    if ops_sockets:
        ops = OpsServer(_config(settings, create_ops_app(app), OPS_CONNECTIONS, OPS_STOP_S), ops_sockets)
    return Server(_config(settings, app, http.max_connections, http.stop_s), app.state.operations, http.drain_s, sockets, ops)


def _guard(
    app: FastAPI,
    settings: Settings,
    stopping: Stopping,
    keys: auth.Keys | None,
    refuse: Callable[[str], None],
    traced: traces.Traces | None,
    free: frozenset[str],
) -> None:
    """What both ports have in common before any route runs."""
    limits = settings.limits
    pace_bytes_s = limits.min_pace_kb_s * 1024
    app.add_middleware(
        BodyLimit,
        max_bytes=limits.max_body_mb * 1024 * 1024,
        idle_s=limits.idle_upload_s,
        pace_bytes_s=pace_bytes_s,
        refuse=refuse,
    )
    # Outermost last.
    app.add_middleware(auth.SameOriginMiddleware)
    if keys:
        app.add_middleware(auth.APIKeyMiddleware, keys=keys, free=free, refused=functools.partial(refuse, "unauthorized"))
    app.add_middleware(HeadLimit, refuse=refuse)
    app.add_middleware(DrainMiddleware, stopping=stopping)
    app.add_middleware(AccessLogMiddleware, traces=traced, static=auth.STATIC)
    app.add_middleware(RequestId)
    problems.install(app, refuse)


def _config(settings: Settings, app: FastAPI, most: int, stop_s: int) -> uvicorn.Config:
    http, limits = settings.http, settings.limits
    patience = ConnectionLimits(most, limits.head_s, limits.idle_upload_s, limits.min_pace_kb_s * 1024)
    return uvicorn.Config(
        # On h11, as httptools does not bound a head that it waits for (`HeadLimit` has the rest); and a socket upgraded to another protocol would be past every door.
        app, http=functools.partial(Connection, patience=patience), ws="none",  # type: ignore[arg-type]  # called like the class
        timeout_keep_alive=http.keep_alive_s, timeout_graceful_shutdown=stop_s, access_log=False, log_config=None, log_level="warning",
        server_header=False, ssl_certfile=http.tls_cert, ssl_keyfile=http.tls_key,
    )  # fmt: skip


def _drain(runner: Runner, agreement: Agreement) -> None:
    """Ends what no request waits for."""
    agreement.drop()
    runner.drain()
