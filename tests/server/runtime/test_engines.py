import functools
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from server.arrays import Tiles
from server.runtime import engines as room
from server.runtime.bundle import read_bundle
from server.runtime.engines import ENGINES, Engine
from server.runtime.engines.openvino import OpenVinoEngine
from server.runtime.golden import noise
from server.settings import RuntimeSettings

# Every precision that an installed engine runs on this machine's processor.
PRECISIONS = [(name, precision) for name, row in ENGINES.items() for precision in row.precisions("cpu")]


# All files are hashed each time that a bundle is read.
read_once = functools.cache(read_bundle)


def opened(folder: Path, graph: str, name: str, precision: str = "fp32", threads: int = 1) -> Engine:
    return ENGINES[name].open(read_once(folder).path(graph, precision), precision, "cpu", threads)


def first(tiles: Tiles, count: int) -> Tiles:
    return Tiles(tiles.pixels[:count], tiles.mean[:count], tiles.inverse_std[:count])


def test_engines_every_file_has_a_row() -> None:
    assert {path.stem for path in Path(room.__file__).parent.glob("*.py")} - {"__init__"} == ENGINES.keys()


def test_engines_are_the_choices_of_the_setting() -> None:
    assert set(get_args(RuntimeSettings.model_fields["engine"].annotation)) == {"auto", *ENGINES}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_always_offer_the_processor(name: str) -> None:
    row = ENGINES[name]
    assert row.installed
    assert "cpu" in row.providers("auto")
    assert row.providers("cpu") == ["cpu"]
    assert "fp32" in row.precisions("cpu")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("graph", ["L1", "accurate"])
def test_run_all_engines_agree(shipped_bundle: Path, dtype: type, graph: str) -> None:
    largest = 1 if dtype == np.float32 else np.iinfo(dtype).max
    pixels = (np.random.default_rng(0).random((2, 3, 32, 48)) * largest).astype(dtype)
    mean = pixels.mean(axis=(2, 3), keepdims=True, dtype=np.float32)
    tiles = Tiles(pixels, mean, 1 / pixels.std(axis=(2, 3), keepdims=True, dtype=np.float32))
    answers = {name: opened(shipped_bundle, graph, name).run(tiles) for name in ENGINES}
    manifest = read_bundle(shipped_bundle).manifest
    head_channels = manifest.score_channels + (manifest.objects is not None)
    for scores in answers.values():
        assert (scores.shape, scores.dtype) == ((2, head_channels, 32, 48), np.float32)
        assert 0 <= scores.min() <= scores.max() <= 1
        assert np.abs(scores - answers["onnxruntime"]).max() < 1e-4


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
@pytest.mark.parametrize(
    ("kind", "graph", "size"),
    [
        ("shipped_bundle", "L1", (32, 48)),
        ("shipped_bundle", "L2", (32, 48)),
        ("volume_bundle", "L1", (16, 16, 32)),
        ("volume_bundle", "L2", (16, 16, 32)),
    ],
    ids=["image L1", "image L2", "volume L1", "volume L2"],
)
def test_run_scores_of_a_tile_do_not_depend_on_batch_or_threads(
    kind: str, graph: str, size: tuple[int, ...], name: str, precision: str, request: pytest.FixtureRequest
) -> None:
    """Bit for bit: what else is being served decides nothing, and neither does the number of cores."""
    folder = request.getfixturevalue(kind)
    tiles = noise(4, 3 if kind == "shipped_bundle" else 1, list(size))
    by_threads = []
    for threads in (1, 2):
        engine = opened(folder, graph, name, precision, threads)
        alone = np.concatenate([engine.run(tiles.one(index)) for index in range(4)])
        by_threads.append(alone)
        for count in (2, 3, 4):
            assert np.array_equal(engine.run(first(tiles, count)), alone[:count])
    if (kind, name, precision) == ("volume_bundle", "onnxruntime", "fp32"):
        # Its convolutions of volumes add in another order on one thread, so that machines with one core are a
        # class of their own.
        assert np.abs(by_threads[0] - by_threads[1]).max() < 1e-6
    else:
        assert np.array_equal(*by_threads)


@pytest.mark.parametrize("name", ENGINES)
def test_run_scores_are_not_overwritten_by_the_next_run(shipped_bundle: Path, name: str) -> None:
    # On as many threads as there are cores.
    engine, tiles = opened(shipped_bundle, "L1", name, threads=0), noise(2, 3, [32, 32])
    scores = engine.run(tiles.one(0))
    before = scores.copy()
    engine.run(tiles.one(1))
    assert np.array_equal(scores, before)


