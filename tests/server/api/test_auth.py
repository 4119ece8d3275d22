"""Keys, through a real server on real sockets."""

import hashlib
import http.client
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server.api import auth
from server.errors import Misconfigured
from tests.support.files import picture_bytes
from tests.support.server import full_server

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))
KEY, LINE = auth.make("lab-3")


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


class TestMake:
    def test_the_file_does_not_hold_the_key(self) -> None:
        assert KEY.startswith("unetpp_")
        assert len(KEY) >= 50
        assert f"lab-3:{hashlib.sha256(KEY.encode()).hexdigest()}" == LINE
        assert auth.make("lab-3")[0] != KEY

    @pytest.mark.parametrize("name", ["", "a b", "a:b", "#a", "ä", "x" * 65, "a\n"])
    def test_names(self, name: str) -> None:
        with pytest.raises(Misconfigured, match="cannot name a key"):
            auth.make(name)


class TestLetIn:
    @pytest.mark.parametrize(
        "headers",
        [
            bearer(KEY), {"Authorization": f"bearer  {KEY}"}, {"X-API-Key": KEY},
            # A proxy may need Authorization for itself.
            {"X-API-Key": KEY, "Authorization": "Basic dTpw"}, {"X-API-Key": KEY, "Authorization": "Bearer of-the-proxy"},
        ],
    )  # fmt: skip
    def test_with_a_key(self, opened: SimpleNamespace, headers: dict[str, str]) -> None:
        answer = opened.client.post("/segment", content=GOOD, headers=headers)
        assert answer.status_code == 200, answer.text
        assert opened.client.get("/models", headers=headers).status_code == 200
        id_ = opened.client.post("/jobs", content=GOOD, headers=headers).json()["id"]
        assert opened.client.get(f"/jobs/{id_}", headers=headers).status_code == 200
        assert opened.client.get(f"/jobs/{id_}").status_code == 401

    @pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json"])
    def test_without_one(self, opened: SimpleNamespace, path: str) -> None:
        assert opened.client.get(path).status_code == 200

    def test_the_documentation_has_a_field_for_it(self, opened: SimpleNamespace) -> None:
        document = opened.client.get("/openapi.json").json()
        assert {scheme["type"] for scheme in document["components"]["securitySchemes"].values()} == {"http", "apiKey"}
        assert document["paths"]["/segment"]["post"]["security"]
        assert "401" in document["paths"]["/segment"]["post"]["responses"]
        assert "security" not in document["paths"]["/health/live"]["get"]

    def test_where_there_are_no_keys_nobody_needs_one(self) -> None:
        with full_server() as opened:
            assert opened.client.get("/models").status_code == 200
            assert "securitySchemes" not in opened.client.get("/openapi.json").json()["components"]


class TestTurnedAway:
    @pytest.mark.parametrize(
        "headers",
        [
            {}, {"Authorization": "Bearer"}, bearer("wrong"), bearer(KEY[:-1]), bearer(KEY + "x"), bearer(LINE.partition(":")[2]), bearer(LINE),
            {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}, {"Authorization": f"Bearer{KEY}"}, {"X-API-Key": ""},
            {"X-API-Key": f"Bearer {KEY}"}, {"X-API-Key": "wrong", **bearer(KEY)}, {"Cookie": f"key={KEY}"},
            bearer("x" * 10_000), {"Authorization": b"Bearer \xff\xfe"}, {"X-API-Key": b"\xe2\x82\xac"},
        ],
    )  # fmt: skip
    def test_says_how_to_send_one(
        self, opened: SimpleNamespace, problem: Callable[..., SimpleNamespace], headers: dict[str, Any]
    ) -> None:
        answer = opened.client.post("/segment", content=GOOD, headers=headers)
        assert "Authorization: Bearer KEY" in problem(answer, 401, "unauthorized").detail
        assert answer.headers["www-authenticate"].startswith("Bearer")

    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/models"), ("GET", "/models/fake"), ("GET", "/models/none"), ("GET", "/nowhere"), ("GET", "/jobs/x"),
            ("DELETE", "/jobs/x"), ("GET", "/segment"), ("OPTIONS", "/segment"), ("POST", "/reload"), ("GET", "/redoc"),
            ("GET", "/docs/"), ("GET", "/docs/oauth2-redirect"), ("GET", "/health"), ("GET", "/health/live/"), ("GET", "/METRICS"),
            ("GET", "//metrics"), ("GET", "/metrics/../models"), ("GET", "/%2e%2e/models"), ("GET", "/metrics%2f..%2fmodels"),
            ("GET", "/metrics;/models"), ("GET", "/models?key=" + KEY), ("PRI", "*"),
        ],
    )  # fmt: skip
    def test_nobody_learns_which_paths_there_are(self, opened: SimpleNamespace, method: str, path: str) -> None:
        # Not through httpx, which would tidy up the path.
        connection = http.client.HTTPConnection("127.0.0.1", opened.port, timeout=30)
        connection.request(method, path)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        assert answer.status == 401, body
        assert answer.headers["content-type"] == "application/problem+json"

    def test_before_the_body_is_read(self, opened: SimpleNamespace) -> None:
        with socket.create_connection(("127.0.0.1", opened.port), timeout=30) as raw:
            raw.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nContent-Length: 200000000\r\n\r\n")
            answer = http.client.HTTPResponse(raw)
            answer.begin()
            assert answer.status == 401

    def test_a_client_that_asks_first_sends_no_body(self, opened: SimpleNamespace) -> None:
        with socket.create_connection(("127.0.0.1", opened.port), timeout=30) as raw:
            raw.sendall(b"POST /segment HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 200000000\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 401 ")

    def test_a_body_sent_all_the_same_loses_no_answer(self, opened: SimpleNamespace) -> None:
        for _ in range(5):
            answer = opened.client.post("/segment", content=b"x" * 20_000_000)
            assert answer.status_code == 401

    def test_each_is_reported_once(self, file: Path) -> None:
        calls: list[str] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            calls.append("app")

        guarded = auth.APIKeyMiddleware(app, auth.Keys(file), frozenset({"/free"}), lambda: calls.append("refused"))

        async def call(path: str, *headers: tuple[bytes, bytes]) -> None:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            await guarded({"type": "http", "path": path, "headers": list(headers)}, None, send)  # type: ignore[arg-type]

        import asyncio

        asyncio.run(call("/x"))
        asyncio.run(call("/free"))
        asyncio.run(call("/x", (b"x-api-key", KEY.encode())))
        assert calls == ["refused", "app", "app"]

    def test_a_websocket_is_no_way_round(self, opened: SimpleNamespace) -> None:
        upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "eA=="}
        assert opened.client.get("/segment", headers=upgrade).status_code == 401


