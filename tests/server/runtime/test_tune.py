import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import EngineUnavailable, TuningTooNoisy
from server.runtime import engines
from server.runtime.device import DeviceThread
from server.runtime.engines import EngineRow
from server.runtime.tune import MAX_ROUNDS, MIN_ROUNDS, tune, tune_batch_size
from server.runtime.tuning import Tuning
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import write_nonsense_bundle
from tests.support.service import FakeEngine, ManualClock, calibrated

Cost = Callable[[str, str, int], float]


class Bench:
    """Fake engines that take manual time: milliseconds by graph, engine and number of tiles."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> None:
        self.clock, self.runs = ManualClock(), 0
        self.lines: list[str] = []
        self.cost: Cost = lambda graph, engine, count: 1.0 * count
        self.folder = write_nonsense_bundle(folder / "fake", **changes)
        for name, precisions in (("onnxruntime", ("fp32", "int8")), ("openvino", ("fp32", "bf16"))):
            row = EngineRow(self._opener(name), "numpy", lambda _, p=precisions: p, lambda _: ["cpu"])
            patch.setitem(engines.ENGINES, name, row)

    def _opener(self, name: str) -> Any:
        def open_graph(path: Path, precision: str, provider: str, threads: int) -> FakeEngine:
            def run(tiles: Tiles) -> np.ndarray:
                self.runs += 1
                self.clock.advance(self.cost(path.stem, f"{name} {precision}", len(tiles)) / 1e3)
                return tiles.pixels

            return FakeEngine(run)

        return open_graph

    def tune(self, limit_s: float = 1000.0, **batching: Any) -> Tuning:
        return tune(
            self.folder,
            RuntimeSettings(),
            BatchingSettings(**batching),
            limit_s,
            self.lines.append,
            self.clock,
        )


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_tune_measures_every_enabled_candidate_of_every_graph(bench: Bench) -> None:
    times = {"onnxruntime fp32": 8.0, "openvino fp32": 3.0, "openvino bf16": 2.0}
    bench.cost = lambda graph, engine, count: times[engine] * count
    tuning = bench.tune()
    assert bench.lines == ["L1", "L2", "L3", "L4", "accurate"]
    expected = {
        (graph, *reversed(engine.split())): ms for graph in bench.lines for engine, ms in times.items()
    }
    assert {(r.graph, r.precision, r.engine): r.milliseconds for r in tuning.rows} == expected
    assert {r.batch_pixels for r in tuning.rows} == {128 * 128}


def test_tune_skips_precisions_that_lose_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, calibration=calibrated([("L1", "fp32", 0.9), ("L1", "bf16", 0.5)]))
    assert {row.precision for row in bench.tune().rows if row.graph == "L1"} == {"fp32"}


def test_tune_engine_without_the_provider_is_left_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(engines.ENGINES["openvino"], providers=lambda _: [])
    monkeypatch.setitem(engines.ENGINES, "openvino", row)
    assert {row.engine for row in bench.tune().rows} == {"onnxruntime"}


def test_tune_nothing_that_serves_the_bundle_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, row in engines.ENGINES.items():
        monkeypatch.setitem(engines.ENGINES, name, dataclasses.replace(row, module="no_such_module"))
    with pytest.raises(EngineUnavailable):
        bench.tune()


def test_tune_one_slow_round_does_not_count(bench: Bench) -> None:
    number = itertools.count()
    bench.cost = lambda graph, engine, count: count * (50.0 if next(number) % 9 == 8 else 1.0)
    assert {row.milliseconds for row in bench.tune().rows} == {1.0}


def test_tune_noise_is_never_stored(bench: Bench) -> None:
    # Every other round over the three candidates takes twice as long.
    number = itertools.count()
    bench.cost = lambda graph, engine, count: 1.0 + next(number) // 3 % 2
    with pytest.raises(TuningTooNoisy) as caught:
        bench.tune()
    assert caught.value.fields == {"graph": "L1", "limit": 0.15, "actual": 1.0}
    assert bench.runs == 3 * (1 + MAX_ROUNDS)


def test_tune_time_limit_ends_the_rounds(bench: Bench) -> None:
    bench.cost = lambda graph, engine, count: 1000.0 * count
    bench.tune(limit_s=0.0, max_batch=1)
    # Each of three candidates of five graphs: one run to prepare, two rounds; and the batch of one tile,
    # prepared and timed.
    assert bench.runs == 5 * 3 * (1 + 2 + 1 + 3)


def test_tune_without_noise_stops_early(bench: Bench) -> None:
    bench.tune(max_batch=1)
    assert bench.runs == 5 * 3 * (1 + MIN_ROUNDS + 1 + 3)


class TestBatchSize:
    @staticmethod
    def size(milliseconds: Callable[[int], float], largest: int = 64, full: int = 1000, dims: int = 2) -> int:
        clock, device = ManualClock(), DeviceThread()

        def run(tiles: Tiles) -> np.ndarray:
            if len(tiles) > full:
                raise MemoryError
            clock.advance(milliseconds(len(tiles)) / 1e3)
            return tiles.pixels

        try:
            return tune_batch_size(FakeEngine(run), dims, 1, largest, device, clock)
        finally:
            device.close()

    @pytest.mark.parametrize(("largest", "best"), [(1, 1), (2, 2), (3, 2), (16, 16)])
    def test_tune_batch_size_never_exceeds_the_limit(self, largest: int, best: int) -> None:
        assert self.size(lambda count: 5.0, largest) == best

    @pytest.mark.parametrize(("gain", "best"), [(0.9, 8), (0.96, 1)])
    def test_tune_batch_size_doubles_while_a_tile_becomes_clearly_faster(
        self, gain: float, best: int
    ) -> None:
        assert self.size(lambda count: count * gain ** (count.bit_length() - 1), 8) == best

    def test_tune_batch_size_stops_where_a_tile_becomes_slower(self) -> None:
        assert self.size(lambda count: 8.0 if count <= 4 else 8.0 * count) == 4

    def test_tune_batch_size_of_a_device_that_is_full_is_the_last_that_fits(self) -> None:
        assert self.size(lambda count: 1.0, full=4) == 4
        assert self.size(lambda count: 1.0, full=0) == 1

    def test_tune_batch_size_of_volumes(self) -> None:
        assert self.size(lambda count: 1.0, 4, dims=3) == 4
