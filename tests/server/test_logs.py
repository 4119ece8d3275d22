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
from tests.support.files import SMALL
from tests.support.server import serving
from tests.support.service import fake_app

# Words in names, headers and values of what is sent.
MARKS = ("PATIENT-DOE", "SECRETNAME", "QUERYJUNK", "HEADERJUNK")


class Log:
    """Lines that have been written."""

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
        # pytest's own handlers are there by now.
        monkeypatch.setattr(sys, "stderr", stream)
        root.handlers = []
        logs.setup(form)
        return Log(stream)

    yield setup
    logging.captureWarnings(False)
    root.handlers, root.level = handlers, level


def raised(error: Exception, module: str) -> Exception:
    """An exception as it is once it has been raised in a module."""
    namespace = {"__name__": module, "error": error}
    try:
        exec("def go():\n    raise error\ngo()", namespace)  # noqa: S102 - our own
    except Exception as caught:  # noqa: BLE001
        return caught
    raise AssertionError


def test_json_line_has_the_fields_of_record_and_request(log: Callable[[str], Log]) -> None:
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
    ("error", "module", "is_written"),
    [
        (RuntimeError("out of memory"), "server.runtime.engines.x", True),
        (BundleDamaged("weights"), "elsewhere", True),
        (NotReady("later"), "server.api.x", True),
        (ValueError("SECRETNAME"), "server.imaging.decode.x", False),
        (ValueError("SECRETNAME"), "nibabel", False),
        (InvalidParameter("QUERYJUNK"), "server.runtime.x", True),
        (InvalidParameter("QUERYJUNK"), "server.api.x", False),
    ],
    ids=str,
)
def test_exception_text_is_written_unless_it_may_quote_the_input(
    form: str, error: Exception, module: str, is_written: bool, log: Callable[[str], Log]
) -> None:
    written = log(form)
    text, error = str(error), raised(error, module)
    logging.getLogger("server.x").error("failed", exc_info=error)
    assert type(error).__name__ in written.text
    assert "test_logs.py" in written.text
    assert (text in written.text) == is_written
    # As the cause of another one it says no more.
    outer = raised(RuntimeError("out of memory"), "server.runtime.x")
    outer.__context__ = error
    logging.getLogger("server.x").error("failed", exc_info=outer)
    assert "out of memory" in written.text
    assert (text in written.text) == is_written


def test_job_ids_are_cut_also_in_errors_of_the_disk(log: Callable[[str], Log]) -> None:
    written = log("text")
    id_ = "0123456789abcdef" * 2
    error = raised(PermissionError(13, "Permission denied", f"var/jobs/{id_}/input"), "server.jobs.files")
    logging.getLogger("server.x").error("failed", exc_info=error)
    assert "var/jobs/01234567…/input" in written.text
    assert id_ not in written.text


@pytest.mark.parametrize("form", ["text", "json"])
def test_job_ids_are_cut_wherever_they_are(form: str, log: Callable[[str], Log]) -> None:
    """In messages, in their arguments, and in paths and addresses in any part of a chain of exceptions."""
    written = log(form)
    id_, request_id, sha256 = "0123456789abcdef" * 2, "fedcba9876543210" * 2, "0123456789abcdef" * 4
    cause = raised(OSError(f"GET http://bucket/jobs%2F{id_}%2Finput, x_{id_}_y"), "server.jobs.files_s3")
    error = raised(NotReady(f"jobs/{id_}"), "server.jobs.store")
    error.__cause__ = cause
    token = logs.REQUEST_ID.set(request_id)
    logger = logging.getLogger("server.x")
    logger.error(f"request {request_id}, job {id_}.part of %s: %s", sha256, cause, exc_info=error)
    logs.REQUEST_ID.reset(token)
    assert written.text.count("01234567…" if form == "text" else "01234567\\u2026") == 6
    assert f"request {request_id}, job" in written.text
    assert sha256 in written.text
    assert id_ not in written.text.replace(sha256, "")


def test_loggers_and_warnings_of_decoders_are_left_out(log: Callable[[str], Log]) -> None:
    written = log("json")
    for name in ("nibabel.global", "tifffile", "PIL.TiffImagePlugin", "py.warnings"):
        logging.getLogger(name).error("SECRETNAME")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("SECRETNAME", stacklevel=1)
    assert written.text == ""


async def test_forgotten_task_is_written_without_its_text(log: Callable[[str], Log]) -> None:
    written = log("json")

    async def forgotten() -> None:
        # Lines of code are written.
        raise ValueError(MARKS[1])

    task = asyncio.create_task(forgotten())
    await asyncio.wait([task])
    del task
    (line,) = written.lines
    assert line["message"] == "Task exception was never retrieved"
    assert "ValueError" in line["exception"]
    assert "SECRETNAME" not in written.text


