"""The page with volumes: NiiVue in a real browser, jobs on the shipped network."""

import gzip
import io
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as Pillow

from tests.server.web.conftest import SAMPLES, holds, open_page
from tests.support.files import volume_of
from tests.support.server import until

VOLUME = SAMPLES / "hippocampus.nii.gz"
STATUS = "document.getElementById('status').textContent"


def quarters(page: Any) -> list[np.ndarray]:
    """What the canvas shows: three planes, and the rendering last; (h, w, 3)."""
    pixels = np.asarray(Pillow.open(io.BytesIO(page.locator("#volume").screenshot())).convert("RGB")).astype(int)
    middle = pixels.shape[0] // 2, pixels.shape[1] // 2
    return [
        pixels[y, x] for y in (slice(0, middle[0]), slice(middle[0], None)) for x in (slice(0, middle[1]), slice(middle[1], None))
    ]


def colored(pixels: np.ndarray) -> int:
    """Pixels that are no grey."""
    return int((np.ptp(pixels, axis=-1) > 40).sum())


def mask(server: httpx.Client, **query: str) -> np.ndarray:
    return volume_of(server.post("/segment", params={"model": "hippocampus", **query}, content=VOLUME.read_bytes()).content)


@pytest.fixture
def reference(server: httpx.Client, tmp_path: Path) -> Path:
    """Labels of another level than those that are scored against them."""
    path = tmp_path / "reference.nii.gz"
    path.write_bytes(server.post("/segment", params={"model": "hippocampus", "level": "1"}, content=VOLUME.read_bytes()).content)
    return path


def mean_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([((a == value) & (b == value)).sum() / ((a == value) | (b == value)).sum() for value in (1, 2)]))


def test_a_preview_and_then_the_result(page: Any, server: httpx.Client, seen: SimpleNamespace) -> None:
    page.evaluate(
        f"""() => {{ window.said = []; new MutationObserver(() => said.push({STATUS})).observe(document.getElementById('status'), {{ childList: true }}); }}"""
    )
    # The viewer comes with the first volume.
    assert not any("niivue" in request.url for request in seen.requests)
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, f"{STATUS}.startsWith('L2 in ') && !{STATUS}.includes('preview')")
    assert any("niivue" in request.url for request in seen.requests)
    first = next(text for text in page.evaluate("said") if text)
    assert "preview at L1; L2 is being computed" in first
    # The preview is L1's answer, so that level need not be asked for.
    page.locator("#slider").fill("0")
    holds(page, f"{STATUS}.startsWith('L1 in ')")
    assert sum(request.method == "POST" for request in seen.requests) == 1
    page.locator("#slider").fill("1")
    holds(page, f"{STATUS}.startsWith('L2 in ')")
    planes = quarters(page)
    assert all((plane.max(axis=-1) > 60).mean() > 0.1 for plane in planes[:3])
    assert all(colored(plane) > 500 for plane in planes)
    # Without the classes there is no colour.
    for box in page.locator("#classes input").all():
        box.uncheck()
    until(lambda: all(colored(plane) < 100 for plane in quarters(page)))
    # What is shown is what the server has counted.
    counts = np.bincount(mask(server, level="2").ravel(), minlength=3)
    table = page.locator("#classes").inner_text()
    assert all(f"{count:,}" in table for count in counts[1:])
    # And as L1 is known, the next one needs no preview.
    page.locator("#slider").fill("2")
    holds(page, f"{STATUS}.startsWith('L3 in ')")
    assert ["preview=true" in request.url for request in seen.requests if request.method == "POST"] == [True, False]


@pytest.mark.long
def test_a_reference_and_all_levels(page: Any, server: httpx.Client, reference: Path) -> None:
    page.get_by_role("button", name="Hippocampus").click()
    holds(page, f"{STATUS}.startsWith('L2 in ') && !{STATUS}.includes('preview')")
    page.set_input_files("#reference-chooser", str(reference))
    holds(page, f"{STATUS}.includes('IoU with the reference')")
    files = {"file": VOLUME.read_bytes(), "reference": reference.read_bytes()}
    answer = server.post("/segment", params={"model": "hippocampus", "level": "2"}, files=files)
    assert f"{float(answer.headers['x-segment-iou']):.3f}" in page.locator("#headline").inner_text()
    page.get_by_role("button", name="Compare all levels").click()
    holds(page, "document.querySelectorAll('#compare figcaption .bar').length === 14")
    accurate = mask(server)
    for level in range(1, 5):
        agreed = mean_iou(mask(server, level=str(level)), accurate)
        assert f"agreement {agreed:.3f}" in page.locator("#compare figure").nth(level - 1).inner_text()


def test_nobody_has_to_wait_for_the_viewer(page: Any, reference: Path) -> None:
    """Levels may be asked for while it is still being loaded, and inputs given one upon the other."""
    page.set_input_files("#chooser", str(reference))
    page.set_input_files("#chooser", str(VOLUME))
    page.locator("#all:enabled").wait_for()
    page.locator("#all").click()
    holds(page, "document.querySelectorAll('#compare figcaption .bar').length === 9")
    page.get_by_role("button", name="show L1").click()
    holds(page, f"{STATUS}.startsWith('L1 in ')")
    assert page.locator("#file").text_content() == VOLUME.name
    assert all(colored(plane) > 500 for plane in quarters(page))


