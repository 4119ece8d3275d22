"""API keys, through a real server on real sockets; and their file."""

import contextlib
import hashlib
import hmac
import http.client
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.api import auth
from server.errors import Misconfigured
from tests.support.files import GOOD
from tests.support.server import full_server, until

KEY, LINE = auth.make("lab-3")
OTHER_KEY, OTHER_LINE = auth.make("other")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the laboratories\n\n{LINE}\n")
    return path


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(LINE)
    with full_server(auth={"keys_file": path}) as opened:
        yield opened


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_make_gives_a_key_and_its_hash() -> None:
    assert KEY.startswith("unetpp_")
    assert len(KEY) >= 50
    assert f"lab-3:{hashlib.sha256(KEY.encode()).hexdigest()}" == LINE
    assert auth.make("lab-3")[0] != KEY


@pytest.mark.parametrize("name", ["", "a b", "a:b", "#a", "ä", "x" * 65, "a\n"])
def test_make_refuses_names_that_break_the_file(name: str) -> None:
    with pytest.raises(Misconfigured) as error:
        auth.make(name)
    assert error.value.fields["parameter"] == "name"


@pytest.mark.parametrize(
    "headers",
    [
        bearer(KEY),
        {"Authorization": f"bearer  {KEY}"},
        {"X-API-Key": KEY},
        # A proxy may need Authorization for itself.
        {"X-API-Key": KEY, "Authorization": "Basic dTpw"},
        {"X-API-Key": KEY, "Authorization": "Bearer of-the-proxy"},
    ],
    ids=range(5),
)
def test_request_with_a_key_is_answered(opened: SimpleNamespace, headers: dict[str, str]) -> None:
    answer = opened.client.post("/segment", content=GOOD, headers=headers)
    assert answer.status_code == 200, answer.text
    assert opened.client.get("/models", headers=headers).status_code == 200
    id_ = opened.client.post("/jobs", content=GOOD, headers=headers).json()["id"]
    assert opened.client.get(f"/jobs/{id_}", headers=headers).status_code == 200
    assert opened.client.get(f"/jobs/{id_}").status_code == 401


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json"])
def test_free_path_needs_no_key(opened: SimpleNamespace, path: str) -> None:
    assert opened.client.get(path).status_code == 200


def test_openapi_with_keys_describes_them(opened: SimpleNamespace) -> None:
    document = opened.client.get("/openapi.json").json()
    assert {scheme["type"] for scheme in document["components"]["securitySchemes"].values()} == {
        "http",
        "apiKey",
    }
    assert document["paths"]["/segment"]["post"]["security"]
    assert "401" in document["paths"]["/segment"]["post"]["responses"]
    assert "security" not in document["paths"]["/health/live"]["get"]


def test_server_without_keys_needs_none(small: Any) -> None:
    assert small.get("/models").status_code == 200
    assert "securitySchemes" not in small.get("/openapi.json").json()["components"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer("wrong"),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer(LINE.partition(":")[2]),
        bearer(LINE),
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer{KEY}"},
        {"X-API-Key": ""},
        {"X-API-Key": f"Bearer {KEY}"},
        {"X-API-Key": "wrong", **bearer(KEY)},
        {"Cookie": f"key={KEY}"},
        bearer("x" * 10_000),
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-API-Key": b"\xe2\x82\xac"},
    ],
    ids=range(17),
)
def test_request_without_a_valid_key_is_refused(
    opened: SimpleNamespace, problem: Callable[..., SimpleNamespace], headers: dict[str, Any]
) -> None:
    answer = opened.client.post("/segment", content=GOOD, headers=headers)
    assert problem(answer, 401, "unauthorized").allowed == ["Authorization: Bearer KEY", "X-API-Key: KEY"]
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/models"), ("GET", "/models/fake"), ("GET", "/models/none"), ("GET", "/nowhere"), ("GET", "/jobs/x"),
        ("DELETE", "/jobs/x"), ("GET", "/segment"), ("OPTIONS", "/segment"), ("POST", "/reload"), ("GET", "/redoc"),
        ("GET", "/docs/"), ("GET", "/docs/oauth2-redirect"), ("GET", "/health"), ("GET", "/health/live/"),
        ("GET", "/METRICS"), ("GET", "//metrics"), ("GET", "/metrics/../models"), ("GET", "/%2e%2e/models"),
        ("GET", "/metrics%2f..%2fmodels"), ("GET", "/metrics;/models"), ("GET", "/models?key=KEY"), ("PRI", "*"),
    ],
)  # fmt: skip
def test_path_is_refused_whether_it_exists_or_not(opened: SimpleNamespace, method: str, path: str) -> None:
    # Not through httpx, which would normalise the path.
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", opened.port, timeout=30)) as connection:
        connection.request(method, path.replace("KEY", KEY))
        answer = connection.getresponse()
        assert answer.status == 401, answer.read()
        assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
