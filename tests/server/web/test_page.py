"""The page with images, in a real browser on the nuclei network."""

import io
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
from pydantic import Field

from server.api import auth
from server.api.routes import page as page_route
from server.segment.request import SegmentParams
from tests.server.conftest import doors, mask_of, pages_bytes, picture_bytes
from tests.server.web.conftest import SAMPLES, Ui

CELLS = SAMPLES / "cells.png"
LEVELS = ["L1", "L2", "L3", "L4", "accurate"]

# Parameters with a control of their own: the slider, the list of models, the downloads.
OWN_CONTROL = {"mode", "level", "model", "format"}

COLORED_PIXELS = """(() => {
  const canvas = document.getElementById("picture");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4) count += data[at] > data[at + 2] + 40;
  return count;
})()"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the sample, which is fast at every level."""
    path = tmp_path_factory.mktemp("page") / "cells.png"
    Pillow.open(CELLS).crop((40, 60, 168, 156)).save(path)
    return path


@pytest.fixture(scope="module")
def masks(server: httpx.Client, cells: Path) -> dict[str, np.ndarray]:
    """The server's mask of `cells` per level."""
    queries = {
        "accurate": {"mode": "accurate"},
        **{f"L{level}": {"level": str(level)} for level in range(1, 5)},
    }
    return {
        name: mask_of(post(server, cells, format="mask.png", **query).content)
        for name, query in queries.items()
    }


def post(server: httpx.Client, path: Path, **query: str) -> httpx.Response:
    return server.post("/segment", params=query, content=path.read_bytes())


def agreement(masks: dict[str, np.ndarray], level: str) -> str:
    """The IoU with accurate as the page writes it."""
    a, b = masks[level] > 0, masks["accurate"] > 0
    return formatted(float((a & b).sum() / (a | b).sum()))


def formatted(overlap: float) -> str:
    return "1" if overlap == 1 else f"{min(overlap, 0.999):.3f}"


