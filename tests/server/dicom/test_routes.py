"""POST /jobs?source= over the wire, with a DICOMweb server written for tests."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import Misconfigured
from tests.server.dicom.fake_web import SERIES, STUDY, FakeWeb, fake_web
from tests.server.dicom.series import check_answer, write_series
from tests.support.files import GOOD
from tests.support.server import serving
from tests.support.service import fake_app

pytest.importorskip("highdicom")

SOURCE = f"main/{STUDY}/{SERIES}"


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeWeb]:
    with fake_web(write_series(tmp_path_factory.mktemp("series"), 1)) as fake:
        yield fake


@pytest.fixture(scope="module")
def client(web: FakeWeb, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    config = tmp_path_factory.mktemp("config") / "pacs.toml"
    config.write_text(
        f'[servers.main]\naddress = "{web.address}"\n[servers.other]\naddress = "http://127.0.0.1:9"\n'
    )
    app = fake_app(changes={"dims": 3}, dicom={"config": config, "min_retry_s": 0.05})
    with serving(app) as client:
        yield client


def end(client: httpx.Client, **query: Any) -> dict[str, Any]:
    answer = client.post("/jobs", params=query)
    assert answer.status_code == 202, answer.text
    url = answer.headers["location"]
    given_up = time.monotonic() + 60
    while (job := client.get(url).json())["state"] in ("queued", "running"):
        assert time.monotonic() < given_up
        time.sleep(0.05)
    return dict(job)


def test_answer_is_stored_once_in_spite_of_trouble(client: httpx.Client, web: FakeWeb) -> None:
    web.statuses, web.store_statuses, web.fails_after_storing = [503, 503], [503], 0
    job = end(client, source=SOURCE, store=True)
    assert job["state"] == "done", job
    assert end(client, source=SOURCE, store=True)["state"] == "done"
    (body,) = web.stored
    check_answer(client.get(job["links"]["result"]).content, 1)
    assert client.get(job["links"]["result"]).content in body


def test_failure_is_told_with_its_result(client: httpx.Client, web: FakeWeb) -> None:
    web.statuses = [401]
    job = end(client, source=SOURCE)
    assert (job["state"], job["error"]["code"], job["error"]["status"]) == ("failed", "pacs-refused", 502)
    answer = client.get(f"/jobs/{job['id']}/result")
    assert (answer.status_code, answer.json()["actual"]) == (502, 401)
    assert "Doe" not in answer.text


@pytest.mark.parametrize(
    ("query", "body", "parameter"),
    [
        ({"source": SOURCE}, GOOD, "source"),
        ({"store": "true"}, GOOD, "store"),
        ({"source": "pacs/1.2.3"}, b"", "source"),
        ({"source": "main/../1"}, b"", "source"),
        ({"source": SOURCE, "store": "true", "format": "mask"}, b"", "format"),
    ],
)
def test_wrong_request_is_refused(
    client: httpx.Client, problem: Callable[..., Any], query: dict[str, str], body: bytes, parameter: str
) -> None:
    fields = problem(client.post("/jobs", params=query, content=body), 422)
    assert (fields.code, fields.parameter) == ("invalid-parameter", parameter)


def test_unknown_name_lists_the_names(client: httpx.Client, problem: Callable[..., Any]) -> None:
    fields = problem(client.post("/jobs", params={"source": "pacs/1.2.3"}), 422)
    assert fields.allowed == ["main", "other"]


@pytest.mark.parametrize("name", ["dicomsr", "mask"])
def test_rule_whose_answer_no_pacs_takes_ends_the_start(tmp_path: Path, name: str) -> None:
    config = tmp_path / "pacs.toml"
    config.write_text(f'[node]\nforward = "A@127.0.0.1:1"\n[[rules]]\nformat = "{name}"\n')
    with pytest.raises(Misconfigured, match="rule 1"):
        fake_app(changes={"dims": 3}, dicom={"config": config})


def test_server_without_pacs_has_no_source(problem: Callable[..., Any]) -> None:
    with serving(fake_app()) as client:
        fields = problem(client.post("/jobs", params={"source": SOURCE}), 422)
    assert (fields.parameter, fields.setting) == ("source", "UNETPP_DICOM__CONFIG")
