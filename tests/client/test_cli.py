"""`unetpp segment` and `unetpp compare` as a person types them."""

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from typer.testing import Result

from client import journal
from client.errors import Failed
from client.local import narrowed
from server.arrays import Tiles
from server.settings import Settings
from tests.client.conftest import done, fails, run, served
from tests.conftest import ROOT
from tests.support.files import mask_of, nifti_bytes, pages_bytes, pages_of, picture_bytes, volume_of
from tests.support.service import bright


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path) -> None:
    """One engine, one precision: nothing to measure at start."""
    monkeypatch.setenv("UNETPP_BUNDLES", str(shipped_bundle))
    monkeypatch.setenv("UNETPP_RUNTIME__ENGINE", "onnxruntime")
    monkeypatch.setenv("UNETPP_RUNTIME__PRECISION", "fp32")
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def image(tmp_path: Path, ihc: np.ndarray) -> Path:
    path = tmp_path / "tissue.png"
    path.write_bytes(picture_bytes(ihc[:200, :240]))
    return path


class TestSegment:
    def test_is_the_answer_of_the_server(self, quick: None, image: Path, client: httpx.Client) -> None:
        assert "nuclei fast L1 fp32" in done("segment", image, "--level", 1)
        answer = client.post("/segment?mode=fast&level=1&precision=fp32", content=image.read_bytes())
        assert (image.parent / "tissue_mask.png").read_bytes() == answer.content

    def test_reference(self, fakes: Callable[..., None], image: Path, tmp_path: Path) -> None:
        own = tmp_path / "own.png"
        done("segment", image, "--level", 1, "-o", own)
        assert "IoU 1.0000  Dice 1.0000" in done("segment", image, "--level", 1, "--reference", own)

    def test_format(self, fakes: Callable[..., None], image: Path) -> None:
        done("segment", image, "--format", "json", "--include-mask")
        report = json.loads((image.parent / "tissue_statistics.json").read_text())
        assert report["size"] == {"height": 200, "width": 240}
        assert mask_of(base64.b64decode(report["mask_png"])).shape == (200, 240)

    def test_nothing_is_left_beside_the_answer(self, fakes: Callable[..., None], image: Path) -> None:
        done("segment", image)
        assert left(image.parent) == ["tissue.png", "tissue_mask.png"]

    def test_errors(self, fakes: Callable[..., None], image: Path, tmp_path: Path) -> None:
        assert "there are: mask (as the input), png" in fails("segment", image, "--format", "gif")
        assert "levels 1, 2, 3, 4" in fails("segment", image, "--level", 9)
        assert "'lungs'" in fails("segment", image, "--model", "lungs")
        assert "'auto', 'fp32'" in fails("segment", image, "--precision", "fp8")
        (tmp_path / "text.png").write_text("hello there")
        assert "not a format that this server reads" in fails("segment", tmp_path / "text.png", "--level", 1)
        assert "no/such/folder is not a folder" in fails("segment", image, "-o", tmp_path / "no/such/folder/out.png")
        assert "axis is for volumes" in fails("segment", image, "--level", 1, "--axis", "1")
        assert "there are: refuse, zero" in fails("segment", image, "--level", 1, "--nonfinite", "drop")

    def test_no_bundles(self, image: Path, tmp_path: Path) -> None:
        assert "UNETPP_BUNDLES" in fails("segment", image, "--bundles", tmp_path / "nowhere")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        assert "does not exist" in fails("segment", tmp_path / "missing.png")

    @pytest.mark.parametrize("model", [None, "nuclei", "hippocampus", "lungs"])
    def test_opens_only_what_is_asked(self, model: str | None) -> None:
        both = Settings(bundles=ROOT / "bundles")
        found = narrowed(both, model)
        assert found.bundles == (both.bundles if model == "lungs" else ROOT / "bundles" / (model or "nuclei"))


VOLUME = np.random.default_rng(1).integers(0, 256, (12, 20, 9), dtype=np.uint8)