class TestFile:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(auth, "EVERY_S", 0.0)

    def write(self, path: Path, text: str) -> None:
        """As editors and orchestrators do: a new file in place of the old one."""
        new = path.with_name("new")
        new.write_text(text)
        new.replace(path)

    def test_is_read_again_when_it_changes(self, file: Path) -> None:
        other, line = auth.make("other")
        with full_server(auth={"keys_file": file}) as opened:

            def statuses() -> tuple[int, ...]:
                return tuple(opened.client.get("/models", headers=bearer(key)).status_code for key in (KEY, other))

            assert statuses() == (200, 401)
            self.write(file, f"{LINE}\n{line}\n")
            assert statuses() == (200, 200)
            self.write(file, f"{line}")
            assert statuses() == (401, 200)
            # All are withdrawn.
            self.write(file, "")
            assert statuses() == (401, 401)
            self.write(file, LINE)
            assert statuses() == (200, 401)

    def test_of_the_same_size_and_written_in_place(self, file: Path) -> None:
        keys = auth.Keys(file)
        other, line = auth.make("lab-3")
        file.write_text(file.read_text().replace(LINE, line))
        os.utime(file, ns=(1, 1))
        assert keys.known(other)
        assert not keys.known(KEY)

    @pytest.mark.parametrize(
        "text", [f"{KEY}\n", "lab-3\n", f"{LINE}\n\0\n", LINE[:-1], f"{LINE} x", "\xff" * 100, "#" * 2_000_000]
    )
    def test_that_breaks_keeps_the_keys(self, file: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
        keys = auth.Keys(file)
        file.write_text(text, encoding="latin-1")
        for _ in range(3):
            assert keys.known(KEY)
        assert caplog.text.count("the keys of before still hold") == 1
        assert KEY not in caplog.text
        file.write_text("lab-4:" + "0" * 64)
        assert not keys.known(KEY)

    def test_that_goes_away_keeps_the_keys(self, file: Path, caplog: pytest.LogCaptureFixture) -> None:
        keys = auth.Keys(file)
        text = file.read_text()
        file.unlink()
        for _ in range(3):
            assert keys.known(KEY)
        assert caplog.text.count("cannot be read: No such file") == 1
        caplog.set_level(logging.INFO)
        file.write_text(text)
        assert keys.known(KEY)
        assert "read the keys file again: 1 keys" in caplog.text

    def test_is_not_looked_at_for_each_request(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(auth, "EVERY_S", 1000.0)
        keys = auth.Keys(file)
        file.unlink()
        monkeypatch.setattr(keys, "_stat", lambda: pytest.fail("looked"))
        assert keys.known(KEY)

    @pytest.mark.parametrize(
        ("text", "said"), [(None, "No such file"), ("", "holds no keys"), ("# none\n", "holds no keys"), (f"\n{KEY}", "line 2")]
    )
    def test_that_is_broken_from_the_start(self, tmp_path: Path, text: str | None, said: str) -> None:
        path = tmp_path / "keys"
        if text is not None:
            path.write_text(text)
        with pytest.raises(Misconfigured, match=said) as caught:
            auth.Keys(path)
        assert str(path) in str(caught.value)
        assert KEY not in str(caught.value)

    def test_every_entry_is_compared(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else the time of an answer would tell where in the file a key stands."""
        file.write_text("\n".join([LINE, *(auth.make(f"k{index}")[1] for index in range(9))]))
        keys = auth.Keys(file)
        compared = []
        compare = auth.hmac.compare_digest
        monkeypatch.setattr(auth.hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
        assert keys.known(KEY)
        assert len(compared) == 10
