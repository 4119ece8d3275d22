"""The page with images, in a real browser on the nuclei network."""

import json
import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from server.api import auth
from server.api.routes.page import request_options
from tests.server.web.conftest import SAMPLES, Ui
from tests.support.files import mask_of, pages_bytes, picture_bytes
from tests.support.server import full_server, until

CELLS = SAMPLES / "cells.png"
LEVELS = ["L1", "L2", "L3", "L4", "auto", "accurate"]

COLORED_PIXELS = """(() => {
  const canvas = document.getElementById("picture");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4) count += data[at] > data[at + 2] + 40;
  return count;
})()"""

NAMELESS_CONTROLS = """[...document.querySelectorAll("button, input:not([type=file]), select, canvas[tabindex]")]
  .filter((one) => one.checkVisibility() && !(one.ariaLabel || one.labels?.length || one.textContent.trim()))
  .map((one) => one.outerHTML)"""


@pytest.fixture(scope="module")
def masks(server: httpx.Client, cells: Path) -> dict[str, np.ndarray]:
    """The server's mask of `cells` per level."""
    queries = {
        "accurate": {"mode": "accurate"},
        "auto": {"mode": "auto"},
        **{f"L{level}": {"level": str(level)} for level in range(1, 5)},
    }
    return {name: mask_of(post(server, cells, **query).content) for name, query in queries.items()}


def post(server: httpx.Client, path: Path, **query: str) -> httpx.Response:
    return server.post("/segment", params=query, content=path.read_bytes())


def agreement(masks: dict[str, np.ndarray], level: str) -> str:
    """The IoU with accurate as the page writes it."""
    a, b = masks[level] > 0, masks["accurate"] > 0
    return formatted(float((a & b).sum() / (a | b).sum()))


def formatted(overlap: float) -> str:
    return "1" if overlap == 1 else f"{min(overlap, 0.999):.3f}"


