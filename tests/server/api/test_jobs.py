"""/jobs: their documents, files and events. How they are queued and kept is tested in jobs/."""

import contextlib
import json
import sqlite3
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from server.jobs.job import JobSpec
from server.jobs.runner import Runner
from server.jobs.store_sqlite import SQLiteStore
from server.settings import JobsSettings
from tests.server.api.jobs_support import DARK, Checked, Gate, last_event, post, watching
from tests.support.files import GOOD, Sent, mask_of, picture_bytes
from tests.support.server import serving
from tests.support.service import fake_app


def test_job_document_follows_the_job(small: httpx.Client) -> None:
    answer = small.post("/jobs?level=2", content=GOOD)
    job = answer.json()
    assert answer.headers["location"] == job["links"]["self"] == f"/jobs/{job['id']}"
    assert (job["model"], job["mode"], job["level"], job["precision"]) == ("fake", "fast", 2, "fp32")
    links = job["links"]
    assert links["result"] is links["preview"] is job["finished"] is job["expires"] is job["error"] is None
    assert job["eta_s"] is not None
    name, job = last_event(small, job["id"])
    assert name == job["state"] == "done"
    assert job == small.get(links["self"]).json()
    assert (job["stage"], job["queue_position"], job["eta_s"]) == (None, None, None)
    assert job["windows"] == {"done": 1, "total": 1}
    times = ("created", "started", "finished", "expires")
    created, started, finished, expires = (datetime.fromisoformat(job[name]) for name in times)
    assert created <= started <= finished == expires - timedelta(hours=24)
    assert created.utcoffset() == timedelta(0)


@pytest.mark.parametrize("query", ["?level=1", "?format=json&include_mask=true", "?format=scores.npz", ""])
def test_result_equals_the_response_of_segment(small: httpx.Client, query: str) -> None:
    id_ = post(small, query)["id"]
    last_event(small, id_)
    result, direct = small.get(f"/jobs/{id_}/result"), small.post(f"/segment{query}", content=GOOD)
    for name in (
        "content-type",
        "x-segment-model",
        "x-segment-mode",
        "x-segment-level",
        "x-segment-level-requested",
    ):
        assert result.headers[name] == direct.headers[name]
    assert "infer;dur=" in result.headers["server-timing"]
    assert result.headers["cache-control"] == "no-store"
    assert result.content == direct.content


def test_result_with_a_reference_is_scored(small: httpx.Client) -> None:
    mask = small.post("/segment", content=GOOD).content
    id_ = small.post("/jobs", files={"file": GOOD, "reference": mask}).json()["id"]
    last_event(small, id_)
    result = small.get(f"/jobs/{id_}/result")
    assert (result.headers["x-segment-iou"], result.headers["x-segment-dice"]) == ("1.0000", "1.0000")


def test_result_is_served_in_parts(small: httpx.Client) -> None:
    id_ = post(small)["id"]
    last_event(small, id_)
    whole = small.get(f"/jobs/{id_}/result").content
    part = small.get(f"/jobs/{id_}/result", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole[10:20])
    head = small.head(f"/jobs/{id_}/result")
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole)))
    assert head.headers["content-type"] == "image/png"
    assert small.head(f"/jobs/{id_}/preview").status_code == 409


