"""`unetpp add-levels`: the bundle with the new levels, and the command."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from export import add_levels as module
from export import cli_levels, levels
from export.add_levels import Observer, Options, add_levels, progress_file
from export.block import Block
from export.card import Card, ExportError, read_card
from export.class_overlap import iou_with, mean_agreement
from export.crops import Crops
from export.cut import cut
from export.data import pictures
from export.importing import HeadedGraph, headed
from export.levels import Distillation, split
from export.onnx_file import ImportRefused
from export.pack import import_network
from export.producer import from_bundle
from export.verify import runnable, verify
from export.weights import places
from model import checkpoint
from server.cli_utils import report_errors
from server.runtime.bundle import NETWORK, WEIGHTS, Bundle, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.golden import noise
from tests.support.networks import unetpp


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Smaller crops than those of a real run, and more measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(levels, "CROP", {2: 64, 3: 32})
        patch.setattr(levels, "ROUND", 10)
        yield


@pytest.fixture(scope="module")
def grown(
    quick: None, tmp_path_factory: pytest.TempPathFactory, deep_kept: Path, disc_images: Path
) -> module.Added:
    """Result of `add_levels` on the bundle of depth 3; do not write there."""
    out = tmp_path_factory.mktemp("grown") / "deep"
    return add_levels(read_bundle(deep_kept), disc_images, out, Options(max_steps=20, force=True))


# --- the bundle ---


def test_levels_are_added_and_said(grown: module.Added, disc_images: Path) -> None:
    manifest = grown.bundle.manifest
    assert manifest.levels == (1, 2, 3)
    assert [graph.name for graph in manifest.graphs] == ["L1", "L2", "L3", "accurate"]
    assert manifest.aggregation == "last"
    said = manifest.distilled
    assert said is not None
    assert (said.images, said.held_out, said.data) == (6, 2, disc_images.name)
    assert said.agreement == {level: round(value, 5) for level, value in grown.agreement.items()}
    # A shallower level costs less, and accurate costs what the deepest level does.
    costs = [graph.macs_per_pixel for graph in manifest.graphs]
    assert costs == sorted(costs)
    assert costs[2] == costs[3]
    assert not progress_file(grown.bundle.folder).exists()


def test_the_bundle_passes_verify(grown: module.Added) -> None:
    assert {verdict.graph for verdict in verify(grown.bundle)} == {"L1", "L2", "L3", "accurate"}


def test_the_deepest_answer_stays_the_same_to_the_bit(grown: module.Added, deep_kept: Path) -> None:
    before = read_bundle(deep_kept)
    tiles = noise(2, 3, [64, 96])
    compared = 0
    for graph in ("L3", "accurate"):
        for engine, precision in runnable(before):
            old, new = (
                ENGINES[engine].open(one.path(graph, precision), precision, "cpu", 1).run(tiles)
                for one in (before, grown.bundle)
            )
            np.testing.assert_array_equal(old, new)
            compared += 1
    assert compared >= 6
    with np.load(before.golden) as old, np.load(grown.bundle.golden) as new:
        for key in old.files:
            np.testing.assert_array_equal(old[key], new[key])


def test_added_levels_are_what_was_trained(disc_images: Path, grown: module.Added) -> None:
    """The graph on ONNX Runtime gives the agreement that the manifest says."""
    producer = from_bundle(grown.bundle)
    crops = Crops(pictures(disc_images, grown.bundle.manifest), grown.bundle.manifest, levels.CROP[2])
    held_out = split(len(crops), 0)[0]
    for level, value in grown.agreement.items():
        own = []
        for index in held_out:
            tiles = crops.cut(index, np.random.default_rng((0, index))).tiles
            own.append(iou_with(producer.reference("L3", tiles), producer.reference(f"L{level}", tiles), 0.5))
        assert mean_agreement(own) == pytest.approx(value, abs=5e-3)


def test_weights_are_stored_as_before_and_no_checkpoint_remains(grown: module.Added, deep_kept: Path) -> None:
    old, new = places(deep_kept / WEIGHTS), places(grown.bundle.folder / WEIGHTS)
    added = new.keys() - old.keys()
    assert old.keys() <= new.keys()
    assert {name.split("/")[1] for name in added} == {"L1", "L2"}
    assert {kind for kind, _, _ in new.values()} == {kind for kind, _, _ in old.values()}
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(grown.bundle.folder / WEIGHTS)


def test_bundle_with_measurements_loses_them(deep: Bundle, disc_images: Path, tmp_path: Path) -> None:
    path = deep.folder / "manifest.json"
    document = json.loads(path.read_text())
    row = {
        "graph": "L3", "precision": "fp32", "engine": "onnxruntime", "iou": 0.5, "mean_iou": 0.5, "dice": 0.5, "latency_ms": 1,
    }  # fmt: skip
    measured = {"data": "discs", "images": 1, "machine": "one", "rows": [row]}
    recommended = {"level": 3, "precision": "fp32", "why": "it is alone"}
    path.write_text(
        json.dumps(
            {**document, "calibration": {**measured, "recommended": recommended}, "held_out": measured}
        )
    )
    added = add_levels(
        read_bundle(deep.folder), disc_images, tmp_path / "out", Options(max_steps=1, force=True)
    )
    assert (added.bundle.manifest.calibration, added.bundle.manifest.held_out) == (None, None)
    assert added.bundle.manifest.recommended_level == 3


def test_imported_network_with_strided_levels_and_activation_inside(
    card: Card, disc_images: Path, tmp_path: Path
) -> None:
    """Levels of a network in float32 whose graph ends in its activation, so that the new heads do, too."""
    model = unetpp(heads=(3,), end="Sigmoid")
    # As of an input of twice the size: all of the network lies at stride 2 behind a first pooling.
    network = headed(strided(model), 2, 3)
    facts = {
        "dims": 2,
        "activation": "sigmoid",
        "activation_included": True,
        "input": {"normalization": "zscore"},
    }
    described = Card.model_validate(card.model_dump() | facts)
    bundle = import_network(network, described, tmp_path / "bundle")
    before = {name: (bundle.folder / name).read_bytes() for name in bundle.manifest.files}
    added = add_levels(bundle, disc_images, tmp_path / "out", Options(max_steps=1, force=True))
    verify(added.bundle)
    producer = from_bundle(added.bundle)
    assert producer.after.applied
    assert [producer.network.strides(head) for head in producer.levels.values()] == [(1, 1)] * 3
    ends = [producer.network.model.graph.node[-1].op_type]
    assert ends == ["Sigmoid"]
    # The bundle itself was not touched.
    assert {name: (bundle.folder / name).read_bytes() for name in bundle.manifest.files} == before


def strided(model: onnx.ModelProto) -> onnx.ModelProto:
    """Puts a pooling before a network and an enlargement behind its logits."""
    from onnx import helper, numpy_helper

    graph = model.graph
    for node in graph.node:
        node.input[:] = ["pooled" if name == "input" else name for name in node.input]
    end = graph.node[-1]
    graph.node.insert(
        0, helper.make_node("AveragePool", ["input"], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2])
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice"))
    end = graph.node[-1]
    resized = helper.make_node(
        "Resize", [end.input[0], "", "twice"], ["full"], "enlarge", mode="linear",
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    end.input[0] = "full"
    graph.node.insert(len(graph.node) - 1, resized)
    return model


@pytest.mark.parametrize("activation", ["softmax", "sigmoid-per-class"])
def test_volumes_of_several_classes(activation: str, tmp_path: Path, balls: Path) -> None:
    classes = 3 if activation == "softmax" else 2
    network = headed(unetpp(dims=3, channels=1, classes=classes, widths=(4, 5, 6), heads=(2,)), 3, 1)
    card = read_card(Path(module.__file__).parent / "cards" / "hippocampus.toml")
    facts = {
        "name": "volume", "dims": 3, "activation": activation, "input": {"normalization": "zscore"},
        "orientation": "RAS", "window": {"size": (16, 16, 16), "overlap": 0.5},
    }  # fmt: skip
    bundle = import_network(network, Card.model_validate(card.model_dump() | facts), tmp_path / "bundle")
    volumes = tmp_path / "volumes"
    shutil.copytree(balls / "images", volumes)
    added = add_levels(bundle, volumes, options=Options(max_steps=2, force=True))
    assert added.bundle.manifest.levels == (1, 2)
    assert added.bundle.folder == bundle.folder
    verify(added.bundle)


def test_level_below_the_bound_is_left_out_unless_forced(
    deep: Bundle, disc_images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Distillation, "round_to_float16", lambda *_: {1: 0.3, 2: 0.9})
    some = add_levels(deep, disc_images, tmp_path / "some", Options(max_steps=1))
    assert (some.bundle.manifest.levels, some.left_out) == ((2, 3), (1,))
    assert some.bundle.manifest.distilled.agreement == {2: 0.9}
    verify(some.bundle)
    forced = add_levels(deep, disc_images, tmp_path / "forced", Options(max_steps=1, force=True))
    assert (forced.bundle.manifest.levels, forced.left_out) == ((1, 2, 3), ())
    with pytest.raises(
        ExportError,
        match=r"no level agrees .* L1 0.30, L2 0.90 after 1 steps. Nothing was changed; --steps 2 trains on",
    ):
        add_levels(deep, disc_images, tmp_path / "none", Options(max_steps=1, min_agreement=0.95))
    assert not (tmp_path / "none").exists()
    # What was trained is not lost.
    assert progress_file(tmp_path / "none").is_file()
    # Further steps help only where it was the steps that ended.
    monkeypatch.setattr(levels, "PATIENCE", 0)
    with pytest.raises(ExportError, match="no level improved any more: give more images, or --force"):
        add_levels(deep, disc_images, tmp_path / "none", Options(max_steps=9, min_agreement=0.95))


def test_refusals(deep: Bundle, small_kept: Path, disc_images: Path, tmp_path: Path, card: Card) -> None:
    with pytest.raises(ExportError, match="has the levels 1, 2 already"):
        add_levels(read_bundle(small_kept), disc_images, tmp_path / "out")
    few = tmp_path / "few"
    few.mkdir()
    for k in range(3):
        shutil.copy(disc_images / f"{k}.png", few)
    (few / "notes.txt").write_text("no image")
    skipped: list[str] = []
    with pytest.raises(ExportError, match="3 images that can be used; at least 4 are needed"):
        add_levels(deep, few, tmp_path / "out", observer=Observer(skipped=skipped.append))
    assert len(skipped) == 1
    assert skipped[0].startswith("notes.txt: ")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        add_levels(deep, disc_images, tmp_path / "taken")
    assert not (tmp_path / "out").exists()


def imported(model: onnx.ModelProto, card: Card, out: Path) -> Bundle:
    facts = {"dims": 2, "activation": "sigmoid", "input": {"normalization": "zscore"}}
    return import_network(headed(model, 2, 3), Card.model_validate(card.model_dump() | facts), out)


def test_network_that_is_no_unetpp_is_refused(card: Card, disc_images: Path, tmp_path: Path) -> None:
    # A U-Net: one concatenation.
    bundle = imported(unetpp(widths=(4, 5), heads=(1,)), card, tmp_path / "unet")
    with pytest.raises(ExportError, match=r"no nodes .* were found"):
        add_levels(bundle, disc_images)


def test_operators_that_are_not_rebuilt_are_refused(card: Card, disc_images: Path, tmp_path: Path) -> None:
    model = unetpp(heads=(3,), widths=(4, 5, 6, 7))
    bundle = imported(model, card, tmp_path / "bundle")
    producer = from_bundle(bundle)
    changed = producer.network.model
    for node in changed.graph.node:
        if node.op_type == "Relu":
            node.op_type = "Softsign"
    unknown = HeadedGraph(cut(changed, producer.network.heads), 2, 3)
    start = next(one for one in unknown.candidates() if one.column == 1)
    with pytest.raises(ImportRefused, match="Softsign"):
        Block(unknown.model, start.start, "x0_1", 4, 1, 2)


def test_levels_trained_on_labels_say_so(deep: Bundle, disc_images: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(disc_images, tmp_path / "images"))
    # Below the images, where they are no images.
    labels = images / "labels"
    labels.mkdir()
    for path in disc_images.iterdir():
        grey = np.asarray(Image.open(path)).mean(axis=-1)
        Image.fromarray(np.uint8(grey > 70)).save(labels / path.name)
    (labels / "notes.txt").write_text("no image")
    options, lines = Options(max_steps=1, force=True), []
    added = add_levels(deep, images, tmp_path / "out", options, labels, Observer(skipped=lines.append))
    assert (added.bundle.manifest.distilled.labels, lines) == ("labels", [])
    (labels / "0.png").unlink()
    again = add_levels(deep, images, tmp_path / "five", options, labels)
    assert again.bundle.manifest.distilled.images == 5


# --- the command ---


def command(*arguments: object):
    app = typer.Typer()
    app.command("add-levels")(report_errors(cli_levels.add_levels))
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["add-levels", *map(str, arguments)], env={"COLUMNS": "200"})


def test_command_adds_levels_and_says_what_next(deep: Bundle, disc_images: Path) -> None:
    result = command(deep.folder, "--images", disc_images, "--steps", 2, "--force")
    assert result.exit_code == 0, result.output
    assert read_bundle(deep.folder).manifest.levels == (1, 2, 3)
    assert "2 steps on 4 images; agreement on 2 others" in result.output
    assert f"next: unetpp verify {deep.folder}" in result.output
    assert (deep.folder / NETWORK).is_file()
    again = command(deep.folder, "--images", disc_images)
    assert (again.exit_code, "has the levels 1, 2, 3 already" in again.stderr) == (1, True)


def test_command_goes_on_after_ctrl_c(
    deep: Bundle, disc_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (deep.folder / "manifest.json").read_bytes()
    step = Distillation.step

    def stop(self: Distillation, *arguments) -> None:
        if self.steps == stop_at:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Distillation, "step", stop)
    arguments = (deep.folder, "--images", disc_images, "--steps", 12, "--force")
    stop_at = 1
    result = command(*arguments)
    assert (result.exit_code, "the same command starts anew" in result.stderr) == (1, True)
    assert not progress_file(deep.folder).exists()
    stop_at = 11
    result = command(*arguments)
    assert (result.exit_code, "interrupted, the bundle is as it was" in result.stderr) == (1, True)
    assert (deep.folder / "manifest.json").read_bytes() == before
    assert progress_file(deep.folder).is_file()
    assert "the same command goes on from" in result.stderr
    monkeypatch.setattr(Distillation, "step", step)
    other = command(*arguments, "--seed", 1)
    assert (other.exit_code, "another seed" in other.stderr) == (1, True)
    result = command(*arguments)
    assert (result.exit_code, "going on with" in result.output) == (0, True)
    assert "12 steps on 4 images" in result.output
    assert not progress_file(deep.folder).exists()