class TestAnswers:
    def test_sample_shows_mask_and_numbers(self, ui: Ui, server: httpx.Client) -> None:
        ui.page.get_by_role("button", name="Cells").click()
        status = ui.settle("L3")
        report = post(server, CELLS, level="3", format="json").json()["classes"][0]
        assert f": {report['objects']} nucleus" in status
        assert f"{report['pixels']:,}" in ui.text("classes")
        assert ui.text("headline").count("agreement") == 1
        phases = {phase.split()[0] for phase in ui.page.locator("#phases li").all_inner_texts()}
        assert {"decode", "infer", "encode"} <= phases
        assert ui.page.evaluate(COLORED_PIXELS) > 5_000
        ui.page.locator("#classes input").first.uncheck()
        ui.wait(f"{COLORED_PIXELS} === 0")

    def test_each_level_is_requested_once(self, on_cells: Ui, masks: dict[str, np.ndarray]) -> None:
        keys = (
            ("ArrowLeft", "L2"),
            ("Home", "L1"),
            ("End", "accurate"),
            ("ArrowLeft", "auto"),
            ("ArrowLeft", "L4"),
            ("Home", "L1"),
        )
        for key, level in keys:
            on_cells.page.locator("#slider").press(key)
            on_cells.settle(r"auto \(L\d\)" if level == "auto" else level)
            assert on_cells.page.locator("#slider").get_attribute("aria-valuetext") == level
        levels = [re.search(r"level=(\d)|mode=(auto|accurate)", url) for url in on_cells.urls("POST")]
        assert sorted(f"L{match[1]}" if match[1] else match[2] for match in levels if match) == sorted(LEVELS)
        for level, text in zip(
            LEVELS[:-1], on_cells.page.locator("#ticks li").all_inner_texts(), strict=False
        ):
            assert agreement(masks, level) in text
            assert re.search(r"\d m?s\b", text)

    def test_auto_shows_the_level_that_served_and_sends_max_loss_alone(
        self, on_cells: Ui, server: httpx.Client, cells: Path
    ) -> None:
        served = post(server, cells, mode="auto").headers["x-segment-level"]
        on_cells.select(4)
        on_cells.settle(rf"auto \(L{served}\)")
        assert f"L{served}" in on_cells.text("headline")
        assert on_cells.page.locator("#network").get_attribute("aria-label").startswith(f"Level {served} ")
        on_cells.expand("options")
        on_cells.page.locator("#option-max_loss").fill("100")
        on_cells.page.locator("#option-max_loss").press("Enter")
        on_cells.settle(r"auto \(L1\)")
        on_cells.select(1)
        on_cells.settle("L2")
        assert [("max_loss=100" in url, "mode=auto" in url) for url in on_cells.urls("POST")[-2:]] == [
            (True, True),
            (False, False),
        ]

    def test_late_response_is_ignored(self, on_cells: Ui) -> None:
        held = on_cells.hold(r"/segment\?.*level=1")
        on_cells.select(0)
        on_cells.wait_for(held)
        on_cells.select(1)
        status = on_cells.settle("L2")
        held[0].fulfill(status=200, body=b"late", headers={"content-type": "application/zip"})
        on_cells.page.wait_for_timeout(100)
        assert on_cells.text("status") == status
        assert on_cells.page.get_by_role("alert").is_hidden()

    def test_slider_moved_while_opening_keeps_the_input(self, on_cells: Ui, cells: Path) -> None:
        """The server is still drawing a TIFF for the browser."""
        held = on_cells.hold("format=picture")
        on_cells.open(("cells.tif", picture_bytes(Pillow.open(cells).convert("L"), "TIFF")))
        on_cells.wait_for(held)
        on_cells.select(0)
        on_cells.page.get_by_role("button", name="Compare all levels").click()
        held[0].continue_()
        on_cells.settle("L1")
        assert on_cells.text("file") == "cells.tif"

    def test_compare_shows_all_levels(self, on_cells: Ui, masks: dict[str, np.ndarray]) -> None:
        for level, text in zip(LEVELS, on_cells.compare(bars=11), strict=True):
            assert re.search(rf"{level}\s+[\d.]+ m?s\b", text)
            assert level == "accurate" or f"agreement {agreement(masks, level)}" in text
        button = on_cells.page.get_by_role("button", name="Compare all levels")
        assert button.get_attribute("aria-pressed") == "true"
        on_cells.page.get_by_role("button", name="show L1").click()
        on_cells.settle("L1")
        assert on_cells.page.locator("#picture").is_visible()
        assert on_cells.page.locator("#compare").is_hidden()

    def test_reference_is_scored(self, ui: Ui, server: httpx.Client, cells: Path, tmp_path: Path) -> None:
        reference = tmp_path / "reference.png"
        reference.write_bytes(post(server, cells, level="1").content)
        files = {"file": cells.read_bytes(), "reference": reference.read_bytes()}
        headers = server.post("/segment", params={"level": "3"}, files=files).headers
        iou, dice = (formatted(float(headers[f"x-segment-{name}"])) for name in ("iou", "dice"))
        for give in (ui.open, ui.drop):
            give(cells, reference)
            ui.wait_for_text("status", rf"^L3 in .*agreement.* IoU with the reference {iou}")
            assert dice in ui.text("headline")
            assert reference.name in ui.text("file")

    def test_differences_have_a_key(self, on_cells: Ui) -> None:
        on_cells.page.get_by_label("differences").check()
        assert on_cells.page.get_by_text("only in this mask").is_visible()
        on_cells.select(5)
        on_cells.settle("accurate")
        assert on_cells.page.get_by_text("only in this mask").is_hidden()


