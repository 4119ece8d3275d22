"""Doors that are not there: other sites' pages, addresses to fetch from, networks from callers."""

import base64
import hashlib
import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.files import picture_bytes
from tests.support.server import full_server, until

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("jobs")
    with full_server(http={"ops_port": 1}, jobs={"folder": folder}) as opened:
        opened.folder = folder
        yield opened


def finished(opened: SimpleNamespace, id_: str) -> Any:
    """A job in the end."""

    def look() -> Any:
        return opened.client.get(f"/jobs/{id_}").json()

    until(lambda: look()["state"] in ("done", "failed", "cancelled"))
    return look()


def get_untidied(port: int, path: str) -> tuple[int, bytes]:
    """httpx would take the dots out of the path."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


class TestOtherSites:
    """A browser shows an answer to a foreign page only where a header of the answer allows it."""

    @pytest.mark.parametrize("origin", ["https://example.org", "null", "http://localhost:8000"])
    def test_no_answer_is_for_them(self, opened: SimpleNamespace, origin: str) -> None:
        for client in (opened.client, opened.ops):
            for path in ("/", "/models", "/segment", "/health/live", "/nowhere"):
                answer = client.get(path, headers={"Origin": origin})
                assert not [name for name in answer.headers if name.startswith("access-control")]
        answer = opened.client.post("/segment?level=1", content=GOOD, headers={"Origin": origin})
        assert answer.status_code == 403
        assert not [name for name in answer.headers if name.startswith("access-control")]

    @pytest.mark.parametrize("path", ["/segment", "/jobs", "/models"])
    def test_their_question_in_advance_is_not_allowed(self, opened: SimpleNamespace, path: str) -> None:
        asked = {
            "Origin": "https://example.org", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key",
        }  # fmt: skip
        answer = opened.client.options(path, headers=asked)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control")]

    @pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)])
    def test_they_cannot_have_work_done_unseen(
        self, opened: SimpleNamespace, problem: Callable[..., SimpleNamespace], site: str, status: int
    ) -> None:
        """As a form needs no permission, and a server without keys asks for none."""
        headers = {"Sec-Fetch-Site": site}
        answer = opened.client.post("/segment?level=1", files={"file": GOOD}, headers=headers)
        if status == 403:
            problem(answer, 403, "other-site")
            problem(opened.client.post("/jobs", content=GOOD, headers=headers), 403)
            problem(opened.client.delete("/jobs/x", headers=headers), 403)
            problem(opened.ops.post("/reload", headers=headers), 403)
        else:
            assert answer.status_code == 200
        # A link to it works.
        assert opened.client.get("/", headers=headers).status_code == 200

    @pytest.mark.parametrize(
        ("origin", "host", "status"),
        [
            ("http://lab:8000", "lab:8000", 200), ("http://LAB:8000", "lab:8000", 200), ("http://lab", "lab", 200), ("http://lab", "lab:80", 200),
            ("http://lab:80", "lab", 200), ("https://lab", "lab:443", 200), ("https://lab", "lab", 200), ("http://[::1]:8000", "[::1]:8000", 200),
            ("http://lab:8001", "lab:8000", 403), ("http://lab", "lab:8000", 403), ("http://lab:8000", "lab", 403), ("https://lab", "lab:80", 403),
            ("http://evil", "lab", 403), ("http://evil.lab", "lab", 403), ("http://lab.evil", "lab", 403), ("null", "lab", 403), ("", "lab", 403),
            ("null", "null", 403), ("file://", "", 403), ("http://", "", 403), ("chrome-extension://lab", "lab", 403),
        ],
    )  # fmt: skip
    def test_nor_over_plain_http_in_a_network(
        self, opened: SimpleNamespace, problem: Callable[..., SimpleNamespace], origin: str, host: str, status: int
    ) -> None:
        """Where browsers do not say Sec-Fetch-Site."""
        headers = {"Origin": origin, "Host": host}
        answer = opened.client.post("/segment?level=1", files={"file": GOOD}, headers=headers)
        assert answer.status_code == status
        if status == 403:
            problem(answer, 403, "other-site")
            problem(opened.ops.post("/reload", headers=headers), 403)
        assert opened.client.get("/", headers=headers).status_code == 200

    def test_a_proxy_may_change_the_host(self, opened: SimpleNamespace) -> None:
        headers = {"Origin": "https://lab.example.org", "Host": "localhost:8000", "Sec-Fetch-Site": "same-origin"}
        assert opened.client.post("/segment?level=1", content=GOOD, headers=headers).status_code == 200


class TestPages:
    @pytest.mark.parametrize("path", ["/", "/docs"])
    def test_load_nothing_from_elsewhere(self, opened: SimpleNamespace, path: str) -> None:
        answer = opened.client.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert not re.findall(r"""(?:src|href|url|import|action)\b\s*[=(]?\s*["']?\s*(?:https?:)?//""", answer.text)
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'"
        assert rules.get("connect-src", "'none'") in ("'self'", "'none'")
        assert "unsafe" not in str(rules)
        # Which the policy would stop.
        assert not re.findall(r"<[^>]* (?:on\w+|style)=", answer.text)
        if path == "/":
            # Of its own files; nothing inline.
            assert rules["script-src"] == rules["style-src"] == "'self'"
            assert not re.findall(r"<style|<script(?![^>]* src=)", answer.text)
            return
        for tag, rule in (("script", "script-src"), ("style", "style-src")):
            texts = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
            hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
            assert rules.get(rule, "'none'") == (" ".join(f"'sha256-{one}'" for one in hashes) or "'none'")

    def test_the_documentation_has_every_route(self, opened: SimpleNamespace) -> None:
        page = opened.client.get("/docs").text
        document = opened.client.get("/openapi.json").json()
        for path, item in document["paths"].items():
            for method, route in item.items():
                assert f"{method.upper()} {path}<" in page
                for parameter in route.get("parameters", []):
                    assert f"<code>{parameter['name']}</code>" in page
        assert "<script" not in page
        assert "<input" not in page
        assert opened.client.get("/redoc").status_code == 404


class TestAddresses:
    @pytest.fixture
    def bait(self) -> Iterator[str]:
        """An address that nobody may call."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/cells.png"
            listening.setblocking(False)
            with pytest.raises(BlockingIOError):
                listening.accept()

    def test_are_not_fetched(self, opened: SimpleNamespace, bait: str) -> None:
        client = opened.client
        for name in ("url", "file", "image", "model", "format"):
            assert client.post("/segment", params={name: bait}, content=GOOD).status_code in (404, 406, 422)
        assert client.post("/segment", data={"file": bait}).status_code == 415
        assert client.post("/segment", data={"url": bait}, files={"file": GOOD}).status_code == 422
        assert client.post("/segment", files={"file": bait.encode()}).status_code == 415
        assert client.post("/segment", content=bait).status_code == 415
        assert client.post("/segment", json={"url": bait}).status_code == 415
        drawing = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{bait}"/></svg>'
        assert client.post("/segment", content=drawing, headers={"Content-Type": "image/svg+xml"}).status_code == 415
        answer = client.post("/jobs", content=GOOD, headers={"Callback-Url": bait})
        assert answer.status_code == 202

    @pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "../../manifest.json", "C:\\x.png"])
    def test_nor_are_paths_opened(self, opened: SimpleNamespace, path: str) -> None:
        assert opened.client.post("/segment", params={"model": path}, content=GOOD).status_code == 404
        assert opened.client.get(f"/models/{path}").status_code == 404

    @pytest.mark.parametrize("slash", ["/", "%2f", "%2F", "%5c", "\\", "//"])
    @pytest.mark.parametrize("dots", ["..", "%2e%2e", ".%2E"])
    def test_jobs_lead_to_no_other_files(self, opened: SimpleNamespace, dots: str, slash: str) -> None:
        id_ = opened.client.post("/jobs?level=1", content=GOOD).json()["id"]
        assert finished(opened, id_)["state"] == "done"
        assert (opened.folder / "jobs.sqlite").is_file()
        assert (opened.folder / id_ / "result").is_file()
        up = dots + slash
        for wrong in (
            "/jobs/jobs.sqlite", f"/jobs/{up}jobs.sqlite", f"/jobs/{id_}/{up}jobs.sqlite", f"/jobs/{id_}/result/{up}{up}jobs.sqlite",
            f"/jobs/{id_}{slash}{up}jobs.sqlite", f"/jobs/{up}{opened.folder.name}/jobs.sqlite", f"/jobs/{id_}/input", f"/jobs/{dots}/result",
            f"/jobs/{up}{opened.folder.name}{slash}{id_}/result", f"/jobs/{id_}{slash}{up}{id_}/result", f"/jobs/{up}{up}{up}{up}etc/passwd",
            f"/jobs/{id_}%00/result", f"/jobs/{id_}/result%00",
        ):  # fmt: skip
            status, body = get_untidied(opened.port, wrong)
            assert status == 404, (wrong, body)
            assert json.loads(body)["status"] == 404
        assert get_untidied(opened.port, f"/jobs/{id_}/result")[0] == 200

    @pytest.mark.parametrize("path", ["/etc/passwd", "../../manifest.json", "C:\\x.png"])
    def test_nor_is_a_name_of_a_file_one(self, opened: SimpleNamespace, path: str) -> None:
        named = {"file": (path, GOOD, "image/png")}
        assert opened.client.post("/segment?level=1", files=named).status_code == 200


class TestNetworks:
    @pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
    @pytest.mark.parametrize("path", ["/models", "/models/fake", "/models/new"])
    def test_have_no_way_in(self, opened: SimpleNamespace, shipped_bundle: Path, method: str, path: str) -> None:
        assert opened.client.request(method, path, content=(shipped_bundle / "L1.onnx").read_bytes()).status_code == 405

    @pytest.mark.parametrize("kind", ["application/octet-stream", "image/png", "application/gzip", ""])
    def test_as_an_image_are_refused(self, opened: SimpleNamespace, shipped_bundle: Path, kind: str) -> None:
        for name in ("L1.onnx", "golden.npz", "manifest.json"):
            data = (shipped_bundle / name).read_bytes()
            for route in ("/segment", "/jobs"):
                sent = opened.client.post(route, content=data, headers={"Content-Type": kind} if kind else {})
                assert sent.status_code == 415, (route, name, sent.text)
