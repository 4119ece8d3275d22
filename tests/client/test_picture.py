import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from client.picture import backdrop, flat, over, side_by_side
from client.sources import encode
from tests.server.conftest import picture_bytes


def test_the_plane_with_most() -> None:
    mask = np.zeros((6, 5, 4), np.uint8)
    mask[1, 2, 3] = mask[2, 2, 3] = mask[1, 2, 0] = 1
    assert flat(mask, mask, volume=True).shape == (5, 6)
    assert flat(mask, mask, volume=True).sum() == 2
    assert flat(mask, mask, volume=False).sum() == 2
    assert flat(mask, mask, volume=False).shape == (5, 4)
    assert flat(mask * 0, mask * 0, volume=True).shape == (5, 6)
    image = mask[..., 3]
    assert flat(image, image, volume=False) is image


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.nii.gz", "x.jpg"])
def test_what_is_behind(tmp_path: Path, rng: np.random.Generator, name: str) -> None:
    values = rng.integers(0, 65536, (9, 8)).astype(np.uint16)
    volume = name.endswith("gz")
    shown = np.stack([values] * 3) if volume else values
    data = encode(shown, np.eye(4)) if volume else encode(shown.astype(np.float32)) if name.endswith("tif") else encode(shown)
    if name.endswith("jpg"):
        data = picture_bytes((values // 256).astype(np.uint8), "JPEG")
    (tmp_path / name).write_bytes(data)
    found = backdrop(tmp_path / name, shown)
    assert found.shape == (*shown.shape, 3)
    assert (found.min(), found.max()) == (0, 255)


def test_what_cannot_be_read_is_black(tmp_path: Path) -> None:
    (tmp_path / "x.mha").write_bytes(b"ObjectType = Image")
    assert not backdrop(tmp_path / "x.mha", np.ones((4, 5), np.uint8)).any()
    (tmp_path / "x.png").write_bytes(picture_bytes(np.ones((9, 9), np.uint8)))
    assert not backdrop(tmp_path / "x.png", np.ones((4, 5), np.uint8)).any()


def test_colours() -> None:
    pixels = np.full((2, 2, 3), 100, np.uint8)
    shown = over(pixels, np.array([[0, 1], [2, 0]]), {1: "#ff0000", 2: "#000000"})
    assert shown[0, 0].tolist() == [100, 100, 100]
    assert shown[0, 1].tolist() == [177, 50, 50]
    assert shown[1, 0].tolist() == [50, 50, 50]


@pytest.mark.parametrize("size", [(1, 1), (4, 900), (900, 4), (600, 500)])
def test_side_by_side(size: tuple[int, int]) -> None:
    sheet = Pillow.open(io.BytesIO(side_by_side([("one", np.zeros((*size, 3), np.uint8))] * 6)))
    assert sheet.width > sheet.height
