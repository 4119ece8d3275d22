"""What /jobs and its event streams refuse, and what a refusal leaves behind: nothing."""

import errno
import socket
import tempfile
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.api import problems
from server.api.routes import jobs
from tests.server.api.conftest import InProcess
from tests.server.api.jobs_support import Checked, Gate, last_event, post
from tests.support.files import GOOD
from tests.support.server import until


@pytest.mark.parametrize(
    ("query", "body", "status", "fields"),
    [
        ("", b"this is text", 415, {}),
        ("", b"", 422, {}),
        ("?level=5", GOOD, 422, {"parameter": "level"}),
        ("?model=lungs", GOOD, 404, {"parameter": "model"}),
        ("?format=gif", GOOD, 406, {"parameter": "format"}),
        ("?preveiw=true", GOOD, 422, {"parameter": "preveiw"}),
        ("?preview=true&preview=true", GOOD, 422, {"parameter": "preview", "actual": 2, "limit": 1}),
        ("?preview=perhaps", GOOD, 422, {"parameter": "preview"}),
        ("?deadline_ms=1000", GOOD, 422, {"parameter": "deadline_ms"}),
        ("?min_level=1", GOOD, 422, {"parameter": "min_level"}),
        ("?channel=1", GOOD, 422, {"parameter": "channel"}),
        ("?min_size_px=-1", GOOD, 422, {"parameter": "min_size_px"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_post_refuses_what_is_wrong(
    small: httpx.Client, problem: Checked, query: str, body: bytes, status: int, fields: dict[str, Any]
) -> None:
    document = vars(problem(small.post(f"/jobs{query}", content=body), status))
    assert document.items() >= fields.items()


def test_post_unknown_parameter_lists_those_of_jobs(small: httpx.Client, problem: Checked) -> None:
    allowed = problem(small.post("/jobs?preveiw=true", content=GOOD), 422, "invalid-parameter").allowed
    assert {"preview", "mode", "level"} <= set(allowed)
    assert not {"deadline_ms", "min_level"} & set(allowed)


def test_post_refuses_a_deadline_header(small: httpx.Client, problem: Checked) -> None:
    answer = small.post("/jobs", content=GOOD, headers={"X-Deadline-Ms": "1000"})
    assert problem(answer, 422, "invalid-parameter").parameter == "deadline_ms"


@pytest.mark.parametrize("multipart", [False, True])
def test_post_over_the_quota_is_refused(
    limited: httpx.Client, gate: Gate, problem: Checked, multipart: bool
) -> None:
    gate.open.clear()
    large = GOOD + bytes(700_000)
    post(limited, body=large)
    answer = limited.post("/jobs", **({"files": {"file": large}} if multipart else {"content": large}))
    assert problem(answer, 507, "store-full").setting == "UNETPP_JOBS__MAX_DISK_MB"
    assert int(answer.headers["retry-after"]) >= 1
    gate.open.set()
    post(limited)


def test_post_to_a_full_queue_is_refused(limited: httpx.Client, gate: Gate, problem: Checked) -> None:
    gate.open.clear()
    post(limited)
    gate.wait()
    waiting = [post(limited)["id"], post(limited)["id"]]
    answer = limited.post("/jobs", content=GOOD)
    assert problem(answer, 429, "overloaded").limit == 2
    assert int(answer.headers["retry-after"]) >= 1
    gate.open.set()
    for id_ in waiting:
        assert last_event(limited, id_)[0] == "done"


def test_post_beside_too_many_uploads_is_refused(limited: httpx.Client, problem: Checked) -> None:
    address = limited.base_url.host, limited.base_url.port
    with socket.create_connection(address, timeout=10) as raw:
        raw.sendall(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n12")
        until(lambda: limited.post("/jobs", content=GOOD).status_code == 429)
        problem(limited.post("/jobs", content=GOOD), 429, "overloaded")
    assert 'unetpp_refusals_total{reason="uploads"} 2.0' in limited.get("/metrics").text


def test_post_to_a_full_disk_is_refused(
    limited: httpx.Client, monkeypatch: pytest.MonkeyPatch, problem: Checked
) -> None:
    class Full(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
    problem(limited.post("/jobs", content=GOOD), 507, "store-full")


def test_upload_that_breaks_off_frees_its_place(limited: httpx.Client) -> None:
    for _ in range(5):
        with socket.create_connection((limited.base_url.host, limited.base_url.port), timeout=10) as raw:
            raw.sendall(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n" + bytes(800_000))
    # The last one may still be noticed while this one comes.
    until(lambda: limited.post("/jobs", content=GOOD + bytes(800_000)).status_code == 202)


async def test_event_stream_over_the_limit_is_refused(in_process: InProcess, problem: Checked) -> None:
    class OneJob:
        async def get(self, id_: str) -> None:
            pass

    app = FastAPI()
    problems.install(app)
    app.include_router(jobs.router(OneJob(), max_streams=0))  # type: ignore[arg-type]
    async with in_process(app) as client:
        answer = await client.get("/jobs/a/events")
    assert (answer.status_code, answer.json()["code"], answer.json()["limit"]) == (429, "overloaded", 0)
