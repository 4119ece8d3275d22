"""The options form: it has what SegmentParams declares, and what is filled in goes with every request."""

import io
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image as Pillow
from pydantic import Field

from server.api.routes.page import insert_options
from server.segment.request import SegmentParams
from tests.server.web.conftest import Ui
from tests.support.server import until

# Parameters with a control of their own: the slider, the list of models, the downloads.
OWN_CONTROL = {"mode", "level", "model", "format"}


class Extended(SegmentParams):
    """The request parameters of some later version."""

    smoothing: int | None = Field(None, ge=0, description="a number")
    sharpen: bool = Field(True, description="a checkbox that is on")
    tone: str | None = Field(None, description="any & <text>")


def report(server: httpx.Client, path: Path, **query: str) -> dict[str, Any]:
    """The statistics of the only class at level 3."""
    params = {"level": "3", "format": "json", **query}
    return dict(server.post("/segment", params=params, content=path.read_bytes()).json()["classes"][0])


def hues(ui: Ui) -> int:
    """How many of 36 hues the picture has; the input is grey."""
    pixels = np.asarray(Pillow.open(io.BytesIO(ui.page.locator("#picture").screenshot())).convert("HSV"))
    strong = pixels[(pixels[..., 1] > 120) & (pixels[..., 2] > 80), 0]
    return int((np.bincount(strong.astype(int) * 36 // 256, minlength=36) > 5).sum())


def test_form_has_every_request_parameter(ui: Ui) -> None:
    names = ui.page.evaluate(
        "[...document.getElementById('options-form').elements].map((field) => field.name)"
    )
    assert names == [name for name in SegmentParams.model_fields if name not in OWN_CONTROL]
    assert ui.text("options-count") == ""


def test_new_parameter_appears_without_a_script(ui: Ui, cells: Path) -> None:
    def extended(route: Any) -> None:
        html = re.sub(r"(<template[^>]*>).*?</template>", r"\1</template>", route.fetch().text())
        route.fulfill(body=insert_options(html, Extended), content_type="text/html")

    ui.page.route(f"{ui.url}/", extended)
    ui.load().expand("options")
    assert ui.text("option-tone-help") == "any & <text>"
    ui.page.get_by_label("smoothing").fill("3")
    ui.page.get_by_label("sharpen").uncheck()
    ui.page.get_by_label("tone").fill("warm")
    ui.page.get_by_label("tone").blur()
    assert ui.text("options-count") == "· 3 set"
    with ui.page.expect_request(re.compile("/segment")) as sent:
        ui.open(cells)
    query = dict(httpx.URL(sent.value.url).params)
    assert {name: query.pop(name) for name in ("smoothing", "sharpen", "tone")} == {
        "smoothing": "3",
        "sharpen": "false",
        "tone": "warm",
    }
    assert query.keys() == OWN_CONTROL


def test_options_go_with_every_request(on_cells: Ui, cells: Path, server: httpx.Client) -> None:
    on_cells.expand("options")
    on_cells.page.get_by_label("threshold").fill("0.8")
    on_cells.page.get_by_label("min size px").fill("200")
    on_cells.page.get_by_label("min size px").blur()
    on_cells.wait_for_text("options-count", "2 set")
    pixels = report(server, cells, threshold="0.8", min_size_px="200")["pixels"]
    on_cells.wait_for_text("classes", f"{pixels:,}")
    assert all(part in on_cells.text("curl") for part in ("threshold=0.8", "min_size_px=200"))


def test_instances_have_colors_of_their_own(on_cells: Ui, cells: Path, server: httpx.Client) -> None:
    on_cells.expand("options")
    on_cells.page.get_by_label("instances").check()
    count = report(server, cells, instances="true")["objects"]
    assert count > 3
    on_cells.wait_for_text("status", f": {count} nucleus.*agreement")
    until(lambda: hues(on_cells) == count)
    on_cells.page.get_by_label("instances").uncheck()
    until(lambda: hues(on_cells) == 1)
