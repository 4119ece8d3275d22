"""Levels by distillation: training on images without labels, and the bundle that comes of it."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from export import add_levels as module
from export import cli_levels
from export.add_levels import Observer, Options, add_levels, progress_file
from export.block import state
from export.card import Card, ExportError, read_card
from export.class_overlap import iou_with, mean_agreement
from export.crops import Crops
from export.cut import cut
from export.data import pictures
from export.golden import synthetic_cells
from export.importing import HeadedGraph, headed
from export.levels import ROUND, Distillation, split
from export.onnx_file import ImportRefused
from export.pack import export, import_network
from export.producer import from_bundle
from export.verify import runnable, verify
from export.weights import places
from model import checkpoint
from model.config import UNetPlusPlusConfig
from model.losses import deep_supervision_loss
from model.network import UNetPlusPlus
from server.cli_utils import report_errors
from server.runtime.bundle import NETWORK, WEIGHTS, Bundle, read_bundle
from server.runtime.engines import ENGINES
from server.runtime.golden import noise
from tests.support.networks import unetpp

SIDE = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of discs, in a folder without an index."""
    root = tmp_path_factory.mktemp("images") / "discs"
    root.mkdir()
    for seed in range(6):
        Image.fromarray(synthetic_cells((SIDE, SIDE + 13), 3, seed)).save(root / f"{seed}.png")
    return root


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, card: Card, images: Path) -> Path:
    """A bundle of depth 3 whose loss stood on the last head alone, in fp32, fp16 and int8; do not write there."""
    folder = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    config = UNetPlusPlusConfig(in_channels=3, widths=(4, 6, 8, 10), deep_supervision=False, norm="batch")
    network = UNetPlusPlus(config).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        pixels = np.stack([synthetic_cells((48, 48), 3, 100 + 4 * step + k) for k in range(4)])
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
        labels = (values.mean(1) > 70).long()
        spread, mean = torch.std_mean(values, dim=(2, 3), keepdim=True)
        loss = deep_supervision_loss(network((values - mean) / spread), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    checkpoint.save(network.eval(), folder / "deep.safetensors", {"epoch": 1})
    export(folder / "deep.safetensors", card, folder / "deep", images)
    return folder / "deep"


@pytest.fixture
def deep(kept: Path, tmp_path: Path) -> Bundle:
    """A copy of it."""
    return read_bundle(Path(shutil.copytree(kept, tmp_path / "deep")))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, kept: Path, images: Path) -> module.Added:
    """What `add_levels` makes of it; do not write there."""
    out = tmp_path_factory.mktemp("grown") / "deep"
    return add_levels(read_bundle(kept), images, out, Options(max_steps=100, min_agreement=0.5))


def crops_of(bundle: Bundle, images: Path) -> Crops:
    return Crops(pictures(images, bundle.manifest), bundle.manifest, SIDE)


def distillation(bundle: Bundle, progress: Path, run: str = "run", seed: int = 0) -> Distillation:
    return Distillation(from_bundle(bundle), progress, run, seed=seed)


def tensors(one: Distillation) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state([*one.blocks.values()])]


def ignore(steps: int, agreement: dict[int, float]) -> None:
    """Callback that does nothing."""


# --- training ---


def test_agreement_rises_on_held_out_images(kept: Path, images: Path, tmp_path: Path) -> None:
    bundle = read_bundle(kept)
    one, crops = distillation(bundle, tmp_path / "progress"), crops_of(bundle, images)
    before = one.measure(crops, split(len(crops), 0)[0])
    after = one.train(crops, 2 * ROUND, ignore)
    assert before.keys() == after.keys() == {1, 2}
    assert all(after[level] > before[level] for level in after), (before, after)
    # The blocks have the weights that were measured.
    assert one.measure(crops, split(len(crops), 0)[0]) == after


