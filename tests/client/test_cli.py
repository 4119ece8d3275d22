"""`unetpp segment` and `unetpp compare`, by a small server on loopback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from client.files import sha256
from tests.client.conftest import CARD, FakeServer, run, zipped
from tests.conftest import ROOT
from tests.support.files import pages_bytes, pages_of, picture_bytes


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]


def states(folder: Path) -> list[str]:
    return [entry["status"] for entry in report_of(folder)["inputs"]]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_segment_writes_beside_the_inputs(folder: Path, fake_server: FakeServer) -> None:
    for _ in range(2):  # the answers of the first run are no inputs of the second
        assert (
            run("segment", folder, "--server", fake_server.url).stdout.count("fake accurate L2 fp32, 22 ms")
            == 4
        )
    assert [name for name in files(folder) if "_mask" in name] == [
        "a_mask.png",
        "b_mask.png",
        "day 2/a_mask.png",
        "day 2/ü_mask.png",
    ]
    pixels = np.asarray(Pillow.open(folder / "b.png"))
    assert np.array_equal(np.asarray(Pillow.open(folder / "b_mask.png")), pixels > pixels.mean())
    assert {name for _, name in fake_server.requests} == {"upload"}


def test_segment_into_folder_writes_report(folder: Path, fake_server: FakeServer, out: Path) -> None:
    url = fake_server.url.replace("//", "//me:secret@")
    run("segment", folder, "--out", out, "--format", "mask,json", "--level", 2, "--jobs", 4, "--server", url)
    assert files(out)[:2] == ["a_mask.png", "a_statistics.json"]
    report = report_of(out)
    assert report["options"] == {"format": "mask,json", "level": 2}
    assert report["model"] == {"name": "fake", "sha256": "0" * 64}
    assert report["server"] == fake_server.url
    entry = report["inputs"][0]
    assert entry["path"] == "../images/a.png"
    assert entry["sha256"] == sha256(folder / "a.png")
    assert [output["path"] for output in entry["outputs"]] == ["a_mask.png", "a_statistics.json"]
    served = {
        "mode": "accurate",
        "level": 2,
        "precision": "fp32",
        "engine": "onnxruntime",
        "timings_ms": {"decode": 1.5, "infer": 20},
    }
    assert entry.items() >= served.items()


def test_segment_to_one_file_with_reference(folder: Path, fake_server: FakeServer, tmp_path: Path) -> None:
    target = tmp_path / "x.png"
    done = run(
        "segment",
        folder / "a.png",
        "-o",
        target,
        "--reference",
        folder / "b.png",
        "--server",
        fake_server.url,
    )
    assert "IoU 1.0000  Dice 1.0000" in done.stdout
    assert target.exists()


def test_segment_of_stack_as_job(tmp_path: Path, fake_server: FakeServer) -> None:
    pages = np.random.default_rng(0).integers(0, 256, (3, 6, 5), dtype=np.uint8)
    (tmp_path / "x.tif").write_bytes(pages_bytes(pages))
    run("segment", tmp_path / "x.tif", "--server", fake_server.url, "--as-job")
    assert np.array_equal(pages_of((tmp_path / "x_mask.tiff").read_bytes()), pages > pages.mean())
    assert fake_server.requests == [("/jobs", "upload")]
    assert fake_server.jobs == {}


def test_segment_with_bad_file_does_the_others(folder: Path, fake_server: FakeServer, out: Path) -> None:
    (folder / "b.png").write_text("hello there")
    done = run("segment", folder, "--out", out, "--server", fake_server.url, code=1)
    assert f"1 of 4 failed:\n  {folder / 'b.png'}: a sentence" in done.stderr
    assert states(out) == ["done", "failed", "done", "done"]
    error = report_of(out)["inputs"][1]["error"]
    assert error == {"detail": "a sentence", "code": "unsupported-type", "status": 415, "request_id": "abc"}
    assert files(out) == ["a_mask.png", "day 2/a_mask.png", "day 2/ü_mask.png", "run.json"]


def test_segment_with_closed_output_folder_fails_for_its_inputs(
    folder: Path, fake_server: FakeServer, out: Path
) -> None:
    out.mkdir()
    (out / "day 2").touch()
    run("segment", folder, "--out", out, "--server", fake_server.url, code=1)
    assert states(out) == ["done", "done", "failed", "failed"]


def test_segment_of_zip_writes_a_folder(
    folder: Path, fake_server: FakeServer, tmp_path: Path, out: Path
) -> None:
    images = {name: (folder / name).read_bytes() for name in ("a.png", "day 2/a.png")}
    (tmp_path / "all.zip").write_bytes(zipped(images))
    run("segment", tmp_path / "all.zip", "--out", out, "--server", fake_server.url)
    assert files(out) == ["all/a_mask.png", "all/day 2/a_mask.png", "all/report.json", "run.json"]
    assert fake_server.requests == [("/jobs", "upload")]
    (tmp_path / "all.zip").write_bytes(zipped(images | {"broken.png": b"hello"}))
    done = run("segment", tmp_path / "all.zip", "--out", out, "--server", fake_server.url, code=1)
    assert "broken.png: not an image" in done.stderr
    (entry,) = report_of(out)["inputs"]
    assert (entry["status"], len(entry["outputs"])) == ("failed", 3)
    run("compare", tmp_path / "all.zip", "--server", fake_server.url, code=1)


def test_names_that_are_not_text(tmp_path: Path, fake_server: FakeServer) -> None:
    path = tmp_path / os.fsdecode(b"bad\xff.png")
    try:
        path.write_bytes(picture_bytes(np.eye(9, dtype=np.uint8)))
    except OSError:
        pytest.skip("this file system takes text only")
    done = run("segment", tmp_path, "--report", tmp_path / "run.json", "--server", fake_server.url)
    assert r"bad\xff_mask.png" in done.stdout
    assert states(tmp_path) == ["done"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["{tmp}/none.png"],
        ["{images}/*.gif"],
        ["{images}/a.png", "-o", "{images}/a.png"],
        ["{images}", "-o", "{tmp}/x.png"],
        ["{images}/a.png", "-o", "{tmp}/x.png", "--format", "mask,json"],
        ["{images}", "--resume"],
        ["{images}", "--report", "{images}/a.png"],
        ["{images}", "--level", "9"],
        ["{images}", "--precision", "fp8"],
        ["{images}", "--min-size-px", "1", "--min-size-mm2", "1"],
        ["{images}", "--as-job"],
        ["{images}", "--server", "http://x", "--bundles", "{tmp}"],
        ["{images}", "--server", "x"],
        ["{images}", "--server", "https://x", "--ca", "{images}/a.png", "--no-verify"],
    ],
    ids=lambda arguments: " ".join(arguments[1:]) or arguments[0],
)
def test_segment_with_wrong_arguments_starts_nothing(
    folder: Path, tmp_path: Path, arguments: list[str]
) -> None:
    before = files(tmp_path)
    done = run("segment", *(one.format(tmp=tmp_path, images=folder) for one in arguments), code=1)
    assert done.stderr.startswith("error: ")
    assert files(tmp_path) == before


def test_resume_skips_what_is_complete(folder: Path, fake_server: FakeServer, out: Path) -> None:
    arguments = ["segment", folder, "--out", out, "--resume", "--server", fake_server.url]
    run(*arguments)
    before = report_of(out)["inputs"]
    assert "4 of 4 were done before" in run(*arguments).stdout
    assert report_of(out)["inputs"] == before
    assert len(fake_server.requests) == 4
    (folder / "a.png").write_bytes((folder / "b.png").read_bytes())
    (out / "day 2" / "a_mask.png").write_bytes(b"half")
    (folder / "b.png").write_bytes(b"")
    assert "1 of 4 were done before" in run(*arguments, code=1).stdout
    assert states(out) == ["done", "failed", "done", "done"]
    assert len(fake_server.requests) == 7
    assert "before" not in run(*arguments, "--level", 1, code=1).stdout


def test_segment_with_key_from_file(folder: Path, fake_server: FakeServer, out: Path) -> None:
    (folder / "b.png").unlink()
    fake_server.key = "k1"
    done = run("segment", folder, "--out", out, "--server", fake_server.url, code=1)
    assert "--api-key-file" in done.stderr
    assert not out.joinpath("run.json").exists()
    (folder / "key").write_text("k1\n")
    key = ["--api-key-file", folder / "key"]
    run("segment", folder, "--out", out, "--server", fake_server.url, *key)
    assert states(out) == ["done"] * 3


def test_server_without_httpx_names_the_extra(folder: Path) -> None:
    script = (
        "import sys\nsys.modules['httpx'] = None\nfrom tests.client.conftest import app\napp(sys.argv[1:])"
    )
    command = [sys.executable, "-c", script, "segment", folder, "--server", "http://x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert "'.[client]'" in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["ctrl-c", "kill"]
)
def test_interrupted_run_keeps_a_true_report(
    folder: Path, fake_server: FakeServer, out: Path, number: int, code: int
) -> None:
    fake_server.hold.clear()
    fake_server.free = 1
    script = "import sys\nfrom tests.client.conftest import app\napp(sys.argv[1:])"
    arguments = ["segment", folder, "--out", out, "--server", fake_server.url, "--jobs", "1", "--resume"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert fake_server.held.wait(60)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == ("interrupted\n" if code == 130 else "")
    assert fake_server.cancelled.wait(60)
    before = states(out)
    assert before[1:] == ["pending"] * 3
    assert files(out) == ["a_mask.png", "run.json"]
    fake_server.hold.set()
    run(*arguments)
    assert states(out) == ["done"] * 4
    assert len(fake_server.requests) == 6 - before.count("done")


def test_compare_shows_every_level(folder: Path, fake_server: FakeServer, tmp_path: Path) -> None:
    arguments = ["compare", folder / "a.png", "--server", fake_server.url, "--threshold", 0.5]
    done = run(*arguments)
    assert all(word in done.stdout for word in ("L1", "L2", "accurate", "agreement", "1.0000"))
    with Pillow.open(folder / "a_levels.png") as sheet:
        assert sheet.width > 4 * 180
    done = run(*arguments, "--reference", folder / "b.png", "-o", tmp_path / "x.png")
    assert "Dice" in done.stdout
    assert (tmp_path / "x.png").exists()


def test_compare_shows_auto_where_the_model_has_a_curve(
    folder: Path, fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["compare", folder / "a.png", "--server", fake_server.url]
    assert "auto (" not in run(*arguments).stdout
    monkeypatch.setitem(CARD, "auto", True)
    fake_server.queries.clear()
    assert "auto (L2)" in run(*arguments, "--max-loss", 0.5).stdout
    assert {one["mode"]: one.get("max_loss") for one in fake_server.queries} == {
        "fast": None,
        "auto": "0.5",
        "accurate": None,
    }


def test_compare_of_stack_shows_mosaics(tmp_path: Path, fake_server: FakeServer) -> None:
    (tmp_path / "x.tif").write_bytes(
        pages_bytes(np.random.default_rng(0).integers(0, 256, (3, 6, 5), dtype=np.uint8))
    )
    run("compare", tmp_path / "x.tif", "--server", fake_server.url)
    with Pillow.open(tmp_path / "x_levels.png") as sheet:
        assert min(sheet.size) > 640


@pytest.mark.parametrize(
    ("arguments", "code"), [(["-o", "{images}/a.png"], 1), (["--instances"], 2), (["--level", "1"], 2)]
)
def test_compare_with_wrong_arguments(
    folder: Path, fake_server: FakeServer, arguments: list[str], code: int
) -> None:
    """With instances the mask would be numbers of objects, whose agreement says nothing."""
    given = [one.format(images=folder) for one in arguments]
    run("compare", folder / "a.png", "--server", fake_server.url, *given, code=code)


def test_agreement_is_the_mean_iou_of_classes() -> None:
    from client.compare import agreement

    full, empty = np.ones((3, 3)), np.zeros((3, 3))
    assert [agreement(full, empty, [1]), agreement(empty, empty, [1]), agreement(full, empty, [1, 2])] == [
        0,
        1,
        0.5,
    ]
