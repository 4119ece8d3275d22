"""Defences against what is sent: other sites' pages, addresses to fetch, paths to open, networks from callers."""

import base64
import contextlib
import hashlib
import http.client
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.support.files import GOOD
from tests.support.server import full_server, until

PATHS = ("/etc/passwd", "file:///etc/passwd", "../../manifest.json", "C:\\x.png")

Problem = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("jobs")
    with full_server(http={"ops_port": 1}, jobs={"folder": folder}) as opened:
        opened.folder = folder
        yield opened


@pytest.fixture(scope="module")
def job(opened: SimpleNamespace) -> str:
    """The id of a job that is done."""
    id_ = str(opened.client.post("/jobs?level=1", content=GOOD).json()["id"])
    until(lambda: opened.client.get(f"/jobs/{id_}").json()["state"] == "done")
    return id_


def allows_cross_origin(answer: httpx.Response) -> bool:
    return any(name.startswith("access-control") for name in answer.headers)


@pytest.mark.parametrize("origin", ["https://example.org", "null", "http://localhost:8000"])
def test_no_response_is_for_other_origins(opened: SimpleNamespace, origin: str) -> None:
    """A browser shows a response to a foreign page only where one of its headers allows it."""
    for client in (opened.client, opened.ops):
        for path in ("/", "/models", "/segment", "/health/live", "/nowhere"):
            assert not allows_cross_origin(client.get(path, headers={"Origin": origin}))
    answer = opened.client.post("/segment?level=1", content=GOOD, headers={"Origin": origin})
    assert answer.status_code == 403
    assert not allows_cross_origin(answer)


@pytest.mark.parametrize("path", ["/segment", "/jobs", "/models"])
def test_preflight_is_not_allowed(opened: SimpleNamespace, path: str) -> None:
    request = {
        "Origin": "https://example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "x-api-key",
    }
    answer = opened.client.options(path, headers=request)
    assert answer.status_code == 405
    assert not allows_cross_origin(answer)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_write_of_another_site_is_refused(opened: SimpleNamespace, problem: Problem, site: str) -> None:
    """A form needs no permission, and a server without keys requires none."""
    headers = {"Sec-Fetch-Site": site}
    problem(opened.client.post("/segment?level=1", files={"file": GOOD}, headers=headers), 403, "other-site")
    problem(opened.client.post("/jobs", content=GOOD, headers=headers), 403)
    problem(opened.client.delete("/jobs/x", headers=headers), 403)
    problem(opened.ops.post("/reload", headers=headers), 403)
    # A link to the page works.
    assert opened.client.get("/", headers=headers).status_code == 200


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_write_of_the_own_page_is_answered(opened: SimpleNamespace, site: str) -> None:
    answer = opened.client.post("/segment?level=1", files={"file": GOOD}, headers={"Sec-Fetch-Site": site})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        ("http://lab:8000", "lab:8000", 200), ("http://LAB:8000", "lab:8000", 200), ("http://lab", "lab", 200),
        ("http://lab", "lab:80", 200), ("http://lab:80", "lab", 200), ("https://lab", "lab:443", 200),
        ("https://lab", "lab", 200), ("http://[::1]:8000", "[::1]:8000", 200), ("http://lab:8001", "lab:8000", 403),
        ("http://lab", "lab:8000", 403), ("http://lab:8000", "lab", 403), ("https://lab", "lab:80", 403),
        ("http://evil", "lab", 403), ("http://evil.lab", "lab", 403), ("http://lab.evil", "lab", 403),
        ("null", "lab", 403), ("", "lab", 403), ("null", "null", 403), ("file://", "", 403), ("http://", "", 403),
        ("chrome-extension://lab", "lab", 403),
    ],
)  # fmt: skip
def test_write_over_plain_http_compares_origin_and_host(
    opened: SimpleNamespace, problem: Problem, origin: str, host: str, status: int
) -> None:
    """Browsers send no Sec-Fetch-Site there."""
    headers = {"Origin": origin, "Host": host}
    answer = opened.client.post("/segment?level=1", files={"file": GOOD}, headers=headers)
    assert answer.status_code == status
    if status == 403:
        problem(answer, 403, "other-site")
        problem(opened.ops.post("/reload", headers=headers), 403)
    assert opened.client.get("/", headers=headers).status_code == 200