def test_held_out_images_are_never_trained_on(
    kept: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(kept)
    one, crops = distillation(bundle, tmp_path / "progress"), crops_of(bundle, images)
    held_out, train = split(len(crops), 0)
    seen: set[int] = set()
    step, cut_out = one.step, crops.cut

    def spied(index: int, random: np.random.Generator):
        seen.add(index)
        return cut_out(index, random)

    def stepped(*arguments):
        monkeypatch.setattr(crops, "cut", spied)
        step(*arguments)
        monkeypatch.setattr(crops, "cut", cut_out)

    monkeypatch.setattr(one, "step", stepped)
    one.train(crops, ROUND, ignore)
    assert seen == {*train}
    assert not seen & {*held_out}


@pytest.mark.parametrize(("images", "held_out"), [(4, 1), (6, 2), (100, 20), (1000, 24)])
def test_split_holds_a_share_out(images: int, held_out: int) -> None:
    first, second = split(images, 3)
    assert len(first) == held_out
    assert sorted(first + second) == [*range(images)]


def test_resumed_run_gives_the_same_as_an_uninterrupted_one(kept: Path, images: Path, tmp_path: Path) -> None:
    bundle = read_bundle(kept)
    crops = crops_of(bundle, images)
    whole = distillation(bundle, tmp_path / "whole")
    expected = whole.train(crops, 3 * ROUND, ignore)

    def stop(steps: int, agreement: dict[int, float]) -> None:
        # In the middle of the second round.
        if steps == ROUND + 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distillation(bundle, tmp_path / "parts").train(crops, 3 * ROUND, stop)
    resumed = distillation(bundle, tmp_path / "parts")
    assert resumed.steps == ROUND
    assert resumed.train(crops, 3 * ROUND, ignore) == expected
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), tensors(whole), strict=True))
    # Differs by seed.
    other = distillation(bundle, tmp_path / "other", seed=1)
    assert not all(torch.equal(a, b) for a, b in zip(tensors(other), tensors(whole), strict=True))


def test_training_ends_when_nothing_improves(
    kept: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(kept)
    one = distillation(bundle, tmp_path / "progress")
    values = itertools.chain([0.5, 0.7, 0.6, 0.7], itertools.repeat(0.1))
    monkeypatch.setattr(one, "measure", lambda *_: dict.fromkeys((1, 2), next(values)))
    steps = []
    monkeypatch.setattr(one, "step", lambda *_: steps.append(1))
    monkeypatch.setattr(one, "save", lambda: None)
    assert one.train(crops_of(bundle, images), 1000, ignore) == {1: 0.7, 2: 0.7}
    assert len(steps) == 5 * ROUND


def test_progress_of_another_run_or_damaged_is_refused(deep: Bundle, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "progress"
    distillation(deep, path).train(crops_of(deep, images), ROUND, ignore)
    with pytest.raises(ExportError, match="of a run on another bundle, other images or another seed"):
        distillation(deep, path, run="other")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ExportError, match=r"damaged .* remove it to start anew"):
        distillation(deep, path)


def test_images_of_nothing_are_refused(deep: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "black"
    folder.mkdir()
    for k in range(4):
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / f"{k}.png")
    one = distillation(deep, tmp_path / "progress")
    one._teach = lambda tiles: (dict.fromkeys(one._outputs), np.zeros((1, 1, 8, 8), np.float32))
    one._logits = lambda level, features: torch.zeros(1, 1, 8, 8) - 1
    with pytest.raises(ExportError, match="finds nothing in 1 of the images"):
        one.train(crops_of(deep, folder), ROUND, ignore)


@pytest.mark.parametrize(
    ("scores", "deepest", "expected"),
    [
        ([[0.6, 0.6, 0.2, 0.2]], [[0.6, 0.2, 0.6, 0.2]], 1 / 3),
        ([[0.1, 0.1, 0.2, 0.2]], [[0.1, 0.2, 0.3, 0.2]], None),
        ([[0.1, 0.1, 0.2, 0.2]], [[0.1, 0.2, 0.9, 0.2]], 0),
        ([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]], [[0, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 0]], 1 / 2),
    ],
    ids=["one class", "neither has any", "one is empty", "several classes"],
)
def test_iou_with_the_deepest(scores: list, deepest: list, expected: float | None) -> None:
    one, other = (np.array(values, np.float32)[None, :, None] for values in (scores, deepest))
    assert iou_with(other, one, 0.5) == (expected if expected is None else pytest.approx(expected))


