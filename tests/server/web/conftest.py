"""A real browser on a real server."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image as Pillow

from tests.conftest import ROOT
from tests.support.server import serving, until
from tests.support.service import quiet_settings

WEB = ROOT / "server" / "web"
SAMPLES = WEB / "samples"

# WebGL in software, for a container without a GPU.
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--headless=new",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
]

# Console messages about error responses and blocked requests, which tests check themselves, and about reading
# pixels.
EXPECTED_MESSAGES = (
    "Failed to load resource: the server responded with a status of 4",
    "Failed to load resource: net::ERR_FAILED",
    "Canvas2D: ",
)

DROP = """(files) => {
  const transfer = new DataTransfer();
  for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


@pytest.fixture(scope="session")
def server() -> Iterator[httpx.Client]:
    """A client of a server with both bundles of the repository, at fp32 so that its answers are reproducible."""
    from server.app import create_app

    settings = quiet_settings(
        bundles=ROOT / "bundles", runtime={"precision": "fp32", "engine": "onnxruntime"}
    )
    with serving(create_app(settings)) as client:
        yield client


class Ui:
    """The page in a browser, with what it requests and reports."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.requests: list[Any] = []
        self.errors: list[str] = []
        page.set_default_timeout(30_000)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED_MESSAGES):
            self.errors.append(message.text)

    def _on_request(self, request: Any) -> None:
        self.requests.append(request)
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.errors.append(f"loaded from another origin: {request.url}")

    def load(self) -> "Ui":
        """Loads the page, and waits for its models."""
        self.page.goto(self.url)
        self.page.locator("#ticks li").last.wait_for()
        return self

    def wait(self, script: str) -> None:
        """Waits in the page until an expression is true; wait_for_function needs eval, which the page's policy forbids."""
        failure = json.dumps(f"never true: {script}")
        self.page.evaluate(
            f"""new Promise((resolve, reject) => {{
              const poll = setInterval(() => {{ if ({script}) resolve(clearInterval(poll)); }}, 10);
              setTimeout(() => reject(new Error({failure})), 60000);
            }})"""
        )

    def wait_for_text(self, element: str, pattern: str) -> str:
        """Waits until the text of an element, by id, matches a regular expression."""
        self.wait(f"new RegExp({json.dumps(pattern)}).test(document.getElementById('{element}').textContent)")
        return self.text(element)

    def wait_for_error(self) -> str:
        """Waits for an error message."""
        self.wait("!document.getElementById('error').hidden")
        return str(self.page.locator("#error span").text_content())

    def text(self, element: str) -> str:
        """The text of an element by id, hidden or not."""
        return str(self.page.locator(f"#{element}").text_content())

    def open(self, *files: Path | tuple[str, bytes]) -> None:
        """Opens a file, and a reference if there are two."""
        self.page.evaluate("document.getElementById('status').textContent = ''")
        for chooser, file in zip(("chooser", "reference-chooser"), files, strict=False):
            payload = (
                {"name": file[0], "mimeType": "", "buffer": file[1]} if isinstance(file, tuple) else file
            )
            if chooser != "chooser":
                self.page.wait_for_selector("#reference:enabled")
            self.page.set_input_files(f"#{chooser}", payload)

    def drop(self, *files: Path) -> None:
        """Drops files onto the page."""
        self.page.evaluate(DROP, [[file.name, list(file.read_bytes())] for file in files])

    def select(self, position: int) -> None:
        """Moves the slider."""
        self.page.locator("#slider").fill(str(position))

    def settle(self, level: str, *, agreement: bool = True) -> str:
        """Waits until the answer of a level is shown; gives the status line. Only images are compared with accurate."""
        compared = ".*agreement with accurate" if agreement and level != "accurate" else ""
        return self.wait_for_text("status", rf"^{level} in (?!.*preview){compared}")

    def compare(self, bars: int) -> list[str]:
        """Compares all levels, and waits for the bars of all figures; gives the captions."""
        self.page.get_by_role("button", name="Compare all levels").click()
        self.wait(f"document.querySelectorAll('#compare figcaption .bar').length === {bars}")
        return list(self.page.locator("#compare figure").all_inner_texts())

    def expand(self, *sections: str) -> None:
        """Opens collapsed sections."""
        for section in sections:
            self.page.evaluate("(id) => { document.getElementById(id).open = true; }", section)

    def hold(self, pattern: str) -> list[Any]:
        """Keeps requests back; gives their routes."""
        held: list[Any] = []
        self.page.route(re.compile(pattern), lambda route: held.append(route))  # noqa: PLW0108 - it gets attributes
        return held

    def wait_for(self, items: list[Any]) -> None:
        """Waits until a list is filled by an event of the browser."""
        until(lambda: bool(self.page.evaluate("true") and items))

    def urls(self, method: str) -> list[str]:
        """The URLs requested with a method."""
        self.page.evaluate("true")
        return [request.url for request in self.requests if request.method == method]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium; closed after a module because Playwright occupies the thread's event loop."""
    playwright = pytest.importorskip("playwright.sync_api")
    paths = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    if not (path := next(paths, None)):
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: Any, server: httpx.Client) -> Iterator[Ui]:
    """A tab that the tests of a module share; small, because WebGL in software is slow."""
    context = browser.new_context(viewport={"width": 1000, "height": 640})
    yield Ui(context.new_page(), str(server.base_url))
    context.close()


@pytest.fixture
def ui(tab: Ui) -> Iterator[Ui]:
    """The page newly loaded; nothing may be reported, forbidden by its policy, or loaded from another origin."""
    tab.requests.clear()
    tab.errors.clear()
    yield tab.load()
    tab.page.unroute_all()
    assert tab.errors == []


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the sample of cells, which is fast at every level."""
    path = tmp_path_factory.mktemp("page") / "cells.png"
    Pillow.open(SAMPLES / "cells.png").crop((40, 60, 168, 156)).save(path)
    return path


@pytest.fixture
def on_cells(ui: Ui, cells: Path) -> Ui:
    """The page with `cells` segmented at the recommended level."""
    ui.open(cells)
    ui.settle("L3")
    return ui