@pytest.mark.parametrize("name", ENGINES)
def test_run_pixels_that_are_a_view(shipped_bundle: Path, name: str) -> None:
    """Grey images are repeated by broadcasting: strides of zero."""
    engine, tiles = opened(shipped_bundle, "L1", name), noise(1, 3, [32, 32])
    view = Tiles(np.broadcast_to(tiles.pixels[:, :1], tiles.pixels.shape), tiles.mean, tiles.inverse_std)
    copy = Tiles(np.ascontiguousarray(view.pixels), tiles.mean, tiles.inverse_std)
    assert np.array_equal(engine.run(view), engine.run(copy))
    assert not view.pixels.flags.writeable


def test_onnxruntime_does_not_fall_back_while_serving(shipped_bundle: Path) -> None:
    """Its Python wrapper would answer from the CPU once a provider fails."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    engine = opened(shipped_bundle, "L1", "onnxruntime")

    class Failing:
        def __init__(self, session: object) -> None:
            self.session = session

        def __getattr__(self, name: str) -> object:
            return getattr(self.session, name)

        def run(self, *_: object) -> None:
            raise EPFail("the GPU is gone")

    session = engine._session  # type: ignore[attr-defined]
    session._sess = Failing(session._sess)
    with pytest.raises(EPFail):
        engine.run(noise(1, 3, [32, 32]))


class FakeCompiled:
    """What `OpenVinoEngine` needs of a compiled model; counts how often its memory was given back."""

    def __init__(self) -> None:
        self.released = 0

    def create_infer_request(self) -> "FakeCompiled":
        return self

    def infer(self, feed: object, share_inputs: bool) -> None: ...

    def get_output_tensor(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(data=np.zeros((1, 1, 2, 2)))

    def release_memory(self) -> None:
        self.released += 1


def test_openvino_keeps_the_workspace_of_one_large_graph() -> None:
    first, second = FakeCompiled(), FakeCompiled()
    engines = [OpenVinoEngine(first), OpenVinoEngine(second)]
    small, large = noise(1, 1, [96, 96]), noise(1, 1, [129, 129])
    for engine in engines * 2:
        engine.run(small)
    assert (first.released, second.released) == (0, 0)
    for engine in (engines[0], engines[0], engines[1]):
        engine.run(large)
    assert (first.released, second.released) == (1, 0)
    engines[0].run(small)
    engines[0].run(large)
    assert (first.released, second.released) == (1, 1)


def test_openvino_keeps_no_engine_that_was_replaced() -> None:
    engine = OpenVinoEngine(FakeCompiled())
    engine.run(noise(1, 1, [129, 129]))
    gone = weakref.ref(engine)
    del engine
    assert gone() is None
    OpenVinoEngine(FakeCompiled()).run(noise(1, 1, [129, 129]))


def test_openvino_runs_again_after_release(shipped_bundle: Path) -> None:
    engine, tiles = opened(shipped_bundle, "L1", "openvino"), noise(1, 3, [64, 64])
    before = engine.run(tiles)
    engine.release()  # type: ignore[attr-defined]
    assert np.array_equal(engine.run(tiles), before)


# Prints by how many MB the process has grown after one large run, and after so many that the arena has been
# shrunk.
LARGE_RUNS = """
import sys
from pathlib import Path
from server.runtime.engines import ENGINES
from server.runtime.engines.onnxruntime import TIDY_EVERY
from server.runtime.golden import noise
from tests.support.memory import resident_mb

engine = ENGINES["onnxruntime"].open(Path(sys.argv[1]) / "L1.onnx", "fp32", "cpu", 1)
before, tiles = resident_mb(), noise(1, 3, [512, 512])
for number in range(1, TIDY_EVERY + 1):
    scores = engine.run(tiles)
    if number == 1:
        print(resident_mb() - before)
print(resident_mb() - before)
"""


def test_onnxruntime_gives_the_memory_of_large_runs_back(shipped_bundle: Path) -> None:
    """In a process of its own: one that has run other tests has memory to spare, and grows less."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE_RUNS, str(shipped_bundle)], capture_output=True, text=True, check=True
    )
    grown, left = map(float, done.stdout.split())
    assert grown > 30
    assert left < grown / 2


def test_onnxruntime_run_that_shrinks_the_arena_gives_the_same_scores(shipped_bundle: Path) -> None:
    from server.runtime.engines.onnxruntime import TIDY_EVERY

    engine, tiles = opened(shipped_bundle, "L1", "onnxruntime"), noise(1, 3, [144, 144])
    scores = engine.run(tiles)
    assert all(np.array_equal(engine.run(tiles), scores) for _ in range(TIDY_EVERY))