def test_images_without_foreground_do_not_count() -> None:
    assert mean_agreement([None, 0.5, None, 0.7]) == pytest.approx(0.6)
    assert mean_agreement([None]) is None


# --- the bundle ---


def test_levels_are_added_and_said(grown: module.Added, images: Path) -> None:
    manifest = grown.bundle.manifest
    assert manifest.levels == (1, 2, 3)
    assert [graph.name for graph in manifest.graphs] == ["L1", "L2", "L3", "accurate"]
    assert manifest.aggregation == "last"
    said = manifest.distilled
    assert said is not None
    assert (said.images, said.held_out, said.data) == (6, 2, images.name)
    assert said.agreement == {level: round(value, 5) for level, value in grown.agreement.items()}
    assert min(grown.agreement.values()) >= 0.8
    # The network without a level less is what that level costs; a head more is all that the levels add.
    costs = [graph.macs_per_pixel for graph in manifest.graphs]
    assert costs == sorted(costs)
    assert costs[2] == costs[3]
    assert not progress_file(grown.bundle.folder).exists()


def test_the_bundle_passes_verify(grown: module.Added) -> None:
    assert {verdict.graph for verdict in verify(grown.bundle)} == {"L1", "L2", "L3", "accurate"}


def test_the_deepest_answer_stays_the_same_to_the_bit(grown: module.Added, kept: Path) -> None:
    before = read_bundle(kept)
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


def test_added_levels_are_what_was_trained(
    kept: Path, images: Path, tmp_path: Path, grown: module.Added
) -> None:
    """The graph on ONNX Runtime gives the agreement that the manifest says."""
    producer = from_bundle(grown.bundle)
    crops = crops_of(grown.bundle, images)
    # As large as the run itself cuts them.
    crops._side = distillation(read_bundle(kept), tmp_path / "none").crop_side
    held_out = split(len(crops), 0)[0]
    for level, value in grown.agreement.items():
        own = []
        for index in held_out:
            tiles = crops.cut(index, np.random.default_rng((0, index)))
            own.append(iou_with(producer.reference("L3", tiles), producer.reference(f"L{level}", tiles), 0.5))
        assert mean_agreement(own) == pytest.approx(value, abs=5e-3)


def test_weights_are_stored_as_before_and_no_checkpoint_remains(grown: module.Added, kept: Path) -> None:
    old, new = places(kept / WEIGHTS), places(grown.bundle.folder / WEIGHTS)
    added = new.keys() - old.keys()
    assert old.keys() <= new.keys()
    assert {name.split("/")[1] for name in added} == {"L1", "L2"}
    assert {kind for kind, _, _ in new.values()} == {kind for kind, _, _ in old.values()}
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(grown.bundle.folder / WEIGHTS)


def test_bundle_with_measurements_loses_them(deep: Bundle, images: Path, tmp_path: Path) -> None:
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
    added = add_levels(read_bundle(deep.folder), images, tmp_path / "out", Options(max_steps=1, force=True))
    assert (added.bundle.manifest.calibration, added.bundle.manifest.held_out) == (None, None)
    assert added.bundle.manifest.recommended_level == 3


def test_imported_network_with_strided_levels_and_activation_inside(
    card: Card, images: Path, tmp_path: Path
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
    added = add_levels(bundle, images, tmp_path / "out", Options(max_steps=1, force=True))
    verify(added.bundle)
    producer = from_bundle(added.bundle)
    assert producer.after.applied
    assert [producer.network.stride(head) for head in producer.levels.values()] == [1, 1, 1]
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
    deep: Bundle, images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Distillation, "round_to_float16", lambda *_: {1: 0.3, 2: 0.9})
    some = add_levels(deep, images, tmp_path / "some", Options(max_steps=1))
    assert (some.bundle.manifest.levels, some.left_out) == ((2, 3), (1,))
    assert some.bundle.manifest.distilled.agreement == {2: 0.9}
    verify(some.bundle)
    forced = add_levels(deep, images, tmp_path / "forced", Options(max_steps=1, force=True))
    assert (forced.bundle.manifest.levels, forced.left_out) == ((1, 2, 3), ())
    with pytest.raises(
        ExportError, match=r"no level agrees .* L1 0.30, L2 0.90 after 1 steps. Nothing was changed"
    ):
        add_levels(deep, images, tmp_path / "none", Options(max_steps=1, min_agreement=0.95))
    assert not (tmp_path / "none").exists()
    # What was trained is not lost.
    assert progress_file(tmp_path / "none").is_file()


