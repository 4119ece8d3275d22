"""A PostgreSQL and an S3 server on this machine, and roads to them that can be cut."""

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx

from bench.serving import free_port, running

BUCKET = "jobs"
DEBIAN = Path("/usr/lib/postgresql")
# Seconds until the S3 server must answer.
READY_S = 120


class Missing(RuntimeError):
    """A program that is needed is not on this machine."""


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
        """Lets connections through, on the port of before; what was sent since `silence` arrives."""
        if self._listening is None:
            self._listening = socket.create_server(("127.0.0.1", self.port))
            self.port = self._listening.getsockname()[1]
            threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()
        self._flows.set()

    def silence(self) -> None:
        """Lets nothing through, as a frozen server does.

        Connections stay open, new ones are accepted, and the kernel acknowledges what is sent until its buffers are full. A network that
        drops packets differs: there nothing is acknowledged, and TCP gives up in the end.
        """
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