def hold(page: Any, pattern: str) -> list[Any]:
    """Keeps back requests; gives their routes."""
    held: list[Any] = []
    page.route(re.compile(pattern), lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks its handlers
    return held


def wait_for_routes(ui: Ui, held: list[Any]) -> None:
    for _ in range(500):
        if held:
            return
        ui.page.wait_for_timeout(10)
    pytest.fail("no request came")


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

    def test_each_level_is_requested_once(self, ui: Ui, cells: Path, masks: dict[str, np.ndarray]) -> None:
        ui.open(cells)
        ui.settle("L3")
        ui.page.locator("#slider").focus()
        for key, level in (
            ("ArrowLeft", "L2"),
            ("Home", "L1"),
            ("End", "accurate"),
            ("ArrowLeft", "L4"),
            ("Home", "L1"),
        ):
            ui.page.keyboard.press(key)
            ui.settle(level)
            assert ui.page.locator("#slider").get_attribute("aria-valuetext") == level
        assert sorted(ui.requested_levels()) == LEVELS
        for level, text in zip(LEVELS[:-1], ui.page.locator("#ticks li").all_inner_texts(), strict=False):
            assert agreement(masks, level) in text
            assert re.search(r"\d m?s\b", text)

    def test_late_response_is_ignored(self, ui: Ui, cells: Path) -> None:
        held = hold(ui.page, r"/segment\?.*level=1")
        ui.open(cells)
        ui.settle("L3")
        ui.select(0)
        wait_for_routes(ui, held)
        ui.select(1)
        status = ui.settle("L2")
        held[0].fulfill(status=200, body=b"late", headers={"content-type": "application/zip"})
        ui.page.wait_for_timeout(100)
        assert ui.text("status") == status
        assert ui.page.get_by_role("alert").is_hidden()

    def test_slider_moved_while_opening_keeps_the_input(self, ui: Ui, cells: Path) -> None:
        """The server is still drawing a TIFF for the browser."""
        held = hold(ui.page, "format=picture")
        ui.open(cells)
        ui.settle("L3")
        ui.open(("cells.tif", picture_bytes(Pillow.open(cells).convert("L"), "TIFF")))
        wait_for_routes(ui, held)
        ui.select(0)
        ui.page.get_by_role("button", name="Compare all levels").click()
        held[0].continue_()
        ui.settle("L1")
        assert ui.text("file") == "cells.tif"

    def test_compare_shows_all_levels(self, ui: Ui, cells: Path, masks: dict[str, np.ndarray]) -> None:
        ui.open(cells)
        ui.settle("L3")
        for level, text in zip(LEVELS, ui.compare(bars=9).all_inner_texts(), strict=True):
            assert level in text
            assert re.search(r"\d m?s\b", text)
            assert level == "accurate" or f"agreement {agreement(masks, level)}" in text
        assert (
            ui.page.get_by_role("button", name="Compare all levels").get_attribute("aria-pressed") == "true"
        )
        ui.page.get_by_role("button", name="show L1").click()
        ui.settle("L1")
        assert ui.page.locator("#picture").is_visible()
        assert ui.page.locator("#compare").is_hidden()

    def test_reference_is_scored(self, ui: Ui, server: httpx.Client, cells: Path, tmp_path: Path) -> None:
        reference = tmp_path / "reference.png"
        reference.write_bytes(post(server, cells, level="1").content)
        files = {"file": cells.read_bytes(), "reference": reference.read_bytes()}
        scores = server.post("/segment", params={"level": "3"}, files=files).headers
        for give in (ui.open, ui.drop):
            give(cells, reference)
            ui.wait_for_text(
                "status",
                r"^L3 in .*agreement.* IoU with the reference " + formatted(float(scores["x-segment-iou"])),
            )
            assert formatted(float(scores["x-segment-dice"])) in ui.text("headline")
            assert reference.name in ui.text("file")

    def test_differences_have_a_key(self, ui: Ui, cells: Path) -> None:
        ui.open(cells)
        ui.settle("L3")
        ui.page.get_by_label("differences").check()
        assert ui.page.get_by_text("only in this mask").is_visible()
        ui.select(4)
        ui.settle("accurate")
        assert ui.page.get_by_text("only in this mask").is_hidden()


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

    def test_zip_archive_is_refused(self, ui: Ui, cells: Path) -> None:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.write(cells, "cells.png")
        ui.open(("cells.zip", archive.getvalue()))
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
        with doors(auth={"keys_file": tmp_path / "keys"}) as opened:
            context, url = browser.new_context(), str(opened.client.base_url)
            ui = Ui(context.new_page(), url)
            ui.page.goto(url)
            assert ui.wait_for_error() == opened.client.get("/models").json()["detail"]
            for entered in ("wrong", key):
                ui.page.get_by_label("This server needs an API key").fill(entered)
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
            other = Ui(context.new_page(), url)
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
        assert any("/jobs?" in request.url for request in ui.requests)
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


class TestOptions:
    def test_form_has_every_request_parameter(self, ui: Ui) -> None:
        names = ui.page.evaluate(
            "[...document.getElementById('options-form').elements].map((field) => field.name)"
        )
        assert names == [name for name in SegmentParams.model_fields if name not in OWN_CONTROL]
        values = ui.page.evaluate(
            "[...document.querySelectorAll('#options-form [name=precision] option')].map((o) => o.value)"
        )
        assert values == list(page_route.request_options()["parameters"][3]["enum"])
        assert ui.text("options-count") == ""

    def test_new_parameter_appears_without_a_script(self, ui: Ui, cells: Path) -> None:
        class Extended(SegmentParams):
            smoothing: int | None = Field(None, description="a number")
            sharpen: bool = Field(True, description="a checkbox that is on")
            tone: str | None = Field(None, pattern="warm|cold", description="a text")

        def extended(route: Any) -> None:
            html = re.sub(r"(<template[^>]*>).*?</template>", r"\1</template>", route.fetch().text())
            route.fulfill(body=page_route.insert_options(html, Extended), content_type="text/html")

        ui.page.route(f"{ui.url}/", extended)
        ui.load()
        ui.expand("options")
        ui.page.get_by_label("smoothing").fill("3")
        ui.page.get_by_label("sharpen").uncheck()
        ui.page.get_by_label("tone").fill("warm")
        ui.page.get_by_label("tone").blur()
        assert ui.text("options-count") == "· 3 set"
        with ui.page.expect_request(re.compile("/segment")) as sent:
            ui.open(cells)
        query = dict(httpx.URL(sent.value.url).params)
        assert {"smoothing": "3", "sharpen": "false", "tone": "warm"}.items() <= query.items()
        assert not {"threshold", "fill_holes", "axes"} & query.keys()

    def test_options_go_with_every_request(self, ui: Ui, cells: Path, server: httpx.Client) -> None:
        ui.open(cells)
        ui.settle("L3")
        ui.expand("options")
        ui.page.get_by_label("threshold").fill("0.8")
        ui.page.get_by_label("min size px").fill("200")
        ui.page.get_by_label("min size px").blur()
        ui.wait_for_text("options-count", "2 set")
        report = post(server, cells, level="3", threshold="0.8", min_size_px="200", format="json").json()
        ui.wait_for_text("classes", f"{report['classes'][0]['pixels']:,}")
        assert all(part in ui.text("curl") for part in ("threshold=0.8", "min_size_px=200"))

    def test_instances_have_colors_of_their_own(self, ui: Ui, cells: Path, server: httpx.Client) -> None:
        ui.open(cells)
        ui.settle("L3")
        ui.expand("options")
        ui.page.get_by_label("instances").check()
        report = post(server, cells, level="3", instances="true", format="json").json()
        count = report["classes"][0]["objects"]
        ui.wait_for_text("status", f": {count} nucleus.*agreement")
        frames(ui.page)
        assert count > 3
        assert hues(ui.page) == count
        ui.page.get_by_label("instances").uncheck()
        ui.wait("!document.getElementById('curl').textContent.includes('instances')")
        frames(ui.page)
        assert hues(ui.page) == 1


class TestDownloads:
    def test_files_are_those_of_the_server(self, ui: Ui, cells: Path, server: httpx.Client) -> None:
        ui.open(cells)
        ui.settle("L3")
        ui.expand("download")
        button = ui.page.get_by_role("button", name="Download")
        with ui.page.expect_download() as one:
            button.click()
        assert one.value.suggested_filename == "cells_mask.png"
        assert Path(one.value.path()).read_bytes() == post(server, cells, level="3").content
        labels = [label.strip() for label in ui.page.locator("#formats label").all_text_contents()]
        formats = page_route.request_options()["formats"]
        assert labels == [one["filename"] for one in formats if "image" in one["kinds"]]
        ui.page.get_by_label("statistics.json").check()
        ui.page.get_by_label("objects.csv").check()
        assert ui.page.get_by_label("uncertainty.png").is_disabled()
        with ui.page.expect_download() as several:
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
    def test_zoom_keeps_the_pixel_under_the_pointer(self, ui: Ui, cells: Path) -> None:
        ui.open(cells)
        ui.settle("L3")
        canvas = ui.page.locator("#picture")
        canvas.press("0")
        canvas.hover()
        frames(ui.page)
        pixel, fitted = ui.text("readout"), canvas.screenshot()
        ui.page.mouse.wheel(0, -600)
        frames(ui.page)
        zoomed = canvas.screenshot()
        assert zoomed != fitted
        nudge(ui.page, canvas)
        assert ui.text("readout") == pixel
        ui.page.keyboard.press("ArrowLeft")
        frames(ui.page)
        assert canvas.screenshot() != zoomed
        ui.page.keyboard.press("0")
        frames(ui.page)
        nudge(ui.page, canvas)
        assert canvas.screenshot() == fitted

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
        ui.wait("document.querySelectorAll('#compare figure').length === 5")
        tab_to(f"{focused}.textContent === 'Options '")
        ui.page.keyboard.press("Enter")
        tab_to(f"{focused}.name === 'threshold'")

    def test_phone_never_scrolls_sideways(self, browser: Any, server: httpx.Client, cells: Path) -> None:
        size = {"width": 360, "height": 740}
        context = browser.new_context(
            viewport=size, color_scheme="dark", reduced_motion="reduce", has_touch=True
        )
        ui = Ui(context.new_page(), str(server.base_url)).load()
        fits = "document.documentElement.scrollWidth <= innerWidth"
        background = "getComputedStyle(document.body).backgroundColor"
        assert ui.page.evaluate(fits)
        ui.open(cells)
        ui.settle("L3")
        ui.expand("card", "options", "download", "command")
        assert ui.page.evaluate(fits)
        assert ui.nameless_controls() == []
        assert ui.page.locator("#status").get_attribute("aria-live") == "polite"
        ui.compare(bars=9)
        assert ui.page.evaluate(fits)
        assert ui.page.evaluate(background) == "rgb(20, 23, 23)"
        ui.page.emulate_media(color_scheme="light")
        assert ui.page.evaluate(background) == "rgb(246, 246, 243)"
        transition = "getComputedStyle(document.querySelector('#network circle')).transitionDuration"
        assert ui.page.evaluate(transition) == "0s"
        context.close()
        assert ui.errors == []


def frames(page: Any) -> None:
    """Waits until the canvas is drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def hues(page: Any) -> int:
    """How many of 36 hues the picture has; the input is grey."""
    pixels = np.asarray(Pillow.open(io.BytesIO(page.locator("#picture").screenshot())).convert("HSV"))
    strong = pixels[(pixels[..., 1] > 120) & (pixels[..., 2] > 80), 0]
    return int((np.bincount(strong.astype(int) * 36 // 256, minlength=36) > 5).sum())


def nudge(page: Any, canvas: Any) -> None:
    """Moves the pointer off the middle of the canvas and back, so that it reports its pixel."""
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2 + 1, box["y"] + box["height"] / 2 + 1)
    canvas.hover()
