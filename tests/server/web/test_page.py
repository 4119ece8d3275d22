"""The page with images, in a real browser on the shipped network."""

import io
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from server.api import auth
from tests.server.web.conftest import SAMPLES, holds, open_page
from tests.support.files import mask_of, pages_bytes, picture_bytes
from tests.support.server import full_server, until

CELLS = SAMPLES / "cells.png"
LEVELS = ["L1", "L2", "L3", "L4", "accurate"]

DROP = """(files) => {
  const transfer = new DataTransfer();
  for (const [name, bytes] of files) transfer.items.add(new File([new Uint8Array(bytes)], name));
  document.getElementById("view").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


def settled(page: Any, level: str) -> str:
    """The status once a level's answer is shown, and compared with accurate."""
    holds(page, f"document.getElementById('status').textContent.startsWith('{level} in ')")
    if level != "accurate":
        holds(page, "/agreement with accurate (1|0\\.\\d+)/.test(document.getElementById('status').textContent)")
    return str(page.locator("#status").text_content())


def choose(page: Any, *files: Path | tuple[str, bytes]) -> None:
    """Opens a file, and perhaps a reference of it."""
    named = [{"name": f[0], "mimeType": "", "buffer": f[1]} if isinstance(f, tuple) else str(f) for f in files]
    page.set_input_files("#chooser", named[0])
    if named[1:]:
        page.wait_for_selector("#reference:enabled")
        page.set_input_files("#reference-chooser", named[1])


def slide(page: Any, level: str) -> None:
    page.locator("#slider").fill(str(LEVELS.index(level)))


def asked(seen: SimpleNamespace) -> list[str]:
    """The level of each request to segment, in turn."""
    found = []
    for request in seen.requests:
        if "/segment?" in request.url:
            match = re.search(r"level=(\d)", request.url)
            found.append(f"L{match[1]}" if match else "accurate")
    return found


def masks(server: httpx.Client, path: Path, **more: str) -> dict[str, np.ndarray]:
    """The mask of every level, from the server."""
    queries = {"accurate": {"mode": "accurate"}, **{f"L{level}": {"level": str(level)} for level in range(1, 5)}}
    content = path.read_bytes()
    return {
        name: mask_of(server.post("/segment", params={**query, "format": "png", **more}, content=content).content)
        for name, query in queries.items()
    }


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def shown(value: float) -> str:
    return "1" if value == 1 else f"{min(value, 0.999):.3f}"