def test_result_of_json_is_compressed_unless_in_parts(small: httpx.Client) -> None:
    noise = picture_bytes(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
    id_ = post(small, "?format=json", noise)["id"]
    last_event(small, id_)
    plain, packed, part = (
        small.get(f"/jobs/{id_}/result", headers={"accept-encoding": "gzip", **headers})
        for headers in ({"accept-encoding": "identity"}, {}, {"range": "bytes=0-9"})
    )
    assert plain.content == packed.content
    assert packed.headers["content-encoding"] == "gzip"
    assert "content-length" not in packed.headers
    assert (part.status_code, part.content) == (206, plain.content[:10])
    assert {answer.headers["vary"] for answer in (plain, packed, part)} == {"Accept-Encoding"}
    assert not {"content-encoding"} & (plain.headers.keys() | part.headers.keys())


def test_last_event_tells_browsers_not_to_return(small: httpx.Client) -> None:
    id_ = post(small)["id"]
    last_event(small, id_)
    text = small.get(f"/jobs/{id_}/events").text
    assert text.startswith("event: done\nid: end\ndata: ")
    again = small.get(f"/jobs/{id_}/events", headers={"last-event-id": "end"})
    assert (again.status_code, again.content) == (204, b"")


def test_job_on_the_shipped_network_has_preview_and_result(client: httpx.Client, ihc: np.ndarray) -> None:
    body = picture_bytes(ihc[:96, :96])
    id_ = post(client, "?level=2&preview=true", body)["id"]
    assert last_event(client, id_)[0] == "done"
    for name, level in (("preview", 1), ("result", 2)):
        kept = client.get(f"/jobs/{id_}/{name}")
        assert kept.headers["x-segment-level"] == str(level)
        assert kept.content == client.post(f"/segment?level={level}", content=body).content


def test_unfinished_job_tells_its_progress(limited: httpx.Client, gate: Gate, problem: Checked) -> None:
    gate.open.clear()
    first, second = post(limited, "?preview=true")["id"], post(limited)["id"]
    gate.wait()
    for id_, state, position in ((first, "running", 0), (second, "queued", 1)):
        assert limited.get(f"/jobs/{id_}").json()["queue_position"] == position
        answer = limited.get(f"/jobs/{id_}/result")
        refused = problem(answer, 409, "not-finished")
        assert (refused.state, refused.position, refused.done, refused.total) == (state, position, 0, 1)
        assert int(answer.headers["retry-after"]) >= 1
    assert "retry-after" in limited.get(f"/jobs/{first}/preview").headers
    # The second has none, so asking again does not help.
    answer = limited.get(f"/jobs/{second}/preview")
    assert problem(answer, 409, "not-finished").parameter == "preview"
    assert "retry-after" not in answer.headers
    gate.open.set()
    assert last_event(limited, first)[1]["links"]["preview"] == f"/jobs/{first}/preview"
    assert mask_of(limited.get(f"/jobs/{first}/preview").content).shape == (16, 16)
    assert last_event(limited, second)[0] == "done"


def test_watchers_see_progress_and_the_same_end(limited: httpx.Client, gate: Gate) -> None:
    gate.open.clear()
    id_ = post(limited)["id"]
    gate.wait()
    with watching(limited, id_) as one, watching(limited, id_) as other:
        for events in (one, other):
            name, job = next(events)
            assert (name, job["state"]) == ("progress", "running")
        with watching(limited, id_) as leaves:
            assert next(leaves)[0] == "progress"
        gate.open.set()
        for events in (one, other):
            *before, last = [name for name, _ in events]
            assert (set(before) <= {"progress"}, last) == (True, "done")


def test_delete_cancels_and_removes(limited: httpx.Client, gate: Gate, problem: Checked) -> None:
    gate.open.clear()
    ids = [post(limited)["id"], post(limited)["id"]]
    gate.wait()
    with watching(limited, ids[0]) as events:
        next(events)
        for id_ in reversed(ids):
            assert limited.delete(f"/jobs/{id_}").status_code == 204
            assert limited.get(f"/jobs/{id_}").json()["state"] == "cancelled"
            for name in ("result", "preview"):
                refused = problem(limited.get(f"/jobs/{id_}/{name}"), 409, "not-finished")
                assert refused.state == "cancelled"
        assert [name for name, _ in events][-1] == "cancelled"
    gate.open.set()
    done = post(limited)["id"]
    assert last_event(limited, done)[0] == "done"
    assert limited.delete(f"/jobs/{done}").status_code == 204
    for method, path in (
        ("GET", ""),
        ("GET", "/result"),
        ("GET", "/preview"),
        ("GET", "/events"),
        ("DELETE", ""),
    ):
        assert problem(limited.request(method, f"/jobs/{done}{path}"), 404, "unknown-job").limit == 24


@pytest.mark.parametrize("name", ["result", "preview"])
def test_delete_while_a_file_is_requested_is_no_server_fault(
    limited: httpx.Client, monkeypatch: pytest.MonkeyPatch, problem: Checked, name: str
) -> None:
    """It comes between the row, which says that the file is there, and the file."""
    id_ = post(limited, "?preview=true")["id"]
    last_event(limited, id_)
    kept = Runner.kept

    async def delete_first(runner: Runner, job: Any, name: str) -> Any:
        monkeypatch.setattr(Runner, "kept", kept)
        await runner.delete(job.id)
        return await kept(runner, job, name)

    monkeypatch.setattr(Runner, "kept", delete_first)
    problem(limited.get(f"/jobs/{id_}/{name}"), 404, "unknown-job")


def test_failed_job_repeats_its_problem(limited: httpx.Client, problem: Checked) -> None:
    truncated = picture_bytes(np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8))[:1000]
    for body, status, code in ((DARK, 500, "inference-failed"), (truncated, 422, "unreadable")):
        name, job = last_event(limited, post(limited, body=body)["id"])
        assert name == job["state"] == "failed"
        for path in ("result", "preview"):
            assert job["error"] == vars(problem(limited.get(f"/jobs/{job['id']}/{path}"), status, code))
        assert "secret" not in json.dumps(job)


def test_kept_jobs_that_went_wrong_are_server_faults(tmp_path: Path, problem: Checked) -> None:
    with contextlib.closing(SQLiteStore(JobsSettings(folder=tmp_path))) as store:
        spec = JobSpec({}, False, "fake", "accurate", 4, "fp32", 1, 1.0)
        given_up, lost = (store.accept(spec, Sent(GOOD), None).id for _ in range(2))
        store.finish(lost, b"mask", {"Content-Type": "image/png"})
        store.files.path(lost, "result").unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as db, db:
        db.execute("UPDATE jobs SET attempts = 5 WHERE state = 'queued'")
    with serving(fake_app(jobs={"folder": tmp_path})) as client:
        problem(client.get(f"/jobs/{lost}/result"), 500, "store-broken")
        assert last_event(client, given_up)[0] == "failed"
        answer = client.get(f"/jobs/{given_up}/result")
        assert problem(answer, 500, "interrupted").actual == 5
        assert answer.headers["cache-control"] == "no-store"


def test_restarted_server_goes_on(gate: Gate, tmp_path: Path) -> None:
    gate.open.clear()
    with contextlib.ExitStack() as stack:
        with serving(gate.opens_after_drain(fake_app(gate, jobs={"folder": tmp_path}))) as client:
            ids = [post(client)["id"] for _ in range(3)]
            gate.wait()
            watcher = stack.enter_context(httpx.Client(base_url=client.base_url, timeout=60))
            events = stack.enter_context(watching(watcher, ids[0]))
            next(events)
        # The job was put back, not waited for, and its watcher did not keep the server from stopping.
        assert {name for name, _ in events} <= {"progress"}
    with serving(fake_app(gate, jobs={"folder": tmp_path})) as client:
        for id_ in ids:
            assert last_event(client, id_)[0] == "done"
            assert mask_of(client.get(f"/jobs/{id_}/result").content).shape == (16, 16)
