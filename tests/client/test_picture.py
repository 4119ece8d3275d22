import io

import numpy as np
import pytest
from PIL import Image as Pillow

from client.picture import sheet
from tests.support.files import picture_bytes


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Pillow.open(io.BytesIO(data)))


@pytest.mark.parametrize("size", [(1, 1), (4, 900), (900, 4), (600, 500)])
def test_side_by_side(size: tuple[int, int]) -> None:
    found = opened(sheet([("one", picture_bytes(np.zeros((*size, 3), np.uint8)))] * 6, 360, 6))
    assert found.shape[1] > found.shape[0]


def test_rows_and_sizes() -> None:
    red, grey = np.full((20, 40, 3), (255, 0, 0), np.uint8), np.full((40, 40), 100, np.uint8)
    found = opened(sheet([("", picture_bytes(red)), ("", picture_bytes(grey)), ("", picture_bytes(grey))], 200, 2))
    assert found.shape == (2 * (200 + 34 + 8) + 8, 2 * (200 + 8) + 8, 3)
    assert (found == (255, 0, 0)).all(axis=2).sum() == 100 * 200
    assert (found == 100).all(axis=2).sum() == 2 * 200 * 200
    assert (found[250:450, 8:208] == 100).all()
