"""SIGTERM, SIGINT and restarts of real processes: `unetpp serve` on fake engines."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bench.serving import free_port
from tests.conftest import ROOT
from tests.support.files import mask_of, picture_bytes
from tests.support.server import until

PIXELS = np.arange(64, dtype=np.uint8).repeat(64).reshape(64, 64)
PICTURE = picture_bytes(PIXELS)
# In seconds; nothing here waits for its end.
FOREVER = "600"

RESTARTS = 3  # of each of two servers


class Life:
    """One server process."""

    def __init__(self, launcher: "subprocess.Popen[str]", folder: Path, port: int, ops_port: str | int) -> None:
        assert launcher.stdout
        self._told = launcher.stdout
        self._status: int | None = None
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        # Where health and metrics are.
        self.ops = f"http://127.0.0.1:{ops_port}"
        word, number = self._told.readline().split()
        assert word == "pid", self.said
        self.pid = int(number)

    def kill(self, number: int) -> None:
        if self._status is None:
            os.kill(self.pid, number)

    def end(self) -> int:
        """Waits for its end and gives its exit status, negative if a signal ended it."""
        if self._status is None:
            word, number = self._told.readline().split()
            assert word == "status"
            self._status = int(number)
        return self._status

    @property
    def said(self) -> str:
        return (self.folder / "stderr").read_text()

    def listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
            return True
        return False

    def ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.ops}/health/ready").status_code == 200
        return False

    def post(self) -> httpx.Response:
        return httpx.post(f"{self.url}/segment?level=1", content=PICTURE, timeout=60)

    def in_flight(self) -> int:
        lines = httpx.get(f"{self.ops}/metrics").text.splitlines()
        return int(float(next(line.split()[1] for line in lines if line.startswith("unetpp_requests_in_flight "))))

    def open_gate(self) -> None:
        """Lets gated engines go on."""
        (self.folder / "go").touch()


class Launcher:
    """Starts lives on one port, one after the other."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._lives: list[Life] = []
        # Bound and not listening: nobody else gets this port while no life has it.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))

    def __call__(self, engine: str = "slow", closing_s: int = 60, opens: str = "well", **http: str) -> Life:
        port = self._held.getsockname()[1]
        environment = {
            f"UNETPP_HTTP__{name}".upper(): value for name, value in ({"port": str(port), "drain_s": "0"} | http).items()
        }
        environment["UNETPP_JOBS__FOLDER"] = str(self._folder / "jobs")
        order = {"folder": str(self._folder), "name": engine, "environment": environment, "closing_s": closing_s, "opens": opens}
        print(json.dumps(order), file=self._process.stdin, flush=True)
        life = Life(self._process, self._folder, port, http.get("ops_port", port))
        self._lives.append(life)
        if opens == "well":
            until(life.ready)
        return life

    def close(self) -> None:
        for life in self._lives:
            life.kill(signal.SIGKILL)
            life.end()
        self._held.close()


