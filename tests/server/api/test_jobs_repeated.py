"""Requests for a job that come several times, because a connection broke: with an Idempotency-Key they are one job."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.server.api.jobs_support import DARK, last_event
from tests.support.files import GOOD

KEY = "0123456789abcdef"


def send(client: httpx.Client, key: str | None, query: str = "?level=1", **sent: Any) -> str:
    answer = client.post(f"/jobs{query}", headers={"Idempotency-Key": key} if key else {}, **sent)
    assert answer.status_code == 202, answer.text
    id_: str = answer.json()["id"]
    assert answer.headers["Location"] == f"/jobs/{id_}"
    return id_


def test_repeated_request_is_the_same_job(small: httpx.Client) -> None:
    first = send(small, KEY, content=GOOD)
    assert send(small, KEY, content=GOOD) == first
    last_event(small, first)
    # Also where it has ended meanwhile.
    answer = small.post("/jobs?level=1", content=GOOD, headers={"Idempotency-Key": KEY}).json()
    assert (answer["id"], answer["state"]) == (first, "done")
    assert small.get(f"/jobs/{first}/result").status_code == 200


def test_deleted_job_can_be_sent_again(small: httpx.Client) -> None:
    first = send(small, KEY + "deleted", content=GOOD)
    last_event(small, first)
    assert small.delete(f"/jobs/{first}").status_code == 204
    assert send(small, KEY + "deleted", content=GOOD) == first
    assert last_event(small, first)[0] == "done"


def test_other_key_parameters_input_or_reference_is_another_job(small: httpx.Client) -> None:
    mask = small.post("/segment", content=GOOD).content
    ids = [
        send(small, KEY, content=GOOD),
        send(small, KEY + "x", content=GOOD),
        send(small, KEY, "?level=2", content=GOOD),
        send(small, KEY, "?level=1&preview=true", content=GOOD),
        send(small, KEY, content=DARK),
        send(small, KEY, files={"file": GOOD, "reference": mask}),
        send(small, None, content=GOOD),
        send(small, None, content=GOOD),
    ]
    assert len({*ids}) == len(ids)


def test_other_accept_is_another_job(small: httpx.Client) -> None:
    ids = {
        small.post("/jobs", content=GOOD, headers={"Idempotency-Key": KEY, "Accept": kind}).json()["id"]
        for kind in ("image/png", "application/json")
    }
    assert len(ids) == 2


def test_multipart_and_plain_body_are_the_same_input(small: httpx.Client) -> None:
    assert send(small, KEY + "m", content=GOOD) == send(small, KEY + "m", files={"file": GOOD})


def test_requests_at_once_are_one_job(small: httpx.Client) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {*pool.map(lambda _: send(small, KEY + "-at-once", content=GOOD), range(24))}
    assert len(ids) == 1
    [id_] = ids
    assert last_event(small, id_)[0] == "done"
    assert small.get(f"/jobs/{id_}/result").content == small.post("/segment?level=1", content=GOOD).content


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 201, "sixteen characters"], ids=["empty", "short", "long", "space"]
)
def test_key_that_others_may_have_is_refused(small: httpx.Client, key: str) -> None:
    answer = small.post("/jobs?level=1", content=GOOD, headers={"Idempotency-Key": key})
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, "invalid-parameter")
    assert (problem["parameter"], problem["actual"]) == ("Idempotency-Key", len(key))