class TestVolumes:
    """On fake engines."""

    def segmented(self, monkeypatch: pytest.MonkeyPatch, path: Path, data: bytes, *options: object, engine: Any = bright,
                  **changes: Any) -> tuple[Result, set[str]]:  # fmt: skip
        """What the command says, and which files it left beside the input."""
        path.write_bytes(data)
        monkeypatch.setattr("server.app.open_bundles", lambda settings: fake_bundles(engine, **changes))
        result = run("segment", path, *options)
        return result, {file.name for file in path.parent.iterdir()} - {path.name}

    @pytest.mark.parametrize(
        ("name", "answer"),
        [
            ("x.nii.gz", "x_mask.nii.gz"), ("x.nii", "x_mask.nii.gz"), ("scan.v2.nii.gz", "scan.v2_mask.nii.gz"),
            ("x", "x_mask.nii.gz"), ("x.gz", "x_mask.nii.gz"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("dims", [2, 3])
    def test_nifti(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, answer: str, dims: int) -> None:
        result, left = self.segmented(monkeypatch, tmp_path / name, nifti_bytes(VOLUME), dims=dims)
        assert result.exit_code == 0, result.output
        assert answer in result.output
        assert left == {answer}
        assert np.array_equal(volume_of((tmp_path / answer).read_bytes()), VOLUME.mean() < VOLUME)

    def test_pages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        result, left = self.segmented(monkeypatch, tmp_path / "x.tif", pages_bytes(VOLUME))
        assert result.exit_code == 0, result.output
        assert left == {"x_mask.tif"}
        assert np.array_equal(pages_of((tmp_path / "x_mask.tif").read_bytes()), VOLUME.mean() < VOLUME)

    def test_one_page_is_an_image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.segmented(monkeypatch, tmp_path / "x.tif", pages_bytes(VOLUME[:1]))[1] == {"x_mask.png"}

    def test_options(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        voxels = VOLUME.astype(np.float32)
        voxels[0, 0, 0] = np.nan
        result, left = self.segmented(
            monkeypatch,
            tmp_path / "x.nii.gz",
            nifti_bytes(voxels),
            "--axis",
            0,
            "--nonfinite",
            "zero",
            "--format",
            "json",
            "--include-mask",
        )
        assert result.exit_code == 0, result.output
        assert "note: 1 values that are not finite were read as 0" in result.output
        assert left == {"x_statistics.json"}
        report = json.loads((tmp_path / "x_statistics.json").read_text())
        assert volume_of(base64.b64decode(report["mask_nifti"])).shape == VOLUME.shape

    def test_reference(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
        truth = tmp_path_factory.mktemp("truth") / "truth.nii.gz"
        truth.write_bytes(nifti_bytes((VOLUME.mean() < VOLUME).astype(np.uint8)))
        result, _ = self.segmented(monkeypatch, tmp_path / "x.nii.gz", nifti_bytes(VOLUME), "--reference", truth)
        assert "IoU 1.0000  Dice 1.0000" in result.output

    def test_interrupted_in_the_engine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []

        def interrupted(tiles: Tiles) -> np.ndarray:
            calls.append(len(tiles))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return bright(tiles)

        pages = np.zeros((200, 16, 16), dtype=np.uint8)
        result, left = self.segmented(monkeypatch, tmp_path / "x.tif", pages_bytes(pages), engine=interrupted)
        assert result.exit_code not in (0, None)
        assert not left
        assert sum(calls) < 200

    def test_interrupted_while_it_writes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = Path.write_bytes

        def half(path: Path, data: bytes) -> int:
            if "_mask" not in path.name:
                return write(path, data)
            write(path, data[:10])
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_bytes", half)
        (tmp_path / "x_mask.nii.gz").touch()
        result, left = self.segmented(monkeypatch, tmp_path / "x.nii.gz", nifti_bytes(VOLUME))
        assert result.exit_code != 0
        assert left == {"x_mask.nii.gz"}
        assert (tmp_path / "x_mask.nii.gz").read_bytes() == b""  # as it was

    def test_ctrl_c(self, tmp_path: Path) -> None:
        """A real signal to a real process, in the middle of a thousand slow batches."""
        (tmp_path / "x.tif").write_bytes(pages_bytes(np.zeros((2000, 16, 16), dtype=np.uint8)))
        code = (
            "import time\nimport server.app\nfrom server.cli import app\nfrom tests.server.conftest import bright, fake_bundles\n"
            "def slow(tiles):\n    print('at work', flush=True)\n    time.sleep(0.5)\n    return bright(tiles)\n"
            "server.app.open_bundles = lambda settings: fake_bundles(slow)\n"
            f"app(['segment', {str(tmp_path / 'x.tif')!r}])\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "at work\n"
            process.send_signal(signal.SIGINT)
            said, errors = process.communicate(timeout=60)
        assert process.returncode != 0
        assert said.count("at work") < 10
        assert "Traceback" not in errors
        assert [path.name for path in tmp_path.iterdir()] == ["x.tif"]


def left(folder: Path) -> list[str]:
    """All files in a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def packed(path: Path, folder: Path, **more: bytes) -> None:
    """A zip of two images of a folder, and more."""
    with zipfile.ZipFile(path, "w") as held:
        for name in ("a.png", "day 2/a.png"):
            held.write(folder / name, name)
        for name, data in more.items():
            held.writestr(f"{name}.png", data)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]


def states(folder: Path) -> list[str]:
    return [entry["status"] for entry in report_of(folder)["inputs"]]


@pytest.fixture(params=["here", "server"])
def where(request: pytest.FixtureRequest, url: str, fakes: Callable[..., None]) -> list[str]:
    """Options that say who segments."""
    return ["--server", url] if request.param == "server" else []


class TestBatch:
    def test_beside_the_inputs(self, folder: Path, where: list[str]) -> None:
        said = done("segment", folder, *where)
        assert left(folder) == [
            "a.png", "a_mask.png", "b.png", "b_mask.png", "day 2/a.png", "day 2/a_mask.png", "day 2/ü.tif", "day 2/ü_mask.png",
        ]  # fmt: skip
        assert said.count("fake accurate L4 fp32") == 4
        pixels = np.asarray(Pillow.open(folder / "b.png"))
        assert np.array_equal(mask_of((folder / "b_mask.png").read_bytes()), pixels > pixels.mean())
        # And once more: the answers are no inputs.
        assert done("segment", folder, *where).count("fake") == 4

    def test_into_a_folder(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        done("segment", folder, "--out", tmp_path / "out", "--format", "mask,json", "--level", 2, *where)
        assert left(tmp_path / "out") == [
            "a_mask.png", "a_statistics.json", "b_mask.png", "b_statistics.json", "day 2/a_mask.png", "day 2/a_statistics.json",
            "day 2/ü_mask.png", "day 2/ü_statistics.json", "run.json",
        ]  # fmt: skip
        report = report_of(tmp_path / "out")
        assert report["options"] == {"format": "mask,json", "level": 2}
        assert report["model"]["name"] == "fake"
        assert report["server"] == (where[1] if where else None)
        assert report["version"]
        entry = report["inputs"][0]
        assert entry["path"] == "../images/a.png"
        assert entry["sha256"] == journal.sha256(folder / "a.png")
        assert entry["bytes"] == (folder / "a.png").stat().st_size
        assert {"mode": "fast", "level": 2, "precision": "fp32", "engine": "fake"}.items() <= entry.items()
        assert [output["path"] for output in entry["outputs"]] == ["a_mask.png", "a_statistics.json"]
        assert entry["timings_ms"]["infer"] >= 0

    def test_one_that_fails_harms_no_other(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:60])
        (folder / "c.png").write_text("hello there")
        said = fails("segment", folder, "--out", tmp_path / "out", *where)
        assert "2 of 5 failed" in said
        assert all(f"{folder / name}: " in said for name in ("b.png", "c.png"))
        assert left(tmp_path / "out") == ["a_mask.png", "day 2/a_mask.png", "day 2/ü_mask.png", "run.json"]
        entries = report_of(tmp_path / "out")["inputs"]
        assert [entry["status"] for entry in entries] == ["done", "failed", "failed", "done", "done"]
        assert entries[2]["error"]["type"] == "urn:unetpp:unsupported-type"
        assert "not a format" in entries[2]["error"]["detail"]

    def test_scored(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        done("segment", folder, "--out", tmp_path / "truth", *where)
        (tmp_path / "truth" / "run.json").unlink()
        for path in (tmp_path / "truth").rglob("*.png"):
            path.rename(path.with_name(path.name.replace("_mask", "")))
        said = done("segment", folder, "--out", tmp_path / "out", "--reference", tmp_path / "truth", *where)
        assert said.count("IoU 1.0000  Dice 1.0000") == 4
        assert [entry["iou"] for entry in report_of(tmp_path / "out")["inputs"]] == [1.0] * 4

    def test_an_archive(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        packed(tmp_path / "all.zip", folder)
        done("segment", tmp_path / "all.zip", "--out", tmp_path / "out", *where)
        assert left(tmp_path / "out") == ["all/a_mask.png", "all/day 2/a_mask.png", "all/report.json", "run.json"]

    def test_an_archive_with_bad_images(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        """The good ones are written, the bad ones are named, and the run has failed."""
        packed(tmp_path / "all.zip", folder, broken=b"hello there")
        out = ["--out", tmp_path / "out", *where]
        said = fails("segment", tmp_path / "all.zip", *out)
        assert "1 of 3 images of the zip could not be segmented" in said
        assert "broken.png: " in said
        assert "not a format" in said
        assert left(tmp_path / "out") == ["all/a_mask.png", "all/day 2/a_mask.png", "all/report.json", "run.json"]
        entry = report_of(tmp_path / "out")["inputs"][0]
        assert entry["status"] == "failed"
        assert "broken.png" in entry["error"]["detail"]
        assert len(entry["outputs"]) == 3
        # It is tried again, and it may be one of many inputs.
        fails("segment", tmp_path / "all.zip", *out, "--resume")
        assert "1 of 2 failed" in fails("segment", tmp_path / "all.zip", folder / "a.png", *out)

    def test_an_archive_has_no_one_file_of_its_answer(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        for name in ("all.zip", "all"):
            packed(tmp_path / name, folder)
            said = fails("segment", tmp_path / name, "-o", tmp_path / "out.zip", *where)
            assert "the answer to a zip of images has many; use --out FOLDER" in said
        assert not (tmp_path / "out.zip").exists()
        assert "one image or volume" in fails("compare", tmp_path / "all.zip", *where)

    def test_an_archive_is_known_by_what_is_in_it(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        packed(tmp_path / "all", folder)
        done("segment", tmp_path / "all", *where)
        assert left(tmp_path) == [
            "all", "all_answers/a_mask.png", "all_answers/day 2/a_mask.png", "all_answers/report.json",
            *(f"images/{name}" for name in left(folder)),
        ]  # fmt: skip
        (tmp_path / "x.zip").write_bytes((folder / "a.png").read_bytes())
        done("segment", tmp_path / "x.zip", *where)
        assert (tmp_path / "x_mask.png").exists()

    @pytest.mark.parametrize("jobs", [1, 4])
    def test_some_at_a_time(self, folder: Path, where: list[str], jobs: int) -> None:
        assert done("segment", folder, "--jobs", jobs, *where).count("fake") == 4

    def test_nothing_is_begun_that_cannot_end_well(self, folder: Path, fakes: Callable[..., None], tmp_path: Path) -> None:
        def opens(settings: object) -> None:
            pytest.fail("takes minutes")

        before = left(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("server.app.open_bundles", opens)
            assert "does not exist" in fails("segment", tmp_path / "none.png")
            assert "nothing matches" in fails("segment", folder / "*.gif")
            assert "an input or a reference" in fails("segment", folder / "a.png", "-o", folder / "a.png")
            assert "4 inputs" in fails("segment", folder, "-o", tmp_path / "x.png")
            assert "use --out" in fails("segment", folder / "a.png", "-o", tmp_path / "x.png", "--format", "png,json")
            assert "name it with --report" in fails("segment", folder, "--resume")
            assert "no report of unetpp" in fails("segment", folder, "--report", folder / "a.png")
            assert "--server" in fails("segment", folder, "--as-job")
            assert "--bundles" in fails("segment", folder, "--server", "http://x", "--bundles", tmp_path)
            assert "no address" in fails("segment", folder, "--server", "x")
            (tmp_path / "ca.pem").touch()
            both = ["--ca", tmp_path / "ca.pem", "--no-verify"]
            assert "name one of them" in fails("segment", folder, "--server", "https://x", *both)
            (folder / "a.jpg").touch()
            assert "the same name" in fails("segment", folder)
            (folder / "a.jpg").unlink()
        assert left(folder) == before

    def test_names_that_are_no_text(self, tmp_path: Path, where: list[str]) -> None:
        path = tmp_path / os.fsdecode(b"bad\xff.png")
        try:
            path.write_bytes(picture_bytes(np.eye(9, dtype=np.uint8)))
        except OSError:
            pytest.skip("this file system takes text only")
        said = done("segment", tmp_path, "--report", tmp_path / "run.json", *where)
        assert r"bad\xff_mask.png" in said
        assert states(tmp_path) == ["done"]

    def test_a_folder_of_answers_that_cannot_be_made(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "day 2").touch()
        said = fails("segment", folder, "--out", tmp_path / "out", *where)
        assert "2 of 4 failed" in said
        assert states(tmp_path / "out") == ["done", "done", "failed", "failed"]


class TestResume:
    @pytest.fixture
    def model_info(self, fakes: Callable[..., None]) -> list[int]:
        """Grows by each tile that an engine runs."""
        calls: list[int] = []

        def engine(tiles: Tiles) -> np.ndarray:
            calls.extend([1] * len(tiles.pixels))
            return bright(tiles)

        fakes(engine)
        return calls

    def test_what_is_done_is_left_out(self, folder: Path, tmp_path: Path, model_info: list[int]) -> None:
        out = ["--out", tmp_path / "out"]
        done("segment", folder, *out)
        assert len(model_info) == 4
        before = report_of(tmp_path / "out")["inputs"]
        assert "4 of 4 were done before" in done("segment", folder, *out, "--resume")
        assert len(model_info) == 4
        assert report_of(tmp_path / "out")["inputs"] == before
        # Without --resume all is done again.
        done("segment", folder, *out)
        assert len(model_info) == 8

    def test_what_has_changed_is_done_again(self, folder: Path, tmp_path: Path, model_info: list[int]) -> None:
        out = ["--out", tmp_path / "out", "--resume"]
        done("segment", folder, *out)
        (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
        (tmp_path / "out" / "day 2" / "a_mask.png").write_bytes(b"half")
        (tmp_path / "out" / "day 2" / "ü_mask.png").unlink()
        (folder / "new.png").write_bytes((folder / "b.png").read_bytes())
        assert "1 of 5 were done before" in done("segment", folder, *out)
        assert len(model_info) == 8
        assert (tmp_path / "out" / "a_mask.png").read_bytes() == (tmp_path / "out" / "b_mask.png").read_bytes()

    @pytest.mark.parametrize("options", [["--level", 1], ["--format", "json"], ["--nonfinite", "zero"]])
    def test_other_options_are_another_run(self, folder: Path, tmp_path: Path, model_info: list[int], options: list[Any]) -> None:
        out = ["--out", tmp_path / "out", "--resume"]
        done("segment", folder, *out)
        assert "before" not in done("segment", folder, *out, *options)
        assert len(model_info) == 8

    def test_another_network_is_another_run(self, folder: Path, tmp_path: Path, fakes: Callable[..., None]) -> None:
        out = ["--out", tmp_path / "out", "--resume"]
        done("segment", folder, *out)
        document = report_of(tmp_path / "out")
        document["model"]["sha256"] = "1" * 64
        (tmp_path / "out" / "run.json").write_text(json.dumps(document))
        assert "before" not in done("segment", folder, *out)

    def test_a_file_that_is_just_there_is_no_answer(self, folder: Path, tmp_path: Path, model_info: list[int]) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a_mask.png").write_bytes(b"from elsewhere")
        done("segment", folder, "--out", tmp_path / "out", "--resume")
        assert len(model_info) == 4

    def test_failures_are_tried_again(self, folder: Path, tmp_path: Path, model_info: list[int]) -> None:
        out = ["--out", tmp_path / "out", "--resume"]
        whole = (folder / "b.png").read_bytes()
        (folder / "b.png").write_bytes(b"")
        fails("segment", folder, *out)
        (folder / "b.png").write_bytes(whole)
        assert "3 of 4 were done before" in done("segment", folder, *out)
        assert states(tmp_path / "out") == ["done"] * 4


SLOW = """
import os, sys, time
import server.app
from server.cli import app
from tests.support.service import bright, fake_deployment
def slow(tiles):
    print("at work", flush=True)
    time.sleep(0.5)
    return bright(tiles)
server.app.open_bundles = lambda settings: fake_bundles(slow)
app(sys.argv[1:])
"""


@contextlib.contextmanager
def started(*arguments: object) -> "Iterator[subprocess.Popen[str]]":
    """The command in a process of its own, whose engine takes half a second and says so."""
    command = [sys.executable, "-c", SLOW, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        yield process


class TestInterrupted:
    """Real signals to real processes."""

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
    def test_half_way(self, folder: Path, tmp_path: Path, number: int, code: int) -> None:
        out = tmp_path / "out"
        with started("segment", folder, "--out", out, "--jobs", 1) as process:
            assert process.stdout
            while process.stdout.readline() != "at work\n":
                pass
            # The first is answered, the second is at work.
            while process.stdout.readline() != "at work\n":
                pass
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
        found = states(out)
        assert "done" not in found[1:]
        assert not [name for name in left(out) if name.endswith(".part")]
        if number == signal.SIGINT:
            assert found[0] == "done"
            assert "interrupted" in errors
        with started("segment", folder, "--out", out, "--resume", "--jobs", 1) as process:
            said, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert states(out) == ["done"] * 4
        assert said.count("at work") == 4 - found.count("done")

    def test_with_a_server(self, folder: Path, tmp_path: Path) -> None:
        go, begun = threading.Event(), threading.Event()

        def gated(tiles: Tiles) -> np.ndarray:
            begun.set()
            go.wait(60)
            return bright(tiles)

        with served(run=gated) as url, started("segment", folder, "--out", tmp_path / "out", "--server", url) as process:
            assert begun.wait(60)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            go.set()
        assert process.returncode == 130
        assert "Traceback" not in errors
        assert states(tmp_path / "out") == ["pending"] * 4

    def test_exit_codes(self, folder: Path) -> None:
        with started("segment", folder / "a.png") as process:
            process.communicate(timeout=60)
        assert process.returncode == 0
        (folder / "b.png").write_bytes(b"")
        with started("segment", folder) as process:
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "1 of 4 failed" in errors


class TestServer:
    def test_as_jobs(self, folder: Path, url: str) -> None:
        assert done("segment", folder, "--server", url, "--as-job").count("fake accurate") == 4
        said = fails("segment", folder / "a.png", "--server", url, "--as-job", "--deadline-ms", 5)
        assert "unknown parameter 'deadline_ms'" in said

    def test_large_volumes_are_jobs(self, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "x.nii.gz").write_bytes(nifti_bytes(VOLUME))
        submitted: list[object] = []
        from client.aio import AsyncClient

        submit = AsyncClient.submit
        monkeypatch.setattr(AsyncClient, "submit", lambda *a, **k: submitted.append(a) or submit(*a, **k))
        done("segment", tmp_path / "x.nii.gz", "--server", url)
        assert not submitted
        monkeypatch.setattr("client.remote.JOB_BYTES", 10)
        done("segment", tmp_path / "x.nii.gz", "--server", url)
        assert len(submitted) == 1
        done("segment", tmp_path / "x.nii.gz", "--server", url, "--deadline-ms", 60000)
        assert len(submitted) == 1

    def test_passwords_are_not_reported(self, folder: Path, tmp_path: Path, url: str) -> None:
        done("segment", folder, "--out", tmp_path / "out", "--server", url.replace("//", "//me:secret@"))
        assert report_of(tmp_path / "out")["server"] == url

    def test_is_gone(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("client.retry.Retries.wait_s", lambda *_: 0)
        assert "no server answers" in fails("segment", folder, "--server", "http://127.0.0.1:9")

    def test_goes_half_way(self, folder: Path, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was not begun is not tried, and a later run goes on from there."""
        from client.aio import AsyncClient
        from client.errors import Unreachable

        segment = AsyncClient.segment

        async def gone(self: AsyncClient, source: Path, **asked: Any) -> Any:
            if source.name == "b.png":
                raise Unreachable("no server answers at this address")
            return await segment(self, source, **asked)

        out = ["--out", tmp_path / "out", "--server", url, "--jobs", 1]
        with monkeypatch.context() as patch:
            patch.setattr(AsyncClient, "segment", gone)
            assert "no server answers" in fails("segment", folder, *out)
        assert states(tmp_path / "out") == ["done", "failed", "pending", "pending"]
        assert "1 of 4 were done before" in done("segment", folder, *out, "--resume")

    def test_one_that_takes_too_long_is_one_that_fails(self, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from client.aio import AsyncClient
        from client.errors import TimedOut

        segment = AsyncClient.segment

        async def late(self: AsyncClient, source: Path, **asked: Any) -> Any:
            if source.name == "b.png":
                raise TimedOut("the server did not answer in time")
            return await segment(self, source, **asked)

        monkeypatch.setattr(AsyncClient, "segment", late)
        assert "1 of 4 failed" in fails("segment", folder, "--server", url)

    def test_key(self, folder: Path, tmp_path: Path) -> None:
        from server.api.auth import make

        secret, line = make("lab")
        (tmp_path / "keys").write_text(line)
        (tmp_path / "key").write_text(f"{secret}\n")
        with served(auth={"keys_file": tmp_path / "keys"}) as url:
            for what in (["segment", folder], ["segment", folder / "a.png"], ["compare", folder / "a.png"]):
                said = fails(*what, "--server", url)
                assert "needs an API key" in said
                assert "--api-key-file" in said
            done("segment", folder, "--server", url, "--api-key-file", tmp_path / "key")

    def test_without_httpx(self, folder: Path) -> None:
        code = f"import sys\nsys.modules['httpx'] = None\nfrom server.cli import app\napp(['segment', {str(folder)!r}, '--server', 'http://x'])"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 1
        assert "pip install '.[client]'" in ran.stderr


def mha_bytes(voxels: np.ndarray) -> bytes:
    """(X, Y, Z) as MetaImage."""
    head = f"ObjectType = Image\nNDims = 3\nDimSize = {' '.join(map(str, voxels.shape))}\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
    return head.encode() + voxels.tobytes(order="F")


def nrrd_bytes(voxels: np.ndarray) -> bytes:
    """(X, Y, Z) as NRRD."""
    sizes = " ".join(map(str, voxels.shape))
    head = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: {sizes}\nencoding: raw\nspace: LPS\n"
    return (head + "space directions: (1,0,0) (0,1,0) (0,0,1)\n\n").encode() + voxels.tobytes(order="F")


def channels_bytes(pixels: np.ndarray) -> bytes:
    """(C, H, W) as an ImageJ TIFF."""
    out = io.BytesIO()
    tifffile.imwrite(out, pixels, imagej=True, metadata={"axes": "CYX"})
    return out.getvalue()


READABLE: dict[str, Callable[[], bytes]] = {
    "x.png": lambda: picture_bytes(VOLUME[..., 0]),
    "x.mha": lambda: mha_bytes(VOLUME),
    "x.nrrd": lambda: nrrd_bytes(VOLUME),
    "channels.tif": lambda: channels_bytes(np.stack([VOLUME[..., 0] * 0, VOLUME[..., 0]])),
    "grey16.tif": lambda: pages_bytes(VOLUME[None, ..., 0].astype(np.uint16) * 4),
}


class TestCompare:
    def test_an_image(self, folder: Path, where: list[str]) -> None:
        said = done("compare", folder / "a.png", *where)
        assert all(name in said for name in ("L1", "L2", "L3", "L4", "accurate", "agreement", "1.0000"))
        with Pillow.open(folder / "a_levels.png") as sheet:
            assert sheet.width > 6 * 180

    def test_scored(self, folder: Path, where: list[str], tmp_path: Path) -> None:
        done("segment", folder / "a.png", "-o", tmp_path / "truth.png", *where)
        said = done("compare", folder / "a.png", "--reference", tmp_path / "truth.png", "-o", tmp_path / "x.png", *where)
        assert "Dice" in said
        assert (tmp_path / "x.png").exists()
        assert not (folder / "a_levels.png").exists()

    @pytest.mark.parametrize("name", ["x.nii.gz", "x.tif"])
    def test_volumes_and_stacks(self, tmp_path: Path, where: list[str], name: str) -> None:
        (tmp_path / name).write_bytes(nifti_bytes(VOLUME) if name.endswith("gz") else pages_bytes(VOLUME))
        done("compare", tmp_path / name, *where)
        with Pillow.open(tmp_path / "x_levels.png") as sheet:
            assert min(sheet.size) > 640

    @pytest.mark.parametrize("name", ["x.png", "x.mha", "x.nrrd", "channels.tif", "grey16.tif"])
    def test_the_input_is_seen(self, tmp_path: Path, where: list[str], name: str) -> None:
        """Whatever the server reads is drawn by the server."""
        (tmp_path / name).write_bytes(READABLE[name]())
        done("compare", tmp_path / name, *where, *(["--channel", 1] if name == "channels.tif" else []))
        with Pillow.open(tmp_path / f"{Path(name).stem}_levels.png") as sheet:
            first = np.asarray(sheet.convert("L"))[8:160, 8:160]
        assert first.std() > 20

    def test_errors(self, folder: Path, where: list[str]) -> None:
        (folder / "c.png").write_text("hello there")
        assert "not a format" in fails("compare", folder / "c.png", *where)
        assert "an input or a reference" in fails("compare", folder / "a.png", "-o", folder / "a.png", *where)
        assert "'lungs'" in fails("compare", folder / "a.png", "--model", "lungs", *where)

    @pytest.mark.parametrize("option", ["--instances", "--level", "--format"])
    def test_what_it_chooses_itself(self, folder: Path, option: str) -> None:
        """With instances the mask would be numbers of objects, and the agreement that of object 1."""
        assert "No such option" in run("compare", folder / "a.png", option, 1).stderr

    def test_measures_each_graph(self, folder: Path, fakes: Callable[..., None]) -> None:
        """A level that sees nothing agrees with nothing."""
        from client.compare import agreement

        full, empty = np.ones((3, 3)), np.zeros((3, 3))
        assert agreement(full, empty, [1]) == 0
        assert agreement(empty, empty, [1]) == 1
        assert agreement(full, empty, [1, 2]) == 0.5


def test_an_error_of_ours_is_said_in_process(folder: Path, fakes: Callable[..., None]) -> None:
    def broken(tiles: Tiles) -> np.ndarray:
        raise Failed("engine of glass")

    fakes(broken)
    fails("segment", folder / "a.png")
