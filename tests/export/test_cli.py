"""`unetpp export`, `verify`, `calibrate` and `add-uncertainty` as a person types them."""

import contextlib
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from export import calibrate as calibrate_module
from export import cli as export_cli
from export import cli_calibrate, pack
from export import verify as verify_module
from export.pack import write_manifest
from server.cli import app
from server.runtime.bundle import read_bundle

CARD = Path(pack.__file__).parent / "cards" / "nuclei.toml"


@pytest.fixture(scope="module")
def card_file(tmp_path_factory):
    """The nuclei card for a network without a channel for objects."""
    path = tmp_path_factory.mktemp("card") / "nuclei.toml"
    path.write_text(re.sub(r"^\[objects\]\n(\w.*\n)+", "", CARD.read_text(), flags=re.MULTILINE))
    return path


def unetpp(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})


def passed(*arguments):
    """The output of a command that ends well."""
    result = unetpp(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def failed(*arguments):
    """The output of a command that ends with exit code 1 and an error for a person."""
    result = unetpp(*arguments)
    assert result.exit_code == 1, result.output
    assert "error: " in result.stderr
    assert "Traceback" not in result.output
    return result.output


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module in (verify_module, calibrate_module):
        monkeypatch.setattr(module, "runnable", lambda bundle: [("onnxruntime", "fp32")])
    monkeypatch.setattr(calibrate_module, "LATENCY_RUNS", 1)
    monkeypatch.setattr(calibrate_module, "LATENCY_SIDE", {2: 32, 3: 32})


@pytest.fixture
def empty_graphs(monkeypatch):
    proto = pack.onnx.helper.make_model(pack.onnx.helper.make_graph([], "empty", [], []))
    monkeypatch.setattr(
        pack, "GRAPH_PRECISIONS", dict.fromkeys(("fp32", "fp16", "int8"), lambda source: proto)
    )
    monkeypatch.setattr(pack, "serve", lambda *_, **__: proto)


@pytest.mark.usefixtures("empty_graphs")
def test_export_says_what_it_wrote_and_what_is_next(small_checkpoint, card_file, tmp_path):
    out = tmp_path / "out"
    output = passed("export", small_checkpoint, "--card", card_file, "--out", out)
    assert f"{out}: 10 files" in output
    assert f"next: unetpp verify {out}" in output
    assert read_bundle(out).manifest.name == "nuclei"


def test_export_names_what_is_wrong(small_checkpoint, card_file, tmp_path):
    out, bad, card, data, precious = (
        tmp_path / name for name in ("out", "bad", "card.toml", "data", "precious")
    )
    bad.write_bytes(b"bad")
    card.write_text("name = 1")
    data.mkdir()
    precious.mkdir()
    assert "bad" in failed("export", bad, "--card", card_file, "--out", out)
    assert "precious" in failed("export", small_checkpoint, "--card", card_file, "--out", precious)
    assert "card.toml" in failed("export", small_checkpoint, "--card", card, "--out", out)
    assert "index.csv" in failed(
        "export", small_checkpoint, "--card", card_file, "--out", out, "--data", data
    )
    assert not out.exists()


def test_verify_prints_the_table_also_where_it_fails(small_bundle):
    output = passed("verify", small_bundle.folder)
    assert all(word in output for word in ("L1", "L2", "accurate", "onnxruntime", "ok"))
    assert "FAILED" not in output
    shutil.copy(small_bundle.folder / "L2.onnx", small_bundle.folder / "L1.onnx")
    # First the hash tells, then, with the hash mended, the comparison.
    assert "SHA-256" in failed("verify", small_bundle.folder)
    write_manifest(small_bundle.folder, small_bundle.manifest)
    output = failed("verify", small_bundle.folder)
    assert "L1 at fp32 on onnxruntime" in output
    assert "FAILED" in output


def test_calibrate_recommends_and_held_out_does_not(small_bundle, discs):
    assert "recommended: level" in passed("calibrate", small_bundle.folder, "--data", discs)
    calibration = read_bundle(small_bundle.folder).manifest.calibration
    assert [r.graph for r in calibration.rows] == ["L1", "L2", "accurate"]
    output = passed("calibrate", small_bundle.folder, "--data", discs, "--split", "train", "--held-out")
    assert "recommended" not in output
    manifest = read_bundle(small_bundle.folder).manifest
    assert manifest.calibration == calibration
    assert manifest.held_out.data == "discs, train split"


def test_calibrate_curve_alone_keeps_the_table(small_bundle, discs):
    before = read_bundle(small_bundle.folder).manifest
    assert "mode=auto: levels" in passed("calibrate", small_bundle.folder, "--data", discs, "--curve")
    after = read_bundle(small_bundle.folder).manifest
    assert after.depth_curve
    assert after.calibration == before.calibration


def test_calibrate_interrupted_shows_what_was_measured_and_writes_nothing(small_bundle, discs, monkeypatch):
    quality = calibrate_module._quality

    def interrupted(engine, manifest, graph, *rest):
        if graph.name == "L2":
            raise KeyboardInterrupt
        return quality(engine, manifest, graph, *rest)

    monkeypatch.setattr(calibrate_module, "_quality", interrupted)
    result = unetpp("calibrate", small_bundle.folder, "--data", discs)
    assert result.exit_code != 0
    assert "L1" in result.output
    assert read_bundle(small_bundle.folder).manifest.calibration is None


def test_calibrate_names_what_is_wrong(small_bundle, discs, tmp_path):
    assert "nowhere" in failed("calibrate", small_bundle.folder, "--data", discs, "--split", "nowhere")
    assert "manifest.json" in failed("calibrate", tmp_path, "--data", discs)
    data = shutil.copytree(discs, tmp_path / "data")
    (data / "labels" / "val1.png").write_bytes(b"")
    assert "labels/val1.png" in failed("calibrate", small_bundle.folder, "--data", data)


@pytest.mark.usefixtures("empty_graphs")
def test_progress_bars_end_at_their_total(
    small_checkpoint, small_bundle, card_file, discs, tmp_path, monkeypatch
):
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

    for module in (export_cli, cli_calibrate):
        monkeypatch.setattr(module, "progress", progress)
    passed("export", small_checkpoint, "--card", card_file, "--out", tmp_path / "out", "--data", discs)
    passed("verify", small_bundle.folder)
    passed("calibrate", small_bundle.folder, "--data", discs)
    # Three graphs: files of three precisions; pairs; both with head_std at fp32; and rows (two, as fp32 has
    # one) of two images.
    assert [(bar.completed, bar.total) for bar in bars] == [(11, 11), (11, 11), (12, 12)]


def test_add_uncertainty_says_what_is_next(small_bundle):
    document = json.loads((small_bundle.folder / "manifest.json").read_text())
    del document["head_std"], document["files"]["head_std.onnx"]
    (small_bundle.folder / "manifest.json").write_text(json.dumps(document))
    assert "next: unetpp verify" in passed("add-uncertainty", small_bundle.folder)
    assert read_bundle(small_bundle.folder).manifest.head_std
    assert "manifest.json" in failed("add-uncertainty", small_bundle.folder.parent)
