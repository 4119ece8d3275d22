import contextlib
import dataclasses
import errno
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from server.api.routes import jobs
from server.arrays import Tiles
from server.errors import InferenceFailed
from server.jobs.job import Job, Ticket
from server.jobs.runner import Runner
from server.jobs.store import Store
from server.segment.request import SegmentRequest
from server.settings import JobsSettings
from tests.support.files import mask_of, picture_bytes
from tests.support.server import serving
from tests.support.service import bright, fake_app

Checked = Callable[..., Any]

PNG = {"content-type": "image/png"}
GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
DARK = picture_bytes(np.full((16, 16), 3, dtype=np.uint8))


class Gate:
    """An engine that waits while it is shut, and fails on an image that is dark all over."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self.entered.release()
        assert self.open.wait(60)
        if (tiles.pixels == 3).all():
            raise ValueError("a secret of the engine")
        return bright(tiles)

    def wait(self) -> None:
        """Until a batch has come."""
        assert self.entered.acquire(timeout=60)

    def opens_after_drain(self, app: FastAPI) -> FastAPI:
        """Not before: the engine's own thread cannot be stopped within a batch."""
        operations = app.state.operations

        def drained() -> None:
            operations.drain()
            self.open.set()

        app.state.operations = dataclasses.replace(operations, drain=drained)
        return app


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def small(gate: Gate) -> Iterator[httpx.Client]:
    """A server that keeps 1 MiB and lets two jobs wait."""
    with serving(fake_app(gate, jobs={"max_disk_mb": 1, "max_queued": 2})) as client:
        yield client


