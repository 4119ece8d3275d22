"""The server as an application of Ray Serve: the same ASGI application and service in each replica.

    serve run deploy.ray_app:build bundles=bundles replicas=2

Batches are made by the scheduler inside a replica; Ray places, restarts, routes to and counts replicas. The
manual's page 'Ray' describes it.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from starlette.types import ASGIApp

from deploy.ray_arguments import RETRY_S, Arguments, read_settings
from deploy.ray_door import Door
from deploy.ray_scaling import DEFICIT, WAIT, LevelDeficit, ScaleOnWait
from server import listening, logs
from server.api.auth import Keys
from server.app import create_app, make_server
from server.errors import Misconfigured, StoreBroken
from server.jobs.store import Store
from server.jobs.stores import open_store
from server.runtime import memory
from server.service import open_service
from server.serving import CLOSING_S, OpsServer
from server.settings import Settings

log = logging.getLogger("server.ray")

# The first port of metrics on a node, where the settings name none; further replicas of the node take the
# next ones, a few of which may be in use by others.
OPS_PORT, OPS_PORTS = 9010, 64

# Addresses that stand for all of a node.
EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - compared, not bound

# Folders of jobs on a node at most, because each replica has its own.
JOB_FOLDERS = 64

# Seconds between two looks at whether Ray stops this replica, and between Ray's own looks at whether requests run.
STOPPING_EVERY_S, WAIT_LOOP_S = 0.2, 0.5

# Seconds between two health checks, three of which must fail. A check may wait for a test tile, which has 10 s.
HEALTH_EVERY_S, HEALTH_TIMEOUT_S = 5, 15


def build(arguments: Arguments) -> Application:
    """Makes the application from its arguments; Ray calls it."""
    settings = read_settings(arguments)
    in_flight = settings.http.max_in_flight
    scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    if arguments.max_replicas is not None:
        targets = {"target_wait_s": arguments.target_wait_s, "target_deficit": arguments.target_deficit}
        policy = AutoscalingPolicy(policy_function=ScaleOnWait, policy_kwargs=targets)  # type: ignore[no-untyped-call]
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=arguments.replicas, max_replicas=arguments.max_replicas, policy=policy
            )
        }
    deployment = Replica.options(  # type: ignore[attr-defined]  # made by the decorator
        **scaling,
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        # Beside requests for masks there are uploads of jobs, event streams and the page.
        max_ongoing_requests=arguments.max_ongoing_requests or 4 * in_flight,
        max_queued_requests=arguments.max_queued_requests or in_flight,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_S),
        graceful_shutdown_timeout_s=settings.http.drain_s + settings.http.stop_s + CLOSING_S,
    )
    application: Application = deployment.bind(arguments)
    return application


@serve.deployment(
    name="unetpp",
    graceful_shutdown_wait_loop_s=WAIT_LOOP_S,
    health_check_period_s=HEALTH_EVERY_S,
    health_check_timeout_s=HEALTH_TIMEOUT_S,
)
@serve.ingress()
class Replica:
    """One server in a process of Ray: whole, but for its public port, which is Ray's.

    Args:
        arguments: arguments of the builder.
    """

    def __init__(self, arguments: Arguments) -> None:
        memory.limit_malloc_arenas()
        context = serve.get_replica_context()
        self._labels = {
            "application": context.app_name,
            "replica": context.replica_tag,
            "node": ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
        }
        self._targets = arguments.targets
        self._stack = contextlib.ExitStack()
        given = read_settings(arguments)
        logs.setup(given.log.format)
        _check_guarded(given)
        if given.auth.keys_file:
            Keys(given.auth.keys_file)
        ops_sockets, port = _bind_ops(given, self._stack)
        http = given.http.model_copy(update={"ops_port": port})
        threads = given.runtime.threads or (0 if arguments.num_gpus else max(1, int(arguments.num_cpus)))
        runtime = given.runtime.model_copy(update={"threads": threads})
        settings = given.model_copy(update={"http": http, "runtime": runtime})
        store = self._stack.enter_context(contextlib.closing(_open_store(settings)))
        self._service = open_service(settings)
        self._service.open()
        self._app = create_app(settings, self._service, store)
        self._operations = self._app.state.operations
        self._ready = _endpoint(self._app, "/health/ready")
        self._deficit = LevelDeficit(self._service.metrics)
        ops = make_server(settings, self._app, [], ops_sockets).ops
        assert ops is not None  # noqa: S101 - it has sockets
        self._ops: OpsServer = ops
        host = http.ops_host
        self._target = f"{self._labels['node'] if host in EVERYWHERE else host}:{port}"
        self._watching: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Returns the application; Ray calls it once."""
        return Door(self._app, self._start, self._stop)

    async def _start(self) -> None:
        """Opens the ops port, and reports it to Prometheus; called when the application has started."""
        await self._ops.open()
        if self._targets:
            await asyncio.to_thread(self._report, self._targets)
        self._watching = asyncio.create_task(self._watch_stopping())

    async def _stop(self) -> None:
        """Closes what `_start` opened; called when the application has ended."""
        if self._watching:
            self._watching.cancel()
        await self._ops.close()
        if self._targets:
            self._target_file(self._targets).unlink(missing_ok=True)
        self._stack.close()

    async def check_health(self) -> None:
        """Checks what /health/ready does; Ray replaces a replica that fails three times in a row.

        Raises:
            NotReady: the server stops, jobs are not worked on, or the device does not answer.
        """
        if not self._operations.stopping.begun:
            await self._ready()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the figures that `ScaleOnWait` goes by."""
        return {WAIT: self._service.scheduler.predict_wait_s(), DEFICIT: self._deficit.since_last_call()}

    async def _watch_stopping(self) -> None:
        """Drains as soon as Ray stops this replica, because event streams would keep it until Ray kills it."""
        while not _is_stopping():  # noqa: ASYNC110 - Ray has no event to wait for
            await asyncio.sleep(STOPPING_EVERY_S)
        log.info("Ray stops this replica: not ready any more, finishing")
        self._operations.stopping.begun = True
        self._operations.drain()

    def _target_file(self, folder: Path) -> Path:
        """The file of this node and port, so that a successor replaces what a killed replica left."""
        return folder / f"unetpp-{self._target.replace(':', '-')}.json"

    def _report(self, folder: Path) -> None:
        """Writes a file for Prometheus' `file_sd_configs`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = self._target_file(folder)
        document = [{"targets": [self._target], "labels": self._labels}]
        # Replaced, because Prometheus may read it at any time.
        written = path.with_suffix(".new")
        written.write_text(json.dumps(document))
        written.replace(path)


