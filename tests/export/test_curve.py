"""The curve of `mode=auto` on made-up observations, and on a small bundle."""

import shutil

import numpy as np
import pytest

from export.agreement import deepest_masks
from export.curve import Observed, fit, observe, write_curve
from export.data import labelled, pictures
from server.runtime.bundle import read_bundle

WORK = np.array([0.1, 0.3, 0.6, 1.0])


def observed(images=60, seed=0):
    """L1 fails on a tenth of the images and is uncertain there; deeper levels do not, and are certain."""
    random = np.random.default_rng(seed)
    iou = np.full((4, images), 0.9)
    uncertain = random.uniform(0.0, 0.1, (4, images))
    hard = np.arange(images) % 10 == 0
    iou[0, hard] = 0.5
    uncertain[0, hard] = 0.35
    return Observed((1, 2, 3, 4), WORK, iou, uncertain)


def test_fit_sends_on_what_is_uncertain_and_loses_nothing():
    last = fit(observed())[-1]
    assert last.chain == (1, 2)
    assert last.loss <= 0
    assert last.going_on == (0.1,)
    assert last.thresholds[0] < 0.35
    assert last.work == pytest.approx(0.1 + 0.1 * 0.3)


def test_fit_keeps_only_places_where_less_work_costs_quality():
    points = fit(observed())
    assert [p.work for p in points] == sorted(p.work for p in points)
    losses = [p.likely_loss for p in points]
    assert losses == sorted(losses, reverse=True)
    assert len({*losses}) == len(losses)
    assert all(share > 0 for p in points for share in p.going_on)


def test_fit_without_any_gain_is_the_deepest_level_last():
    random = np.random.default_rng(1)
    iou = np.sort(random.uniform(0.5, 0.9, (4, 30)), axis=0)
    points = fit(Observed((1, 2, 3, 4), WORK, iou, random.uniform(0, 1, (4, 30))))
    assert (points[-1].chain, points[-1].loss, points[-1].work) == ((4,), 0.0, 1.0)


def served(noise, point):
    """Index of the level that serves each image, by arithmetic of its own."""
    levels = []
    for column in range(noise.iou.shape[1]):
        for level, threshold in zip(point.chain, (*point.thresholds, 1.0), strict=True):
            if noise.uncertain[level - 1, column] <= threshold:
                break
        levels.append(level - 1)
    return np.array(levels)


def test_loss_is_measured_on_images_that_were_not_chosen_on():
    """On shares that say nothing, what fits by chance does not hold."""
    random = np.random.default_rng(2)
    iou = np.stack([random.choice([0.6, 0.9], 40), np.full(40, 0.75), np.full(40, 0.76), np.full(40, 0.77)])
    noise = Observed((1, 2, 3, 4), WORK, iou, random.uniform(0, 1, (4, 40)))
    optimism = []
    for point in fit(noise):
        lost = (iou[-1] - iou[served(noise, point), np.arange(40)]) * 100
        optimism.append(point.loss - lost.mean())
    assert min(optimism) > -1e-3
    assert max(optimism) > 0.5


@pytest.mark.parametrize("images", [1, 2, 7])
def test_fit_of_few_images_does_not_fail(images):
    assert fit(observed(images))[-1].likely_loss <= 0


def test_fit_of_one_level_is_that_level():
    one = Observed((1,), np.ones(1), np.full((1, 3), 0.8), np.full((1, 3), 0.5))
    assert [p.chain for p in fit(one)] == [(1,)]


def test_write_curve_changes_nothing_else(small_kept, discs, tmp_path):
    folder = shutil.copytree(small_kept, tmp_path / "small")
    before, seen = read_bundle(folder).manifest, []
    items = [*labelled(discs, "val", before)]
    curve = write_curve(read_bundle(folder), items, "discs", "labels", lambda *now: seen.append(now))
    after = read_bundle(folder).manifest
    assert after.depth_curve == curve
    assert after.model_copy(update={"depth_curve": None}) == before
    assert (curve.reference, curve.data) == ("labels", "discs")
    assert seen[-1] == (2 * curve.images, 2 * curve.images)
    assert curve.choose(100).work <= curve.choose(0).work


def test_write_curve_without_labels_compares_with_the_deepest_level(small_kept, discs, tmp_path):
    folder, images = shutil.copytree(small_kept, tmp_path / "small"), tmp_path / "mine"
    shutil.copytree(discs / "images", images)
    bundle = read_bundle(folder)
    items = deepest_masks(bundle, [*pictures(images, bundle.manifest)])
    curve = write_curve(bundle, items, "mine", "deepest level")
    assert (curve.reference, curve.images) == ("deepest level", len([*images.iterdir()]))
    rows = observe(bundle, items[:3])
    assert (rows.iou[-1] == 1).all()
    assert rows.levels == bundle.manifest.levels