def post(client: httpx.Client, query: str = "", body: bytes = GOOD) -> dict[str, Any]:
    answer = client.post(f"/jobs{query}", content=body, headers=PNG)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def events(client: httpx.Client, id_: str) -> list[tuple[str, dict[str, Any]]]:
    """All events until the stream ends."""
    with client.stream("GET", f"/jobs/{id_}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(parsed(answer.iter_lines()))


def parsed(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


class TestHappyPath:
    def test_a_job(self, small: httpx.Client) -> None:
        answer = small.post("/jobs?level=2", content=GOOD, headers=PNG)
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["location"] == job["links"]["self"] == f"/jobs/{job['id']}"
        assert (job["model"], job["mode"], job["level"], job["precision"]) == ("fake", "fast", 2, "fp32")
        assert job["links"]["result"] is job["links"]["preview"] is job["finished"] is job["expires"] is job["error"] is None
        assert job["eta_s"] is not None
        name, job = events(small, job["id"])[-1]
        assert name == job["state"] == "done"
        assert job == small.get(job["links"]["self"]).json()
        assert (job["stage"], job["queue_position"], job["eta_s"], job["windows"]) == (None, None, None, {"done": 1, "total": 1})
        created, started, finished, expires = (
            datetime.fromisoformat(job[t]) for t in ("created", "started", "finished", "expires")
        )
        assert created <= started <= finished
        assert expires - finished == timedelta(hours=24)
        assert created.utcoffset() == timedelta(0)

    @pytest.mark.parametrize("query", ["?level=1", "?format=json&include_mask=true", "?format=npz", ""])
    def test_the_result_is_the_answer_of_segment(self, small: httpx.Client, query: str) -> None:
        job = post(small, query)
        events(small, job["id"])
        result = small.get(f"/jobs/{job['id']}/result")
        direct = small.post(f"/segment{query}", content=GOOD, headers=PNG)
        assert result.status_code == 200
        for name in ("content-type", "x-segment-model", "x-segment-mode", "x-segment-level", "x-segment-level-requested"):
            assert result.headers[name] == direct.headers[name]
        assert "infer;dur=" in result.headers["server-timing"]
        assert result.headers["cache-control"] == "no-store"
        if "json" in query:
            assert {**result.json(), "timings_ms": 0} == {**direct.json(), "timings_ms": 0}
        else:
            assert result.content == direct.content

    def test_reference(self, small: httpx.Client) -> None:
        mask = small.post("/segment", content=GOOD).content
        job = small.post("/jobs", files={"file": GOOD, "reference": mask}).json()
        events(small, job["id"])
        result = small.get(f"/jobs/{job['id']}/result")
        assert (result.headers["x-segment-iou"], result.headers["x-segment-dice"]) == ("1.0000", "1.0000")

    def test_part_of_a_result(self, small: httpx.Client) -> None:
        job = post(small)
        events(small, job["id"])
        whole = small.get(f"/jobs/{job['id']}/result").content
        part = small.get(f"/jobs/{job['id']}/result", headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, whole[10:20])
        head = small.head(f"/jobs/{job['id']}/result")
        assert (head.status_code, head.headers["content-length"], head.headers["content-type"]) == (
            200,
            str(len(whole)),
            "image/png",
        )
        assert small.head(f"/jobs/{job['id']}/preview").status_code == 409

    def test_a_browser_does_not_come_back_for_more(self, small: httpx.Client) -> None:
        id_ = post(small)["id"]
        with small.stream("GET", f"/jobs/{id_}/events") as answer:
            assert answer.headers["cache-control"] == "no-store, no-transform"
            last = answer.read().decode().strip().split("\n\n")[-1].splitlines()
        assert last[:2] == ["event: done", "id: end"]
        again = small.get(f"/jobs/{id_}/events", headers={"last-event-id": "end"})
        assert (again.status_code, again.content) == (204, b"")
        assert [name for name, _ in events(small, id_)] == ["done"]

    def test_the_shipped_network(self, client: httpx.Client, ihc: np.ndarray) -> None:
        body = picture_bytes(ihc[:200, :200])
        job = post(client, "?level=2&preview=true", body)
        assert events(client, job["id"])[-1][0] == "done"
        for name, level in (("preview", 1), ("result", 2)):
            kept = client.get(f"/jobs/{job['id']}/{name}")
            assert kept.headers["x-segment-level"] == str(level)
            assert kept.content == client.post(f"/segment?level={level}", content=body, headers=PNG).content


class TestProgress:
    def test_waiting_running_and_preview(self, small: httpx.Client, gate: Gate, problem: Checked) -> None:
        gate.open.clear()
        first, second = post(small, "?preview=true"), post(small)
        gate.wait()
        assert small.get(f"/jobs/{first['id']}").json()["queue_position"] == 0
        assert small.get(f"/jobs/{second['id']}").json()["queue_position"] == 1
        for job, where in ((first, "running, 0 of 1 windows"), (second, "queued at place 1")):
            answer = small.get(f"/jobs/{job['id']}/result")
            assert where in problem(answer, 409, "not-finished").detail
            assert int(answer.headers["retry-after"]) >= 1
        assert "preview is not there yet" in problem(small.get(f"/jobs/{first['id']}/preview"), 409).detail
        answer = small.get(f"/jobs/{second['id']}/preview")
        assert "preview=true" in problem(answer, 409).detail
        assert "retry-after" not in answer.headers
        gate.open.set()
        told = events(small, first["id"])
        assert told[-1][1]["links"]["preview"] == f"/jobs/{first['id']}/preview"
        assert mask_of(small.get(f"/jobs/{first['id']}/preview").content).shape == (16, 16)
        assert events(small, second["id"])[-1][0] == "done"

    def test_watchers(self, small: httpx.Client, gate: Gate) -> None:
        gate.open.clear()
        id_ = post(small)["id"]
        gate.wait()
        with small.stream("GET", f"/jobs/{id_}/events") as one, small.stream("GET", f"/jobs/{id_}/events") as other:
            streams = [parsed(answer.iter_lines()) for answer in (one, other)]
            for stream in streams:
                name, job = next(stream)
                assert (name, job["state"]) == ("progress", "running")
            with small.stream("GET", f"/jobs/{id_}/events") as leaves:
                assert next(parsed(leaves.iter_lines()))[0] == "progress"
            gate.open.set()
            for stream in streams:
                told = list(stream)
                assert told[-1][0] == "done"
                assert all(name == "progress" for name, _ in told[:-1])
        assert [name for name, _ in events(small, id_)] == ["done"]

    def test_a_job_that_is_deleted_ends_its_stream(self, small: httpx.Client, gate: Gate) -> None:
        gate.open.clear()
        id_ = post(small)["id"]
        gate.wait()
        with small.stream("GET", f"/jobs/{id_}/events") as answer:
            stream = parsed(answer.iter_lines())
            next(stream)
            gate.open.set()
            assert small.delete(f"/jobs/{id_}").status_code == 204
            assert [name for name, _ in stream][-1:] in (["cancelled"], ["done"], [])


class TestDelete:
    def test_waiting_and_running(self, small: httpx.Client, gate: Gate, problem: Checked) -> None:
        gate.open.clear()
        running, waiting = post(small), post(small)
        gate.wait()
        for job in (waiting, running):
            assert small.delete(f"/jobs/{job['id']}").status_code == 204
            assert small.get(f"/jobs/{job['id']}").json()["state"] == "cancelled"
            for name in ("result", "preview"):
                assert "cancelled" in problem(small.get(f"/jobs/{job['id']}/{name}"), 409, "not-finished").detail
            assert [name for name, _ in events(small, job["id"])] == ["cancelled"]
        gate.open.set()
        assert events(small, post(small)["id"])[-1][0] == "done"

    def test_finished(self, small: httpx.Client, problem: Checked) -> None:
        id_ = post(small)["id"]
        events(small, id_)
        assert small.delete(f"/jobs/{id_}").status_code == 204
        for method, path in (("GET", ""), ("GET", "/result"), ("GET", "/preview"), ("GET", "/events"), ("DELETE", "")):
            detail = problem(small.request(method, f"/jobs/{id_}{path}"), 404, "unknown-job").detail
            assert "kept for 24 hours" in detail

    @pytest.mark.parametrize("name", ["result", "preview"])
    def test_while_its_file_is_asked_for(
        self, small: httpx.Client, monkeypatch: pytest.MonkeyPatch, problem: Checked, name: str
    ) -> None:
        """Between its row and its file, where the row had said that it is there."""
        id_ = post(small, "?preview=true")["id"]
        events(small, id_)
        find = Runner.find

        async def slower(runner: Runner, job: Job, name: str) -> Any:
            monkeypatch.setattr(Runner, "find", find)
            await runner.delete(job.id)
            return await find(runner, job, name)

        monkeypatch.setattr(Runner, "find", slower)
        problem(small.get(f"/jobs/{id_}/{name}"), 404, "unknown-job")


class TestFailures:
    def test_a_file_that_is_lost(self, gate: Gate, tmp_path: Path, problem: Checked) -> None:
        with serving(fake_app(gate, jobs={"folder": tmp_path})) as client:
            id_ = post(client)["id"]
            events(client, id_)
            (tmp_path / id_ / "result").unlink()
            problem(client.get(f"/jobs/{id_}/result"), 500, "store-broken")

    def test_given_up(self, gate: Gate, tmp_path: Path, problem: Checked) -> None:
        """Its end is no hint to ask again."""
        with contextlib.closing(Store(JobsSettings(folder=tmp_path))) as store, tempfile.TemporaryFile() as file:
            file.write(GOOD)
            asked = dataclasses.asdict(SegmentRequest())
            id_ = store.accept(Ticket(asked, False, "fake", "accurate", 4, "fp32", 1, 1.0), file, None).id
            store._query("UPDATE jobs SET attempts = 5")
        with serving(fake_app(gate, jobs={"folder": tmp_path})) as client:
            assert events(client, id_)[-1][0] == "failed"
            answer = client.get(f"/jobs/{id_}/result")
            assert "started 5 times" in problem(answer, 500, "interrupted").detail
            assert answer.headers["cache-control"] == "no-store"

    def test_of_the_server(self, small: httpx.Client, problem: Checked) -> None:
        id_ = post(small, body=DARK)["id"]
        name, job = events(small, id_)[-1]
        assert name == job["state"] == "failed"
        for path in ("result", "preview"):
            found = problem(small.get(f"/jobs/{id_}/{path}"), 500, "inference-failed")
            assert job["error"] == vars(found)
        assert "secret" not in json.dumps(job)
        assert "job's id" in found.detail
        assert InferenceFailed.__name__ not in found.detail

    def test_of_the_caller(self, small: httpx.Client, problem: Checked) -> None:
        truncated = picture_bytes(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8))[:1000]
        id_ = post(small, body=truncated)["id"]
        assert events(small, id_)[-1][0] == "failed"
        assert "truncated" in problem(small.get(f"/jobs/{id_}/result"), 422, "unreadable").detail


class TestRefusals:
    @pytest.mark.parametrize(
        ("query", "body", "status", "said"),
        [
            ("", b"this is text", 415, "PNG"),
            ("", b"", 422, "0 bytes"),
            ("?level=9", GOOD, 422, "1, 2, 3, 4"),
            ("?model=lungs", GOOD, 404, "'lungs'"),
            ("?format=gif", GOOD, 406, "'gif'"),
            ("?preveiw=true", GOOD, 422, ", preview"),
            ("?preview=true&preview=true", GOOD, 422, "preview is given 2 times"),
            ("?preview=perhaps", GOOD, 422, "preview"),
        ],
    )
    def test_nonsense_is_not_accepted(
        self, small: httpx.Client, problem: Checked, query: str, body: bytes, status: int, said: str
    ) -> None:
        assert said in problem(small.post(f"/jobs{query}", content=body, headers=PNG), status).detail
        assert "unetpp_jobs_queued 0.0" in small.get("/metrics").text

    def test_preview_is_no_parameter_of_segment(self, small: httpx.Client, problem: Checked) -> None:
        problem(small.post("/segment?preview=true", content=GOOD), 422, "invalid-parameter")
        # A job has no deadline, in whatever way one is given.
        problem(small.post("/jobs", content=GOOD, headers={"X-Deadline-Ms": "1000"}), 422, "invalid-parameter")
        problem(small.post("/jobs?deadline_ms=1000", content=GOOD), 422, "invalid-parameter")

    def test_there_is_no_list(self, small: httpx.Client, problem: Checked) -> None:
        problem(small.get("/jobs"), 405)

    @pytest.mark.parametrize("multipart", [False, True])
    def test_over_quota(self, small: httpx.Client, gate: Gate, problem: Checked, multipart: bool) -> None:
        gate.open.clear()
        post(small, body=GOOD + bytes(700_000))
        more = GOOD + bytes(700_000)
        answer = small.post("/jobs", files={"file": more}) if multipart else small.post("/jobs", content=more, headers=PNG)
        assert "1 MiB" in problem(answer, 507, "store-full").detail
        assert int(answer.headers["retry-after"]) >= 1
        gate.open.set()
        post(small)

    def test_too_many_wait(self, small: httpx.Client, gate: Gate, problem: Checked) -> None:
        gate.open.clear()
        post(small)
        gate.wait()
        waiting = [post(small), post(small)]
        answer = small.post("/jobs", content=GOOD)
        assert "2 jobs are waiting" in problem(answer, 429, "overloaded").detail
        assert int(answer.headers["retry-after"]) >= 1
        gate.open.set()
        for job in waiting:
            assert events(small, job["id"])[-1][0] == "done"

    def test_too_many_uploads(self, gate: Gate, problem: Checked) -> None:
        with serving(fake_app(gate, http={"max_in_flight": 1})) as client:
            with socket.create_connection((client.base_url.host, client.base_url.port), timeout=10) as raw:
                raw.sendall(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n12")
                deadline = time.monotonic() + 60
                while (answer := client.post("/jobs", content=GOOD)).status_code == 202:
                    assert time.monotonic() < deadline
                assert "1 uploads are arriving" in problem(answer, 429, "overloaded").detail
            metrics = client.get("/metrics").text
            assert 'unetpp_jobs_total{outcome="refused"} 1.0' in metrics
            assert 'unetpp_refusals_total{reason="uploads"} 1.0' in metrics

    def test_a_disk_that_fills_up_while_a_body_arrives(
        self, small: httpx.Client, monkeypatch: pytest.MonkeyPatch, problem: Checked
    ) -> None:
        class Full(tempfile.SpooledTemporaryFile):
            def write(self, _: bytes) -> int:
                raise OSError(errno.ENOSPC, "no space left on device")

        monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
        problem(small.post("/jobs", content=GOOD), 507, "store-full")

    def test_too_many_streams(self, small: httpx.Client, monkeypatch: pytest.MonkeyPatch, problem: Checked) -> None:
        id_ = post(small)["id"]
        events(small, id_)
        monkeypatch.setattr(jobs, "MAX_STREAMS", 0)
        assert "0 event streams are open" in problem(small.get(f"/jobs/{id_}/events"), 429, "overloaded").detail

    def test_an_upload_that_breaks_off_frees_its_place(self, small: httpx.Client) -> None:
        for _ in range(5):
            with socket.create_connection((small.base_url.host, small.base_url.port), timeout=10) as raw:
                raw.sendall(b"POST /jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n" + bytes(800_000))
        # Answered in the order of the connections' ends, so the last one may still be noticed while this one comes.
        deadline = time.monotonic() + 60
        while (answer := small.post("/jobs", content=GOOD + bytes(800_000))).status_code in (429, 507):
            assert time.monotonic() < deadline, answer.text
        assert answer.status_code == 202


class TestRestart:
    def test_what_waited_goes_on(self, gate: Gate, tmp_path: Path) -> None:
        gate.open.clear()
        with serving(gate.opens_after_drain(fake_app(gate, jobs={"folder": tmp_path}))) as client:
            ids = [post(client)["id"] for _ in range(3)]
            gate.wait()
        with serving(fake_app(gate, jobs={"folder": tmp_path})) as client:
            for id_ in ids:
                assert events(client, id_)[-1][0] == "done"
                assert mask_of(client.get(f"/jobs/{id_}/result").content).shape == (16, 16)

    def test_a_watcher_does_not_keep_the_server_from_stopping(self, gate: Gate) -> None:
        gate.open.clear()
        with contextlib.ExitStack() as watching:
            with serving(gate.opens_after_drain(fake_app(gate))) as client:
                id_ = post(client)["id"]
                gate.wait()
                watcher = watching.enter_context(httpx.Client(base_url=client.base_url, timeout=60))
                answer = watching.enter_context(watcher.stream("GET", f"/jobs/{id_}/events"))
                stream = parsed(answer.iter_lines())
                next(stream)
            # The job was put back, not waited for: its end is never told.
            assert {name for name, _ in stream} <= {"progress"}


def test_every_answer_is_in_the_documentation(small: httpx.Client) -> None:
    paths = small.get("/openapi.json").json()["paths"]
    assert {path for path in paths if path.startswith("/jobs")} == {
        "/jobs", "/jobs/{id}", "/jobs/{id}/events", "/jobs/{id}/result", "/jobs/{id}/preview"
    }  # fmt: skip
    parameters = {p["name"] for p in paths["/jobs"]["post"]["parameters"]}
    of_segment = {p["name"] for p in paths["/segment"]["post"]["parameters"]}
    # Of use only to whoever waits.
    assert parameters == of_segment - {"deadline_ms", "min_level"} | {"preview"}