def test_refusal_comes_before_the_body(opened: SimpleNamespace, expect: str) -> None:
    with socket.create_connection(("127.0.0.1", opened.port), timeout=30) as raw:
        raw.sendall(
            f"POST /segment HTTP/1.1\r\nHost: x\r\n{expect}Content-Length: 200000000\r\n\r\n".encode()
        )
        assert raw.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_refusal_is_not_lost_where_the_body_is_sent_anyway(opened: SimpleNamespace) -> None:
    for _ in range(5):
        assert opened.client.post("/segment", content=b"x" * 5_000_000).status_code == 401


def test_websocket_is_refused(opened: SimpleNamespace) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "eA==",
    }
    assert opened.client.get("/segment", headers=upgrade).status_code == 401


async def test_middleware_counts_each_refusal(file: Path) -> None:
    calls: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append("app")

    async def send(message: Any) -> None:
        pass

    guarded = auth.APIKeyMiddleware(
        app, auth.Keys(file), frozenset({"/free"}), lambda: calls.append("refused")
    )
    for path, headers in (("/x", []), ("/free", []), ("/x", [(b"x-api-key", KEY.encode())])):
        await guarded({"type": "http", "path": path, "headers": headers}, None, send)  # type: ignore[arg-type]
    assert calls == ["refused", "app", "app"]


def replace(path: Path, text: str) -> None:
    """Writes a new file in place of the old one, as editors and orchestrators do."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)


def test_server_reads_a_changed_file(file: Path) -> None:
    with full_server(auth={"keys_file": file}) as opened:

        def statuses() -> tuple[int, ...]:
            get = opened.client.get
            return tuple(get("/models", headers=bearer(key)).status_code for key in (KEY, OTHER_KEY))

        assert statuses() == (200, 401)
        replace(file, f"{OTHER_LINE}")
        until(lambda: statuses() == (401, 200))


def test_keys_follow_the_file(file: Path) -> None:
    keys = auth.Keys(file, check_interval_s=0)
    for text, expected in (
        (f"{LINE}\n{OTHER_LINE}\n", (True, True)),
        (OTHER_LINE, (False, True)),
        # All are withdrawn.
        ("", (False, False)),
        (LINE, (True, False)),
    ):
        replace(file, text)
        assert (KEY in keys, OTHER_KEY in keys) == expected


def test_keys_notice_a_file_of_the_same_size(file: Path) -> None:
    keys = auth.Keys(file, check_interval_s=0)
    other, line = auth.make("lab-3")
    file.write_text(file.read_text().replace(LINE, line))
    os.utime(file, ns=(1, 1))
    assert other in keys
    assert KEY not in keys


@pytest.mark.parametrize(
    "text",
    [f"{KEY}\n", "lab-3\n", f"{LINE}\n\0\n", LINE[:-1], f"{LINE} x", "\xff" * 100, "#" * 2_000_000, None],
    ids=["key", "name", "null", "short", "long", "binary", "huge", "gone"],
)
def test_keys_stay_valid_where_the_file_breaks(
    file: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    keys = auth.Keys(file, check_interval_s=0)
    if text is None:
        file.unlink()
    else:
        file.write_text(text, encoding="latin-1")
    for _ in range(3):
        assert KEY in keys
    assert len(caplog.records) == 1
    assert KEY not in caplog.text
    file.write_text("lab-4:" + "0" * 64)
    assert KEY not in keys


def test_keys_are_not_read_for_each_request(file: Path) -> None:
    keys = auth.Keys(file, check_interval_s=1000)
    file.write_text(OTHER_LINE)
    assert KEY in keys
    assert OTHER_KEY not in keys


@pytest.mark.parametrize(
    "text", [None, "", "# none\n", f"\n{KEY}"], ids=["no file", "empty", "comment", "key"]
)
def test_keys_refuse_a_file_that_is_broken_from_the_start(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "keys"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Misconfigured) as error:
        auth.Keys(path)
    assert error.value.fields.items() >= {"setting": "UNETPP_AUTH__KEYS_FILE", "value": str(path)}.items()
    assert error.value.fields.get("line") == (2 if text and KEY in text else None)
    assert KEY not in str(error.value)


def test_keys_compare_every_entry(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the time of an answer would tell where in the file a key stands."""
    file.write_text("\n".join([LINE, *(auth.make(f"k{index}")[1] for index in range(9))]))
    keys, compared = auth.Keys(file), []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    assert KEY in keys
    assert len(compared) == 10
