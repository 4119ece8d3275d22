"""A tiny labelled data folder of bright discs on a noisy ground."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
