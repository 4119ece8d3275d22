"""The composition root: settings in, ASGI application out."""

import asyncio
import contextlib
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
from server.api.open_inference.statistics import Statistics
from server.api.request_id import RequestId
from server.api.routes import errors, health, jobs, models, monai_label, open_inference, page, segment
from server.api.routes import ops as ops_routes
from server.api.routes.open_inference_grpc import GrpcServer
from server.api.schemas import Problem
from server.api.stopping import DrainMiddleware, Stopping
from server.dicom.config import DicomConfig
from server.errors import EngineUnavailable
from server.jobs.runner import Runner
from server.jobs.sessions import Sessions
from server.jobs.store import Store
from server.monitoring import model_info
from server.monitoring.health_probe import HealthProbe
from server.monitoring.shadow_evaluation import ShadowEvaluation
from server.pacs import make_node, make_pacs, read_dicom
from server.reload import Reload
from server.runtime.deployment import Deployment, read_deployments
from server.segment.service import SegmentationService
from server.service import open_service
from server.serving import CLOSING_S, Operations, OpsServer, Server
from server.settings import Settings

WEB = Path(__file__).parent / "web"

# Connections of the ops port, beside those of the other one; and seconds that a scrape may take that runs in
# the end.
OPS_CONNECTIONS, OPS_STOP_S = 64, 1

# Seconds that an idle connection stays open, because proxies expect more than 60.
KEEP_ALIVE_S = 65

_NOTHING = contextlib.nullcontext()

# Only for the documentation, because `auth` checks the keys.
KEY_SCHEMES = [
    Depends(HTTPBearer(auto_error=False)),
    Depends(APIKeyHeader(name="X-API-Key", auto_error=False)),
]


def create_app(
    settings: Settings,
    service: SegmentationService | None = None,
    store: Store | None = None,
    dicom: DicomConfig | None = None,
) -> FastAPI:
    """Makes the application.

    Args:
        settings: settings of the operator.
        service: open service, whose bundles have been checked already; by default one is made and opened
            here.
        store: store of jobs; by default one is opened on start-up.
        dicom: configuration of PACS and node; by default it is read where the settings name one.
    """
    if service is None:
        service = open_service(settings)
        service.open()
    dicom = dicom or read_dicom(settings)
    metrics, stopping, tracing = service.metrics, Stopping(), traces.start(settings.log.trace_parent)
    runner = Runner(
        settings.jobs,
        settings.http.max_in_flight,
        service,
        metrics,
        params.headers,
        problems.job_document_of,
        store,
        pacs=make_pacs(dicom, settings) if dicom else None,
    )
    sessions = Sessions(settings.monai_label, lambda: runner.files)
    shadow = ShadowEvaluation(settings.quality, service, metrics)
    node = make_node(dicom, settings, service, runner) if dicom else None
    probe = HealthProbe(service)
    in_flight, timeout_s = segment.InFlight(settings.http.max_in_flight, service), settings.limits.max_wait_s
    ready = functools.partial(health.check_ready, probe, runner, stopping)
    open_door = open_inference.OpenInference(
        service, Statistics(), in_flight, timeout_s, probe.check_device, ready
    )
    keys = auth.Keys(settings.auth.keys_file) if settings.auth.keys_file else None
    rpc = None
    if settings.http.grpc_port is not None:
        rpc = GrpcServer(open_door, settings.http, keys, stopping, metrics.count_refusal)
    metrics.register_models(model_info.describe(service.registry.deployments))
    metrics.set_models(lambda: model_info.describe(service.registry.deployments))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.open_in_background()
        try:
            async with shadow, runner, sessions, node or _NOTHING, rpc or _NOTHING:
                yield
        finally:
            # Not in a thread, because it settles futures of this loop.
            service.close()
            if tracing:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="UNet++ segmentation server",
        summary="One trained UNet++, served at the depth each request can afford.",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    operating = health.router(probe, runner, metrics, stopping)
    has_ops_port = settings.http.ops_port is not None
    guard = functools.partial(
        _guard, settings=settings, stopping=stopping, keys=keys, refuse=metrics.count_refusal, traced=tracing
    )
    static = (
        auth.STATIC
        | auth.OPEN_INFERENCE_HEALTH
        | page.paths()
        | (monai_label.FREE if settings.monai_label.enabled else frozenset())
    )
    guard(app, free=static if has_ops_port else static | auth.HEALTH)
    reload = Reload(functools.partial(_read_again, settings), service, stopping.check)
    app.state.operations = Operations(
        stopping, functools.partial(_drain, runner, shadow, rpc), reload, operating, guard
    )
    doors = {
        "segment": segment.router(service, in_flight, timeout_s),
        "jobs": jobs.router(runner),
        "models": models.router(service),
        "open-inference": open_door.router(),
    }
    if settings.monai_label.enabled:
        doors["monai-label"] = monai_label.router(service, sessions, in_flight, timeout_s, keys)
    for tag, routes in doors.items():
        app.include_router(
            routes,
            tags=[tag],
            dependencies=KEY_SCHEMES if keys else [],
            responses={401: {"model": Problem}} if keys else {},
        )
    if not has_ops_port:
        app.include_router(operating, tags=["operate"])
    problems.describe(app)
    app.include_router(errors.router())
    app.include_router(page.router(page.read(WEB)))
    return app


