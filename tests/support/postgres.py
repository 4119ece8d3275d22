"""A real PostgreSQL and a real S3 server for tests, and a network between them that can be cut."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "jobs"
DEBIAN = Path("/usr/lib/postgresql")


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """Starts a PostgreSQL and gives the address of its maintenance database; skips where there is none."""
    pytest.importorskip("psycopg", reason="needs the extra cluster")
    # Not the folder of pytest, because another user has to get there, and because the path of a socket is short.
    with tempfile.TemporaryDirectory(prefix="pg", ignore_cleanup_errors=True) as folder:
        starts = (_pgserver, _debian)
        for start in starts:
            with contextlib.suppress(ImportError, OSError, RuntimeError, subprocess.SubprocessError):
                stack = contextlib.ExitStack()
                address = stack.enter_context(start(Path(folder) / start.__name__))
                with stack:
                    _without_fsync(address)
                    yield address
                    return
    pytest.skip("needs PostgreSQL: pgserver from PyPI, or Debian's")


@contextlib.contextmanager
def _pgserver(folder: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for XDG_RUNTIME_DIR
        import pgserver

        server = pgserver.get_server(folder, cleanup_mode="stop")
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
    """Tests do not cut the power."""
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


def emptied(address: str) -> str:
    """Removes the tables of an earlier test, and gives the address."""
    import psycopg

    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning")
        connection.execute("DROP SCHEMA IF EXISTS unetpp CASCADE")
    return address


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Starts a server that speaks S3, with one bucket, and gives its endpoint; skips where there is none."""
    pytest.importorskip("obstore", reason="needs the extra cluster")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pytest.importorskip("moto.server", reason="needs moto[s3] and flask-cors")
    import logging

    import httpx

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        endpoint = "http://{}:{}".format(*running.get_host_and_port())
        httpx.put(f"{endpoint}/{BUCKET}").raise_for_status()
        yield endpoint
    finally:
        running.stop()


class Network:
    """A TCP road to a server's socket, which can be cut: connections break, and new ones are refused."""

    def __init__(self, socket_path: str) -> None:
        self._socket_path = socket_path
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listening: socket.socket | None = None
        self.port = 0
        self.mend()

    def mend(self) -> None:
        """Lets connections through, on the port of before."""
        self._listening = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

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

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                near, _ = listening.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._socket_path)
            with self._lock:
                self._open |= {near, far}
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
    source.close()
