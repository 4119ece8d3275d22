"""Files of jobs in a folder and in a bucket: what the contract of stores does not show."""

import contextlib
import email.utils
import http.server
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.errors import StoreUnavailable
from server.jobs.stores import open_files
from server.settings import JobsSettings

ID = "0123456789abcdef" * 2
MIB = 1024 * 1024


class SlowBucket:
    """A server with one object, which says nothing more after so many bytes of an answer.

    To a client that gives up after some time, a slow network is the same.

    Attributes:
        data: content of the object.
        asked: ranges that were asked for.
    """

    def __init__(self, data: bytes, most_bytes: int) -> None:
        self.data = data
        self.asked: list[str] = []
        over = self._over = threading.Event()
        bucket = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(b"", len(bucket.data), 200)

            def do_GET(self) -> None:
                bucket.asked.append(self.headers.get("Range", "all"))
                part = re.fullmatch(r"bytes=(\d+)-(\d*)", bucket.asked[-1])
                if part is None:
                    self._answer(bucket.data, len(bucket.data), 200)
                    return
                start, end = int(part[1]), int(part[2] or len(bucket.data) - 1) + 1
                self._answer(bucket.data[start:end], len(bucket.data[start:end]), 206, start)

            def _answer(self, body: bytes, length: int, status: int, start: int = 0) -> None:
                self.send_response(status)
                self.send_header("Content-Length", f"{length}")
                self.send_header("ETag", '"1"')
                self.send_header("Last-Modified", email.utils.formatdate(1e9, usegmt=True))
                if status == 206:
                    self.send_header(
                        "Content-Range", f"bytes {start}-{start + length - 1}/{len(bucket.data)}"
                    )
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body[:most_bytes])
                    if len(body) > most_bytes:
                        over.wait(60)

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()


@pytest.fixture
def slow_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Opens the files in a `SlowBucket`, with less patience than usual."""
    variables = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    files_s3 = pytest.importorskip("server.jobs.files_s3", reason="needs the extra cluster")
    with contextlib.ExitStack() as stack:

        def opened(bucket: SlowBucket, patience: str = "10s", retries: int = 2) -> Any:
            for name in ("read_timeout", "timeout"):
                monkeypatch.setitem(files_s3.CLIENT_OPTIONS, name, patience)
            monkeypatch.setitem(files_s3.RETRY_CONFIG, "max_retries", retries)
            stack.enter_context(bucket.running())
            monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
            return open_files(JobsSettings(folder=tmp_path, files="s3://jobs/x"))

        yield opened


def test_object_that_takes_longer_than_a_request_may_arrives(slow_files: Any) -> None:
    data = bytes(range(256)) * (33 * MIB // 256) + b"end"
    bucket = SlowBucket(data, 8 * MIB)
    with slow_files(bucket).open(ID, "result") as file:
        assert file.read() == data
    assert len(bucket.asked) == 7


def test_bucket_that_goes_silent_is_away(slow_files: Any) -> None:
    with pytest.raises(StoreUnavailable):
        slow_files(SlowBucket(b"x" * MIB, 1000), patience="1s", retries=0).open(ID, "result")