def no_sideways(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the sample, which is quick at every level."""
    path = tmp_path_factory.mktemp("page") / "cells.png"
    Pillow.open(CELLS).crop((40, 60, 200, 188)).save(path)
    return path


class TestImages:
    def test_a_sample_is_segmented(self, page: Any, server: httpx.Client) -> None:
        assert page.locator("#card").get_attribute("open") is not None
        page.get_by_role("button", name="Cells").click()
        # The manifest's own level.
        said = settled(page, "L3")
        known = masks(server, CELLS)
        assert f"agreement with accurate {shown(iou(known['L3'] > 0, known['accurate'] > 0))}" in said
        assert page.locator("#headline").inner_text().count("agreement") == 1
        assert page.locator("#phases li").count() >= 5
        assert f"{(known['L3'] > 0).sum():,}" in page.locator("#classes").inner_text()
        # Orange over grey, and nothing where the class is hidden.
        colored = "() => { const c = document.getElementById('picture'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0; for (let i = 0; i < d.length; i += 4) n += d[i] > d[i + 2] + 40; return n; }"
        assert page.evaluate(colored) > 10_000
        page.locator("#classes input").first.uncheck()
        holds(page, f"({colored})() === 0")

    def test_every_level_is_asked_for_once(self, page: Any, cells: Path, seen: SimpleNamespace, server: httpx.Client) -> None:
        choose(page, cells)
        settled(page, "L3")
        page.locator("#slider").focus()
        for key, level in (("ArrowLeft", "L2"), ("Home", "L1"), ("End", "accurate"), ("ArrowLeft", "L4"), ("Home", "L1")):
            page.keyboard.press(key)
            settled(page, level)
            assert page.locator("#slider").get_attribute("aria-valuetext") == level
        assert sorted(asked(seen)) == ["L1", "L2", "L3", "L4", "accurate"]
        known = masks(server, cells)
        for index, level in enumerate(LEVELS[:-1]):
            tick = page.locator("#ticks li").nth(index)
            assert shown(iou(known[level] > 0, known["accurate"] > 0)) in tick.inner_text()
            assert re.search(r"\d m?s\b", tick.inner_text())

    def test_outdated_answers_never_win(self, page: Any, cells: Path) -> None:
        """What is asked first may come last; and it is not waited for."""
        held: list[Any] = []
        page.route(re.compile(r"/segment\?.*level=1"), lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks its handlers
        choose(page, cells)
        settled(page, "L3")
        slide(page, "L1")
        page.wait_for_timeout(0)
        slide(page, "L2")
        said = settled(page, "L2")
        assert len(held) == 1
        # The request is given up, so this reaches nobody, or is not looked at.
        with_answer = {"status": 200, "body": b"late", "headers": {"content-type": "application/zip"}}
        held[0].fulfill(**with_answer)
        page.wait_for_timeout(200)
        assert page.locator("#status").text_content() == said
        assert not page.locator("#error").is_visible()

    def test_an_input_is_not_lost_when_the_slider_moves(self, page: Any, cells: Path) -> None:
        """While the server still draws a TIFF for the browser."""
        held: list[Any] = []
        page.route(re.compile("format=picture"), lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks its handlers
        choose(page, cells)
        settled(page, "L3")
        choose(page, ("cells.tif", picture_bytes(Pillow.open(cells).convert("L"), "TIFF")))
        until(lambda: bool(page.evaluate("1") and held))
        slide(page, "L1")
        page.get_by_role("button", name="Compare all levels").click()
        held[0].continue_()
        settled(page, "L1")
        assert page.locator("#file").text_content() == "cells.tif"

    def test_compare(self, page: Any, cells: Path, server: httpx.Client) -> None:
        choose(page, cells)
        settled(page, "L3")
        page.get_by_role("button", name="Compare all levels").click()
        holds(page, "document.querySelectorAll('#compare figcaption .bar').length === 9")
        known = masks(server, cells)
        for level, figure in zip(LEVELS, page.locator("#compare figure").all(), strict=True):
            text = figure.inner_text()
            assert level in text
            assert re.search(r"\d m?s\b", text)
            if level != "accurate":
                assert f"agreement {shown(iou(known[level] > 0, known['accurate'] > 0))}" in text
        assert page.get_by_role("button", name="Compare all levels").get_attribute("aria-pressed") == "true"
        # One of them alone again.
        page.get_by_role("button", name="show L1").click()
        settled(page, "L1")
        assert page.locator("#picture").is_visible()
        assert page.locator("#compare").is_hidden()

    @pytest.mark.parametrize("dropped", [False, True])
    def test_a_reference(self, page: Any, server: httpx.Client, tmp_path: Path, dropped: bool) -> None:
        reference = tmp_path / "reference.png"
        reference.write_bytes(server.post("/segment", params={"level": "1"}, content=CELLS.read_bytes()).content)
        if dropped:
            page.evaluate(DROP, [[path.name, list(path.read_bytes())] for path in (CELLS, reference)])
        else:
            choose(page, CELLS)
            settled(page, "L3")
            page.set_input_files("#reference-chooser", str(reference))
        holds(page, "document.getElementById('status').textContent.includes('IoU with the reference')")
        files = {"file": CELLS.read_bytes(), "reference": reference.read_bytes()}
        answer = server.post("/segment", params={"level": "3"}, files=files)
        assert f"IoU with the reference {shown(float(answer.headers['x-segment-iou']))}" in settled(page, "L3")
        assert f"{shown(float(answer.headers['x-segment-dice']))}" in page.locator("#headline").inner_text()
        assert reference.name in str(page.locator("#file").text_content())

    def test_differences(self, page: Any, cells: Path) -> None:
        choose(page, cells)
        settled(page, "L3")
        slide(page, "L1")
        settled(page, "L1")
        page.get_by_label("differences").check()
        assert page.get_by_text("only in this mask").is_visible()
        slide(page, "accurate")
        settled(page, "accurate")
        assert page.get_by_text("only in this mask").is_hidden()

    def test_zoom_and_pan(self, page: Any, cells: Path) -> None:
        choose(page, cells)
        settled(page, "L3")
        canvas = page.locator("#picture")
        # A ring around it from here on.
        canvas.focus()
        canvas.press("0")
        canvas.hover()
        drawn(page)
        at = str(page.locator("#readout").text_content())
        before = canvas.screenshot()
        page.mouse.wheel(0, -600)
        until(lambda: canvas.screenshot() != before)
        drawn(page)
        zoomed = canvas.screenshot()
        # What lies under the pointer stays there.
        page.mouse.move(*middle(canvas, 1))
        canvas.hover()
        assert str(page.locator("#readout").text_content()) == at
        page.keyboard.press("ArrowLeft")
        drawn(page)
        assert canvas.screenshot() != zoomed
        page.keyboard.press("0")
        drawn(page)
        page.mouse.move(*middle(canvas, 1))
        canvas.hover()
        assert canvas.screenshot() == before

    def test_errors_are_in_the_servers_words(self, page: Any, cells: Path, server: httpx.Client, tmp_path: Path) -> None:
        broken = cells.read_bytes()[:2000]
        choose(page, ("broken.png", broken))
        detail = server.post("/segment", files={"file": ("broken.png", broken)}).json()["detail"]
        holds(page, "!document.getElementById('error').hidden")
        assert page.get_by_role("alert").locator("span").text_content() == detail
        # And the next one is none the worse for it.
        choose(page, cells)
        settled(page, "L3")
        assert page.get_by_role("alert").is_hidden()
        other = tmp_path / "other.png"
        other.write_bytes(picture_bytes(np.zeros((256, 320), dtype=np.uint8)))
        choose(page, cells, other)
        holds(page, "!document.getElementById('error').hidden")
        assert "the reference is 320 × 256 pixels" in str(page.get_by_role("alert").text_content())

    def test_trying_again(self, page: Any, cells: Path) -> None:
        page.route(re.compile("/segment"), lambda route: route.abort())
        choose(page, cells)
        holds(page, "!document.getElementById('error').hidden")
        assert "does not answer" in str(page.get_by_role("alert").text_content())
        page.unroute(re.compile("/segment"))
        page.get_by_role("button", name="Try again").click()
        settled(page, "L3")

    def test_what_browsers_do_not_read(self, page: Any, cells: Path, seen: SimpleNamespace) -> None:
        """A TIFF of 16 bits: the server draws it. A stack: it draws its pages, too."""
        pixels = np.asarray(Pillow.open(cells).convert("L")).astype(np.uint16) * 8
        choose(page, ("cells.tif", picture_bytes(pixels, "TIFF")))
        settled(page, "L3")
        assert (
            page.evaluate(
                "(() => { const c = document.getElementById('picture'); return c.getContext('2d').getImageData(c.width / 2, c.height / 2, 1, 1).data[3]; })()"
            )
            == 255
        )
        choose(page, ("cells.png", picture_bytes(pixels)))
        settled(page, "L3")
        choose(page, ("stack.tif", pages_bytes(np.stack([pixels[:128, :128]] * 3))))
        holds(page, "document.getElementById('file').textContent === 'stack.tif'")
        holds(page, "document.getElementById('status').textContent.startsWith('L3 in ')")
        assert "agreement" not in page.locator("#headline").inner_text()
        # It may take longer than a connection lasts.
        assert any("/jobs?" in request.url for request in seen.requests)
        assert "/jobs?" in str(page.locator("#curl").text_content())
        # Pages that are channels are an image, which is looked at again.
        page.locator("#options summary").click()
        page.get_by_label("axes of the TIFF").fill("CYX")
        page.get_by_label("axes of the TIFF").blur()
        settled(page, "L3")
        assert page.get_by_label("axes of the TIFF").input_value() == "CYX"
        assert page.get_by_label("smallest object").is_visible()
        choose(page, cells)
        settled(page, "L3")
        assert page.locator("#chosen").text_content() == ""

    def test_flat_files_of_volume_formats(self, page: Any, cells: Path, tmp_path: Path) -> None:
        sitk = pytest.importorskip("SimpleITK")
        image = sitk.GetImageFromArray(np.asarray(Pillow.open(cells).convert("L")))
        for name in ("flat.mha", "flat.nrrd"):
            sitk.WriteImage(image, str(tmp_path / name))
            choose(page, tmp_path / name)
            holds(page, f"document.getElementById('file').textContent === '{name}'")
            settled(page, "L3")
            assert page.locator("#picture").is_visible()

    def test_archives_are_for_others(self, page: Any, cells: Path) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            archive.write(cells, "cells.png")
        choose(page, ("cells.zip", packed.getvalue()))
        holds(page, "!document.getElementById('error').hidden")
        assert "This is a zip archive" in str(page.get_by_role("alert").text_content())

    def test_options_go_with_every_request(self, page: Any, cells: Path, seen: SimpleNamespace, server: httpx.Client) -> None:
        choose(page, cells)
        settled(page, "L3")
        page.locator("#options summary").click()
        page.get_by_label("threshold").fill("0.8")
        page.get_by_label("smallest object").fill("200")
        page.get_by_label("smallest object").blur()
        settled(page, "L3")
        holds(page, "document.querySelector('#chosen').textContent.includes('2')")
        answer = server.post(
            "/segment",
            params={"level": "3", "threshold": "0.8", "min_size_px": "200", "format": "json"},
            content=cells.read_bytes(),
        ).json()
        pixels = f"{answer['classes'][0]['pixels']:,}"
        holds(page, f"document.getElementById('classes').textContent.includes('{pixels}')")
        assert all(part in str(page.locator("#curl").text_content()) for part in ("threshold=0.8", "min_size_px=200"))

    def test_touching_objects_are_told_apart(self, page: Any, cells: Path, server: httpx.Client) -> None:
        choose(page, cells)
        settled(page, "L3")
        page.locator("#options summary").click()
        page.get_by_label("split touching objects").check()
        answer = server.post(
            "/segment", params={"level": "3", "instances": "true", "format": "json"}, content=cells.read_bytes()
        ).json()
        objects = answer["classes"][0]["objects"]
        holds(page, f"document.getElementById('status').textContent.includes(': {objects} nucleus')")
        assert objects > 4
        until(lambda: hues(page) == objects)
        page.get_by_label("split touching objects").uncheck()
        holds(page, "document.getElementById('busy').hidden && !document.getElementById('curl').textContent.includes('instances')")
        until(lambda: hues(page) == 1)

    def test_downloads(self, page: Any, cells: Path, server: httpx.Client) -> None:
        choose(page, cells)
        settled(page, "L3")
        page.locator("#download summary").click()
        with page.expect_download() as one:
            page.get_by_role("button", name="Download").click()
        assert one.value.suggested_filename == "cells_mask.png"
        content = cells.read_bytes()
        assert Path(one.value.path()).read_bytes() == server.post("/segment", params={"level": "3"}, content=content).content
        page.get_by_label("statistics, JSON").check()
        page.get_by_label("objects, CSV").check()
        assert page.get_by_label("uncertainty, PNG").is_disabled()
        with page.expect_download() as several:
            page.get_by_role("button", name="Download").click()
        with zipfile.ZipFile(Path(several.value.path())) as archive:
            assert archive.namelist() == ["mask.png", "objects.csv", "statistics.json"]
            assert json.loads(archive.read("statistics.json"))["level"] == 3

    def test_the_command_does_the_same(self, page: Any, cells: Path, server: httpx.Client, tmp_path: Path) -> None:
        import subprocess

        (tmp_path / 'it\'s; a 1,5 "cell".png').write_bytes(cells.read_bytes())
        choose(page, tmp_path / 'it\'s; a 1,5 "cell".png')
        settled(page, "L3")
        page.locator("#request summary").click()
        command = page.locator("#curl").inner_text()
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
        known = server.post("/segment", params={"level": "3"}, content=cells.read_bytes()).content
        assert (tmp_path / "mask.png").read_bytes() == known


def drawn(page: Any) -> None:
    """Waits until what was asked for is on the canvas."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def hues(page: Any) -> int:
    """How many of 36 hues the picture has; the input is grey."""
    shown = np.asarray(Pillow.open(io.BytesIO(page.locator("#picture").screenshot())).convert("HSV"))
    strong = shown[(shown[..., 1] > 120) & (shown[..., 2] > 80), 0]
    return int((np.bincount(strong.astype(int) * 36 // 256, minlength=36) > 5).sum())


def middle(locator: Any, off: float = 0) -> tuple[float, float]:
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2 + off, box["y"] + box["height"] / 2 + off


class TestPeople:
    def test_by_keyboard_alone(self, page: Any) -> None:
        """From the top, and it is seen where one is."""
        visible = "() => getComputedStyle(document.activeElement).outlineStyle !== 'none' && document.activeElement.matches(':focus-visible')"

        def tab_to(condition: str) -> None:
            for _ in range(40):
                page.keyboard.press("Tab")
                if page.evaluate(f"() => {condition}"):
                    assert page.evaluate(visible)
                    return
            pytest.fail(f"not reached: {condition}")

        tab_to("document.activeElement.textContent.includes('Cells')")
        page.keyboard.press("Enter")
        settled(page, "L3")
        tab_to("document.activeElement.id === 'slider'")
        page.keyboard.press("ArrowLeft")
        settled(page, "L2")
        tab_to("document.activeElement.id === 'all'")
        page.keyboard.press("Space")
        holds(page, "document.querySelectorAll('#compare figure').length === 5")
        tab_to("document.activeElement.textContent === 'Options '")
        page.keyboard.press("Enter")
        tab_to("document.activeElement.name === 'threshold'")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_phone(self, browser: Any, server: httpx.Client, seen: SimpleNamespace, scheme: str) -> None:
        size = {"width": 360, "height": 740}
        page = open_page(
            browser, str(server.base_url), seen, viewport=size, color_scheme=scheme, reduced_motion="reduce", has_touch=True
        )
        page.locator("#ticks li").last.wait_for()
        assert no_sideways(page)
        page.get_by_role("button", name="Cells").click()
        settled(page, "L3")
        for part in ("#card", "#options", "#download", "#request"):
            if page.locator(part).get_attribute("open") is None:
                page.locator(f"{part} summary").click()
        assert no_sideways(page)
        page.get_by_role("button", name="Compare all levels").click()
        holds(page, "document.querySelectorAll('#compare figcaption .bar').length === 9")
        assert no_sideways(page)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(20, 23, 23)") == (scheme == "dark")
        assert page.evaluate("getComputedStyle(document.querySelector('#network circle')).transitionDuration") == "0s"
        page.context.close()

    def test_controls_have_names(self, page: Any) -> None:
        page.get_by_role("button", name="Cells").click()
        settled(page, "L3")
        nameless = page.evaluate("""() => [...document.querySelectorAll('button, input:not([type=file]), select, canvas[tabindex]')].filter((one) => one.checkVisibility()
            && !(one.ariaLabel || one.labels?.length || one.textContent.trim())).map((one) => one.outerHTML)""")
        assert nameless == []
        assert page.locator("#status").get_attribute("aria-live") == "polite"


def test_asks_for_a_key(browser: Any, seen: SimpleNamespace, tmp_path: Path) -> None:
    key, line = auth.make("page")
    (tmp_path / "keys").write_text(line)
    with full_server(auth={"keys_file": tmp_path / "keys"}) as opened:
        page = open_page(browser, str(opened.client.base_url), seen)
        detail = opened.client.get("/models").json()["detail"]
        holds(page, "!document.getElementById('error').hidden")
        assert page.get_by_role("alert").locator("span").text_content() == detail
        page.get_by_label("This server needs an API key").fill("wrong")
        page.keyboard.press("Enter")
        holds(page, "document.getElementById('error').textContent.includes('not known')")
        page.get_by_label("This server needs an API key").fill(key)
        page.keyboard.press("Enter")
        page.locator("#ticks li").last.wait_for()
        assert page.locator("#door").is_hidden()
        page.get_by_role("button", name="Cells").click()
        holds(page, "/agreement with accurate 1/.test(document.getElementById('status').textContent)")
        command = str(page.locator("#curl").text_content())
        assert '-H "X-API-Key: $KEY"' in command
        assert key not in page.content()
        assert all(key not in request.url for request in seen.requests)
        # Another tab has to enter it again.
        other = page.context.new_page()
        other.goto(str(opened.client.base_url))
        holds(other, "!document.getElementById('door').hidden")
        page.context.close()
