"""Golden pairs: structured, reproducible, and torch's own scores."""

import numpy as np
import pytest
import torch

from export import golden as golden_module
from export.golden import CASES, OnnxReference, synthetic_cells, tiles_of, torch_scores, write_golden
from export.graph import ServedGraph
from export.importing import headed, open_session
from export.tail import Tail
from server.runtime.bundle import Preprocessing
from server.runtime.golden import read_pairs
from tests.support.networks import unetpp


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


def test_reference_runs_the_network_once_for_all_graphs_of_an_input(monkeypatch):
    graph, runs = headed(unetpp(), 2, 3), []

    class Counting:
        def __init__(self, model):
            self.session = open_session(model)
            self.get_inputs = self.session.get_inputs

        def run(self, names, feed):
            runs.append(names)
            return self.session.run(names, feed)

    monkeypatch.setattr(golden_module, "open_session", Counting)
    levels = dict(enumerate(graph.heads, start=1))
    reference = OnnxReference(graph, levels, Preprocessing(), Tail("sigmoid"))
    tiles = [tiles_of([synthetic_cells((32, 32), 3, seed)]) for seed in (0, 1)]
    first = [[reference(name, one) for name in ("L1", "L2", "accurate", "head_std")] for one in tiles]
    assert len(runs) == 2
    assert not np.array_equal(first[0][0], first[1][0])
    assert np.array_equal(reference("L1", tiles[0]), first[0][0])
