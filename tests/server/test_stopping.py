"""SIGTERM, SIGINT and restarts of real processes: `unetpp serve` on fake engines."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.server.processes import FOREVER, PICTURE, PIXELS, Launcher, count_ok, held_port, launching
from tests.support.files import mask_of
from tests.support.server import until

BOTH_SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@pytest.fixture(scope="module")
def process() -> Iterator["subprocess.Popen[str]"]:
    """One for the module, because its imports take seconds."""
    with launching() as process:
        yield process


@pytest.fixture
def serve(process: "subprocess.Popen[str]", tmp_path: Path) -> Iterator[Launcher]:
    with contextlib.closing(Launcher(process, tmp_path)) as launcher:
        yield launcher


@pytest.fixture
def background() -> Iterator[Callable[..., "Future[Any]"]]:
    """Calls in threads."""
    with ThreadPoolExecutor(8) as executor:
        yield executor.submit


def kept_alive(port: int) -> Any:
    """A connection that has served a request and stays open."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/health/live")
    connection.getresponse().read()
    return contextlib.closing(connection)


def check_mask(answer: httpx.Response) -> None:
    assert answer.status_code == 200, answer.text
    assert np.array_equal(mask_of(answer.content), PIXELS.mean() < PIXELS)


@BOTH_SIGNALS
def test_server_idle_stops_at_once(serve: Launcher, number: int) -> None:
    server = serve()
    with kept_alive(server.port) as idle, socket.create_connection(("127.0.0.1", server.port)) as fresh:
        server.kill(number)
        assert idle.sock.recv(1) == b""
        assert fresh.recv(1) == b""
        server.ended_well()


def test_server_hung_up_while_bundles_open_goes_on(serve: Launcher) -> None:
    server = serve(opens="late")
    server.kill(signal.SIGHUP)
    server.open_gate()
    until(server.ready)
    server.kill(signal.SIGTERM)
    server.ended_well()


class TestDraining:
    """Between SIGTERM and the end of drain_s."""

    def test_server_draining_is_not_ready_and_answers_everything(
        self, serve: Launcher, problem: Callable[..., Any]
    ) -> None:
        server = serve(drain_s=FOREVER)
        with httpx.Client(base_url=server.url) as kept, kept_alive(server.port) as raw:
            assert "connection" not in kept.get("/health/ready").headers
            first = raw.sock
            server.kill(signal.SIGTERM)
            until(lambda: not server.ready())
            answer = kept.get("/health/ready")
            problem(answer, 503, "not-ready")
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["connection"] == "close"
            check_mask(kept.post("/segment?level=1", content=PICTURE))
            for path, status in (
                ("/health/live", 200),
                ("/nowhere", 404),
                ("/jobs/unknown", 404),
                ("/segment", 405),
            ):
                answer = kept.get(path)
                assert (answer.status_code, answer.headers.get_list("connection")) == (status, ["close"])
            # A connection that was open is closed with its next answer, and not before.
            raw.request("GET", "/health/live")
            assert raw.sock is first
            raw.getresponse().read()
            assert raw.sock is None

    def test_server_draining_does_not_lose_a_response_before_the_body(self, serve: Launcher) -> None:
        server = serve(drain_s=FOREVER)
        server.kill(signal.SIGTERM)
        until(lambda: not server.ready())
        for _ in range(3):
            with contextlib.closing(HTTPConnection("127.0.0.1", server.port)) as kept:
                for body, connection in ((b"x" * 20_000_000, None), (None, "close")):
                    kept.request("POST", "/segment?model=unknown", body)
                    answer = kept.getresponse()
                    assert (answer.status, answer.headers["connection"]) == (404, connection)
                    answer.read()

    def test_server_draining_works_on_jobs(self, serve: Launcher) -> None:
        server = serve("gated", drain_s=FOREVER)
        id_ = httpx.post(f"{server.url}/jobs", content=PICTURE).json()["id"]
        with httpx.stream("GET", f"{server.url}/jobs/{id_}/events", timeout=60) as events:
            lines = events.iter_lines()
            next(lines)
            server.kill(signal.SIGTERM)
            until(lambda: not server.ready())
            server.open_gate()
            assert "event: done" in list(lines)
        assert httpx.get(f"{server.url}/jobs/{id_}/result").status_code == 200

    def test_server_with_drain_skips_it_after_ctrl_c(self, serve: Launcher) -> None:
        server = serve(drain_s=FOREVER)
        server.kill(signal.SIGINT)
        server.ended_well()

    @BOTH_SIGNALS
    def test_server_draining_ends_at_once_at_a_second_signal(self, serve: Launcher, number: int) -> None:
        server = serve(drain_s=FOREVER)
        server.kill(signal.SIGTERM)
        until(lambda: not server.ready())
        server.kill(number)
        assert server.wait() == 128 + number
        assert "Traceback" not in server.stderr


