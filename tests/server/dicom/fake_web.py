"""A DICOMweb server that misbehaves as a test says."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

STUDY, SERIES = "1.2.826.1", "1.2.826.1.1"
JSON = "application/dicom+json"


def value(*values: Any) -> dict[str, Any]:
    return {"vr": "UI", "Value": [*values]}


@dataclass
class FakeWeb:
    """What the server has, and how it answers.

    Attributes:
        instances: files of its one series.
        statuses: statuses of the next answers that bring instances; then 200.
        store_statuses: statuses of the next answers to STOW-RS; then 200.
        cut: whether an answer with instances ends before its last boundary.
        missing: instances that an answer leaves out.
        pause_s: seconds in the middle of an answer.
        location: where an answer with instances redirects to.
        stored: bodies that were stored.
        seen: paths and headers of all requests.
        fails_after_storing: next requests to STOW-RS that are stored and not answered.
        reason: failure reason of answers with 409.
        port: its TCP port.
        more_series: further rows of the list of series.
        listing: the whole list, as bytes.
        other_instances: UIDs that every list of instances has, whatever it was asked for.
        encoding: Content-Encoding of answers, whose bytes are not changed.
        encoded: end of their paths.
        query_status: status of lists of instances.
    """

    instances: list[bytes] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    store_statuses: list[int] = field(default_factory=list)
    cut: bool = False
    missing: int = 0
    pause_s: float = 0.0
    location: str | None = None
    stored: list[bytes] = field(default_factory=list)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    fails_after_storing: int = 0
    reason: int | None = None
    port: int = 0
    more_series: list[dict[str, Any]] = field(default_factory=list)
    listing: bytes = b""
    other_instances: list[str] = field(default_factory=list)
    encoding: str | None = None
    encoded: str = "/series"
    query_status: int = 200

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/dicom-web"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> FakeWeb:
        return self.server.fake  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", kind: str = JSON, **headers: str) -> None:
        self.send_response(status)
        for name, text in {"Content-Type": kind, "Content-Length": f"{len(body)}", **headers}.items():
            self.send_header(name, text)
        self.end()
        self.wfile.write(body)

    def end(self) -> None:
        if self.fake.encoding and urlsplit(self.path).path.endswith(self.fake.encoded):
            self.send_header("Content-Encoding", self.fake.encoding)
        self.end_headers()

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        self.fake.seen.append((self.path, dict(self.headers)))
        tail = path.path.removeprefix("/dicom-web")
        if tail == f"/studies/{STUDY}/series":
            row = {
                "0020000E": value(SERIES),
                "00080060": value("CT"),
                "00201209": value(len(self.fake.instances)),
            }
            asked = parse_qs(path.query).get("SeriesInstanceUID", [SERIES])
            rows = [row, *self.fake.more_series] if asked == [SERIES] else []
            self.answer(200, self.fake.listing or json.dumps(rows).encode())
        elif tail == f"/studies/{STUDY}/instances":
            uid = parse_qs(path.query)["SOPInstanceUID"][0]
            there = [uid] if any(uid.encode() in body for body in self.fake.stored) else []
            rows = [{"00080018": value(one)} for one in [*self.fake.other_instances, *there]]
            self.answer(self.fake.query_status, json.dumps(rows).encode())
        elif tail == f"/studies/{STUDY}/series/{SERIES}":
            self.bring()
        else:
            self.answer(404)

    def bring(self) -> None:
        status = self.fake.statuses.pop(0) if self.fake.statuses else 200
        if self.fake.location:
            self.answer(302, Location=self.fake.location)
            return
        if status != 200:
            self.answer(status, b"Patient Doe^Jane")
            return
        kept = self.fake.instances[self.fake.missing :]
        parts = [b"\r\n--b1\r\nContent-Type: application/dicom\r\n\r\n" + one for one in kept]
        body = b"".join(parts) + (b"" if self.fake.cut else b"\r\n--b1--\r\n")
        self.send_response(200)
        self.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary="b1"')
        self.send_header("Content-Length", f"{len(body)}")
        self.end()
        with contextlib.suppress(OSError):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(self.fake.pause_s)
            self.wfile.write(body[len(body) // 2 :])

    def do_POST(self) -> None:
        self.fake.seen.append((self.path, dict(self.headers)))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        status = self.fake.store_statuses.pop(0) if self.fake.store_statuses else 200
        if status in (200, 202):
            self.fake.stored.append(body)
        if self.fake.fails_after_storing:
            self.fake.fails_after_storing -= 1
            self.close_connection = True
            return
        failed = (
            {"00081198": {"vr": "SQ", "Value": [{"00081197": value(self.fake.reason)}]}}
            if status == 409
            else {}
        )
        self.answer(status, json.dumps(failed).encode())


class QuietServer(ThreadingHTTPServer):
    """Prints nothing where a client hangs up."""

    def handle_error(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def fake_web(paths: Sequence[Path] = (), **behaviour: Any) -> Iterator[FakeWeb]:
    fake = FakeWeb([path.read_bytes() for path in paths], **behaviour)

    server = QuietServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.fake = fake  # type: ignore[attr-defined]
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
