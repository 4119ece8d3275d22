"""The files of the page: what is served, to whom, and how long it may be cached."""

import gzip
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.api import auth
from server.api.routes import page
from server.errors import Misconfigured
from tests.server.web.conftest import WEB
from tests.support.server import full_server

ASSETS = page.read(WEB)
OWN_TEXTS = [
    path for path, asset in ASSETS.items() if asset.media_type in page.TEXT_TYPES and path not in page.PINNED
]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with full_server() as opened:
        yield opened.client


def test_files_table_lists_the_folder() -> None:
    """Except licence texts, which are for readers of the repository and of the wheel."""
    files = {path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file()}
    assert set(page.FILES) == {name for name in files if not name.endswith(".LICENSE")}


def test_first_visit_is_small() -> None:
    """The volume viewer is not part of it, because it is loaded with the first volume."""
    first = [asset for path, asset in ASSETS.items() if not path.startswith(("vendor/", "samples/"))]
    assert sum(len(asset.gzipped or asset.body) for asset in first) < 64 * 1024
    assert sum(len(asset.body) for path, asset in ASSETS.items() if path.startswith("samples/")) < 400_000
    assert all(len((WEB / f"{name}.js").read_text().splitlines()) <= 300 for name in page.MODULES)


@pytest.mark.parametrize("path", sorted(page.paths()))
def test_file_is_served(client: httpx.Client, path: str) -> None:
    asset = ASSETS[page.PAGES.get(path, path.removeprefix("/web/"))]
    plain = client.get(path, headers={"Accept-Encoding": "identity"})
    assert (plain.status_code, plain.content) == (200, asset.body)
    expected = {
        "content-type": asset.media_type,
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
    }
    assert expected.items() <= dict(plain.headers).items()
    assert "content-encoding" not in plain.headers
    assert client.head(path).headers["etag"] == plain.headers["etag"]
    compressed = client.get(path)
    assert compressed.content == asset.body
    if asset.media_type in page.TEXT_TYPES:
        assert compressed.headers["content-encoding"] == "gzip"
        assert gzip.decompress(asset.gzipped or b"") == asset.body


def test_versioned_files_are_cached_for_a_year(client: httpx.Client) -> None:
    """Every file except the page itself is referenced with its version."""
    texts = [ASSETS[path].body.decode() for path in OWN_TEXTS]
    versions = dict(
        match for text in texts for match in re.findall(r'"(?:/web/|\./)([\w./-]+)\?v=(\w+)"', text)
    )
    assert set(versions) == set(page.FILES) - set(page.PAGES.values())
    assert not any(re.search(r'from "\./\w+\.js"', text) for text in texts)
    for name, version in versions.items():
        cached = client.head(f"/web/{name}?v={version}").headers["cache-control"]
        assert cached == "public, max-age=31536000, immutable"
    assert client.head("/web/style.css?v=outdated").headers["cache-control"] == "no-cache"


def test_known_etag_gets_304(client: httpx.Client) -> None:
    tag = client.get("/").headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"]
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "nothing.js",
        "index.html",
        "docs.html",
        "../app.py",
        "..%2Fapp.py",
        "vendor/",
        "",
        "style.css/",
        "vendor/niivue.LICENSE",
    ],
)
def test_other_path_gets_404(client: httpx.Client, path: str) -> None:
    assert client.get(f"/web/{path}").status_code == 404


def test_policy_forbids_inline_code(client: httpx.Client) -> None:
    response = client.get("/")
    rules = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules["script-src"], rules["style-src"], rules["connect-src"]} == {"'self'"}
    assert "unsafe" not in response.headers["content-security-policy"]
    assert not re.search(r"<style|<script(?![^>]* src=)| style=| on\w+=", response.text)


def test_damaged_installation_is_refused(tmp_path: Path) -> None:
    licences = [f"vendor/{file.stem}" for file in (WEB / "vendor").glob("*.LICENSE")]
    for path, sha256 in page.PINNED.items():
        assert hashlib.sha256((WEB / path).read_bytes()).hexdigest() == sha256
        assert any(path.startswith(licence) for licence in licences)
    folder = Path(shutil.copytree(WEB, tmp_path / "web"))
    with (folder / "vendor" / "niivue.umd.js").open("a") as file:
        file.write("//")
    with pytest.raises(Misconfigured) as changed:
        page.read(folder)
    assert changed.value.fields["value"] == "vendor/niivue.umd.js"
    (folder / "main.js").unlink()
    with pytest.raises(Misconfigured) as missing:
        page.read(folder)
    assert missing.value.fields["value"] == "main.js"


def test_page_needs_no_key(tmp_path: Path) -> None:
    """The key is entered on the page, and kept until the tab is closed."""
    (tmp_path / "keys").write_text(auth.make("page")[1])
    with full_server(auth={"keys_file": tmp_path / "keys"}) as opened:
        assert {opened.client.get(path).status_code for path in page.paths()} == {200}
        assert opened.client.get("/web/nothing.js").status_code == 401
    scripts = "".join((WEB / f"{name}.js").read_text() for name in page.MODULES)
    assert "sessionStorage" in scripts
    assert "localStorage" not in scripts
    assert "innerHTML" not in scripts


def test_third_party_files_are_credited() -> None:
    notice = (WEB.parents[1] / "NOTICE").read_text()
    assert all(Path(name).name in notice for name in page.FILES if name.startswith(("samples/", "vendor/")))