class TestErrors:
    def test_detail_of_the_server_is_shown(self, ui: Ui, cells: Path, server: httpx.Client) -> None:
        broken = cells.read_bytes()[:2000]
        ui.open(("broken.png", broken))
        assert (
            ui.wait_for_error()
            == server.post("/segment", files={"file": ("broken.png", broken)}).json()["detail"]
        )
        ui.open(cells)
        ui.settle("L3")
        assert ui.page.get_by_role("alert").is_hidden()
        ui.open(cells, ("other.png", picture_bytes(np.zeros((16, 16), dtype=np.uint8))))
        assert "16 × 16" in ui.wait_for_error()

    def test_zip_archive_is_refused(self, ui: Ui) -> None:
        ui.open(("cells.zip", b"PK\x03\x04"))
        assert "zip archive" in ui.wait_for_error()

    def test_lost_connection_can_be_retried(self, ui: Ui, cells: Path) -> None:
        ui.page.route(re.compile("/segment"), lambda route: route.abort())
        ui.open(cells)
        assert "does not answer" in ui.wait_for_error()
        ui.page.unroute(re.compile("/segment"))
        ui.page.get_by_role("button", name="Try again").click()
        ui.settle("L3")

    def test_key_is_asked_for(self, browser: Any, tmp_path: Path) -> None:
        key, line = auth.make("page")
        (tmp_path / "keys").write_text(line)
        with full_server(auth={"keys_file": tmp_path / "keys"}) as opened:
            context, url = browser.new_context(), str(opened.client.base_url)
            ui, other = Ui(context.new_page(), url), Ui(context.new_page(), url)
            ui.page.goto(url)
            assert ui.wait_for_error() == opened.client.get("/models").json()["detail"]
            for text in ("wrong", key):
                ui.page.get_by_label("This server needs an API key").fill(text)
                with ui.page.expect_response(re.compile("/models$")):
                    ui.page.keyboard.press("Enter")
            ui.page.locator("#ticks li").last.wait_for()
            assert ui.page.locator("#key-form").is_hidden()
            ui.page.get_by_role("button", name="Cells").click()
            ui.wait_for_text("status", "agreement with accurate 1")
            assert '-H "X-API-Key: $KEY"' in ui.text("curl")
            assert key not in ui.page.content()
            assert all(key not in request.url for request in ui.requests)
            # Another tab does not know it.
            other.page.goto(url)
            other.wait("!document.getElementById('key-form').hidden")
            context.close()
            assert ui.errors == other.errors == []


class TestInputs:
    def test_server_draws_what_the_browser_cannot(self, ui: Ui, cells: Path) -> None:
        """Images of 16 bits become a picture; of a stack the server draws the overlay."""
        pixels = np.asarray(Pillow.open(cells).convert("L")).astype(np.uint16) * 8
        for name, kind in (("deep.tif", "TIFF"), ("deep.png", "PNG")):
            ui.open((name, picture_bytes(pixels, kind)))
            ui.settle("L3")
            ui.wait(f"{COLORED_PIXELS} > 500")
        ui.open(("stack.tif", pages_bytes(np.stack([pixels[:64, :64]] * 3))))
        ui.settle("L3", agreement=False)
        assert "agreement" not in ui.text("headline")
        assert any("/jobs?" in url for url in ui.urls("POST"))
        assert "/jobs?" in ui.text("curl")
        # With pages as channels it is an image, which the server has to draw again.
        ui.expand("options")
        axes = ui.page.get_by_label("axes")
        axes.fill("CYX")
        axes.blur()
        ui.settle("L3")
        assert axes.input_value() == "CYX"
        ui.open(cells)
        ui.settle("L3")
        assert ui.text("options-count") == ""

    @pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
    def test_flat_file_of_a_volume_format_is_an_image(
        self, ui: Ui, cells: Path, tmp_path: Path, suffix: str
    ) -> None:
        sitk = pytest.importorskip("SimpleITK")
        path = tmp_path / f"flat{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(np.asarray(Pillow.open(cells).convert("L"))), str(path))
        ui.open(path)
        ui.settle("L3")
        assert ui.page.locator("#picture").is_visible()


class TestDownloads:
    def test_files_are_those_of_the_server(self, on_cells: Ui, cells: Path, server: httpx.Client) -> None:
        on_cells.expand("download")
        button = on_cells.page.get_by_role("button", name="Download")
        with on_cells.page.expect_download() as one:
            button.click()
        assert one.value.suggested_filename == "cells_mask.png"
        assert Path(one.value.path()).read_bytes() == post(server, cells, level="3").content
        labels = [label.strip() for label in on_cells.page.locator("#formats label").all_text_contents()]
        assert labels == [one["filename"] for one in request_options()["formats"] if "image" in one["kinds"]]
        for label in ("statistics.json", "objects.csv"):
            on_cells.page.get_by_label(label).check()
        assert on_cells.page.get_by_label("uncertainty.png").is_disabled()
        with on_cells.page.expect_download() as several:
            button.click()
        with zipfile.ZipFile(Path(several.value.path())) as archive:
            assert sorted(archive.namelist()) == ["mask.png", "objects.csv", "statistics.json"]
            assert json.loads(archive.read("statistics.json"))["level"] == 3

    def test_command_gives_the_same_file(
        self, ui: Ui, cells: Path, server: httpx.Client, tmp_path: Path
    ) -> None:
        path = tmp_path / 'it\'s; a 1,5 "cell".png'
        path.write_bytes(cells.read_bytes())
        ui.open(path)
        ui.settle("L3")
        subprocess.run(["bash", "-c", ui.text("curl")], cwd=tmp_path, check=True, capture_output=True)
        assert (tmp_path / "mask.png").read_bytes() == post(server, cells, level="3").content