def test_scaled_voxels_in_the_second_format(page: Any, server: httpx.Client, tmp_path: Path) -> None:
    """NIfTI-2 of stored values that are not those that are meant: of both the page reads masks, and draws slices."""
    import nibabel as nib

    source = nib.Nifti1Image.from_filename(VOLUME)
    scaled = nib.Nifti2Image(source.get_fdata(), source.affine)
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_slope_inter(0.01, 300)
    path = tmp_path / "second.nii.gz"
    nib.save(scaled, path)
    page.set_input_files("#chooser", str(path))
    page.locator("#all:enabled").wait_for()
    page.locator("#slider").fill("0")
    page.locator("#all").click()
    holds(page, "document.querySelector('#compare figcaption')?.textContent.includes('agreement')")
    bodies = [
        server.post("/segment", params={"model": "hippocampus"} | more, content=path.read_bytes()).content
        for more in ({"level": "1"}, {})
    ]
    first, accurate = (np.asarray(nib.Nifti2Image.from_bytes(gzip.decompress(body)).dataobj) for body in bodies)
    assert f"agreement {mean_iou(first, accurate):.3f}" in page.locator("#compare figure").first.inner_text()
    pixels = np.array(
        page.evaluate(
            "(() => { const c = document.querySelector('#compare canvas'); return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]; })()"
        )
    ).reshape(-1, 4)
    greys = pixels[np.ptp(pixels[:, :3], axis=1) == 0, 0]
    assert ((greys > 20) & (greys < 235)).mean() > 0.3


def test_of_two_masks_the_last_is_seen(page: Any) -> None:
    """Both are kept, and the viewer takes longer to read the first."""
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, f"{STATUS}.startsWith('L2 in ') && !{STATUS}.includes('preview')")
    page.evaluate("""() => {
      const { NVImage, Niivue } = window.niivue, load = NVImage.loadFromFile, add = Niivue.prototype.addVolume;
      Object.assign(window, { held: [], added: 0 });
      NVImage.loadFromFile = async (file) => {
        const mask = await load.call(NVImage, file);
        await new Promise((go) => held.push(go));
        return mask;
      };
      Niivue.prototype.addVolume = function (volume) {
        added += 1;
        return add.call(this, volume);
      };
    }""")
    page.locator("#slider").fill("0")
    holds(page, "held.length === 1")
    page.locator("#slider").fill("1")
    holds(page, "held.length === 2")
    page.evaluate("held[1]()")
    holds(page, f"{STATUS}.startsWith('L2 in ') && added === 1")
    page.evaluate("held[0]()")
    page.evaluate("new Promise((go) => setTimeout(go))")
    assert page.evaluate(f"{STATUS}.startsWith('L2 in ') && added === 1")


def test_cancel(page: Any, server: httpx.Client, seen: SimpleNamespace) -> None:
    held: list[Any] = []
    page.route(re.compile("/jobs/.*/events"), lambda route: held.append(route))  # noqa: PLW0108 - Playwright marks its handlers
    page.set_input_files("#chooser", str(VOLUME))
    page.locator("#cancel").wait_for()
    holds(page, "document.getElementById('doing').textContent.startsWith('L2')")
    page.locator("#cancel").click()
    assert page.locator("#busy").is_hidden()
    holds(page, f"{STATUS} === 'cancelled'")
    (request,) = [request for request in seen.requests if request.method == "DELETE"]
    until(
        lambda: (
            server.get(httpx.URL(request.url).path).status_code == 404
            or server.get(httpx.URL(request.url).path).json()["state"] in ("cancelled", "done")
        )
    )
    page.unroute(re.compile("/jobs/.*/events"))
    # And nothing stands in the way of another try.
    page.locator("#slider").fill("0")
    holds(page, f"{STATUS}.startsWith('L1 in ')")


def test_a_connection_ends_and_the_job_does_not(page: Any, server: httpx.Client, seen: SimpleNamespace) -> None:
    """Of its events the first stream cannot be had, the second is empty, the third broken; the server is away once. No preview comes."""
    streams: list[Any] = []
    asked: list[Any] = []

    def stream(route: Any) -> None:
        streams.append(route)
        if len(streams) == 1:
            route.abort()
        elif len(streams) == 2:
            route.fulfill(status=200, body="", headers={"content-type": "text/event-stream"})
        elif len(streams) == 3:
            route.fulfill(status=200, body="data: {", headers={"content-type": "text/event-stream", "content-length": "100"})
        else:
            route.continue_()

    def itself(route: Any) -> None:
        asked.append(route)
        if route.request.method == "GET" and len(asked) == 1:
            route.abort()
        elif route.request.method == "GET" and len(asked) < 4:
            # As if it were still at work.
            answer = route.fetch()
            route.fulfill(response=answer, json=answer.json() | {"state": "running"})
        else:
            route.continue_()

    page.route(re.compile("/jobs/[^/]*/events"), stream)
    page.route(re.compile("/jobs/[^/]*/preview"), lambda route: route.abort())
    page.route(re.compile("/jobs/[^/]*$"), itself)
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, f"{STATUS}.startsWith('L2 in ')")
    assert len(streams) >= 3
    assert page.get_by_role("alert").is_hidden()
    # What has been fetched is kept nowhere else.
    until(lambda: bool(page.evaluate("1")) and any(request.method == "DELETE" for request in seen.requests))
    (gone,) = [request.url for request in seen.requests if request.method == "DELETE"]
    until(lambda: server.get(httpx.URL(gone).path).status_code == 404)


