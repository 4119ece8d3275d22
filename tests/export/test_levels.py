"""Training of levels by distillation, on images without labels and with them."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from export import levels
from export.block import state
from export.card import ExportError
from export.class_overlap import iou_with, mean_agreement
from export.crops import Crops
from export.data import Labelled, pictures
from export.levels import Distillation, split
from export.producer import from_bundle
from export.tail import Tail
from server.arrays import Image as PlainImage
from server.runtime.bundle import Bundle, read_bundle

SIDE = 64

# Steps between two measurements in these tests.
ROUND = 8


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures more often than a real run."""
    monkeypatch.setattr(levels, "ROUND", ROUND)


def crops_of(bundle: Bundle, folder: Path) -> Crops:
    return Crops(pictures(folder, bundle.manifest), bundle.manifest, SIDE)


def distillation(bundle: Bundle, progress: Path, run: str = "run", seed: int = 0) -> Distillation:
    return Distillation(from_bundle(bundle), progress, run, seed=seed)


def tensors(one: Distillation) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in state([*one.blocks.values()])]


def ignore(steps: int, agreement: dict[int, float]) -> None:
    """Callback that does nothing."""


def test_agreement_rises_on_held_out_images(deep_kept: Path, disc_images: Path, tmp_path: Path) -> None:
    bundle = read_bundle(deep_kept)
    one, crops = distillation(bundle, tmp_path / "progress"), crops_of(bundle, disc_images)
    before = one.measure(crops, split(len(crops), 0)[0])
    after = one.train(crops, 80, ignore)
    assert before.keys() == after.keys() == {1, 2}
    assert all(after[level] > before[level] for level in after), (before, after)
    # The blocks have the weights that were measured.
    assert one.measure(crops, split(len(crops), 0)[0]) == after


def test_held_out_images_are_never_trained_on(
    deep_kept: Path, disc_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(deep_kept)
    one, crops = distillation(bundle, tmp_path / "progress"), crops_of(bundle, disc_images)
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


@pytest.mark.parametrize(("count", "held_out"), [(4, 1), (6, 2), (100, 20), (1000, 24)])
def test_split_holds_a_share_out(count: int, held_out: int) -> None:
    first, second = split(count, 3)
    assert len(first) == held_out
    assert sorted(first + second) == [*range(count)]


def test_resumed_run_gives_the_same_as_an_uninterrupted_one(
    deep_kept: Path, disc_images: Path, tmp_path: Path
) -> None:
    bundle = read_bundle(deep_kept)
    crops = crops_of(bundle, disc_images)
    whole = distillation(bundle, tmp_path / "whole")
    expected = whole.train(crops, 3 * ROUND, ignore)

    def stop(steps: int, agreement: dict[int, float]) -> None:
        # In the middle of the second round.
        if steps == ROUND + 5:
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


@pytest.mark.parametrize(
    ("activation", "channels", "expected"),
    [
        ("sigmoid", 1, [[0, 1, 1]]),
        ("softmax", 3, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("sigmoid-per-class", 2, [[0, 1, 0], [0, 0, 1]]),
    ],
)
def test_labels_in_the_place_of_scores(
    deep_kept: Path, tmp_path: Path, activation: str, channels: int, expected: list[list[float]]
) -> None:
    producer = from_bundle(read_bundle(deep_kept))
    changed = dataclasses.replace(producer, after=Tail(activation))
    one = Distillation(changed, tmp_path / "progress", "run")
    labels = np.array([[[0, 1, 1 if channels == 1 else 2]]], np.uint8)
    np.testing.assert_array_equal(one._of_labels(labels, channels)[0, :, 0], expected)


def test_labels_are_cut_with_their_images(deep_kept: Path, tmp_path: Path) -> None:
    """The label is the red channel, wherever the crop lies and however it is reflected."""
    random = np.random.default_rng(0)
    items = []
    for size in ((90, 40), (200, 130)):
        label = random.integers(0, 2, size).astype(np.uint8)
        items.append(Labelled("one", PlainImage(np.stack([label, 0 * label, 0 * label + 5], -1)), label))
    crops = Crops(items, read_bundle(deep_kept).manifest, 128)
    for index, seed in itertools.product(range(2), range(4)):
        crop = crops.cut(index, np.random.default_rng(seed))
        assert crop.label.shape == (1, 128, 128)
        np.testing.assert_array_equal(crop.label, crop.tiles.pixels[:, 0])


def test_training_ends_when_nothing_improves(
    deep_kept: Path, disc_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(deep_kept)
    one = distillation(bundle, tmp_path / "progress")
    values = itertools.chain([0.5, 0.7, 0.6, 0.7], itertools.repeat(0.1))
    monkeypatch.setattr(one, "measure", lambda *_: dict.fromkeys((1, 2), next(values)))
    steps = []
    monkeypatch.setattr(one, "step", lambda *_: steps.append(1))
    monkeypatch.setattr(one, "save", lambda: None)
    assert one.train(crops_of(bundle, disc_images), 1000, ignore) == {1: 0.7, 2: 0.7}
    assert len(steps) == 5 * ROUND


def test_progress_of_another_run_or_damaged_is_refused(
    deep: Bundle, disc_images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "progress"
    distillation(deep, path).train(crops_of(deep, disc_images), ROUND, ignore)
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