class TestAccess:
    def test_zoom_keeps_the_pixel_under_the_pointer(self, on_cells: Ui) -> None:
        canvas = on_cells.page.locator("#picture")
        box = canvas.bounding_box()

        def view(key: str = "") -> tuple[str, bytes]:
            """What is under the pointer and on the canvas, once a key has worked."""
            if key:
                canvas.press(key)
            on_cells.page.evaluate(
                "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
            )
            on_cells.page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2 + 1)
            canvas.hover()
            return on_cells.text("readout"), canvas.screenshot()

        fitted = view("0")
        on_cells.page.mouse.wheel(0, -600)
        until(lambda: view()[1] != fitted[1])
        zoomed = view()
        assert zoomed[0] == fitted[0]
        assert view("ArrowLeft") != zoomed
        assert view("0") == fitted

    def test_keyboard_reaches_every_control(self, ui: Ui, cells: Path) -> None:
        focused = "document.activeElement"
        ui.page.route(re.compile("/samples/cells.png"), lambda route: route.fulfill(path=cells))

        def tab_to(condition: str) -> None:
            for _ in range(40):
                ui.page.keyboard.press("Tab")
                if ui.page.evaluate(condition):
                    assert ui.page.evaluate(f"{focused}.matches(':focus-visible')")
                    assert ui.page.evaluate(f"getComputedStyle({focused}).outlineStyle !== 'none'")
                    return
            pytest.fail(f"not reached: {condition}")

        tab_to(f"{focused}.textContent.includes('Cells')")
        ui.page.keyboard.press("Enter")
        ui.settle("L3")
        tab_to(f"{focused}.id === 'slider'")
        ui.page.keyboard.press("ArrowLeft")
        ui.settle("L2")
        tab_to(f"{focused}.id === 'compare-all'")
        ui.page.keyboard.press("Space")
        ui.wait("document.querySelectorAll('#compare figure').length === 6")
        tab_to(f"{focused}.textContent === 'Options '")
        ui.page.keyboard.press("Enter")
        tab_to(f"{focused}.name === 'threshold'")

    def test_phone_never_scrolls_sideways(self, browser: Any, server: httpx.Client, cells: Path) -> None:
        size = {"width": 360, "height": 740}
        context = browser.new_context(
            viewport=size, color_scheme="dark", reduced_motion="reduce", has_touch=True
        )
        ui = Ui(context.new_page(), str(server.base_url)).load()
        fits, style = "document.documentElement.scrollWidth <= innerWidth", "getComputedStyle(document.body)"
        assert ui.page.evaluate(fits)
        ui.open(cells)
        ui.settle("L3")
        ui.expand("card", "options", "download", "command")
        assert ui.page.evaluate(fits)
        assert ui.page.evaluate(NAMELESS_CONTROLS) == []
        assert ui.page.locator("#status").get_attribute("aria-live") == "polite"
        ui.compare(bars=11)
        assert ui.page.evaluate(fits)
        assert ui.page.evaluate(f"{style}.backgroundColor") == "rgb(20, 23, 23)"
        ui.page.emulate_media(color_scheme="light")
        assert ui.page.evaluate(f"{style}.backgroundColor") == "rgb(246, 246, 243)"
        circle = "getComputedStyle(document.querySelector('#network circle'))"
        assert ui.page.evaluate(f"{circle}.transitionDuration") == "0s"
        context.close()
        assert ui.errors == []
