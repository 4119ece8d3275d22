"""The table against independent arithmetic, and the recommendation on tables made by hand."""

import shutil

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from export import calibrate as calibrate_module
from export.calibrate import mean_overlap, recommend
from export.data import labelled
from export.pack import update_manifest
from export.verify import runnable
from model.reading import DataError
from server.runtime.bundle import read_bundle
from server.runtime.calibration import CalibrationRow, Measured
from server.segment.flips import flips
from server.segment.sliding_window import infer_offline


def calibrate(bundle, data, split, **options):
    """Calibrates on a split of a data folder."""
    images = [*labelled(data, split, bundle.manifest)]
    return calibrate_module.calibrate(bundle, images, f"{data.name}, {split} split", **options)


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    """Times are not what is tested here."""
    monkeypatch.setattr(calibrate_module, "LATENCY_RUNS", 1)
    monkeypatch.setattr(calibrate_module, "LATENCY_SIDE", {2: 32, 3: 32})


@pytest.fixture(scope="module")
def calibrated(small_kept, discs, tmp_path_factory):
    """A bundle that was measured once."""
    folder = shutil.copytree(small_kept, tmp_path_factory.mktemp("calibrated") / "small")
    advanced = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_module, "LATENCY_RUNS", 1)
        patch.setattr(calibrate_module, "LATENCY_SIDE", {2: 32, 3: 32})
        measured = calibrate(read_bundle(folder), discs, "val", held_out=False, advance=advanced.append)
    return folder, measured, advanced


def test_a_row_for_every_graph_precision_and_engine(calibrated):
    folder, measured, advanced = calibrated
    bundle = read_bundle(folder)
    pairs = runnable(bundle)
    assert {("onnxruntime", "fp32"), ("onnxruntime", "fp16"), ("onnxruntime", "int8")} <= set(pairs)
    for graph in ("L1", "L2", "accurate"):
        rows = [r for r in measured.rows if r.graph == graph]
        # At fp32 the fastest engine speaks for all.
        assert [r.precision for r in rows].count("fp32") == 1
        assert sorted((r.engine, r.precision) for r in rows if r.precision != "fp32") == sorted(
            p for p in pairs if p[1] != "fp32"
        )
    assert set(advanced) == set(measured.rows)
    assert len(advanced) == len(measured.rows)
    assert all((r.engine, r.precision) in runnable(bundle) for r in measured.rows)
    assert all(r.latency_ms > 0 for r in measured.rows)


def test_one_precision_anew_keeps_the_other_rows(calibrated, discs, tmp_path):
    folder = shutil.copytree(calibrated[0], tmp_path / "small")
    advanced = []
    again = calibrate(
        read_bundle(folder), discs, "val", held_out=False, precisions=["int8"], advance=advanced.append
    )
    assert {row.precision for row in advanced} == {"int8"}
    others = [row for row in calibrated[1].rows if row.precision != "int8"]
    assert [row for row in again.rows if row.precision != "int8"] == others
    assert len(again.rows) == len(calibrated[1].rows)
    assert read_bundle(folder).manifest.calibration.rows == again.rows


def test_rows_of_other_data_are_not_kept(calibrated, discs, tmp_path):
    folder = shutil.copytree(calibrated[0], tmp_path / "small")
    with pytest.raises(DataError, match="train split on this machine; measure all precisions"):
        calibrate(read_bundle(folder), discs, "train", held_out=False, precisions=["int8"])


def test_the_manifest_carries_it(calibrated):
    folder, measured, _ = calibrated
    calibration = read_bundle(folder).manifest.calibration
    assert calibration.rows == measured.rows
    assert calibration.data == "discs, val split"
    assert calibration.images == 2
    assert "core" in calibration.machine
    assert calibration.recommended == recommend(read_bundle(folder).manifest, measured)
    assert read_bundle(folder).manifest.held_out is None