def create_ops_app(app: FastAPI) -> FastAPI:
    """Makes the application of the ops port: health and metrics of another application, and what only operators do."""
    operations: Operations = app.state.operations
    ops = FastAPI(title="Operate", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    operations.guard(ops, free=auth.HEALTH | {problems.ERRORS_PATH})
    for routes in (operations.routes, ops_routes.router(operations.reload)):
        ops.include_router(routes, tags=["operate"])
    ops.include_router(errors.router())
    problems.describe(ops)
    return ops


def make_server(
    settings: Settings,
    app: FastAPI,
    sockets: list[socket],
    ops_sockets: list[socket],
    closing_s: float = CLOSING_S,
) -> Server:
    """Makes the server of an application on bound sockets; without sockets for it there is no ops port."""
    http = settings.http
    ops = None
    if ops_sockets:
        ops = OpsServer(_config(settings, create_ops_app(app), OPS_CONNECTIONS, OPS_STOP_S), ops_sockets)
    config = _config(settings, app, http.max_connections, http.stop_s)
    return Server(config, app.state.operations, http.drain_s, sockets, ops, closing_s)


def _read_again(settings: Settings, before: Mapping[str, Deployment]) -> dict[str, Deployment]:
    """Reads the bundles while serving.

    Raises:
        EngineUnavailable: TensorRT would keep the device for minutes.
    """
    if settings.runtime.provider == "tensorrt":
        raise EngineUnavailable(
            "TensorRT builds engines for minutes, in which nobody would be served; restart the server instead"
        )
    return read_deployments(settings.bundles, settings.runtime, settings.batching, before)


def _guard(
    app: FastAPI,
    settings: Settings,
    stopping: Stopping,
    keys: auth.Keys | None,
    refuse: Callable[[str], None],
    traced: traces.Traces | None,
    free: frozenset[str],
) -> None:
    """Adds what stands before the routes of both ports. Middleware that is added last runs first."""
    limits = settings.limits
    app.add_middleware(
        BodyLimit,
        max_bytes=limits.max_body_mb * 1024 * 1024,
        idle_s=limits.idle_upload_s,
        min_bytes_per_s=limits.min_pace_kb_s * 1024,
        count_refusal=refuse,
    )
    app.add_middleware(auth.SameOriginMiddleware)
    if keys:
        refused = functools.partial(refuse, "unauthorized")
        app.add_middleware(auth.APIKeyMiddleware, keys=keys, free=free, count_refusal=refused)
    app.add_middleware(HeadLimit, count_refusal=refuse)
    app.add_middleware(DrainMiddleware, stopping=stopping)
    app.add_middleware(AccessLogMiddleware, traces=traced, static=auth.STATIC)
    app.add_middleware(RequestId)
    problems.install(app, refuse)


def _config(settings: Settings, app: FastAPI, max_connections: int, stop_s: int) -> uvicorn.Config:
    http, limits = settings.http, settings.limits
    connection_limits = ConnectionLimits(
        max_connections, limits.head_s, limits.idle_upload_s, limits.min_pace_kb_s * 1024
    )
    return uvicorn.Config(
        app,
        # On h11, because httptools does not bound a head that it waits for (`HeadLimit` has the rest).
        http=functools.partial(Connection, limits=connection_limits),  # type: ignore[arg-type]  # called like the class
        # A socket upgraded to another protocol would be past every door.
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=stop_s,
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        ssl_certfile=http.tls_cert,
        ssl_keyfile=http.tls_key,
    )


def _drain(runner: Runner, shadow: ShadowEvaluation, rpc: GrpcServer | None) -> None:
    """Ends what no request waits for, and listening for gRPC."""
    shadow.drop()
    runner.drain()
    if rpc:
        rpc.drain()
