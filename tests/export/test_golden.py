"""Golden pairs: structured, reproducible, and torch's own scores."""

import numpy as np
import pytest
import torch

from export.golden import CASES, synthetic_cells, tiles_of, torch_scores, write_golden
from export.graph import ServedGraph
from server.runtime.golden import read_pairs


def test_synthetic_cells_are_structured_and_reproducible():
    a, b = synthetic_cells((64, 96), 3, 0), synthetic_cells((64, 96), 3, 0)
    assert (a.shape, a.dtype) == ((64, 96, 3), np.uint8)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, synthetic_cells((64, 96), 3, 1))
    assert a.std() > 15


def test_tiles_of_images_have_their_own_statistics():
    images = [synthetic_cells((32, 48), 3, seed) for seed in range(2)]
    tiles = tiles_of(images)
    assert tiles.pixels.shape == (2, 3, 32, 48)
    for n, image in enumerate(images):
        np.testing.assert_allclose(tiles.mean[n, :, 0, 0], image.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(tiles.inverse_std[n, :, 0, 0], 1 / image.std((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_written_pairs_are_read_by_the_server(tmp_path, make_network, dims):
    network = make_network(dims=dims)
    graphs = {
        "L1": ServedGraph(network.prune(1), "sigmoid").eval(),
        "accurate": ServedGraph(network, "sigmoid").eval(),
    }
    write_golden(
        tmp_path / "golden.npz", [*graphs], lambda name, tiles: torch_scores(graphs[name], tiles), 3, dims
    )
    pairs = list(read_pairs(tmp_path / "golden.npz"))
    assert len(pairs) == 2 * len(CASES[dims])
    for name, tiles, scores in pairs:
        with torch.no_grad():
            image = torch.from_numpy(tiles.pixels.astype(np.float32))
            expected = graphs[name](
                image, torch.from_numpy(tiles.mean), torch.from_numpy(tiles.inverse_std)
            ).numpy()
        np.testing.assert_array_equal(scores, expected)
        np.testing.assert_array_equal(torch_scores(graphs[name], tiles), expected)
        # Golden scores that are the same everywhere would check nothing.
        assert scores.std() > 1e-3
