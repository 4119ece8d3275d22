"""The page with volumes: NiiVue in a real browser, jobs on the hippocampus network."""

import gzip
import io
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from tests.server.web.conftest import SAMPLES, Ui
from tests.support.files import volume_of
from tests.support.server import until

VOLUME = SAMPLES / "hippocampus.nii.gz"

EVENTS, STATE, PREVIEW = (re.compile(f"/jobs/[^/]*{path}$") for path in ("/events", "", "/preview"))

NO_WEBGL = """
  const getContext = HTMLCanvasElement.prototype.getContext;
  HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
    return kind.startsWith("webgl") ? null : getContext.call(this, kind, ...more);
  };
"""

# Delays the loading of masks until `held[i]()` is called.
HOLD_MASKS = """(() => {
  const { NVImage } = window.niivue, load = NVImage.loadFromFile;
  window.held = [];
  NVImage.loadFromFile = async (file) => {
    const mask = await load.call(NVImage, file);
    await new Promise((resolve) => held.push(resolve));
    return mask;
  };
})()"""


def post(server: httpx.Client, **query: str) -> bytes:
    return server.post(
        "/segment", params={"model": "hippocampus", **query}, content=VOLUME.read_bytes()
    ).content


@pytest.fixture(scope="module")
def masks(server: httpx.Client) -> dict[str, np.ndarray]:
    """The server's mask of the sample per level."""
    queries = {
        "accurate": {"mode": "accurate"},
        **{f"L{level}": {"level": str(level)} for level in range(1, 5)},
    }
    return {name: volume_of(post(server, **query)) for name, query in queries.items()}


def mean_iou(a: np.ndarray, b: np.ndarray) -> float:
    overlaps = [((a == value) & (b == value)).sum() / ((a == value) | (b == value)).sum() for value in (1, 2)]
    return float(np.mean(overlaps))


def quarters(ui: Ui, canvas: str = "volume") -> list[np.ndarray]:
    """The canvas: three planes, and the rendering last; (h, w, 3)."""
    pixels = np.asarray(
        Pillow.open(io.BytesIO(ui.page.locator(f"#{canvas}").screenshot())).convert("RGB")
    ).astype(int)
    return [half for rows in np.array_split(pixels, 2) for half in np.array_split(rows, 2, axis=1)]


def colored(pixels: np.ndarray) -> int:
    """Number of pixels that are not grey."""
    return int((np.ptp(pixels, axis=-1) > 40).sum())


def settle(ui: Ui, level: str) -> str:
    return ui.settle(level, agreement=False)