def _is_stopping() -> bool:
    """Whether Ray waits for this replica's last requests. Ray 2.60 has no public way to learn it."""
    worker = ray.get_runtime_context().worker
    actor = worker.actors.get(worker.actor_id)
    return bool(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False))


def _check_guarded(settings: Settings) -> None:
    """Checks what `unetpp serve` checks of its address: Ray's proxies do not tell theirs.

    Raises:
        Misconfigured: there are no keys, and the operator has not said that none are needed.
    """
    if settings.auth.keys_file is None and not settings.auth.insecure:
        raise Misconfigured(
            "Ray's proxies may listen beyond loopback, and no key is needed; make keys (unetpp key NAME) and set "
            "UNETPP_AUTH__KEYS_FILE, or set UNETPP_AUTH__INSECURE=true if everyone who reaches the proxies may use the server",
            setting="UNETPP_AUTH__KEYS_FILE",
            remedy="UNETPP_AUTH__INSECURE",
        )


def _bind_ops(settings: Settings, stack: contextlib.ExitStack) -> tuple[list[Any], int]:
    """Binds the ops port to the first free one from that of the settings on.

    Raises:
        Misconfigured: none of so many is free, or the address cannot be bound.
    """
    first = settings.http.ops_port or OPS_PORT
    for port in range(first, first + OPS_PORTS):
        with contextlib.ExitStack() as bound:
            try:
                sockets = listening.bind(settings.http.ops_host, port, listening.OPS_HOST, True, bound)
                # At once, because another replica could bind the port, too, until one of them listens.
                for one in sockets:
                    one.listen()
            except (Misconfigured, OSError) as error:
                if isinstance(error, Misconfigured) and error.fields.get("setting") == listening.OPS_HOST:
                    raise
                continue
            stack.push(bound.pop_all())
            return sockets, port
    raise Misconfigured(
        f"none of the ports {first} to {first + OPS_PORTS - 1} of {settings.http.ops_host} is free; name another first one",
        setting="UNETPP_HTTP__OPS_PORT",
        value=first,
    )


def _open_store(settings: Settings) -> Store:
    """Opens the first folder of jobs that no other replica of this node uses, so that a successor takes up a dead one's jobs.

    Raises:
        StoreBroken: a folder cannot be used.
    """
    for number in range(JOB_FOLDERS):
        folder = settings.jobs.folder / f"replica-{number}"
        try:
            return open_store(settings.jobs.model_copy(update={"folder": folder}))
        except StoreBroken as error:
            # The lock of another replica.
            if not isinstance(error.__cause__, BlockingIOError) or number == JOB_FOLDERS - 1:
                raise
    raise AssertionError("unreachable")


def _endpoint(app: FastAPI, path: str) -> Callable[[], Awaitable[Any]]:
    """Finds the function behind a path of the ops port."""
    routes = app.state.operations.routes.routes
    endpoint: Callable[[], Awaitable[Any]] = next(route.endpoint for route in routes if route.path == path)
    return endpoint