class TestRequests:
    def test_request_is_one_line_with_its_outcome(self, log: Callable[[str], Log]) -> None:
        with serving(fake_app()) as client:
            written = log("json")
            client.post("/segment?level=2", content=SMALL, headers={"X-Request-Id": "mine"})
            client.post("/segment?model=QUERYJUNK", content=SMALL)
            for path in ("/jobs/QUERYJUNK", "/QUERYJUNK", "/health/ready", "/metrics"):
                client.get(path)
        ok, bad, job, unknown = written.requests()
        assert 0 < ok.pop("http.server.request.duration") < 60
        assert ok.pop("time")
        assert ok.pop("message").startswith("POST /segment 200 in ")
        assert ok == {
            "level": "info",
            "logger": "server.api.access",
            "request_id": "mine",
            "http.request.method": "POST",
            "http.route": "/segment",
            "http.response.status_code": 200,
            "http.request.body.size": len(SMALL),
            "unetpp.outcome": "ok",
            "unetpp.model": "fake",
            "unetpp.mode": "fast",
            "unetpp.requested_level": "2",
            "unetpp.served_level": "2",
        }
        names = ("model", "mode", "requested_level", "served_level")
        assert {bad[f"unetpp.{name}"] for name in names} == {"none"}
        outcomes = [
            (line["http.response.status_code"], line["unetpp.outcome"]) for line in (bad, job, unknown)
        ]
        assert outcomes == [(404, "client_error")] * 3
        assert job["http.route"] == "/jobs/{id}"
        assert "http.route" not in unknown
        assert len({line["request_id"] for line in written.requests()}) == 4

    def test_static_paths_are_named(self, log: Callable[[str], Log]) -> None:
        """They have no template to be named by."""
        with serving(fake_app()) as client:
            written = log("json")
            for path in ("/", "/docs", "/openapi.json", "/docs/oauth2-redirect", "/?QUERYJUNK"):
                client.get(path)
        # A page's line may come after the next one's, because its file is closed first.
        routes = sorted(line.get("http.route", "") for line in written.requests())
        assert routes == ["", "/", "/", "/docs", "/openapi.json"]

    def test_probe_failure_has_no_request_id(self, log: Callable[[str], Log]) -> None:
        def broken(_: Any) -> Any:
            raise RuntimeError("broken")

        with serving(fake_app(broken)) as client:
            written = log("json")
            assert client.get("/health/ready", headers={"X-Request-Id": "mine"}).status_code == 503
        failures = [line for line in written.lines if line["logger"] == "server.monitoring.health_probe"]
        assert failures
        assert not [line for line in failures if "request_id" in line]
        assert written.requests()[-1]["request_id"] == "mine"

    def test_unexpected_failure_is_one_line(self, log: Callable[[str], Log]) -> None:
        app = fake_app()

        @app.get("/bug")
        def bug() -> None:
            raise KeyError(MARKS[1])

        with serving(app) as client:
            written = log("json")
            answer = client.get("/bug")
            assert answer.status_code == 500
        (request,) = written.requests()
        (failure,) = [line for line in written.lines if "exception" in line]
        request_id = answer.headers["x-request-id"]
        assert failure["request_id"] == request["request_id"] == request_id
        # It looks like the id of a job, which would be cut.
        assert failure["message"] == f"request {request_id} failed unexpectedly"
        assert "KeyError: (its text is left out" in failure["exception"]
        assert (request["http.response.status_code"], request["unetpp.outcome"]) == (500, "error")

    @pytest.mark.parametrize("form", ["text", "json"])
    def test_nothing_of_what_was_sent_is_written(self, form: str, log: Callable[[str], Log]) -> None:
        volume = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4))
        volume.header["descrip"] = b"SECRETNAME"
        volume.header["pixdim"][0] = 7
        sent = volume.to_bytes()
        queries = [
            f"{name}=QUERYJUNK" for name in ("QUERYJUNK", "level", "mode", "model", "nonfinite", "format")
        ]
        headers = ("Accept", "Content-Type", "X-Deadline-Ms", "X-Request-Id", "User-Agent", "Authorization")
        with serving(fake_app()) as client:
            written = log(form)
            for path in ("/segment", "/jobs"):
                for body in (
                    sent,
                    sent[:-9],
                    sent[:300],
                    sent.replace(b"n+1", b"n+9"),
                    b"SECRETNAME",
                    SMALL,
                ):
                    client.post(path, files={"file": ("PATIENT-DOE.nii", body)})
                    client.post(path, content=body)
                for query in queries:
                    client.post(f"{path}?{query}", content=SMALL)
            client.post("/segment", files={"QUERYJUNK": ("PATIENT-DOE.nii", SMALL)})
            for header in headers:
                client.post("/segment", content=SMALL, headers={header: "HEADERJUNK/1 (x)"})
            client.get("/PATIENT-DOE.nii?QUERYJUNK")
            client.get("/models/QUERYJUNK")
        assert written.text.count("/segment") > 20
        assert not [mark for mark in MARKS if mark in written.text]
