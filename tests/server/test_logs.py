"""What the log says of requests and failures, and that it never says what callers sent."""

import asyncio
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from server import logs
from server.errors import BundleDamaged, InvalidParameter, NotReady
from server.segment import steps
from tests.support.files import picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app

PICTURE = picture_bytes(np.arange(64, dtype=np.uint8).reshape(8, 8))
# In names, headers and values of what is sent.
MARKS = ("PATIENT-DOE", "SECRETNAME", "QUERYJUNK", "HEADERJUNK")


class Log:
    """What has been written."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["logger"] == "server.api.access"]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Log]]:
    """Sets the log up as `unetpp serve` does, and puts things back as they were."""
    root, stream = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers, root.level

    def setup(form: Any) -> Log:
        # pytest's own are there by now.
        monkeypatch.setattr(sys, "stderr", stream)
        root.handlers = []
        logs.setup(form)
        return Log(stream)

    yield setup
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


def raised(error: Exception, module: str) -> Exception:
    """As it is once it has been raised in a module."""
    namespace = {"__name__": module, "error": error}
    try:
        exec("def go():\n    raise error\ngo()", namespace)  # noqa: S102 - our own
    except Exception as caught:  # noqa: BLE001
        return caught
    raise AssertionError


def test_a_line_is_an_object(log: Callable[[str], Log]) -> None:
    written = log("json")
    token = logs.REQUEST_ID.set("abc")
    logging.getLogger("server.x").warning("two\nlines %d", 2)
    logs.REQUEST_ID.reset(token)
    logging.getLogger("server.x").info("more", extra={"fields": {"seconds": 1.5}})
    first, second = written.lines
    assert first.pop("time").endswith("Z")
    assert first == {"level": "warning", "logger": "server.x", "message": "two\nlines 2", "request_id": "abc"}
    assert second["seconds"] == 1.5
    assert "request_id" not in second


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("error", "module", "told"),
    [
        (RuntimeError("out of memory"), "server.runtime.engines.x", True),
        (BundleDamaged("weights"), "elsewhere", True),
        (NotReady("later"), "server.api.x", True),
        (ValueError("SECRETNAME"), "server.imaging.decode.x", False),
        (ValueError("SECRETNAME"), "nibabel", False),
        (InvalidParameter("QUERYJUNK"), "server.runtime.x", True),
        (InvalidParameter("QUERYJUNK"), "server.api.x", False),
    ],
)
def test_texts_of_exceptions(form: str, error: Exception, module: str, told: bool, log: Callable[[str], Log]) -> None:
    written = log(form)
    text, error = str(error), raised(error, module)
    logging.getLogger("server.x").error("failed", exc_info=error)
    assert type(error).__name__ in written.text
    assert "test_logs.py" in written.text
    assert (text in written.text) == told
    # As what led to another one it says no more.
    outer = raised(RuntimeError("out of memory"), "server.runtime.x")
    outer.__context__ = error
    logging.getLogger("server.x").error("failed", exc_info=outer)
    assert "out of memory" in written.text
    assert (text in written.text) == told


def test_ids_of_jobs_are_cut(log: Callable[[str], Log]) -> None:
    """Also where the disk's own errors name files."""
    written = log("text")
    id_ = "0123456789abcdef" * 2
    error = raised(PermissionError(13, "Permission denied", f"var/jobs/{id_}/input"), "server.jobs.files")
    logging.getLogger("server.x").error("failed", exc_info=error)
    assert "var/jobs/01234567…/input" in written.text
    assert id_ not in written.text


def test_who_is_not_heard(log: Callable[[str], Log]) -> None:
    written = log("json")
    for name in ("nibabel.global", "tifffile", "PIL.TiffImagePlugin", "py.warnings"):
        logging.getLogger(name).error("SECRETNAME")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("SECRETNAME", stacklevel=1)
    assert written.text == ""


def test_forgotten_tasks(log: Callable[[str], Log]) -> None:
    written = log("json")

    async def forgotten() -> None:
        # Lines of code are told.
        raise ValueError(MARKS[1])

    async def go() -> None:
        task = asyncio.create_task(forgotten())
        await asyncio.wait([task])
        del task

    asyncio.run(go())
    (line,) = written.lines
    assert line["message"] == "Task exception was never retrieved"
    assert "ValueError" in line["exception"]
    assert "SECRETNAME" not in written.text