@pytest.mark.parametrize("graph", ["L1", "accurate"])
def test_one_row_computed_independently(calibrated, discs, graph):
    """Decode, pad, run and score without any of the server's or the project's code."""
    folder, measured, _ = calibrated
    session = onnxruntime.InferenceSession(folder / f"{graph}.onnx", providers=["CPUExecutionProvider"])
    ious, means, dices = [], [], []
    for name in ("val0", "val1"):
        pixels = np.asarray(Image.open(discs / "images" / f"{name}.png")).astype(np.float32)
        truth = np.asarray(Image.open(discs / "labels" / f"{name}.png")) > 0
        height, width = truth.shape
        mean, std = pixels.mean((0, 1)), pixels.std((0, 1))
        padded = np.pad(pixels, [(0, -height % 16), (0, -width % 16), (0, 0)], mode="reflect")
        feed = {
            "image": padded.transpose(2, 0, 1)[None],
            "mean": mean.reshape(1, 3, 1, 1),
            "inverse_std": (1 / std).reshape(1, 3, 1, 1),
        }
        mask = session.run(None, feed)[0][0, 0, :height, :width] > 0.5
        iou = (mask & truth).sum() / (mask | truth).sum()
        background = (~mask & ~truth).sum() / (~mask | ~truth).sum()
        ious.append(iou)
        means.append((iou + background) / 2)
        dices.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
    # The network was not trained: the numbers are poor, but they must not be trivial.
    assert 0 < np.mean(ious) < 1
    row = measured.row(graph, "fp32")
    assert (row.iou, row.mean_iou, row.dice) == pytest.approx(
        (np.mean(ious), np.mean(means), np.mean(dices)), abs=2e-3
    )


def test_every_image_of_every_row_is_shown(small_bundle, discs, monkeypatch):
    pairs = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("onnxruntime", "int8"), ("openvino", "int8")]
    monkeypatch.setattr(calibrate_module, "runnable", lambda bundle: pairs)
    shown = []
    calibrate(
        small_bundle, discs, "val", held_out=True, on_progress=lambda done, total: shown.append((done, total))
    )
    total = 3 * 3 * 2  # graphs, rows of each (one of them for fp32), images
    assert shown == [(done, total) for done in range(1, total + 1)]


def test_held_out_decides_nothing(calibrated, discs):
    folder, _, _ = calibrated
    before = read_bundle(folder).manifest
    measured = calibrate(read_bundle(folder), discs, "train", held_out=True)
    after = read_bundle(folder).manifest
    assert after.held_out == measured
    assert (after.held_out.data, after.held_out.images) == ("discs, train split", 3)
    assert after.calibration == before.calibration
    assert after.model_copy(update={"held_out": None}) == before.model_copy(update={"held_out": None})


def test_calibrating_again_keeps_the_held_out_table_and_changes_no_scores(small_bundle, discs, monkeypatch):
    monkeypatch.setattr(calibrate_module, "runnable", lambda bundle: [("onnxruntime", "fp32")])
    held_out = calibrate(small_bundle, discs, "train", held_out=True)
    first = calibrate(read_bundle(small_bundle.folder), discs, "val", held_out=False)
    second = calibrate(read_bundle(small_bundle.folder), discs, "val", held_out=False)
    assert [(r.graph, r.iou, r.mean_iou, r.dice) for r in first.rows] == [
        (r.graph, r.iou, r.mean_iou, r.dice) for r in second.rows
    ]
    assert read_bundle(small_bundle.folder).manifest.held_out == held_out