def test_a_job_that_is_lost_is_said_to_be(page: Any, server: httpx.Client, seen: SimpleNamespace) -> None:
    page.route(re.compile("/jobs/[^/]*/events"), lambda route: route.abort())
    gone = {"status": 404, "json": {"detail": "no such job"}}
    page.route(
        re.compile("/jobs/[^/]*$"), lambda route: route.fulfill(**gone) if route.request.method == "GET" else route.continue_()
    )
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, "!document.getElementById('error').hidden")
    assert page.get_by_role("alert").locator("span").text_content() == "no such job"
    until(lambda: bool(page.evaluate("1")) and any(request.method == "DELETE" for request in seen.requests))


def test_a_model_of_images_does_it_slice_by_slice(page: Any, seen: SimpleNamespace) -> None:
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, f"{STATUS}.startsWith('L2 in ')")
    # What cannot be read changes nothing.
    page.set_input_files("#chooser", {"name": "broken.tif", "mimeType": "", "buffer": b"II*\0broken"})
    holds(page, "!document.getElementById('error').hidden")
    assert page.locator("#file").text_content() == VOLUME.name
    assert page.locator("#model").input_value() == "hippocampus"
    assert page.locator("#model option").all_inner_texts() == ["hippocampus", "nuclei (slice by slice)"]
    page.locator("#model").select_option("nuclei")
    page.locator("#slider").fill("0")
    holds(page, f"{STATUS}.startsWith('L1 in ') && {STATUS}.includes('nuclei')")
    page.locator("#options summary").click()
    page.get_by_label("slices along").select_option("0")
    holds(page, "document.getElementById('busy').hidden")
    assert any("axis=0" in request.url for request in seen.requests)


def test_the_commands_do_the_same(page: Any, server: httpx.Client, tmp_path: Path) -> None:
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, f"{STATUS}.startsWith('L2 in ') && !{STATUS}.includes('preview')")
    (tmp_path / VOLUME.name).write_bytes(VOLUME.read_bytes())
    page.locator("#request summary").click()
    subprocess.run(["bash", "-c", page.locator("#curl").inner_text()], cwd=tmp_path, check=True, capture_output=True)
    assert np.array_equal(volume_of((tmp_path / "mask.nii.gz").read_bytes()), mask(server, level="2"))


@pytest.mark.long
def test_errors_and_other_formats(page: Any, server: httpx.Client, tmp_path: Path) -> None:
    broken = VOLUME.read_bytes()[:3000]
    page.set_input_files("#chooser", {"name": "broken.nii.gz", "mimeType": "", "buffer": broken})
    holds(page, "!document.getElementById('error').hidden")
    detail = server.post("/segment", params={"model": "hippocampus"}, content=broken).json()["detail"]
    assert page.get_by_role("alert").locator("span").text_content() == detail
    sitk = pytest.importorskip("SimpleITK")
    for name in ("volume.nrrd", "volume.mha"):
        sitk.WriteImage(sitk.ReadImage(str(VOLUME)), str(tmp_path / name))
        page.set_input_files("#chooser", str(tmp_path / name))
        holds(
            page,
            f"document.getElementById('file').textContent === '{name}' && {STATUS}.startsWith('L2 in ') && !{STATUS}.includes('preview')",
        )
        assert all(colored(plane) > 500 for plane in quarters(page))
    page.locator("#download summary").click()
    page.get_by_label(".seg.nrrd").check()
    page.get_by_label("mask, NIfTI").uncheck()
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename.endswith("mask.seg.nrrd")


NO_WEBGL = """
  const got = HTMLCanvasElement.prototype.getContext;
  HTMLCanvasElement.prototype.getContext = function (kind, ...more) {
    return kind.startsWith("webgl") ? null : got.call(this, kind, ...more);
  };
"""


def test_without_webgl_the_server_draws(browser: Any, server: httpx.Client, seen: SimpleNamespace) -> None:
    page = open_page(browser, str(server.base_url), seen, NO_WEBGL)
    page.set_input_files("#chooser", str(VOLUME))
    holds(page, f"{STATUS}.startsWith('L2 in ')")
    picture = np.asarray(Pillow.open(io.BytesIO(page.locator("#picture").screenshot())).convert("RGB")).astype(int)
    assert colored(picture) > 500
    page.get_by_role("button", name="Compare all levels").click()
    holds(page, "document.querySelectorAll('#compare figcaption .bar').length === 5")
    page.context.close()
