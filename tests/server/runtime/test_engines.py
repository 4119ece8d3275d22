import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from server.runtime.opening import noise
from server.segment.plan import statistics

from server.arrays import Tiles
from server.runtime import engines as room
from server.runtime.bundle import read_bundle
from server.runtime.engines import ENGINES
from server.runtime.engines.openvino import OpenVinoEngine


def test_every_file_has_a_row() -> None:
    files = {path.stem for path in Path(room.__file__).parent.glob("*.py")} - {"__init__", "fake"}
    assert files == ENGINES.keys()


def test_rows_are_the_settings_choices() -> None:
    from typing import get_args

    from server.settings import RuntimeSettings

    assert set(get_args(RuntimeSettings.model_fields["engine"].annotation)) == {"auto", *ENGINES}


@pytest.fixture(scope="module", params=["shipped_bundle", "tiny_bundle"])
def bundle(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def tiles_of(dtype: type, count: int, height: int, width: int) -> Tiles:
    random = np.random.default_rng(0)
    pixels = (random.random((count, height, width, 3)) * {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]).astype(dtype)
    mean, inverse_std = zip(*(statistics(image) for image in pixels), strict=True)
    facts = (np.reshape(values, (count, 3, 1, 1)).astype(np.float32) for values in (mean, inverse_std))
    return Tiles(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), *facts)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_engines_agree(bundle: Path, dtype: type) -> None:
    read = read_bundle(bundle)
    tiles = tiles_of(dtype, 2, 32, 48)
    for graph in ("L1", "L3", "accurate"):
        answers = {name: row.open(read.path(graph, "fp32"), "fp32", "cpu", 1).run(tiles) for name, row in ENGINES.items()}
        for name, scores in answers.items():
            assert scores.shape == (2, 1, 32, 48), name
            assert scores.dtype == np.float32, name
            assert scores.min() >= 0, name
            assert scores.max() <= 1, name
            assert np.abs(scores - answers["onnxruntime"]).max() < 1e-4, name


@pytest.mark.parametrize("name", ENGINES)
def test_one_tile_at_a_time_is_the_same_and_results_are_kept(shipped_bundle: Path, name: str) -> None:
    engine = ENGINES[name].open(read_bundle(shipped_bundle).path("L1", "fp32"), "fp32", "cpu", 1)
    tiles = tiles_of(np.uint8, 3, 32, 32)
    together = engine.run(tiles)
    before = together.copy()
    singly = [engine.run(tiles.one(i)) for i in range(3)]
    assert np.array_equal(together, before)  # not overwritten by the next run
    assert np.abs(together - np.concatenate(singly)).max() < 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_pixels_that_are_a_view(shipped_bundle: Path, name: str) -> None:
    """Grey images are repeated by broadcasting: strides of zero."""
    engine = ENGINES[name].open(read_bundle(shipped_bundle).path("L1", "fp32"), "fp32", "cpu", 1)
    tiles = tiles_of(np.float32, 1, 32, 32)
    view = Tiles(np.broadcast_to(tiles.pixels[:, :1], tiles.pixels.shape), tiles.mean, tiles.inverse_std)
    copy = Tiles(np.ascontiguousarray(view.pixels), tiles.mean, tiles.inverse_std)
    assert np.array_equal(engine.run(view), engine.run(copy))
    assert not view.pixels.flags.writeable


@pytest.mark.parametrize("name", ENGINES)
def test_cpu_is_always_offered(name: str) -> None:
    row = ENGINES[name]
    assert row.installed
    assert "cpu" in row.providers("auto")
    assert row.providers("cpu") == ["cpu"]
    assert "fp32" in row.precisions("cpu")


def test_onnxruntime_never_falls_back_in_service(shipped_bundle: Path) -> None:
    """Its Python wrapper would answer from the CPU once a provider fails."""
    from onnxruntime.capi.onnxruntime_pybind11_state import EPFail

    engine = ENGINES["onnxruntime"].open(read_bundle(shipped_bundle).path("L1", "fp32"), "fp32", "cpu", 1)

    class Failing:
        def __init__(self, session: object) -> None:
            self.session = session

        def __getattr__(self, name: str) -> object:
            return getattr(self.session, name)

        def run(self, *_: object) -> None:
            raise EPFail("the GPU is gone")

    session = engine._session  # type: ignore[attr-defined]
    session._sess = Failing(session._sess)
    with pytest.raises(EPFail, match="the GPU is gone"):
        engine.run(tiles_of(np.uint8, 1, 32, 32))


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


def test_openvino_keeps_one_large_workspace() -> None:
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


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("kind", "size"), [("shipped_bundle", (1, 3, 64, 64)), ("volume_bundle", (1, 1, 32, 32, 32))])
def test_runs_again_after_release(name: str, kind: str, size: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    opened = ENGINES[name].open(request.getfixturevalue(kind) / "L1.onnx", "fp32", "cpu", 1)
    tiles = noise(1, size[1], list(size[2:]))
    before = opened.run(tiles)
    opened.release()
    assert np.array_equal(opened.run(tiles), before)


# Prints by how many MB the process has grown by a large run, and by how many still after its release.
LARGE_RUN = """
import resource
import sys
from pathlib import Path
from server.runtime.engines import ENGINES
from server.runtime.opening import noise

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

engine = ENGINES["onnxruntime"].open(Path(sys.argv[1]) / "L1.onnx", "fp32", "cpu", 1)
before = resident_mb()
engine.run(noise(1, 3, [1024, 1024]))
print(resident_mb() - before)
engine.release()
print(resident_mb() - before)
"""


def test_onnxruntime_gives_the_memory_of_large_runs_back(shipped_bundle: Path) -> None:
    """In a process of its own: one that has run other tests has memory to spare, and grows less."""
    done = subprocess.run([sys.executable, "-c", LARGE_RUN, str(shipped_bundle)], capture_output=True, text=True, check=True)
    grown, left = map(float, done.stdout.split())
    assert grown > 100
    assert left < grown / 2


def test_the_arena_is_tidied_now_and_then(shipped_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every so many large runs, which give the same scores then; never for small ones, which come often and leave little."""
    from server.runtime.engines import onnxruntime as module

    engine = ENGINES["onnxruntime"].open(read_bundle(shipped_bundle).path("L1", "fp32"), "fp32", "cpu", 1)
    large, small = noise(1, 3, [160, 160]), noise(1, 3, [32, 32])
    expected, options, asked = engine.run(large), module._tidying(), []
    monkeypatch.setattr(module, "_tidying", lambda: asked.append(1) or options)
    for _ in range(2 * module.TIDY_EVERY):
        assert np.array_equal(engine.run(large), expected)
    for _ in range(2 * module.TIDY_EVERY):
        engine.run(small)
    assert len(asked) == 2