def test_bad_data_leaves_the_manifest_alone(small_bundle, discs, tmp_path):
    data = shutil.copytree(discs, tmp_path / "data")
    (data / "images" / "val0.png").write_bytes(b"")
    before = (small_bundle.folder / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"images/val0\.png"):
        calibrate(small_bundle, data, "val", held_out=False)
    with pytest.raises(DataError, match="no rows with split 'none'"):
        calibrate(small_bundle, discs, "none", held_out=False)
    assert (small_bundle.folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(("mask", "truth", "values", "expected"), [
    # Foreground: 1 of 3 pixels; background: 1 of 3; Dice 2 * 1 / 4.
    ([1, 1, 0, 0], [0, 1, 1, 0], [1], [1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 3]),
    # Both empty counts one.
    ([0, 0], [0, 0], [1], [1] * 5), ([1, 1], [0, 0], [1], [0] * 5), ([1, 1], [1, 1], [1], [1] * 5),
    # IoU of class 1: 1/2, of class 2: 1/2, of class 3, in neither: 1; background 1.
    ([1, 1, 2, 0], [1, 2, 2, 0], [1, 2, 3], [2 / 3, 3 / 4, (2 / 3 + 2 / 3 + 1) / 3, 2 / 3, 2 / 3, 1, 1 / 2, 1 / 2, 1]),
])  # fmt: skip
def test_mean_overlap_by_hand(mask, truth, values, expected):
    assert mean_overlap(np.array([mask], np.uint8), np.array([truth], np.uint8), values) == pytest.approx(
        expected
    )


REST = {"L2_fp32": (0.8, 6), "accurate_fp32": (0.8, 7)}


@pytest.mark.parametrize(("rows", "level", "precision"), [
    # The shallowest that is good enough.
    ({"L1_fp32": (0.796, 2)} | REST, 1, "fp32"), ({"L1_fp32": (0.794, 2)} | REST, 2, "fp32"),
    # The best row is L2, and L1 is judged against it; or none is good enough, and the deepest is taken.
    ({"L1_fp32": (0.76, 2), "L2_fp32": (0.8, 6), "accurate_fp32": (0.765, 7)}, 2, "fp32"),
    ({"L1_fp32": (0.7, 2), "L2_fp32": (0.75, 6), "accurate_fp32": (0.8, 7)}, 2, "fp32"),
    # int8 that is within tolerance and faster; that loses too much; that is slower.
    ({"L1_fp32": (0.799, 4), "L1_int8": (0.797, 1)} | REST, 1, "int8"),
    ({"L1_fp32": (0.799, 4), "L1_int8": (0.79, 1)} | REST, 1, "fp32"),
    ({"L1_fp32": (0.799, 1), "L1_int8": (0.799, 4)} | REST, 1, "fp32"),
    # L1 at fp32 is within half a point of the best, but its int8, which `auto` would serve, is not.
    ({"L1_fp32": (0.797, 4), "L1_int8": (0.793, 1), "L2_int8": (0.799, 2)} | REST, 2, "int8"),
    # Of several engines the fastest within tolerance.
    ({"L1_fp32": (0.799, 4), "L1_int8_a": (0.7, 1), "L1_int8_b": (0.798, 2), "L1_int8_c": (0.799, 3)} | REST, 1, "int8"),
    ({"L1_fp32": (0.799, 4), "L1_int8_a": (0.7, 1), "L1_int8_b": (0.7, 2)} | REST, 1, "fp32"),
])  # fmt: skip
def test_recommend_goes_by_the_table(small_kept, rows, level, precision):
    table = []
    for key, (iou, latency) in rows.items():
        graph, at, engine = (*key.split("_"), "any")[:3]
        row = {"graph": graph, "precision": at, "engine": engine, "iou": iou, "mean_iou": iou, "dice": iou}
        table.append(CalibrationRow(**row, latency_ms=latency))
    measured = Measured(data="made by hand", images=1, machine="none", rows=tuple(table))
    recommended = recommend(read_bundle(small_kept).manifest, measured)
    assert (recommended.level, recommended.precision) == (level, precision)
    # The reason must not claim what is not so.
    best = max(iou for key, (iou, _) in rows.items() if "fp32" in key)
    (iou,) = {
        iou
        for key, (iou, _) in rows.items()
        if key.startswith(f"L{level}_") and f"{iou:.4f} and takes" in recommended.why
    }
    assert recommended.why.startswith(
        "the shallowest level within" if iou >= best - 0.005 else "the deepest level"
    )


def test_volumes_of_several_classes_have_a_dice_for_each(volume_kept, balls, tmp_path):
    folder = shutil.copytree(volume_kept, tmp_path / "volume")
    measured = calibrate(read_bundle(folder), balls, "val", held_out=False, precisions=["fp32"])
    assert {row.graph for row in measured.rows} == {"L1", "L2", "accurate"}
    for row in measured.rows:
        assert len(row.class_dice) == 2
        assert row.dice == pytest.approx(np.mean(row.class_dice), abs=1e-4)
        assert row.iou == pytest.approx(np.mean(row.class_iou), abs=1e-4)
    assert read_bundle(folder).manifest.calibration.rows == measured.rows


def test_flips_are_measured_at_fp32_where_the_network_knows_mirrors(small_kept, discs, tmp_path):
    folder = shutil.copytree(small_kept, tmp_path / "small")
    bundle = read_bundle(folder)
    update_manifest(bundle, mirror_axes=(0, 1))
    seen = []
    measured = calibrate(
        read_bundle(folder),
        discs,
        "val",
        held_out=False,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert [(row.graph, row.copies) for row in measured.flips] == [("L1", 4), ("L2", 4), ("accurate", 4)]
    manifest = read_bundle(folder).manifest
    engine = calibrate_module.open_fp32(bundle, "L2")
    ious = []
    for item in labelled(discs, "val", manifest):
        plain = infer_offline(
            item.image, manifest, manifest.graph("L2"), engine, copies=flips("flips", (0, 1))
        )
        ious.append(mean_overlap(plain.classes, item.label, [1])[0])
    row = next(row for row in measured.flips if row.graph == "L2")
    assert row.iou == pytest.approx(np.mean(ious), abs=1e-5)
    # Measuring int8 again keeps them.
    calibrate(read_bundle(folder), discs, "val", held_out=False, precisions=("int8",))
    assert read_bundle(folder).manifest.calibration.flips == measured.flips
    # A network that was not trained on mirrored inputs has none.
    update_manifest(read_bundle(folder), mirror_axes=None)
    assert calibrate(read_bundle(folder), discs, "val", held_out=False).flips == ()
