"""A real browser on a real server."""

import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT
from tests.support.server import serving, until
from tests.support.service import NO_SHADOW

WEB = ROOT / "server" / "web"
SAMPLES = WEB / "samples"

# As distributions and Google call it.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Of a browser in a container without a GPU: WebGL in software, and nothing asked of its maker.
CHROMIUM = (
    "--no-sandbox", "--headless=new", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

# What the browser says of answers that are errors, which tests look at themselves, and of tests that look at pixels.
NOT_OURS = (
    "Failed to load resource: the server responded with a status of 4",
    "Failed to load resource: net::ERR_FAILED",
    "Canvas2D: ",
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server on both shipped bundles, at fp32; how fast they are here is not measured, which takes longest."""
    from server.app import create_app, open_bundles
    from server.runtime import opening
    from server.settings import BatchingSettings, JobsSettings, QualitySettings, RuntimeSettings, Settings

    settings = Settings(
        bundles=ROOT / "bundles",
        runtime=RuntimeSettings(precision="fp32", engine="onnxruntime"),
        batching=BatchingSettings(max_batch=1),
        jobs=JobsSettings(folder=tmp_path_factory.mktemp("jobs")),
        quality=QualitySettings(**NO_SHADOW),
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(opening, "_timed", lambda engine, tiles: 0.01)
        bundles = open_bundles(settings)
    with serving(create_app(settings, bundles)) as client:
        yield client


def holds(page: Any, script: str) -> None:
    """Waits until an expression of JavaScript is true. Playwright's own way would be against the page's policy."""
    until(lambda: page.evaluate(script))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. No longer than a module: while it is open, this thread has an event loop."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not (path := next(filter(None, map(shutil.which, BROWSERS)), None)):
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=list(CHROMIUM))
        yield browser
        browser.close()


def open_page(browser: Any, url: str, seen: SimpleNamespace, first: str = "", **options: Any) -> Any:
    """A page of its own context, of which `seen` hears what it says and asks for; `first` runs before its own scripts."""
    page = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options)).new_page()
    page.set_default_timeout(30_000)

    def said(message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(NOT_OURS):
            seen.errors.append(message.text)

    def asked(request: Any) -> None:
        seen.requests.append(request)
        if not request.url.startswith((url, "blob:", "data:")):
            seen.foreign.append(request.url)

    page.on("console", said)
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("request", asked)
    page.add_init_script(first)
    page.goto(url)
    return page


@pytest.fixture
def seen() -> Iterator[SimpleNamespace]:
    """What a page says and asks for; nothing may go wrong, be forbidden by its policy, or be loaded from elsewhere."""
    seen = SimpleNamespace(errors=[], foreign=[], requests=[])
    yield seen
    assert seen.errors == []
    assert seen.foreign == []


@pytest.fixture
def page(browser: Any, server: httpx.Client, seen: SimpleNamespace) -> Iterator[Any]:
    """The page, as somebody finds it who comes for the first time, with its models loaded."""
    page = open_page(browser, str(server.base_url), seen)
    page.locator("#ticks li").last.wait_for()
    yield page
    page.context.close()
