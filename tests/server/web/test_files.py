"""The page's files: what is served, to whom, and how long it may be kept."""

import gzip
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.api import auth
from server.api.routes import page
from server.errors import Misconfigured
from tests.server.web.conftest import WEB
from tests.support.server import full_server

KEY, LINE = auth.make("page")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with full_server() as opened:
        yield opened.client


def files() -> list[str]:
    return sorted(path.relative_to(WEB).as_posix() for path in WEB.rglob("*") if path.is_file())


def test_every_file_is_in_the_table() -> None:
    """But texts of licences, which are for readers of the repository and of the wheel."""
    assert sorted(page.FILES) == [name for name in files() if not name.endswith(".LICENSE")]


def test_everything_fits_a_first_visit() -> None:
    """Without the viewer of volumes, which comes with the first volume."""
    first = [asset for path, asset in page.read(WEB).items() if not path.startswith(("vendor/", "samples/"))]
    assert sum(len(asset.gzipped or asset.body) for asset in first) < 64 * 1024
    assert sum(len(asset.body) for path, asset in page.read(WEB).items() if path.startswith("samples/")) < 400_000


@pytest.mark.parametrize("path", sorted(page.paths()))
def test_is_served(client: httpx.Client, path: str) -> None:
    asset = page.read(WEB)[path.removeprefix("/web/") if path != "/" else page.INDEX]
    answer = client.get(path, headers={"Accept-Encoding": "identity"})
    assert answer.status_code == 200
    assert answer.content == asset.body
    assert answer.headers["content-type"] == asset.media_type
    assert "content-encoding" not in answer.headers
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert client.head(path).headers["etag"] == answer.headers["etag"]
    smaller = client.get(path)
    assert smaller.content == asset.body
    if asset.media_type.startswith("text/"):
        assert smaller.headers["content-encoding"] == "gzip"
        assert gzip.decompress(asset.gzipped or b"") == asset.body


def test_what_is_named_with_its_version_may_be_kept_for_ever(client: httpx.Client) -> None:
    """Every file but the page itself is named so, also by the others."""
    named: set[str] = set()
    for path, asset in page.read(WEB).items():
        if asset.media_type in page.TEXTS and path not in page.PINNED:
            found = re.findall(r'"(?:/web/|\./)([\w./-]+)\?v=(\w+)"', asset.body.decode())
            named |= {name for name, _ in found}
            assert not re.search(r'from "\./\w+\.js"', asset.body.decode())
            for name, version in found:
                answer = client.get(f"/web/{name}?v={version}")
                assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert named == set(page.FILES) - {page.INDEX}
    assert client.get("/web/style.css?v=of-yesterday").headers["cache-control"] == "no-cache"


def test_is_not_sent_twice(client: httpx.Client) -> None:
    tag = client.get("/").headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"]
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


@pytest.mark.parametrize(
    "path", ["nothing.js", "index.html", "../app.py", "..%2Fapp.py", "vendor/", "", "style.css/", "vendor/niivue.LICENSE"]
)
def test_nothing_else_is(client: httpx.Client, path: str) -> None:
    assert client.get(f"/web/{path}").status_code == 404


def test_nothing_inline_may_run(client: httpx.Client) -> None:
    answer = client.get("/")
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'none'"
    assert {rules["script-src"], rules["style-src"], rules["connect-src"]} == {"'self'"}
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r"<style|<script(?![^>]* src=)| style=| on\w+=", answer.text)


def test_what_others_wrote_is_what_was_chosen(tmp_path: Path) -> None:
    for path, known in page.PINNED.items():
        assert hashlib.sha256((WEB / path).read_bytes()).hexdigest() == known
        assert (WEB / path).with_name(f"{Path(path).name.split('.')[0]}.LICENSE").is_file()
    folder = Path(shutil.copytree(WEB, tmp_path / "web"))
    with (folder / "vendor" / "niivue.umd.js").open("a") as file:
        file.write("//")
    with pytest.raises(Misconfigured, match="vendor/niivue"):
        page.read(folder)
    (folder / "main.js").unlink()
    with pytest.raises(Misconfigured, match="install"):
        page.read(folder)


def test_needs_no_key(tmp_path: Path) -> None:
    """Who has one enters it here; it is sent with requests alone, and forgotten with the tab."""
    (tmp_path / "keys").write_text(LINE)
    with full_server(auth={"keys_file": tmp_path / "keys"}) as opened:
        assert {opened.client.get(path).status_code for path in page.paths()} == {200}
        assert opened.client.get("/web/nothing.js").status_code == 401
        assert 'type="password"' in opened.client.get("/").text
    scripts = "".join((WEB / name).read_text() for name in page.FILES if name.endswith(".js") and name not in page.PINNED)
    assert "sessionStorage" in scripts
    assert "localStorage" not in scripts
    assert "innerHTML" not in scripts


@pytest.mark.parametrize("name", page.MODULES)
def test_modules_are_whole_and_short(name: str) -> None:
    path = WEB / f"{name}.js"
    assert len(path.read_text().splitlines()) <= 300
    if not (node := shutil.which("node")):
        pytest.skip("needs node")
    # As a module, whatever the version takes a .js for.
    checked = subprocess.run(
        [node, "--input-type=module", "--check"], input=path.read_text(), capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


def test_downloads_are_what_the_server_offers() -> None:
    from server.imaging.encode import ENCODERS

    text = (WEB / "formats.js").read_text()
    kinds = {"ALL": ("image", "stack", "volume"), "IMAGE": ("image",), "STACKS": ("image", "stack"), "VOLUME": ("volume",)}
    rows = re.findall(r'^  (\w+): \["[^"]+", (\w+), "([\w.]+)"(, true)?\]', text, re.MULTILINE)
    offered = {name: (kinds[kind], file, bool(accurate)) for name, kind, file, accurate in rows}
    assert offered == {name: (row.kinds, row.file, "head_std" in row.needs) for name, row in ENCODERS.items()}


def test_the_samples_are_credited() -> None:
    notice = (WEB.parents[1] / "NOTICE").read_text()
    for name in page.FILES:
        if name.startswith(("samples/", "vendor/")):
            assert Path(name).name in notice
