"""The ops port, in one process; `test_stopping` has its life."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from server.api import auth
from tests.support.files import GOOD
from tests.support.server import full_server, make_certificate

KEY, LINE = auth.make("operator")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(LINE)
    # The number is not used: the sockets are bound already.
    with full_server(http={"ops_port": 1}, auth={"keys_file": path}) as opened:
        yield opened


def test_without_one_they_are_on_the_one_port() -> None:
    with full_server() as opened:
        for path in auth.HEALTH:
            assert opened.client.get(path).status_code == 200
            assert path in opened.client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", sorted(auth.HEALTH))
def test_health_and_metrics_are_there_alone_and_need_no_key(
    opened: SimpleNamespace, problem: Callable[..., SimpleNamespace], path: str
) -> None:
    assert opened.ops.get(path).status_code == 200
    assert opened.ops.get(path).headers["x-request-id"]
    problem(opened.client.get(path), 401)
    problem(opened.client.get(path, headers={"X-API-Key": KEY}), 404)
    assert path not in opened.client.get("/openapi.json").json()["paths"]


@pytest.mark.parametrize("path", ["/models", "/segment", "/jobs/x", "/", "/docs", "/redoc", "/openapi.json"])
def test_nothing_else_is(opened: SimpleNamespace, problem: Callable[..., SimpleNamespace], path: str) -> None:
    problem(opened.ops.get(path), 401, "unauthorized")
    problem(opened.ops.get(path, headers={"X-API-Key": KEY}), 404)


def test_actions_need_a_key(opened: SimpleNamespace, problem: Callable[..., SimpleNamespace]) -> None:
    problem(opened.ops.post("/reload"), 401, "unauthorized")
    problem(opened.client.post("/reload"), 401, "unauthorized")
    # It is no action of the public port.
    problem(opened.client.post("/reload", headers={"X-API-Key": KEY}), 404)


def test_metrics_are_of_the_other_port(opened: SimpleNamespace) -> None:
    assert opened.client.post("/segment?level=1", content=GOOD, headers={"X-API-Key": KEY}).status_code == 200
    lines = [
        line
        for line in opened.ops.get("/metrics").text.splitlines()
        if line.startswith("unetpp_requests_total")
    ]
    assert [
        line.rpartition(" ")[2] for line in lines if 'outcome="ok"' in line and not line.endswith(" 0.0")
    ] == ["1.0"]


def test_both_ports_speak_tls(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    with full_server(
        http={"ops_port": 1, "tls_cert": tmp_path / "cert.pem", "tls_key": tmp_path / "key.pem"}
    ) as opened:
        context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
        with httpx.Client(verify=context) as strict:
            assert strict.get(f"https://127.0.0.1:{opened.ops_port}/health/ready").json() == {"ready": True}
            answer = strict.post(f"https://127.0.0.1:{opened.port}/segment?level=1", content=GOOD)
            assert answer.status_code == 200
        for port in (opened.port, opened.ops_port):
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/health/live")
