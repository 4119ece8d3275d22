"""A real HAProxy with the committed configuration, before two real servers: one is killed, one is stopped, and no request is lost."""

import contextlib
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import httpx
import numpy as np
import pytest

from bench.cluster_lab import haproxy_config, haproxy_program
from bench.stores import Missing
from client import Client
from tests.conftest import ROOT
from tests.docker.conftest import compose
from tests.server.processes import PICTURE, PIXELS, Launcher, ServerProcess, count_ok, held_port, launching
from tests.support.files import mask_of, picture_bytes
from tests.support.server import until

CONFIG = (ROOT / "deploy" / "haproxy.cfg").read_text()
CALLERS = 4


@dataclass
class Fleet:
    """Two servers behind HAProxy."""

    url: str
    servers: list[ServerProcess]
    launchers: list[Launcher]
    ops: list[int]

    def start(self, index: int) -> None:
        """Starts a server again, at its address."""
        self.servers[index] = self.launchers[index](ops_port=str(self.ops[index]), drain_s="3")

    def post(self) -> httpx.Response:
        """Sends one request, without a retry of the client."""
        return httpx.post(f"{self.url}/segment?level=1", content=PICTURE, timeout=60)


@pytest.fixture(scope="module")
def binary() -> str:
    """Path of HAProxy."""
    try:
        return haproxy_program()
    except Missing as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def forks(binary: str) -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that fork a server each, so that imports happen once."""
    with launching() as first, launching() as second:
        yield [first, second]


@pytest.fixture
def fleet(binary: str, forks: list["subprocess.Popen[str]"], tmp_path: Path) -> Iterator[Fleet]:
    """Two servers, and HAProxy with the committed file and their addresses."""
    with contextlib.ExitStack() as stack:
        launchers, ops, text = [], [], CONFIG
        door = stack.enter_context(held_port())
        for fork, name in zip(forks, ("one", "two"), strict=True):
            (tmp_path / name).mkdir()
            launchers.append(stack.enter_context(contextlib.closing(Launcher(fork, tmp_path / name))))
            ops.append(stack.enter_context(held_port()))
        fleet = Fleet(f"http://127.0.0.1:{door}", [None, None], launchers, ops)  # type: ignore[list-item]
        for index, (name, host) in enumerate((("one", "server"), ("two", "server-two"))):
            fleet.start(index)
            address = f"server {name} 127.0.0.1:{fleet.servers[index].port} port {ops[index]}"
            assert f"server {name} {host}:8000\n" in text
            text = text.replace(f"server {name} {host}:8000\n", f"{address}\n")
        text = text.replace("bind :8000", f"bind 127.0.0.1:{door}")
        stack.enter_context(_haproxy(binary, tmp_path, text, fleet.url))
        yield fleet


@contextlib.contextmanager
def _haproxy(binary: str, folder: Path, text: str, url: str) -> Iterator[None]:
    """HAProxy with a configuration, which answers at this address."""
    (folder / "haproxy.cfg").write_text(text)
    with (folder / "log").open("w") as log, contextlib.ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen([binary, "-f", str(folder / "haproxy.cfg")], stdout=log, stderr=log)
        )
        stack.callback(process.terminate)
        until(lambda: process.poll() is not None or _answers(url))
        assert process.poll() is None, (folder / "log").read_text()
        yield


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/models").status_code == 200
    return False


def test_a_server_is_killed_and_one_is_stopped_and_no_request_is_lost(fleet: Fleet) -> None:
    enough = Event()
    answered = [0] * CALLERS

    def call(number: int) -> None:
        with Client(fleet.url, retries=50, timeout_s=60) as client:
            while not enough.is_set():
                mask = client.segment(PICTURE, level=1).mask
                assert np.array_equal(mask, PIXELS.mean() < PIXELS)
                answered[number] += 1

    def answers(more: int) -> None:
        before = sum(answered)
        until(lambda: sum(answered) > before + more or any(one.done() for one in running))

    with ThreadPoolExecutor(CALLERS) as pool:
        running = [pool.submit(call, number) for number in range(CALLERS)]
        try:
            answers(20)
            fleet.servers[0].kill(signal.SIGKILL)
            fleet.servers[0].wait()
            answers(20)
            fleet.start(0)
            until(lambda: _requests(fleet.servers[0]) > 0 or any(one.done() for one in running))
            fleet.servers[1].kill(signal.SIGTERM)
            fleet.servers[1].ended_well()
            answers(20)
        finally:
            enough.set()
        for one in running:
            one.result()
    assert count_ok(fleet.servers[1]) > 0


def test_a_refused_connection_is_tried_at_the_other_server(fleet: Fleet) -> None:
    """Before the health check has noticed, and without a retry of the client."""
    fleet.servers[0].kill(signal.SIGKILL)
    fleet.servers[0].wait()
    answers = [fleet.post() for _ in range(6)]
    assert [one.status_code for one in answers] == [200] * 6
    assert all(np.array_equal(mask_of(one.content), PIXELS.mean() < PIXELS) for one in answers)


def test_both_servers_give_the_same_bytes(fleet: Fleet) -> None:
    rng = np.random.default_rng(19)
    for _ in range(20):
        body = picture_bytes(rng.integers(0, 256, (48, 64), dtype=np.uint8))
        urls = [one.url for one in fleet.servers] + [fleet.url]
        answers = [httpx.post(f"{url}/segment?level=1", content=body) for url in urls]
        assert [one.status_code for one in answers] == [200] * 3
        assert len({one.content for one in answers}) == 1
    first, second = (_shared(one) for one in fleet.servers)
    assert first == second
    assert len(first) > 4
    # HAProxy has sent some to each.
    assert all(20 < _requests(one) < 40 for one in fleet.servers)


def test_a_caller_who_leaves_frees_the_server(fleet: Fleet) -> None:
    # HAProxy does not watch the caller of a request any more that it has sent a second time, as it does after the 503 of a server
    # that a busy machine makes late.
    assert any(_is_freed(fleet) for _ in range(3))


def _is_freed(fleet: Fleet) -> bool:
    """Whether no server has a request 10 s after its caller has left."""
    for index in (0, 1):
        fleet.servers[index].kill(signal.SIGKILL)
        fleet.servers[index].wait()
        fleet.servers[index] = fleet.launchers[index]("gated", ops_port=str(fleet.ops[index]))
    until(lambda: all(one.ready() for one in fleet.servers))
    # Until a server that holds the request has it; before, HAProxy may know of none.
    until(lambda: _left(fleet.url))
    given_up = time.monotonic() + 10
    while any(one.in_flight() for one in fleet.servers) and time.monotonic() < given_up:
        time.sleep(0.05)
    return not any(one.in_flight() for one in fleet.servers)


def _left(url: str) -> bool:
    """Sends a request and leaves after a second; whether no answer came before."""
    try:
        httpx.post(f"{url}/segment?level=1", content=PICTURE, timeout=1)
    except httpx.ReadTimeout:
        return True
    return False


class Unavailable(BaseHTTPRequestHandler):
    """A server that is ready, and answers 503 to every POST."""

    protocol_version = "HTTP/1.1"
    posts: Counter[str]

    def do_GET(self) -> None:
        self._answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.posts[self.path] += 1
        self._answer(503)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def unavailable(binary: str, tmp_path: Path) -> Iterator[tuple[str, Counter[str], Callable[[], None]]]:
    """Address of HAProxy before two servers that answer 503, the POSTs that reached them, and what ends one of them."""
    posts: Counter[str] = Counter()
    handler = type("Handler", (Unavailable,), {"posts": posts})
    with contextlib.ExitStack() as stack:
        door = stack.enter_context(held_port())
        servers = []
        for _ in range(2):
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(server.shutdown)
            servers.append(server)

        def end_one() -> None:
            servers[0].shutdown()
            servers[0].server_close()

        ports = {f"s{one.server_port}": (one.server_port, one.server_port) for one in servers}
        url = f"http://127.0.0.1:{door}"
        stack.enter_context(_haproxy(binary, tmp_path, haproxy_config(door, ports), url))
        yield url, posts, end_one


@pytest.mark.parametrize(
    ("path", "headers", "is_repeated"),
    [
        ("/segment?level=1", {}, True),
        ("/jobs", {}, False),
        ("/jobs?level=1", {}, False),
        ("/jobs?level=1", {"Idempotency-Key": "0123456789abcdef"}, True),
    ],
)
def test_a_job_without_a_key_is_sent_once(
    unavailable: tuple[str, Counter[str], Callable[[], None]],
    path: str,
    headers: dict[str, str],
    is_repeated: bool,
) -> None:
    url, posts, _ = unavailable
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {len(PICTURE)}",
        "Connection: close",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0)) as connection:
        # At once, because HAProxy repeats only what it had whole when it sent it.
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + PICTURE)
        assert connection.makefile("rb").readline().split()[1] == b"503"
    assert (posts[path] > 1) == is_repeated
    assert posts[path] > 0


def test_a_job_without_a_key_is_tried_where_a_connection_is_refused(
    unavailable: tuple[str, Counter[str], Callable[[], None]],
) -> None:
    url, posts, end_one = unavailable
    end_one()
    for _ in range(4):
        httpx.post(f"{url}/jobs", content=PICTURE)
    assert posts["/jobs"] == 4


def _shared(server: ServerProcess) -> list[str]:
    """Series that must be the same on all replicas."""
    lines = httpx.get(f"{server.ops}/metrics").text.splitlines()
    return [line for line in lines if line.startswith(("unetpp_bundle_info{", "unetpp_engine_info{"))]


def _requests(server: ServerProcess) -> int:
    lines = httpx.get(f"{server.ops}/metrics").text.splitlines()
    ok = [line for line in lines if line.startswith("unetpp_requests_total{") and 'outcome="ok"' in line]
    return sum(int(float(line.split()[-1])) for line in ok)


def test_haproxy_accepts_the_file(binary: str, tmp_path: Path) -> None:
    """Without the names of Compose, which do not resolve here."""
    (tmp_path / "haproxy.cfg").write_text(re.sub(r"server(-two)?:8000", "127.0.0.1:8000", CONFIG))
    done = subprocess.run(
        [binary, "-c", "-f", str(tmp_path / "haproxy.cfg")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr


def test_only_what_was_not_worked_on_is_tried_again() -> None:
    assert re.findall(r"^\s*retry-on (.*)$", CONFIG, re.MULTILINE) == ["conn-failure 503"]
    # Bodies of hundreds of megabytes pass through.
    assert "http-buffer-request" not in CONFIG


def test_servers_are_those_of_compose() -> None:
    services = compose()["services"]
    names = re.findall(r"^\s*server \w+ ([\w-]+):8000$", CONFIG, re.MULTILINE)
    assert set(names) == set(services["haproxy"]["depends_on"])
    assert "UNETPP_HTTP__OPS_PORT=9000" in (ROOT / "docker" / "serve.Dockerfile").read_text()
    assert "check port 9000 " in CONFIG
    assert "./deploy/haproxy.cfg:/usr/local/etc/haproxy/haproxy.cfg:ro,z" in services["haproxy"]["volumes"]
