"""Images in memory that crops are cut from: how many fit, and what is said of the others."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import crops
from export.crops import read_crops
from server.runtime.bundle import read_bundle


@pytest.mark.parametrize("with_labels", [False, True])
def test_images_that_do_not_fit_are_counted(
    small_kept: Path, disc_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_labels: bool
) -> None:
    images, labels = Path(shutil.copytree(disc_images, tmp_path / "images")), None
    (images / "-notes.txt").write_text("no image")
    if with_labels:
        labels = images / "labels"
        labels.mkdir()
        for file in disc_images.iterdir():
            Image.fromarray(np.asarray(Image.open(file))[..., 0]).save(labels / file.name)
    manifest = read_bundle(small_kept).manifest
    skipped: list[str] = []
    assert len(read_crops(images, labels, manifest, "train", 64, skipped.append)) == 6
    assert [line.split(":")[0] for line in skipped] == ["-notes.txt"]
    fit = sum(np.asarray(Image.open(images / f"{k}.png")).nbytes for k in range(4))
    monkeypatch.setattr(crops, "MAX_BYTES", fit)
    assert len(read_crops(images, labels, manifest, "train", 64, skipped.append)) == 4
    assert skipped[-1].startswith("2 further files: the 4 images before them fill")
