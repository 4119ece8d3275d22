"""What people send: zips of images, and files of microscopes and Slicer, through the real server."""

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import SimpleITK

from server.arrays import Tiles
from tests.server.imaging.itk import by_itk, itk_read
from tests.server.imaging.test_microscopy import written
from tests.server.segment.test_archive import packed, picture
from tests.support.files import mask_of, nifti_bytes, pages_of, picture_bytes, volume_of
from tests.support.server import serving, until
from tests.support.service import bright, fake_app

Checked = Callable[..., Any]

ZIP = {"content-type": "application/zip"}
THREE = packed({"a.png": picture(1), "day/b.png": picture(2), "day/notes.txt": b"hello"})
VOXELS = np.random.default_rng(1).integers(0, 256, (6, 7, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def server() -> Iterator[httpx.Client]:
    with serving(fake_app(limits={"max_zip_images": 20, "max_zip_mb": 64})) as client:
        yield client


def opened(body: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(body)) as made:
        assert made.testzip() is None
        return {name: made.read(name) for name in made.namelist()}


class TestZips:
    @pytest.mark.parametrize("declared", ["application/zip", "application/x-zip-compressed", "application/octet-stream"])
    @pytest.mark.parametrize("multipart", [False, True])
    def test_are_answered_by_zips(self, server: httpx.Client, declared: str, multipart: bool) -> None:
        if multipart:
            answer = server.post("/segment", files={"file": ("x.zip", THREE, declared)})
        else:
            answer = server.post("/segment", content=THREE, headers={"content-type": declared})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/zip"
        assert answer.headers["content-disposition"] == 'inline; filename="masks.zip"'
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert answer.headers["x-segment-note"] == "1 of 3 files could not be segmented; see report.json"
        assert answer.headers["x-segment-model"] == "fake"
        assert "infer;dur=" in answer.headers["server-timing"]
        files = opened(answer.content)
        assert sorted(files) == ["a_mask.png", "day/b_mask.png", "report.json"]
        assert mask_of(files["a_mask.png"]).sum() == 128
        rows = json.loads(files["report.json"])["images"]
        assert [row["status"] for row in rows] == ["ok", "ok", "failed"]

    def test_take_the_same_parameters(self, server: httpx.Client) -> None:
        answer = server.post("/segment?level=2&format=png,json", content=packed({"a.png": picture()}), headers=ZIP)
        files = opened(answer.content)
        assert sorted(files) == ["a_mask.png", "a_statistics.json", "report.json"]
        assert json.loads(files["a_statistics.json"])["level"] == 2

    def test_give_each_image_all_that_is_asked_for(self, server: httpx.Client) -> None:
        answer = server.post(
            "/segment?format=mask,labels_png,csv,geojson&fill_holes=true", content=packed({"x/a.png": picture()}), headers=ZIP
        )
        files = opened(answer.content)
        assert sorted(files) == ["report.json", "x/a_labels.png", "x/a_mask.png", "x/a_objects.csv", "x/a_objects.geojson"]
        assert json.loads(files["report.json"])["images"][0]["postprocessing"] == {"fill_holes": True}

    @pytest.mark.parametrize(
        ("data", "status", "said"),
        [
            (packed({}), 422, "holds no files"), (packed({"a.txt": b"x"}), 415, "none of the zip's 1 files"), (THREE[:60], 422, "list of files cannot be read"),
            (packed({f"{k}.png": b"" for k in range(21)}), 413, "UNETPP_LIMITS__MAX_ZIP_IMAGES"), (packed({"x": bytes(128) + b"DICM"}), 415, "DICOM"),
        ],
    )  # fmt: skip
    def test_are_refused_in_words(self, server: httpx.Client, problem: Checked, data: bytes, status: int, said: str) -> None:
        for route in ("/segment", "/jobs"):
            assert said in problem(server.post(route, content=data, headers=ZIP), status).detail

    def test_have_no_reference_and_no_preview(self, server: httpx.Client, problem: Checked) -> None:
        both = {"file": THREE, "reference": picture()}
        assert "reference is for one image" in problem(server.post("/segment", files=both), 422).detail
        assert "neither a reference nor a preview" in problem(server.post("/jobs", files=both), 422).detail
        assert (
            "neither a reference nor a preview"
            in problem(server.post("/jobs?preview=true", content=THREE, headers=ZIP), 422).detail
        )

    def test_as_jobs(self, server: httpx.Client) -> None:
        accepted = server.post("/jobs", content=THREE, headers=ZIP)
        assert accepted.status_code == 202, accepted.text
        job = accepted.json()
        assert job["windows"]["total"] == 3
        until(lambda: server.get(job["links"]["self"]).json()["state"] in ("done", "failed"))
        done = server.get(job["links"]["self"]).json()
        assert (done["state"], done["windows"]) == ("done", {"done": 3, "total": 3})
        result = server.get(done["links"]["result"])
        assert result.headers["content-type"] == "application/zip"
        assert sorted(opened(result.content)) == ["a_mask.png", "day/b_mask.png", "report.json"]
        assert (
            opened(result.content)["a_mask.png"]
            == opened(server.post("/segment", content=THREE, headers=ZIP).content)["a_mask.png"]
        )

    def test_jobs_can_be_cancelled(self) -> None:
        entered, go_on, ran = threading.Event(), threading.Event(), [0]

        def run(tiles: Tiles) -> np.ndarray:
            entered.set()
            assert go_on.wait(60)
            ran[0] += len(tiles)
            return bright(tiles)

        data = packed({f"{k}.png": picture(k, 100) for k in range(40)})
        with serving(fake_app(run, batching={"max_batch": 1})) as client:
            job = client.post("/jobs", content=data, headers=ZIP).json()["links"]["self"]
            assert entered.wait(60)
            assert client.delete(job).status_code == 204
            assert client.get(job).json()["state"] == "cancelled"
            go_on.set()
            assert client.post("/segment", content=picture()).status_code == 200
        assert ran[0] < 40

    def test_large_answers_come_from_disk(self, server: httpx.Client) -> None:
        rng = np.random.default_rng(0)
        data = packed({f"{k}.png": picture_bytes(rng.integers(0, 255, (700, 700), dtype=np.uint8)) for k in range(12)})
        answer = server.post("/segment?format=npz,png16", content=data, headers=ZIP)
        assert len(answer.content) > 4 * 1024 * 1024 or answer.status_code == 200
        assert len(opened(answer.content)) == 25

    def test_that_would_take_too_long_are_refused_at_once(self, problem: Checked) -> None:
        ran: list[int] = []
        app = fake_app(lambda tiles: ran.append(1) or bright(tiles), pace=2 / 256, limits={"max_wait_s": 10})
        data = packed({f"{k}.png": picture(k) for k in range(8)})
        with serving(app) as client:
            assert "8 images" in problem(client.post("/segment", content=data, headers=ZIP), 413).detail
            few = packed({f"{k}.png": picture(k) for k in range(4)})
            assert "4 images" in problem(client.post("/segment?deadline_ms=3000", content=few, headers=ZIP), 422).detail
            assert not ran
            assert client.post("/segment", content=packed({"a.png": picture()}), headers=ZIP).status_code == 200

    def test_have_no_shallower_levels(self, server: httpx.Client, problem: Checked) -> None:
        refused = problem(server.post("/segment?min_level=1", content=THREE, headers=ZIP), 422, "invalid-parameter")
        assert "min_level is for one image" in refused.detail

    def test_deadlines_hold_for_all(self, problem: Checked) -> None:
        def slow(tiles: Tiles) -> np.ndarray:
            threading.Event().wait(0.05)
            return bright(tiles)

        data = packed({f"{k}.png": picture(k) for k in range(40)})
        with serving(fake_app(slow, batching={"max_batch": 1})) as client:
            problem(client.post("/segment?deadline_ms=300", content=data, headers=ZIP), 504)
            assert client.post("/segment", content=picture()).status_code == 200


class TestMicroscopes:
    def test_channels_and_axes(self, server: httpx.Client, problem: Checked) -> None:
        values = np.random.default_rng(0).integers(0, 255, (3, 2, 9, 7), dtype=np.uint8)
        file = written(values, "ZCYX", ome=True)
        first, second = (server.post(f"/segment?channel={channel}", content=file) for channel in range(2))
        assert pages_of(first.content).shape == (3, 9, 7)
        assert not np.array_equal(pages_of(first.content), pages_of(second.content))
        guessed = server.post("/segment", content=file)
        assert guessed.content == first.content
        assert guessed.headers["x-segment-note"] == "the input has 2 channels and the first (0) was read; channel=1 reads another"
        assert pages_of(server.post("/segment?axes=ZYX", content=file).content).shape == (6, 9, 7)
        assert "2 channels, 0 to 1" in problem(server.post("/segment?channel=2", content=file), 422).detail
        assert "does not fit" in problem(server.post("/segment?axes=TCZYX", content=file), 422).detail
        assert "is not understood" in problem(server.post("/jobs?axes=hello", content=file), 422).detail
        assert "axes is for TIFF" in problem(server.post("/segment?axes=ZYX", content=picture()), 422).detail

    def test_the_size_of_a_pixel_makes_areas(self, server: httpx.Client) -> None:
        pixels = np.zeros((9, 7), dtype=np.uint8)
        pixels[2:4, 2:5] = 200
        file = written(
            pixels,
            "YX",
            ome=True,
            metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25, "PhysicalSizeXUnit": "mm", "PhysicalSizeYUnit": "mm"},
        )
        report = server.post("/segment?format=json", content=file).json()
        assert report["classes"][0]["area_mm2"] == pytest.approx(6 * 0.5 * 0.25)
        plain = server.post("/segment?format=json", content=picture_bytes(pixels)).json()
        assert "area_mm2" not in plain["classes"][0]

    def test_a_reference_has_axes_of_its_own(self, server: httpx.Client) -> None:
        values = np.random.default_rng(0).integers(0, 255, (3, 2, 9, 7), dtype=np.uint8)
        file = written(values, "ZCYX", imagej=True)
        truth = server.post("/segment?channel=1", content=file).content
        scored = server.post("/segment?channel=1", files={"file": file, "reference": truth})
        assert float(scored.headers["x-segment-iou"]) == 1

    def test_a_reference_of_several_channels_is_none(self, server: httpx.Client, problem: Checked) -> None:
        values = np.zeros((3, 2, 9, 7), dtype=np.uint8)
        files = {"file": written(values[:, 0], "ZYX", imagej=True), "reference": written(values, "ZCYX", imagej=True)}
        assert "the label image has 2 channels; send labels" in problem(server.post("/segment", files=files), 422).detail

    def test_one_colour_of_a_picture(self, server: httpx.Client) -> None:
        pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
        alone = server.post("/segment", content=picture_bytes(pixels[..., 2]))
        assert np.array_equal(
            mask_of(server.post("/segment?channel=2", content=picture_bytes(pixels)).content), mask_of(alone.content)
        )


class TestItk:
    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    @pytest.mark.parametrize("dims", [2, 3])
    @pytest.mark.parametrize("declared", ["application/octet-stream", "application/x-nrrd", None])
    def test_volumes(self, suffix: str, dims: int, declared: str | None) -> None:
        image = SimpleITK.GetImageFromArray(VOXELS.transpose(2, 1, 0))
        image.SetSpacing((1.0, 2.0, 3.0))
        file = by_itk(image, suffix, packed=True)
        with serving(fake_app(changes={"dims": dims})) as client:
            headers = {"content-type": declared} if declared else {}
            answer = client.post("/segment?format=nifti", content=file, headers=headers)
            same = client.post("/segment", content=nifti_bytes(VOXELS, np.diag([-1.0, -2, 3, 1])))
            assert answer.status_code == 200, answer.text
            assert np.array_equal(volume_of(answer.content), volume_of(same.content))
            report = client.post("/segment?format=json", content=file).json()
            assert report["spacing_mm"] == {"x": 1.0, "y": 2.0, "z": 3.0}
            default = client.post("/segment", content=file)
            assert default.headers["content-type"] == "application/x-nrrd"
            assert default.headers["content-disposition"] == 'inline; filename="mask.seg.nrrd"'
            scored = client.post("/segment", files={"file": file, "reference": default.content})
            assert float(scored.headers["x-segment-iou"]) == 1
            in_slicer = itk_read(default.content, ".nrrd")
            assert np.array_equal(SimpleITK.GetArrayFromImage(in_slicer).transpose(2, 1, 0), volume_of(answer.content))
            assert in_slicer.GetSpacing() == image.GetSpacing()

    @pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
    def test_as_references(self, server: httpx.Client, suffix: str) -> None:
        labels = VOXELS.mean() < VOXELS
        image = SimpleITK.GetImageFromArray(labels.astype(np.int16).transpose(2, 1, 0))
        scored = server.post(
            "/segment", files={"file": nifti_bytes(VOXELS, np.diag([-1.0, -1, 1, 1])), "reference": by_itk(image, suffix)}
        )
        assert scored.status_code == 200, scored.text
        assert float(scored.headers["x-segment-iou"]) == 1

    def test_images(self, server: httpx.Client) -> None:
        file = by_itk(SimpleITK.GetImageFromArray(VOXELS[0]), ".mha")
        assert np.array_equal(
            mask_of(server.post("/segment", content=file).content),
            mask_of(server.post("/segment", content=picture_bytes(VOXELS[0])).content),
        )
