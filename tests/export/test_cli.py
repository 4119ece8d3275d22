"""`unetpp export`, `verify`, `calibrate` as a person types them."""

import contextlib
import functools
import json
import shutil

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from export import calibrate as calibrate_module
from export import cli as export_cli
from export import pack
from export import verify as verify_module
from export.pack import write_manifest
from server.cli import app
from server.runtime.bundle import read_bundle

CARD = str(pack.Path(pack.__file__).parent / "cards" / "nuclei.toml")


def unetpp(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def report_errors(result, *words):
    """Exit code 1 and one error for a person, no traceback."""
    assert result.exit_code == 1, result.output
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in result.stderr


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(verify_module, "runnable", lambda bundle: [("onnxruntime", "fp32")])
    monkeypatch.setattr(calibrate_module, "runnable", lambda bundle: [("onnxruntime", "fp32")])
    monkeypatch.setattr(calibrate_module, "LATENCY_RUNS", 1)
    monkeypatch.setattr(calibrate_module, "LATENCY_SIDE", {2: 32, 3: 32})


@pytest.mark.parametrize("command", ["export", "verify", "calibrate", "add-uncertainty"])
def test_help(command):
    result = unetpp(command, "--help")
    assert result.exit_code == 0
    assert command in result.output


def test_export(small_checkpoint, tmp_path, monkeypatch):
    proto = pack.onnx.helper.make_model(pack.onnx.helper.make_graph([], "empty", [], []))
    monkeypatch.setattr(pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16"), lambda graph, tiles: proto))
    result = unetpp("export", small_checkpoint, "--card", CARD, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'}: 9 files" in result.output
    assert f"next: unetpp verify {tmp_path / 'out'}" in result.output
    assert read_bundle(tmp_path / "out").manifest.name == "nuclei"


def test_export_says_what_is_wrong(small_checkpoint, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    report_errors(unetpp("export", tmp_path / "bad.safetensors", "--card", CARD, "--out", tmp_path / "out"), "bad.safetensors")
    (tmp_path / "precious").mkdir()
    report_errors(unetpp("export", small_checkpoint, "--card", CARD, "--out", tmp_path / "precious"), "is not a bundle")
    (tmp_path / "card.toml").write_text("name = 1")
    report_errors(
        unetpp("export", small_checkpoint, "--card", tmp_path / "card.toml", "--out", tmp_path / "out"),
        "card.toml: not a valid card",
    )
    (tmp_path / "data").mkdir()
    report_errors(
        unetpp("export", small_checkpoint, "--card", CARD, "--out", tmp_path / "out", "--data", tmp_path / "data"), "index.csv"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("quick")
def test_verify(small_bundle):
    result = unetpp("verify", small_bundle.folder)
    assert result.exit_code == 0, result.output
    for word in ("L1", "L2", "accurate", "onnxruntime", "ok"):
        assert word in result.output
    assert "FAILED" not in result.output


@pytest.mark.usefixtures("quick")
def test_verify_fails(small_bundle):
    shutil.copy(small_bundle.folder / "L2.onnx", small_bundle.folder / "L1.onnx")
    # First the hash tells, then, with the hash mended, the comparison.
    report_errors(unetpp("verify", small_bundle.folder), "L1.onnx", "SHA-256")
    write_manifest(small_bundle.folder, small_bundle.manifest)
    result = unetpp("verify", small_bundle.folder)
    report_errors(result, "L1 at fp32 on onnxruntime")
    # The table is shown all the same.
    assert "FAILED" in result.output


@pytest.mark.usefixtures("quick")
def test_calibrate(small_bundle, discs):
    result = unetpp("calibrate", small_bundle.folder, "--data", discs)
    assert result.exit_code == 0, result.output
    assert "recommended: level" in result.output
    calibration = read_bundle(small_bundle.folder).manifest.calibration
    assert [r.graph for r in calibration.rows] == ["L1", "L2", "accurate"]
    result = unetpp("calibrate", small_bundle.folder, "--data", discs, "--split", "train", "--held-out")
    assert result.exit_code == 0, result.output
    assert "recommended" not in result.output
    manifest = read_bundle(small_bundle.folder).manifest
    assert manifest.calibration == calibration
    assert manifest.held_out.data == "discs, train split"


@pytest.mark.usefixtures("quick")
def test_calibrate_interrupted(small_bundle, discs, monkeypatch):
    quality = calibrate_module._quality

    def interrupted(engine, manifest, graph, *rest):
        if graph.name == "L2":
            raise KeyboardInterrupt
        return quality(engine, manifest, graph, *rest)

    monkeypatch.setattr(calibrate_module, "_quality", interrupted)
    result = unetpp("calibrate", small_bundle.folder, "--data", discs)
    assert result.exit_code != 0
    # What was measured is shown; nothing is written.
    assert "L1" in result.output
    assert "onnxruntime" in result.output
    assert read_bundle(small_bundle.folder).manifest.calibration is None


@pytest.mark.usefixtures("quick")
def test_bars_end_where_they_should(small_checkpoint, small_bundle, discs, tmp_path, monkeypatch):
    """What is counted beforehand is what is then done."""
    proto = pack.onnx.helper.make_model(pack.onnx.helper.make_graph([], "empty", [], []))
    monkeypatch.setattr(pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16", "int8"), lambda graph, tiles: proto))
    pairs = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("onnxruntime", "fp16")]
    for module in (verify_module, calibrate_module):
        monkeypatch.setattr(module, "runnable", lambda bundle: pairs)
    bars = []

    @contextlib.contextmanager
    def progress(description, total=None):
        bar = Progress(disable=True)
        task = bar.add_task(description, total=total)
        bars.append(bar.tasks[0])
        yield functools.partial(bar.update, task)

    monkeypatch.setattr(export_cli, "_progress", progress)
    assert unetpp("export", small_checkpoint, "--card", CARD, "--out", tmp_path / "out", "--data", discs).exit_code == 0
    assert unetpp("verify", small_bundle.folder).exit_code == 0
    assert unetpp("calibrate", small_bundle.folder, "--data", discs).exit_code == 0
    # Three graphs: files of three precisions; pairs; both with the spread at fp32; and rows (two, as fp32 has one) of two images.
    assert [(bar.completed, bar.total) for bar in bars] == [(10, 10), (11, 11), (12, 12)]


def test_calibrate_says_what_is_wrong(small_bundle, discs, tmp_path):
    report_errors(unetpp("calibrate", small_bundle.folder, "--data", discs, "--split", "nowhere"), "no rows with split 'nowhere'")
    report_errors(unetpp("calibrate", tmp_path, "--data", discs), "manifest.json: not found")
    data = shutil.copytree(discs, tmp_path / "data")
    (data / "labels" / "val1.png").write_bytes(b"")
    report_errors(unetpp("calibrate", small_bundle.folder, "--data", data), "labels/val1.png")


@pytest.mark.usefixtures("quick")
def test_add_spread(small_bundle):
    document = json.loads((small_bundle.folder / "manifest.json").read_text())
    del document["head_std"], document["files"]["head_std.onnx"]
    (small_bundle.folder / "manifest.json").write_text(json.dumps(document))
    result = unetpp("add-uncertainty", small_bundle.folder)
    assert result.exit_code == 0, result.output
    assert "next: unetpp verify" in result.output
    assert read_bundle(small_bundle.folder).manifest.head_std
    report_errors(unetpp("add-uncertainty", small_bundle.folder.parent), "manifest.json: not found")
