"""Agreement without labels: the table by hand, what it decides, and the page about it."""

import base64
import io
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from export import agreement as agreement_module
from export import calibrate as calibrate_module
from export.agreement import deepest_masks, measure_agreement, recommend
from export.calibrate import mean_overlap
from export.card import ExportError
from export.cli_calibrate import calibrate
from export.curve import write_curve
from export.data import pictures
from export.pack import write_manifest
from export.report import LEVEL_ONLY, REFERENCE_ONLY, _picture, _worst_of, write_report
from server.cli_utils import report_errors
from server.errors import BundleDamaged
from server.runtime.bundle import read_bundle
from server.runtime.calibration import AgreementRow
from server.runtime.engines import ENGINES
from server.segment.sliding_window import infer_offline

app = typer.Typer(pretty_exceptions_enable=False)
app.command("calibrate")(report_errors(calibrate))
app.command("other")(lambda: None)

PAIRS = [("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("onnxruntime", "int8")]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate_module, "LATENCY_RUNS", 1)
    monkeypatch.setattr(calibrate_module, "LATENCY_SIDE", {2: 32, 3: 32})
    for module in (agreement_module, calibrate_module):
        monkeypatch.setattr(module, "runnable", lambda bundle: PAIRS)
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_table_by_hand(small_bundle, discs):
    """Against masks computed here, with IoU written out."""
    manifest = small_bundle.manifest
    items = deepest_masks(small_bundle, [*pictures(discs, manifest)])
    advanced, shown = [], []
    measured = measure_agreement(
        small_bundle, items, "discs", advanced.append, lambda done, total: shown.append((done, total))
    )
    assert tuple(advanced) == measured.rows
    assert shown == [(k, 18) for k in range(1, 19)]  # graphs, precisions, images
    assert [(r.graph, r.precision) for r in measured.rows] == [
        (graph, precision) for graph in ("L1", "L2", "accurate") for precision in ("fp32", "fp16", "int8")
    ]
    masks = {}
    for graph, precision in {(r.graph, r.precision) for r in measured.rows}:
        engine = ENGINES["onnxruntime"].open(small_bundle.path(graph, precision), precision, "cpu", 1)
        masks[graph, precision] = [
            infer_offline(item.image, manifest, manifest.graph(graph), engine).classes > 0 for item in items
        ]

    def iou(a, b):
        return np.mean([(x & y).sum() / (x | y).sum() for x, y in zip(a, b, strict=True)])

    for row in measured.rows:
        own = masks[row.graph, row.precision]
        assert row.agreement == pytest.approx(iou(own, masks["L2", "fp32"]), abs=2e-5)
        assert row.fp32_agreement == pytest.approx(iou(own, masks[row.graph, "fp32"]), abs=2e-5)
    assert measured.row("L2", "fp32").agreement == 1
    assert measured.row("L1", "fp32").agreement < 1
    read = read_bundle(small_bundle.folder).manifest
    assert read.agreement == measured
    assert read.calibration is None
    assert read.recommended_level == measured.recommended.level


def test_empty_masks_decide_nothing(small_bundle, discs):
    """An empty mask agrees with an empty mask, so that any level would be recommended."""
    manifest = small_bundle.manifest.model_copy(update={"threshold": 0.9999})
    write_manifest(small_bundle.folder, manifest)
    before = (small_bundle.folder / "manifest.json").read_bytes()
    for option in ((), ("--curve",)):
        result = run(small_bundle.folder, "--images", discs / "images", *option)
        assert result.exit_code == 1
        assert "the deepest level finds nothing in 5 images" in result.stderr
    assert (small_bundle.folder / "manifest.json").read_bytes() == before


def test_what_was_written_meanwhile_stays(small_bundle, discs):
    """Two commands at once: the bundle was read before the other one wrote its table."""
    items = deepest_masks(small_bundle, [*pictures(discs, small_bundle.manifest)])
    measured = measure_agreement(small_bundle, items, "discs")
    calibrated = calibrate_module.calibrate(small_bundle, items, "discs", held_out=False)
    held_out = calibrate_module.calibrate(small_bundle, items, "others", held_out=True)
    curve = write_curve(small_bundle, items, "discs", "deepest level")
    read = read_bundle(small_bundle.folder).manifest
    assert (read.agreement, read.held_out, read.depth_curve) == (measured, held_out, curve)
    assert read.calibration.rows == calibrated.rows


@pytest.mark.parametrize("what", ["agreement", "calibration", "curve"])
def test_files_that_changed_meanwhile_are_not_taken_over(small_bundle, discs, what):
    """Neither a damaged file, nor a file of another export with its own manifest."""
    items = deepest_masks(small_bundle, [*pictures(discs, small_bundle.manifest)])

    def run_one():
        if what == "agreement":
            measure_agreement(small_bundle, items, "discs")
        elif what == "calibration":
            calibrate_module.calibrate(small_bundle, items, "discs", held_out=False)
        else:
            write_curve(small_bundle, items, "discs", "deepest level")

    written = (small_bundle.folder / "manifest.json").read_bytes()
    with small_bundle.golden.open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleDamaged):
        run_one()
    assert (small_bundle.folder / "manifest.json").read_bytes() == written
    write_manifest(small_bundle.folder, small_bundle.manifest)
    with pytest.raises(ExportError, match="was changed meanwhile; calibrate again"):
        run_one()


@pytest.mark.parametrize(("rows", "level", "precision"), [
    ({"L1_fp32": (0.96, 1, 2), "L2_fp32": (1, 1, 6)}, 1, "fp32"),
    ({"L1_fp32": (0.94, 1, 2), "L2_fp32": (1, 1, 6)}, 2, "fp32"),
    # A faster precision counts where it gives the same mask as fp32.
    ({"L1_fp32": (0.96, 1, 2), "L1_int8": (0.96, 0.996, 1), "L2_fp32": (1, 1, 6)}, 1, "int8"),
    ({"L1_fp32": (0.96, 1, 2), "L1_int8": (0.96, 0.994, 1), "L2_fp32": (1, 1, 6)}, 1, "fp32"),
])  # fmt: skip
def test_recommendation(small_kept, rows, level, precision):
    table = []
    for key, (agreement, same, latency) in rows.items():
        graph, at = key.split("_")
        row = {"graph": graph, "precision": at, "engine": "any", "agreement": agreement}
        table.append(AgreementRow(**row, fp32_agreement=same, latency_ms=latency))
    recommended = recommend(read_bundle(small_kept).manifest, table)
    assert (recommended.level, recommended.precision) == (level, precision)
    assert recommended.why.endswith("how good the masks are is not known")


def test_recommendation_of_one_level(deep):
    row = AgreementRow(
        graph="L3", precision="fp32", engine="any", agreement=1, fp32_agreement=1, latency_ms=2
    )
    assert recommend(deep.manifest, [row]).why.startswith("the only level; at fp32 it takes 2.0 ms")


def test_without_labels(small_bundle, discs, tmp_path):
    result = run(small_bundle.folder, "--images", discs / "images")
    assert result.exit_code == 0, result.output
    assert "agreement with L2" in result.output
    assert "IoU │" not in result.output
    assert "Measured without labels" in result.output
    manifest = read_bundle(small_bundle.folder).manifest
    assert (manifest.agreement.data, manifest.agreement.images) == ("images", 5)
    assert manifest.calibration is None
    page = (tmp_path / "calibration-small.html").read_text()
    assert "5 images of images without labels" in page
    assert "not a quality" in page
    assert not list(small_bundle.folder.glob("*.html"))


def test_with_labels(small_bundle, discs, tmp_path):
    assert run(small_bundle.folder, "--images", discs / "images").exit_code == 0
    result = run(
        small_bundle.folder, "--images", discs / "images", "--labels", discs / "labels", "--report", "r.html"
    )
    assert result.exit_code == 0, result.output
    assert "recommended: level" in result.output
    manifest = read_bundle(small_bundle.folder).manifest
    assert manifest.calibration.data == "images with labels of labels"
    assert manifest.calibration.images == 5
    # The other table stays, and the one with labels decides.
    assert manifest.agreement
    assert manifest.recommended_level == manifest.calibration.recommended.level
    assert "keeps its calibration" in run(small_bundle.folder, "--images", discs / "images").output
    assert manifest.calibration == read_bundle(small_bundle.folder).manifest.calibration
    whole = run(small_bundle.folder, "--data", discs, "--report", "data.html")
    assert whole.exit_code == 0, whole.output
    assert "discs, val split" in (tmp_path / "data.html").read_text()


def test_volumes_of_several_classes(volume_kept, balls, tmp_path):
    folder = shutil.copytree(volume_kept, tmp_path / "volume")
    assert run(folder, "--images", balls / "images").exit_code == 0
    for row in read_bundle(folder).manifest.agreement.rows:
        assert len(row.class_agreement) == 2
        assert row.agreement == pytest.approx(np.mean(row.class_agreement), abs=1e-4)
    result = run(folder, "--images", balls / "images", "--labels", balls / "labels")
    assert result.exit_code == 0, result.output
    assert "IoU anterior" in (tmp_path / "calibration-volume.html").read_text().replace(
        "IoU head", "IoU anterior"
    )


def test_mistakes_are_named(small_bundle, discs):
    before = (small_bundle.folder / "manifest.json").read_bytes()
    for arguments, words in (
        ((), "either --data"),
        (("--data", discs, "--images", discs), "either --data"),
        (("--data", discs, "--labels", discs), "--labels needs --images"),
        (("--images", discs, "--report", "nowhere/r.html"), "the folder nowhere does not exist"),
        (("--images", discs, "--held-out"), "--held-out and --precision need labels"),
        (("--images", small_bundle.folder), "no file that 'small' can take"),
        (("--images", discs / "images", "--labels", small_bundle.folder), "no image with a label"),
    ):
        result = run(small_bundle.folder, *arguments)
        assert result.exit_code == 1
        assert words in result.stderr
    assert (small_bundle.folder / "manifest.json").read_bytes() == before


def test_the_page_loads_nothing_and_escapes(small_bundle, discs, tmp_path):
    manifest = small_bundle.manifest
    items = deepest_masks(small_bundle, [*pictures(discs, manifest)])
    measured = measure_agreement(small_bundle, items, "<script>alert(1)</script>")
    write_report(tmp_path / "r.html", small_bundle, items, measured)
    page = (tmp_path / "r.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert re.findall(r"(?:src|href)=\"(?!data:image/png;base64,)", page) == []
    assert "http" not in page
    assert measured.recommended.why.split(";")[0].replace("'", "&#x27;") in page
    shown = re.findall(r"data:image/png;base64,([^\"]+)", page)
    # The plot, and the worst images of L1; L2 is what it is compared with.
    assert len(shown) == 3
    for one in shown:
        Image.open(io.BytesIO(base64.b64decode(one))).verify()
    assert "<p>It differs on none.</p>" in page
    assert page.count("<tr>") == len(measured.rows) + 1


def test_worst_images_come_first_and_are_coloured_where_they_differ(small_bundle, discs):
    manifest = small_bundle.manifest
    items = deepest_masks(small_bundle, [*pictures(discs, manifest, "train")])
    empty = [replace(items[0], label=np.zeros_like(items[0].label)), *items[1:]]
    section = _worst_of(small_bundle, 2, empty)
    assert re.findall(r"<figcaption>(.*?)</figcaption>", section) == ["images/train0.png: 0.000"]
    mask = np.zeros(items[0].image.size, np.uint8)
    label = mask.copy()
    mask[:10], label[-10:] = 1, 1
    image = np.asarray(Image.open(io.BytesIO(_picture(replace(items[0], label=label), mask))), float)
    for part, colour in ((image[:20], LEVEL_ONLY), (image[-20:], REFERENCE_ONLY)):
        tint = part.mean((0, 1)) - image[100:140].mean((0, 1))
        assert np.corrcoef(tint, colour)[0, 1] > 0.9


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3))
def test_agreement_bounds_what_any_labels_could_tell(seed, classes):
    """The rule by which precisions are enabled without labels: IoU falls by no more than 1 - agreement."""
    random = np.random.default_rng(seed)
    values = [*range(1, classes + 1)]
    exact = random.integers(0, classes + 1, 12).astype(np.uint8)
    near = np.where(random.random(12) < random.random(), random.integers(0, classes + 1, 12), exact)
    label = random.integers(0, classes + 1, 12).astype(np.uint8)
    lost = mean_overlap(exact, label, values)[0] - mean_overlap(near.astype(np.uint8), label, values)[0]
    assert lost <= 1 - mean_overlap(near.astype(np.uint8), exact, values)[0] + 1e-9


def test_unetpp_models_shows_agreement_under_its_own_heading(small_bundle, discs):
    from server.cli import app as unetpp

    assert run(small_bundle.folder, "--images", discs / "images").exit_code == 0
    result = CliRunner().invoke(
        unetpp, ["models", "--bundles", str(small_bundle.folder)], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "agreement with L2" in result.output
    assert "IoU ┃" not in result.output
    assert "5 images of images without labels" in result.output