class TestViewer:
    def test_preview_comes_before_the_result(self, ui: Ui, masks: dict[str, np.ndarray]) -> None:
        assert not any("niivue" in request.url for request in ui.requests)
        held = ui.hold("/jobs/[^/]*/result$")
        ui.open(VOLUME)
        ui.wait_for_text("status", "^L1 in .* preview at L1; L2 is being computed")
        assert any("niivue" in request.url for request in ui.requests)
        ui.wait_for(held)
        held[0].continue_()
        settle(ui, "L2")
        # The preview is the answer of L1, so that level is not requested again.
        ui.select(0)
        settle(ui, "L1")
        assert len(ui.urls("POST")) == 1
        ui.select(1)
        settle(ui, "L2")
        planes = quarters(ui)
        assert all((plane.max(axis=-1) > 60).mean() > 0.1 for plane in planes[:3])
        assert all(colored(plane) > 200 for plane in planes)
        for box in ui.page.locator("#classes input").all():
            box.uncheck()
        until(lambda: all(colored(plane) < 50 for plane in quarters(ui)))
        counts = np.bincount(masks["L2"].ravel(), minlength=3)
        assert all(f"{count:,}" in ui.text("classes") for count in counts[1:])
        ui.page.unroute_all()
        # With L1 known, other levels need no preview.
        ui.select(2)
        settle(ui, "L3")
        assert ["preview=true" in url for url in ui.urls("POST")] == [True, False]

    def test_reference_is_scored_and_levels_compared(
        self, ui: Ui, server: httpx.Client, masks: dict[str, np.ndarray], tmp_path: Path
    ) -> None:
        reference = tmp_path / "reference.nii.gz"
        reference.write_bytes(post(server, level="1"))
        ui.open(VOLUME, reference)
        settle(ui, "L2")
        ui.wait_for_text("headline", f"{mean_iou(masks['L2'], masks['L1']):.3f}.*IoU with the reference")
        for level, text in zip(("L1", "L2", "L3", "L4"), ui.compare(bars=17), strict=False):
            assert f"agreement {mean_iou(masks[level], masks['accurate']):.3f}" in text

    def test_requests_may_come_while_the_viewer_loads(self, ui: Ui, tmp_path: Path) -> None:
        """Inputs and levels may follow each other faster than they are shown."""
        other = tmp_path / "other.nii.gz"
        other.write_bytes(VOLUME.read_bytes())
        ui.open(other)
        ui.open(VOLUME)
        ui.page.locator("#compare-all:enabled").wait_for()
        ui.compare(bars=11)
        ui.page.get_by_role("button", name="show L1").click()
        settle(ui, "L1")
        assert ui.text("file") == VOLUME.name
        assert all(colored(plane) > 200 for plane in quarters(ui))

    def test_nifti2_with_scaled_voxels(self, ui: Ui, server: httpx.Client, tmp_path: Path) -> None:
        """The page reads the masks of it, and draws slices in scaled values."""
        import nibabel as nib

        source = nib.Nifti1Image.from_filename(VOLUME)
        scaled = nib.Nifti2Image(source.get_fdata(), source.affine)
        scaled.header.set_data_dtype(np.int16)
        scaled.header.set_slope_inter(0.01, 300)
        path = tmp_path / "nifti2.nii.gz"
        nib.save(scaled, path)
        ui.open(path)
        ui.page.locator("#compare-all:enabled").wait_for()
        ui.select(0)
        ui.page.locator("#compare-all").click()
        ui.wait("document.querySelector('#compare figcaption')?.textContent.includes('agreement')")
        queries = ({"model": "hippocampus", "level": "1"}, {"model": "hippocampus"})
        bodies = [
            server.post("/segment", params=query, content=path.read_bytes()).content for query in queries
        ]
        first, accurate = (
            np.asarray(nib.Nifti2Image.from_bytes(gzip.decompress(body)).dataobj) for body in bodies
        )
        assert (
            f"agreement {mean_iou(first, accurate):.3f}"
            in ui.page.locator("#compare figure").first.inner_text()
        )
        pixels = ui.page.evaluate(
            """(() => {
              const canvas = document.querySelector("#compare canvas");
              return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
            })()"""
        )
        rgb = np.array(pixels).reshape(-1, 4)[:, :3]
        greys = rgb[np.ptp(rgb, axis=1) == 0, 0]
        assert ((greys > 20) & (greys < 235)).mean() > 0.3

    def test_latest_mask_is_shown(self, ui: Ui) -> None:
        """Both are cached, and the viewer takes longer to read the first."""
        ui.open(VOLUME)
        settle(ui, "L2")
        ui.page.evaluate(HOLD_MASKS)
        ui.select(0)
        ui.wait("held.length === 1")
        ui.select(1)
        ui.wait("held.length === 2")
        ui.page.evaluate("held[1]()")
        settle(ui, "L2")
        shown = quarters(ui)
        ui.page.evaluate("held[0]()")
        ui.page.wait_for_timeout(200)
        assert all(map(np.array_equal, shown, quarters(ui)))
        assert ui.text("status").startswith("L2 in ")

    def test_server_draws_without_webgl(self, browser: Any, server: httpx.Client) -> None:
        context = browser.new_context()
        context.add_init_script(NO_WEBGL)
        ui = Ui(context.new_page(), str(server.base_url))
        # The input comes before the models.
        ui.page.goto(ui.url)
        ui.open(VOLUME)
        settle(ui, "L2")
        assert sum(map(colored, quarters(ui, "picture"))) > 500
        ui.compare(bars=6)
        context.close()
        assert [message.split(":")[0] for message in ui.errors] == ["The server draws this volume"]