def test_write_behind_a_proxy_that_changes_the_host_is_answered(opened: SimpleNamespace) -> None:
    headers = {"Origin": "https://lab.example.org", "Host": "localhost:8000", "Sec-Fetch-Site": "same-origin"}
    assert opened.client.post("/segment?level=1", content=GOOD, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/", "/docs", "/errors"])
def test_page_loads_nothing_from_elsewhere(opened: SimpleNamespace, path: str) -> None:
    answer = opened.client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.findall(
        r"""(?:src|href|url|import|action)\b\s*[=(]?\s*["']?\s*(?:https?:)?//""", answer.text
    )
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert rules.get("connect-src", "'none'") in ("'self'", "'none'")
    assert "unsafe" not in str(rules)
    # The policy would stop these.
    assert not re.findall(r"<[^>]* (?:on\w+|style)=", answer.text)
    if path != "/errors":
        assert rules["script-src"] == rules["style-src"] == "'self'"
        assert not re.findall(r"<style|<script(?![^>]* src=)", answer.text)
        return
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        texts = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", answer.text, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules.get(rule, "'none'") == (" ".join(f"'sha256-{one}'" for one in hashes) or "'none'")


@pytest.fixture
def bait() -> Iterator[str]:
    """An address that fails the test if it is called."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/cells.png"
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            listening.accept()


def test_address_in_a_request_is_not_fetched(opened: SimpleNamespace, bait: str) -> None:
    post = opened.client.post
    for name in ("url", "file", "image", "model", "format"):
        assert post("/segment", params={name: bait}, content=GOOD).status_code in (404, 406, 422)
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{bait}"/></svg>'
    for status, request in (
        (415, {"data": {"file": bait}}),
        (422, {"data": {"url": bait}, "files": {"file": GOOD}}),
        (415, {"files": {"file": bait.encode()}}),
        (415, {"content": bait}),
        (415, {"json": {"url": bait}}),
        (415, {"content": svg, "headers": {"Content-Type": "image/svg+xml"}}),
    ):
        assert post("/segment", **request).status_code == status
    assert post("/jobs", content=GOOD, headers={"Callback-Url": bait}).status_code == 202


@pytest.mark.parametrize("path", PATHS)
def test_path_in_a_request_is_not_opened(opened: SimpleNamespace, path: str) -> None:
    assert opened.client.post("/segment", params={"model": path}, content=GOOD).status_code in (404, 422)
    assert opened.client.get(f"/models/{path}").status_code == 404
    named = {"file": (path, GOOD, "image/png")}
    assert opened.client.post("/segment?level=1", files=named).status_code == 200


@pytest.mark.parametrize("slash", ["/", "%2f", "%2F", "%5c", "\\", "//"])
@pytest.mark.parametrize("dots", ["..", "%2e%2e", ".%2E"])
def test_job_path_leads_to_no_other_file(opened: SimpleNamespace, job: str, dots: str, slash: str) -> None:
    assert (opened.folder / "jobs.sqlite").is_file()
    assert (opened.folder / job / "result").is_file()
    up, own = dots + slash, opened.folder.name

    def get(path: str) -> tuple[int, bytes]:
        """Not through httpx, which would take the dots out of the path."""
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", opened.port, timeout=30)
        ) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()

    for wrong in (
        "jobs.sqlite", f"{up}jobs.sqlite", f"{job}/{up}jobs.sqlite", f"{job}/result/{up}{up}jobs.sqlite",
        f"{job}{slash}{up}jobs.sqlite", f"{up}{own}/jobs.sqlite", f"{job}/input", f"{dots}/result",
        f"{up}{own}{slash}{job}/result", f"{job}{slash}{up}{job}/result", f"{up}{up}{up}{up}etc/passwd",
        f"{job}%00/result", f"{job}/result%00",
    ):  # fmt: skip
        status, body = get(f"/jobs/{wrong}")
        assert status == json.loads(body)["status"] == 404, (wrong, body)
    assert get(f"/jobs/{job}/result")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
@pytest.mark.parametrize("path", ["/models", "/models/fake", "/models/new"])
def test_network_cannot_be_uploaded(opened: SimpleNamespace, method: str, path: str) -> None:
    assert opened.client.request(method, path, content=b"\x08\x08").status_code == 405


@pytest.mark.parametrize("declared", ["application/octet-stream", "image/png", "application/gzip", ""])
@pytest.mark.parametrize("name", ["L1.onnx", "golden.npz", "manifest.json"])
@pytest.mark.parametrize("route", ["/segment", "/jobs"])
def test_network_as_an_image_is_refused(
    opened: SimpleNamespace, shipped_bundle: Path, declared: str, name: str, route: str
) -> None:
    headers = {"Content-Type": declared} if declared else {}
    answer = opened.client.post(route, content=(shipped_bundle / name).read_bytes(), headers=headers)
    assert answer.status_code == 415, answer.text
