"""Real servers on loopback, in threads."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from server.arrays import Tiles
from tests.support.service import bright, fake_deployment, quiet_settings


def until(condition: Callable[[], bool]) -> None:
    """Waits for what must come."""
    given_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < given_up
        time.sleep(0.01)


@contextlib.contextmanager
def running(server: Any) -> Iterator[None]:
    """A `Server` in a thread, from when it listens until it has stopped."""
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    listening = [server, *filter(None, [server.ops])]
    until(lambda: all(one.started for one in listening) or not thread.is_alive())
    assert thread.is_alive(), "the server did not start"
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server did not stop"


@contextlib.contextmanager
def serving(app: Any) -> Iterator[httpx.Client]:
    """A real server of an application on a free port, and a client of it."""
    import uvicorn

    from server.serving import Server

    server = Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"), app.state.operations)
    with running(server):
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client


@contextlib.contextmanager
def full_server(run: Callable[[Tiles], np.ndarray] = bright, **settings: Any) -> Iterator[SimpleNamespace]:
    """A server on fake engines with all that `unetpp serve` puts in front of it, in a thread: `client`, `port`, `ops`, `ops_port`."""
    from server.app import create_app, make_server
    from server.service import open_service

    chosen = quiet_settings(**settings)
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(2)]
        for made in sockets:
            made.bind(("127.0.0.1", 0))
        ports = [made.getsockname()[1] for made in sockets]
        deployment = fake_deployment(run)
        app = create_app(chosen, open_service(chosen, {deployment.name: deployment}))
        server = make_server(chosen, app, sockets[:1], sockets[1:] if chosen.http.ops_port else [])
        opened.enter_context(running(server))
        kind = "https" if chosen.http.tls_cert else "http"
        clients = [
            opened.enter_context(
                httpx.Client(base_url=f"{kind}://127.0.0.1:{port}", timeout=60, verify=False)  # noqa: S501 - our own
            )
            for port in ports
        ]
        yield SimpleNamespace(
            client=clients[0], port=ports[0], ops=clients[1], ops_port=ports[1], server=server, app=app
        )


def make_certificate(folder: Path) -> None:
    """`cert.pem` of localhost, and its `key.pem`."""
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    )
    with contextlib.suppress(FileNotFoundError):
        made = [
            *command.split(),
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ]
        subprocess.run(made, cwd=folder, check=True, capture_output=True)
        return
    pytest.skip("needs openssl")