class TestRequests:
    def test_segment(self, log: Callable[[str], Log]) -> None:
        with serving(fake_app()) as client:
            written = log("json")
            client.post("/segment?level=2", content=PICTURE, headers={"X-Request-Id": "mine"})
            client.post("/segment?level=9", content=PICTURE)
            client.get("/jobs/QUERYJUNK")
            client.get("/QUERYJUNK")
            client.get("/health/ready")
            client.get("/metrics")
        ok, bad, job, unknown = written.requests()
        assert 0 < ok.pop("seconds") < 60
        assert ok.pop("time")
        assert ok.pop("message").startswith("POST /segment 200 in ")
        assert ok == {
            "level": "info", "logger": "server.api.access", "request_id": "mine", "method": "POST", "route": "/segment", "status": 200,
            "outcome": "ok", "model": "fake", "mode": "fast", "requested_level": "2", "served_level": "2", "bytes_in": len(PICTURE),
        }  # fmt: skip
        assert (bad["status"], bad["outcome"], bad["model"], bad["served_level"]) == (422, "client_error", "none", "none")
        assert (job["route"], job["status"], job["outcome"]) == ("/jobs/{id}", 404, "client_error")
        assert (unknown["route"], unknown["status"]) == ("none", 404)
        assert len({line["request_id"] for line in written.requests()}) == 4

    def test_static_ones_are_named(self, log: Callable[[str], Log]) -> None:
        """They have no template to be named by."""
        with serving(fake_app()) as client:
            written = log("json")
            for path in ("/", "/docs", "/openapi.json", "/docs/oauth2-redirect"):
                client.get(path)
            client.get("/?QUERYJUNK")
        # A page's line may come after the next one's, as its file is closed first.
        assert sorted(line["route"] for line in written.requests()) == ["/", "/", "/docs", "/openapi.json", "none"]

    def test_a_probe_is_no_part_of_who_asked(self, log: Callable[[str], Log]) -> None:
        def broken(_: Any) -> Any:
            raise RuntimeError("broken")

        with serving(fake_app(broken)) as client:
            written = log("json")
            assert client.get("/health/ready", headers={"X-Request-Id": "mine"}).status_code == 503
        failure, request = written.lines
        assert failure["logger"] == "server.segment.probe"
        assert "request_id" not in failure
        assert request["request_id"] == "mine"

    def test_failures_are_one_line_each(self, log: Callable[[str], Log], monkeypatch: pytest.MonkeyPatch) -> None:
        def bug(*_: Any) -> None:
            raise KeyError(MARKS[1])

        monkeypatch.setattr(steps, "decode", bug)
        with serving(fake_app()) as client:
            written = log("json")
            assert client.post("/segment", content=PICTURE, headers={"X-Request-Id": "mine"}).status_code == 500
        request, failure = written.lines
        assert failure["request_id"] == request["request_id"] == "mine"
        assert "KeyError: (its text is left out" in failure["exception"]
        assert (request["status"], request["outcome"]) == (500, "error")

    @pytest.mark.parametrize("form", ["text", "json"])
    def test_nothing_of_what_was_sent(self, form: str, log: Callable[[str], Log]) -> None:
        volume = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
        volume.header["descrip"] = b"SECRETNAME"
        volume.header["pixdim"][0] = 7
        sent = volume.to_bytes()
        with serving(fake_app()) as client:
            written = log(form)
            for body in (sent, sent[:-9], sent[:300], sent.replace(b"n+1", b"n+9"), b"SECRETNAME", PICTURE):
                client.post("/segment", files={"file": ("PATIENT-DOE.nii", body)})
                client.post("/segment", content=body)
                client.post("/jobs", files={"file": ("PATIENT-DOE.nii", body)})
            for query in (
                "QUERYJUNK=1",
                "level=QUERYJUNK",
                "mode=QUERYJUNK",
                "model=QUERYJUNK",
                "nonfinite=QUERYJUNK",
                "format=QUERYJUNK",
            ):
                client.post(f"/segment?{query}", content=PICTURE)
                client.post(f"/jobs?{query}", content=PICTURE)
            client.post("/segment", files={"QUERYJUNK": ("PATIENT-DOE.nii", PICTURE)})
            for header in ("Accept", "Content-Type", "X-Deadline-Ms", "X-Request-Id", "User-Agent", "Authorization"):
                client.post("/segment", content=PICTURE, headers={header: "HEADERJUNK/1 (x)"})
            client.get("/PATIENT-DOE.nii?QUERYJUNK")
            client.get("/models/QUERYJUNK")
        assert written.text.count("/segment") > 20
        assert not [mark for mark in MARKS if mark in written.text]
