"""A full disk: a request whose temporary files have no room may be repeated, and says so."""

import errno
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.support.files import GOOD
from tests.support.server import serving
from tests.support.service import fake_app

# Larger than what is kept in memory.
LARGE = GOOD + bytes(5 << 20)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with serving(fake_app()) as client:
        yield client


def failing(code: int) -> Callable[..., Any]:
    """A temporary file that no byte can be written to."""

    def open_file(*_: Any, **__: Any) -> Any:
        raise OSError(code, "no room")

    return open_file


@pytest.mark.parametrize("multipart", [False, True])
def test_body_without_room_is_503(
    client: httpx.Client, multipart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, Any] = {"files": {"file": LARGE}} if multipart else {"content": LARGE}
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", failing(errno.ENOSPC))
        answer = client.post("/segment", **sent)
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (503, "disk-full"), problem
    assert int(answer.headers["Retry-After"]) >= 1
    assert "no room" not in answer.text.replace(problem["detail"], "")
    assert client.post("/segment", **sent).status_code == 200


def test_other_errors_of_the_disk_stay_faults_of_the_server(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", failing(errno.EIO))
        answer = client.post("/segment", content=LARGE)
        assert (answer.status_code, answer.json()["code"]) == (500, "internal")