@contextlib.contextmanager
def launching() -> Iterator["subprocess.Popen[str]"]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
    command = [sys.executable, str(Path(__file__).with_name("launch.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment | {"PYTHONPATH": str(ROOT)}
    ) as process:
        yield process


@pytest.fixture(scope="module")
def process() -> Iterator["subprocess.Popen[str]"]:
    """One for the module, as its imports take seconds."""
    with launching() as process:
        yield process


@pytest.fixture
def serve(process: "subprocess.Popen[str]", tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(process, tmp_path)
    yield launcher
    launcher.close()


@pytest.fixture
def background() -> Iterator[Callable[..., "Future[Any]"]]:
    """Calls in threads."""
    with ThreadPoolExecutor(8) as executor:
        yield executor.submit


def ended_well(life: Life) -> None:
    assert life.end() == 0, life.said
    assert "Traceback" not in life.said


def right(answer: httpx.Response) -> bool:
    assert answer.status_code == 200, answer.text
    return np.array_equal(mask_of(answer.content), PIXELS.mean() < PIXELS)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_stops(serve: Launcher, number: int) -> None:
    life = serve()
    life.kill(number)
    ended_well(life)


def test_a_hangup_while_bundles_open_is_no_end(serve: Launcher) -> None:
    life = serve(opens="late")
    life.kill(signal.SIGHUP)
    life.open_gate()
    until(life.ready)
    life.kill(signal.SIGTERM)
    ended_well(life)


class TestListeningOn:
    """Between SIGTERM and the end of drain_s."""

    @pytest.fixture
    def life(self, serve: Launcher) -> Life:
        return serve(drain_s=FOREVER)

    def test_not_ready_and_answering(self, life: Life, problem: Callable[..., Any]) -> None:
        with httpx.Client(base_url=life.url) as kept:
            assert "connection" not in kept.get("/health/ready").headers
            life.kill(signal.SIGTERM)
            until(lambda: not life.ready())
            answer = kept.get("/health/ready")
            assert "stopping" in problem(answer, 503, "not-ready").detail
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.headers["connection"] == "close"
            for _ in range(3):
                answer = kept.post("/segment?level=1", content=PICTURE)
                assert right(answer)
                assert answer.headers["connection"] == "close"
            for path, status in (("/health/live", 200), ("/nowhere", 404), ("/jobs/unknown", 404), ("/segment", 405)):
                answer = kept.get(path)
                assert answer.status_code == status
                assert answer.headers.get_list("connection") == ["close"]
        assert life.post().status_code == 200

    def test_a_kept_alive_connection_is_let_go_with_its_next_answer(self, life: Life) -> None:
        with contextlib.closing(HTTPConnection("127.0.0.1", life.port)) as kept:
            kept.request("GET", "/health/live")
            kept.getresponse().read()
            first = kept.sock
            life.kill(signal.SIGTERM)
            until(lambda: not life.ready())
            kept.request("GET", "/health/live")
            assert kept.sock is first
            kept.getresponse().read()
            assert kept.sock is None

    def test_an_answer_that_comes_before_the_body_is_not_lost(self, life: Life) -> None:
        life.kill(signal.SIGTERM)
        until(lambda: not life.ready())
        for _ in range(5):
            with contextlib.closing(HTTPConnection("127.0.0.1", life.port)) as kept:
                kept.request("POST", "/segment?model=unknown", b"x" * 20_000_000)
                answer = kept.getresponse()
                assert (answer.status, answer.headers["connection"]) == (404, None)
                answer.read()
                kept.request("POST", "/segment?model=unknown")
                answer = kept.getresponse()
                assert (answer.status, answer.headers["connection"]) == (404, "close")

    def test_jobs_go_on(self, serve: Launcher) -> None:
        life = serve("gated", drain_s=FOREVER)
        id_ = httpx.post(f"{life.url}/jobs", content=PICTURE).json()["id"]
        with httpx.stream("GET", f"{life.url}/jobs/{id_}/events", timeout=60) as events:
            lines = events.iter_lines()
            next(lines)
            life.kill(signal.SIGTERM)
            until(lambda: not life.ready())
            life.open_gate()
            assert "event: done" in list(lines)
        assert httpx.get(f"{life.url}/jobs/{id_}/result").status_code == 200

    def test_ctrl_c_does_not_wait(self, life: Life) -> None:
        life.kill(signal.SIGINT)
        ended_well(life)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_stops_at_once(self, life: Life, number: int) -> None:
        life.kill(signal.SIGTERM)
        until(lambda: not life.ready())
        life.kill(number)
        assert life.end() == 128 + number
        assert "Traceback" not in life.said


class TestOpsPort:
    """It is there from the first answer of the other port to its last."""

    @pytest.fixture
    def ops_port(self) -> Iterator[str]:
        with socket.socket() as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            yield str(held.getsockname()[1])

    @pytest.mark.parametrize("drain_s", ["0", FOREVER])
    def test_tells_of_the_end_until_the_end(
        self, serve: Launcher, background: Callable[..., Any], problem: Callable[..., Any], ops_port: str, drain_s: str
    ) -> None:
        life = serve("gated", ops_port=ops_port, drain_s=drain_s)
        posted = background(life.post)
        until(lambda: life.in_flight() == 1)
        life.kill(signal.SIGTERM)
        if drain_s == "0":
            until(lambda: not life.listens())
        else:
            until(lambda: not life.ready())
        for _ in range(3):
            assert "stopping" in problem(httpx.get(f"{life.ops}/health/ready"), 503, "not-ready").detail
            assert httpx.get(f"{life.ops}/health/live").status_code == 200
            assert life.in_flight() == 1
        life.open_gate()
        assert right(posted.result())
        if drain_s == "0":
            ended_well(life)
        with contextlib.suppress(httpx.TransportError):
            assert httpx.get(f"{life.ops}/health/ready").status_code == 503

    def test_an_idle_connection_does_not_keep_it(self, serve: Launcher, ops_port: str) -> None:
        life = serve(ops_port=ops_port)
        with contextlib.closing(HTTPConnection("127.0.0.1", int(ops_port))) as kept:
            kept.request("GET", "/metrics")
            kept.getresponse().read()
            life.kill(signal.SIGINT)
            ended_well(life)

    def test_a_port_that_is_taken_after_it_was_bound(self, serve: Launcher, tmp_path: Path) -> None:
        """Which bound sockets of two programs do not prevent, as long as neither listens."""
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", 0))
            life = serve(opens="late", ops_port=str(other.getsockname()[1]))
            other.listen()
            life.open_gate()
            assert life.end() == 1
        errors = [line for line in life.said.splitlines() if "error:" in line]
        assert errors == ["error: the server cannot listen: Address already in use; choose other ports"]
        assert "Traceback" not in life.said


class TestInFlight:
    """When the server listens no more."""

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_is_finished(self, serve: Launcher, background: Callable[..., Any], number: int) -> None:
        life = serve("gated")
        posted = [background(life.post) for _ in range(4)]
        until(lambda: life.in_flight() == 4)
        life.kill(number)
        until(lambda: not life.listens())
        life.open_gate()
        for answer in posted:
            assert right(answer.result())
            assert answer.result().headers["connection"] == "close"
        ended_well(life)
        row = 'unetpp_requests_total{mode="fast",model="fake",outcome="ok",requested_level="1",served_level="1"} 4'
        assert row in (life.folder / "metrics").read_text()

    def test_is_cut_off_in_the_end(self, serve: Launcher, background: Callable[..., Any], problem: Callable[..., Any]) -> None:
        life = serve("gated", stop_s="1")
        posted = background(life.post)
        until(lambda: life.in_flight() == 1)
        life.kill(signal.SIGTERM)
        answer = posted.result()
        problem(answer, 503, "not-ready")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
        # Its batch cannot be stopped.
        life.open_gate()
        ended_well(life)
        metrics = (life.folder / "metrics").read_text()
        assert 'unetpp_cancellations_total{reason="stopping"} 1.0' in metrics
        assert "unetpp_stopping 1.0" in metrics

    def test_a_device_that_never_returns_cannot_keep_it(self, serve: Launcher, background: Callable[..., Any]) -> None:
        life = serve("gated", closing_s=1, stop_s="1")
        posted = background(life.post)
        until(lambda: life.in_flight() == 1)
        life.kill(signal.SIGTERM)
        assert posted.result().status_code == 503
        assert life.end() == 1
        # Where it hangs.
        assert "in gated" in life.said

    def test_a_second_signal_stops_at_once(self, serve: Launcher, background: Callable[..., Any]) -> None:
        life = serve("gated", stop_s=FOREVER)
        posted = background(life.post)
        until(lambda: life.in_flight() == 1)
        life.kill(signal.SIGTERM)
        until(lambda: not life.listens())
        life.kill(signal.SIGTERM)
        assert life.end() == 128 + signal.SIGTERM
        assert isinstance(posted.exception(), httpx.TransportError)

    def test_an_idle_connection_is_closed(self, serve: Launcher) -> None:
        life = serve()
        with (
            contextlib.closing(HTTPConnection("127.0.0.1", life.port)) as kept,
            socket.create_connection(("127.0.0.1", life.port)) as fresh,
        ):
            kept.request("GET", "/health/live")
            kept.getresponse().read()
            life.kill(signal.SIGTERM)
            assert kept.sock.recv(1) == b""
            assert fresh.recv(1) == b""
            ended_well(life)

    @contextlib.contextmanager
    def upload_half(self, life: Life) -> Iterator[HTTPConnection]:
        with contextlib.closing(HTTPConnection("127.0.0.1", life.port)) as connection:
            connection.putrequest("POST", "/segment?level=1")
            connection.putheader("Content-Length", str(len(PICTURE)))
            connection.endheaders()
            connection.send(PICTURE[:50])
            until(lambda: life.in_flight() == 1)
            yield connection

    def test_half_an_upload_may_go_on(self, serve: Launcher) -> None:
        life = serve()
        with self.upload_half(life) as upload:
            life.kill(signal.SIGTERM)
            until(lambda: not life.listens())
            upload.send(PICTURE[50:])
            answer = upload.getresponse()
            assert answer.status == 200
            assert answer.headers["connection"] == "close"
            ended_well(life)

    def test_half_an_upload_that_stalls(self, serve: Launcher) -> None:
        life = serve(stop_s="1")
        with self.upload_half(life) as upload:
            life.kill(signal.SIGTERM)
            answer = upload.getresponse()
            assert answer.status == 503
            assert answer.headers["retry-after"]
            ended_well(life)

    @pytest.mark.parametrize("stop", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)])
    def test_a_job_waits_for_the_next_life(self, serve: Launcher, stop: tuple[int, ...]) -> None:
        life = serve("gated", stop_s=FOREVER)
        id_ = httpx.post(f"{life.url}/jobs", content=PICTURE).json()["id"]
        with httpx.stream("GET", f"{life.url}/jobs/{id_}/events", timeout=60) as events:
            lines = events.iter_lines()
            next(lines)
            for number in stop:
                life.kill(number)
                # Of two equal signals the kernel may make one, until the first is taken.
                until(lambda: not life.ready())
            with contextlib.suppress(httpx.TransportError):
                assert not any("event: done" in line for line in lines)
        # A batch that runs holds the thread that it runs in.
        life.open_gate()
        assert life.end() == (0 if len(stop) == 1 else 128 + stop[0])
        assert "Traceback" not in life.said
        life = serve("gated")
        until(lambda: httpx.get(f"{life.url}/jobs/{id_}").json()["state"] == "done")


class TestStartUp:
    @pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
    def test_stops_at_once(self, serve: Launcher, number: int, status: int) -> None:
        life = serve(opens="never")
        life.kill(number)
        assert life.end() == status
        assert "Traceback" not in life.said

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_as_the_first_process_of_a_container(self, tmp_path: Path, number: int) -> None:
        """For which the kernel ignores signals that are not handled."""
        apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
        if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
            pytest.skip("needs namespaces of processes")
        code = (
            "import os, time, server.app\nfrom server.cli import app\n"
            "def opens(settings):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
            "server.app.open_bundles = opens\napp(['serve'])\n"
        )
        environment = os.environ | {"UNETPP_JOBS__FOLDER": str(tmp_path), "UNETPP_HTTP__PORT": str(free_port())}  # noqa: TID251 - of a child
        with subprocess.Popen(
            [*apart, sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        ) as outside:
            assert outside.stdout
            assert outside.stdout.readline() == "1\n"
            children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
            os.kill(int(children[0]), number)
            _, errors = outside.communicate(timeout=60)
        assert outside.returncode == 128 + number
        assert "Traceback" not in errors


class Caller:
    """A small client that knows all servers and tries again, as the README asks for; belongs to one thread."""

    def __init__(self, urls: list[str]) -> None:
        self._urls = deque(urls)
        self._client = httpx.Client(timeout=60)
        self.statuses: Counter[int] = Counter()
        self.unanswered: Counter[str] = Counter()

    def call(self, body: bytes) -> httpx.Response:
        for _ in range(1000):
            # The load is spread; and after a failure it is another one's turn, too.
            self._urls.rotate()
            try:
                answer = self._client.post(f"{self._urls[0]}/segment?level=1", content=body)
            except httpx.TransportError as error:
                self.unanswered[type(error).__name__] += 1
                time.sleep(0.01)
                continue
            self.statuses[answer.status_code] += 1
            if answer.status_code not in (429, 503):
                return answer
            time.sleep(int(answer.headers["retry-after"]))
        raise AssertionError("nobody answers")

    def call_until(self, enough: threading.Event, seed: int) -> int:
        """Calls with pictures of its own, and checks their answers; how many there were."""
        random = np.random.default_rng(seed)
        with self._client:
            for answered in itertools.count():
                if enough.is_set():
                    return answered
                pixels = random.integers(0, 256, (64, 64), dtype=np.uint8)
                answer = self.call(picture_bytes(pixels))
                assert answer.status_code == 200, answer.text
                assert np.array_equal(mask_of(answer.content), pixels.mean() < pixels)
        raise AssertionError

    @property
    def answered(self) -> int:
        return self.statuses[200]


def count_ok(life: Life) -> int:
    """Of a life that has ended."""
    lines = (life.folder / "metrics").read_text().splitlines()
    return sum(int(float(line.split()[1])) for line in lines if "unetpp_requests_total{" in line and 'outcome="ok"' in line)


@pytest.mark.long
def test_a_rolling_restart_loses_no_request(process: "subprocess.Popen[str]", tmp_path: Path) -> None:
    with contextlib.ExitStack() as opened:
        launchers = []
        for name, launching_ in (("a", process), ("b", opened.enter_context(launching()))):
            (tmp_path / name).mkdir()
            launchers.append(Launcher(launching_, tmp_path / name))
            opened.callback(launchers[-1].close)
        lives = [launch(drain_s="0.5") for launch in launchers]
        callers = [Caller([life.url for life in lives]) for _ in range(4)]
        enough = threading.Event()
        pool = opened.enter_context(ThreadPoolExecutor(len(callers)))
        opened.callback(enough.set)
        running = [pool.submit(caller.call_until, enough, seed) for seed, caller in enumerate(callers)]
        ok = 0
        for _ in range(RESTARTS):
            for index, launch in enumerate(launchers):
                before = sum(caller.answered for caller in callers)
                until(lambda before=before: sum(caller.answered for caller in callers) > before + 20)  # type: ignore[misc]
                lives[index].kill(signal.SIGTERM)
                ended_well(lives[index])
                ok += count_ok(lives[index])
                lives[index] = launch(drain_s="0.5")
        enough.set()
        answered = sum(future.result() for future in running)
        for life in lives:
            life.kill(signal.SIGTERM)
            ended_well(life)
            ok += count_ok(life)
    assert set().union(*(caller.statuses for caller in callers)) <= {200, 429, 503}
    # What was worked on was answered: a request that met a closed door was not worked on.
    assert ok == answered == sum(caller.answered for caller in callers)
    assert set().union(*(caller.unanswered for caller in callers)) <= {"ConnectError", "ReadError", "RemoteProtocolError"}
    # Else the restarts came when nobody called.
    assert all(caller.unanswered for caller in callers)