class TestOpsPort:
    """It is there from the first answer of the public port to its last."""

    @pytest.fixture
    def ops_port(self) -> Iterator[str]:
        with held_port() as port:
            yield str(port)

    @pytest.mark.parametrize("drain_s", ["0", FOREVER])
    def test_ops_port_reports_not_ready_until_the_end(
        self,
        serve: Launcher,
        background: Callable[..., Any],
        problem: Callable[..., Any],
        ops_port: str,
        drain_s: str,
    ) -> None:
        server = serve("gated", ops_port=ops_port, drain_s=drain_s)
        posted = background(server.post)
        until(lambda: server.in_flight() == 1)
        with kept_alive(int(ops_port)):
            server.kill(signal.SIGTERM)
            until(lambda: not (server.listens() if drain_s == "0" else server.ready()))
            problem(httpx.get(f"{server.ops}/health/ready"), 503, "not-ready")
            assert httpx.get(f"{server.ops}/health/live").status_code == 200
            assert server.in_flight() == 1
            server.open_gate()
            check_mask(posted.result())
            if drain_s == "0":
                # An idle connection of the ops port does not keep it.
                server.ended_well()

    def test_ops_port_taken_after_it_was_bound_ends_the_start(self, serve: Launcher) -> None:
        """Which bound sockets of two programs do not prevent, as long as neither listens."""
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
            server = serve(opens="late", ops_port=str(other.getsockname()[1]))
            other.listen()
            server.open_gate()
            assert server.wait() == 1
        assert len([line for line in server.stderr.splitlines() if line.startswith("error: ")]) == 1
        assert "Traceback" not in server.stderr