class TestJobs:
    def test_cancel_deletes_the_job(self, ui: Ui, server: httpx.Client) -> None:
        ui.page.route(EVENTS, lambda route: None)
        ui.open(VOLUME)
        ui.wait_for_text("busy-text", "^L2")
        ui.page.locator("#cancel").click()
        assert ui.page.locator("#busy").is_hidden()
        ui.wait_for_text("status", "^cancelled$")
        (url,) = ui.urls("DELETE")
        until(lambda: is_ended(server, url))
        ui.page.unroute(EVENTS)
        ui.select(0)
        settle(ui, "L1")

    def test_broken_connections_do_not_end_a_job(self, ui: Ui, server: httpx.Client) -> None:
        """Streams of events fail, end early or break off; the server is away once; the preview is lost."""
        sse = {"content-type": "text/event-stream"}

        def running(route: Any) -> None:
            response = route.fetch()
            route.fulfill(response=response, json=response.json() | {"state": "running"})

        streams: list[Any] = [
            lambda route: route.abort(),
            lambda route: route.fulfill(body="", headers=sse),
            lambda route: route.fulfill(body="data: {", headers=sse | {"content-length": "100"}),
        ]
        states: list[Any] = [lambda route: route.abort(), running, running]

        def in_turn(steps: list[Any], route: Any) -> None:
            (steps.pop(0) if steps and route.request.method == "GET" else type(route).continue_)(route)

        ui.page.route(EVENTS, lambda route: in_turn(streams, route))
        ui.page.route(STATE, lambda route: in_turn(states, route))
        ui.page.route(PREVIEW, lambda route: route.abort())
        ui.open(VOLUME)
        settle(ui, "L2")
        assert streams == []
        assert ui.page.get_by_role("alert").is_hidden()
        # A fetched result is deleted on the server.
        until(lambda: len(ui.urls("DELETE")) == 1)
        (url,) = ui.urls("DELETE")
        until(lambda: server.get(httpx.URL(url).path).status_code == 404)

    def test_lost_job_is_an_error(self, ui: Ui) -> None:
        gone = {"status": 404, "json": {"code": "unknown-job", "detail": "no such job"}}
        ui.page.route(EVENTS, lambda route: route.abort())
        ui.page.route(
            STATE, lambda route: route.fulfill(**gone) if route.request.method == "GET" else route.continue_()
        )
        ui.open(VOLUME)
        assert ui.wait_for_error() == "no such job"
        until(lambda: len(ui.urls("DELETE")) == 1)

    def test_image_model_segments_slices(self, ui: Ui) -> None:
        ui.open(VOLUME)
        settle(ui, "L2")
        # A file that cannot be read changes nothing.
        ui.open(("broken.tif", b"II*\0broken"))
        ui.wait_for_error()
        assert ui.text("file") == VOLUME.name
        assert ui.page.locator("#model").input_value() == "hippocampus"
        assert ui.page.locator("#model option").all_inner_texts() == [
            "hippocampus",
            "nuclei (slice by slice)",
        ]
        ui.select(0)
        ui.page.locator("#model").select_option("nuclei")
        ui.select(0)
        ui.wait_for_text("status", "^L1 in .*nuclei")
        ui.expand("options")
        with ui.page.expect_request(re.compile("/jobs.*axis=0")):
            ui.page.get_by_label("axis").select_option("0")
        ui.wait("document.getElementById('busy').hidden")
        assert ui.page.get_by_role("alert").is_hidden()

    def test_commands_give_the_same_file(self, ui: Ui, masks: dict[str, np.ndarray], tmp_path: Path) -> None:
        ui.open(VOLUME)
        settle(ui, "L2")
        (tmp_path / VOLUME.name).write_bytes(VOLUME.read_bytes())
        subprocess.run(["bash", "-c", ui.text("curl")], cwd=tmp_path, check=True, capture_output=True)
        assert np.array_equal(volume_of((tmp_path / "mask.nii.gz").read_bytes()), masks["L2"])

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    def test_other_formats(self, ui: Ui, server: httpx.Client, tmp_path: Path, suffix: str) -> None:
        sitk = pytest.importorskip("SimpleITK")
        path = tmp_path / f"volume{suffix}"
        sitk.WriteImage(sitk.ReadImage(str(VOLUME)), str(path))
        ui.open(path)
        settle(ui, "L2")
        assert all(colored(plane) > 200 for plane in quarters(ui))
        ui.expand("download")
        ui.page.get_by_label("mask.seg.nrrd").check()
        ui.page.get_by_label("mask.nii.gz").uncheck()
        with ui.page.expect_download() as download:
            ui.page.get_by_role("button", name="Download").click()
        assert download.value.suggested_filename == "volume_mask.seg.nrrd"


def is_ended(server: httpx.Client, url: str) -> bool:
    """Whether a job is cancelled, done or deleted."""
    response = server.get(httpx.URL(url).path)
    return response.status_code == 404 or response.json()["state"] in ("cancelled", "done")