def test_refusals(deep: Bundle, small_kept: Path, images: Path, tmp_path: Path, card: Card) -> None:
    with pytest.raises(ExportError, match="has the levels 1, 2 already"):
        add_levels(read_bundle(small_kept), images, tmp_path / "out")
    few = tmp_path / "few"
    few.mkdir()
    for k in range(3):
        shutil.copy(images / f"{k}.png", few)
    (few / "notes.txt").write_text("no image")
    skipped: list[str] = []
    with pytest.raises(ExportError, match="3 images that can be used; at least 4 are needed"):
        add_levels(deep, few, tmp_path / "out", observer=Observer(skipped=skipped.append))
    assert len(skipped) == 1
    assert skipped[0].startswith("notes.txt: ")
    (tmp_path / "taken").mkdir()
    with pytest.raises(ExportError, match="exists and is not a bundle"):
        add_levels(deep, images, tmp_path / "taken")
    assert not (tmp_path / "out").exists()


def imported(model: onnx.ModelProto, card: Card, out: Path) -> Bundle:
    facts = {"dims": 2, "activation": "sigmoid", "input": {"normalization": "zscore"}}
    return import_network(headed(model, 2, 3), Card.model_validate(card.model_dump() | facts), out)


def test_network_that_is_no_unetpp_is_refused(card: Card, images: Path, tmp_path: Path) -> None:
    # A U-Net: one concatenation.
    bundle = imported(unetpp(widths=(4, 5), heads=(1,)), card, tmp_path / "unet")
    with pytest.raises(ExportError, match=r"no nodes .* were found"):
        add_levels(bundle, images)


def test_operators_that_are_not_rebuilt_are_refused(card: Card, images: Path, tmp_path: Path) -> None:
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
        module_block(unknown, start.start)


def module_block(network: HeadedGraph, start: str) -> None:
    from export.block import Block

    Block(network.model, start, "x0_1", 4, 1, 2)


# --- the command ---


def command(*arguments: object):
    app = typer.Typer()
    app.command("add-levels")(report_errors(cli_levels.add_levels))
    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["add-levels", *map(str, arguments)], env={"COLUMNS": "200"})


def test_command_adds_levels_and_says_what_next(deep: Bundle, images: Path) -> None:
    result = command(deep.folder, "--images", images, "--steps", 2, "--force")
    assert result.exit_code == 0, result.output
    assert read_bundle(deep.folder).manifest.levels == (1, 2, 3)
    assert "2 steps on 4 images; agreement on 2 others" in result.output
    assert f"next: unetpp verify {deep.folder}" in result.output
    assert (deep.folder / NETWORK).is_file()
    again = command(deep.folder, "--images", images)
    assert (again.exit_code, "has the levels 1, 2, 3 already" in again.stderr) == (1, True)


def test_command_goes_on_after_ctrl_c(deep: Bundle, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (deep.folder / "manifest.json").read_bytes()
    step = Distillation.step

    def stop(self: Distillation, *arguments) -> None:
        if self.steps == ROUND + 1:
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Distillation, "step", stop)
    arguments = (deep.folder, "--images", images, "--steps", ROUND + 2, "--force")
    result = command(*arguments)
    assert (result.exit_code, "interrupted, the bundle is as it was" in result.stderr) == (1, True)
    assert (deep.folder / "manifest.json").read_bytes() == before
    assert progress_file(deep.folder).is_file()
    monkeypatch.setattr(Distillation, "step", step)
    other = command(*arguments, "--seed", 1)
    assert (other.exit_code, "another seed" in other.stderr) == (1, True)
    result = command(*arguments)
    assert (result.exit_code, "going on with" in result.output) == (0, True)
    assert f"{ROUND + 2} steps" in result.output
    assert not progress_file(deep.folder).exists()
