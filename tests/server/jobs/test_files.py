"""Files of jobs in a folder and in a bucket: what the contract of stores does not show."""

import contextlib
import email.utils
import http.server
import io
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.kept_file import KeptFileResponse
from server.errors import StoreUnavailable
from server.jobs.files import SharedFiles
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


def test_file_that_is_not_read_costs_nothing(slow_files: Any, tmp_path: Path) -> None:
    """Its client has gone, or wants a part: nothing is fetched that is not asked for, and nothing is left behind."""
    data = bytes(range(256)) * (20 * MIB // 256)
    bucket = SlowBucket(data, 8 * MIB)
    kept = slow_files(bucket).kept(ID, "result")
    assert kept.stat.st_size == len(data)
    assert bucket.asked == []
    with kept.open() as file:
        file.seek(10 * MIB)
        assert file.read(100) == data[10 * MIB :][:100]
    assert bucket.asked == [f"bytes={10 * MIB}-{11 * MIB - 1}"]
    assert [*tmp_path.rglob("*")] == []


async def test_part_of_an_object_is_served_without_the_rest(slow_files: Any) -> None:
    data = bytes(range(256)) * (20 * MIB // 256)
    bucket = SlowBucket(data, 8 * MIB)
    files = slow_files(bucket)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        kept = files.kept(ID, "result")
        await KeptFileResponse(kept, {"Content-Type": "image/png"})(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        part = await client.get("/", headers={"Range": "bytes=3000000-3000009,15000000-15000004"})
        assert part.status_code == 206
        assert data[3_000_000:3_000_010] in part.content
        assert data[15_000_000:15_000_005] in part.content
        assert bucket.asked == [f"bytes={start}-{start + MIB - 1}" for start in (3_000_000, 15_000_000)]
        bucket.asked.clear()
        assert (await client.head("/")).headers["content-length"] == f"{len(data)}"
        assert bucket.asked == []
        assert (await client.get("/")).content == data
        assert len(bucket.asked) == 5


def test_folder_that_is_removed_meanwhile_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = SharedFiles(JobsSettings(folder=tmp_path / "own"), tmp_path)
    for id_ in (ID, "f" * 32):
        files.write(id_, "input", io.BytesIO(b"x"))
    is_dir = Path.is_dir

    def is_dir_until_now(path: Path) -> bool:
        found = is_dir(path)
        if path.name == ID:
            shutil.rmtree(path)
        return found

    monkeypatch.setattr(Path, "is_dir", is_dir_until_now)
    assert files.ids(older_than_s=-60) == ["f" * 32]


STEPS = st.lists(
    st.tuples(st.sampled_from(["read", "seek", "end"]), st.integers(0, 90)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 70), steps=STEPS)
def test_object_is_read_as_a_file_is(size: int, steps: list[tuple[str, int]]) -> None:
    files_s3 = pytest.importorskip("server.jobs.files_s3", reason="needs the extra cluster")
    data = bytes(range(size))
    bucket = pytest.importorskip("obstore.store").MemoryStore()
    bucket.put("a", data)
    right = io.BytesIO(data)
    with (
        mock.patch.multiple(files_s3, FIRST_PIECE_BYTES=2, MAX_PIECE_BYTES=16),
        io.BufferedReader(files_s3.ObjectReader(bucket, "a", size), 4) as file,
    ):
        for step, number in steps:
            if step == "read":
                assert file.read(number) == right.read(number)
            elif step == "seek":
                assert file.seek(number) == right.seek(number)
            else:
                assert file.seek(0, io.SEEK_END) == right.seek(0, io.SEEK_END)
        assert file.read() == right.read()
