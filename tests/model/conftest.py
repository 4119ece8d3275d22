"""Tiny labelled data folders: bright discs, and bright balls, on a noisy ground."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from model import train
from tests.model.runs import recipe

# The threads of OpenMP spin while they wait, which takes most of the time where tests share the cores.
torch.set_num_threads(1)


def write_discs(root: Path, splits: dict[str, int], side: int = 32) -> Path:
    """Writes images/, labels/ and index.csv; ids say their split."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rows = ["id,split,stain"]
    y, x = np.mgrid[:side, :side]
    for split, count in splits.items():
        for n in range(count):
            cy, cx = random.uniform(side * 0.3, side * 0.7, 2)
            disc = (y - cy) ** 2 + (x - cx) ** 2 < (side * 0.25) ** 2
            picture = np.clip(60 + 120 * disc + random.normal(0, 8, (side, side)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / "images" / f"{split}{n}.png")
            Image.fromarray((disc * 255).astype(np.uint8)).save(root / "labels" / f"{split}{n}.png")
            rows.append(f"{split}{n},{split},{'rare' if n == 0 else 'common'}")
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    """Four training, two validation images; a copy that a test may damage."""
    return write_discs(tmp_path / "discs", {"train": 4, "val": 2})


@pytest.fixture(scope="session")
def discs_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, shared: do not write there."""
    return write_discs(tmp_path_factory.mktemp("data") / "discs", {"train": 4, "val": 2})


@pytest.fixture(scope="session")
def halves_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The discs, each of two objects that touch, numbered 1 and 2; do not write there."""
    root = write_discs(tmp_path_factory.mktemp("data") / "halves", {"train": 4, "val": 2})
    for path in (root / "labels").iterdir():
        disc = np.asarray(Image.open(path)) > 0
        right = np.arange(disc.shape[1]) > np.nonzero(disc)[1].mean()
        Image.fromarray((disc * np.where(right, 2, 1)).astype(np.uint8)).save(path)
    return root


def write_balls(root: Path, splits: dict[str, int]) -> Path:
    """As `write_discs`, in NIfTI: the anterior half of each ball is class 1, the posterior class 2."""
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True)
    rows = ["id,split"]
    grid = np.stack(np.mgrid[:18, :22, :16])
    for split, count in splits.items():
        for n in range(count):
            centre = random.uniform([7, 9, 6], [10, 12, 9])[:, None, None, None]
            ball = ((grid - centre) ** 2).sum(0) < 36
            label = np.where(grid[1] > centre[1], 1, 2) * ball
            picture = 60 + 120 * ball + random.normal(0, 8, ball.shape)
            nib.save(
                nib.Nifti1Image(picture.astype(np.float32), np.eye(4)), root / "images" / f"{split}{n}.nii.gz"
            )
            nib.save(
                nib.Nifti1Image(label.astype(np.uint8), np.eye(4)), root / "labels" / f"{split}{n}.nii.gz"
            )
            rows.append(f"{split}{n},{split}")
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture
def balls(tmp_path: Path) -> Path:
    """Four training, two validation volumes; a copy that a test may damage."""
    return write_balls(tmp_path / "balls", {"train": 4, "val": 2})


@pytest.fixture(scope="session")
def balls_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, shared: do not write there."""
    return write_balls(tmp_path_factory.mktemp("data") / "balls", {"train": 4, "val": 2})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, discs_kept):
    """Four epochs in one go."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    train.train(recipe(schedule="one-cycle", weight_decay=1e-2), discs_kept, out)
    return out