class TestInFlight:
    """When the server does not listen any more."""

    @BOTH_SIGNALS
    def test_requests_in_flight_are_finished(
        self, serve: Launcher, background: Callable[..., Any], number: int
    ) -> None:
        server = serve("gated")
        posted = [background(server.post) for _ in range(4)]
        until(lambda: server.in_flight() == 4)
        server.kill(number)
        until(lambda: not server.listens())
        server.open_gate()
        for answer in posted:
            check_mask(answer.result())
            assert answer.result().headers["connection"] == "close"
        server.ended_well()
        assert count_ok(server) == 4

    def test_request_in_flight_gets_503_after_stop_s(
        self, serve: Launcher, background: Callable[..., Any], problem: Callable[..., Any]
    ) -> None:
        server = serve("gated", stop_s="1")
        posted = background(server.post)
        until(lambda: server.in_flight() == 1)
        server.kill(signal.SIGTERM)
        answer = posted.result()
        problem(answer, 503, "not-ready")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
        # Its batch cannot be stopped.
        server.open_gate()
        server.ended_well()
        assert 'unetpp_cancellations_total{reason="stopping"} 1.0' in server.metrics
        assert "unetpp_stopping 1.0" in server.metrics

    def test_device_that_never_returns_is_ended_with_a_traceback(
        self, serve: Launcher, background: Callable[..., Any]
    ) -> None:
        server = serve("gated", closing_s=1, stop_s="1")
        posted = background(server.post)
        until(lambda: server.in_flight() == 1)
        server.kill(signal.SIGTERM)
        assert posted.result().status_code == 503
        assert server.wait() == 1
        assert "in gated" in server.stderr

    def test_request_in_flight_is_dropped_at_a_second_signal(
        self, serve: Launcher, background: Callable[..., Any]
    ) -> None:
        server = serve("gated", stop_s=FOREVER)
        posted = background(server.post)
        until(lambda: server.in_flight() == 1)
        server.kill(signal.SIGTERM)
        until(lambda: not server.listens())
        server.kill(signal.SIGTERM)
        assert server.wait() == 128 + signal.SIGTERM
        assert isinstance(posted.exception(), httpx.TransportError)

    @pytest.mark.parametrize("goes_on", [True, False])
    def test_upload_in_flight_is_finished_or_gets_503(self, serve: Launcher, goes_on: bool) -> None:
        server = serve(stop_s=FOREVER if goes_on else "1")
        with contextlib.closing(HTTPConnection("127.0.0.1", server.port)) as upload:
            upload.putrequest("POST", "/segment?level=1")
            upload.putheader("Content-Length", str(len(PICTURE)))
            upload.endheaders()
            upload.send(PICTURE[:50])
            until(lambda: server.in_flight() == 1)
            server.kill(signal.SIGTERM)
            until(lambda: not server.listens())
            if goes_on:
                upload.send(PICTURE[50:])
            answer = upload.getresponse()
            assert answer.status == (200 if goes_on else 503)
            assert answer.headers["connection"] == "close" if goes_on else answer.headers["retry-after"]
            server.ended_well()

    @pytest.mark.parametrize("stop", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)])
    def test_job_in_flight_is_done_by_the_next_server(self, serve: Launcher, stop: tuple[int, ...]) -> None:
        server = serve("gated", stop_s=FOREVER)
        id_ = httpx.post(f"{server.url}/jobs", content=PICTURE).json()["id"]
        with httpx.stream("GET", f"{server.url}/jobs/{id_}/events", timeout=60) as events:
            lines = events.iter_lines()
            next(lines)
            for number in stop:
                server.kill(number)
                # Of two equal signals the kernel may make one, until the first is taken.
                until(lambda: not server.ready())
            with contextlib.suppress(httpx.TransportError):
                assert not any("event: done" in line for line in lines)
        # A batch that runs holds its thread.
        server.open_gate()
        assert server.wait() == (0 if len(stop) == 1 else 128 + stop[0])
        assert "Traceback" not in server.stderr
        server = serve("gated")
        until(lambda: httpx.get(f"{server.url}/jobs/{id_}").json()["state"] == "done")


class TestStartUp:
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
    def test_server_opening_bundles_stops_at_once(self, serve: Launcher, number: int, status: int) -> None:
        server = serve(opens="never")
        server.kill(number)
        assert server.wait() == status
        assert "Traceback" not in server.stderr

    @BOTH_SIGNALS
    def test_server_as_first_process_of_a_container_stops_at_once(self, tmp_path: Path, number: int) -> None:
        """For which the kernel ignores signals that are not handled."""
        namespace = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
        if (
            not shutil.which("unshare")
            or subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode
        ):
            pytest.skip("needs namespaces of processes")
        code = (
            "import os, time, server.service\nfrom server.cli import app\n"
            "def opens(settings):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
            "server.service.open_service = opens\napp(['serve'])\n"
        )
        with held_port() as port, contextlib.ExitStack() as stack:
            environment = os.environ | {"UNETPP_JOBS__FOLDER": str(tmp_path), "UNETPP_HTTP__PORT": str(port)}  # noqa: TID251 - of a child
            command = [*namespace, sys.executable, "-c", code]
            pipe = subprocess.PIPE
            outside = stack.enter_context(
                subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)
            )
            assert outside.stdout
            assert outside.stdout.readline() == "1\n"
            children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
            os.kill(int(children[0]), number)
            _, errors = outside.communicate(timeout=60)
        assert outside.returncode == 128 + number
        assert "Traceback" not in errors
