"""Doors that are not there: other sites' pages, addresses to fetch from, networks from callers."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.server.conftest import doors, picture_bytes

GOOD = picture_bytes(np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.fixture(scope="module")
def opened() -> Iterator[SimpleNamespace]:
    with doors(http={"ops_port": 1}) as opened:
        yield opened


class TestOtherSites:
    """A browser shows an answer to a foreign page only where a header of the answer allows it."""

    @pytest.mark.parametrize("origin", ["https://example.org", "null", "http://localhost:8000"])
    def test_no_answer_is_for_them(self, opened: SimpleNamespace, origin: str) -> None:
        for client in (opened.client, opened.ops):
            for path in ("/", "/models", "/segment", "/health/live", "/nowhere"):
                answer = client.get(path, headers={"Origin": origin})
                assert not [name for name in answer.headers if name.startswith("access-control")]
        answer = opened.client.post("/segment?level=1", content=GOOD, headers={"Origin": origin})
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
        for name in ("manifest.json", "result/../../../etc/passwd", "%2e%2e%2fjobs.db", path.replace("/", "%2f")):
            assert opened.client.get(f"/jobs/{name}").status_code == 404
            assert opened.client.get(f"/jobs/x/{name}").status_code == 404
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
                if route == "/jobs" and sent.status_code == 202:
                    # It is looked at later, and fails then.
                    continue
                assert sent.status_code == 415, (route, name, sent.text)
