import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.arrays import Tiles
from server.errors import TuningTooNoisy
from server.runtime import engines
from server.runtime.bundle import Bundle
from server.runtime.device import DeviceThread
from server.runtime.engines import EngineRow
from server.runtime.machine import Machine
from server.runtime.tune import MAX_ROUNDS, MIN_ROUNDS, tune, tune_batch_size
from server.runtime.tuning import BUNDLE_FOLDER, Tuning, TuningKey, TuningRow, find_tuning, store_tuning
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import write_nonsense_bundle
from tests.support.service import FakeEngine, ManualClock, calibrated, manifest

MACHINE = Machine(
    "cpu x", frozenset({"avx2", "fma"}), 4, {"openvino": {"cpu": ("fp32",)}, "onnxruntime": {"cpu": ("fp32",)}},
    {"openvino": "2026.1", "onnxruntime": "1.31"},
)  # fmt: skip
BUNDLE = Bundle(Path("/nowhere"), manifest(), "a" * 64)
KEY = TuningKey.of(BUNDLE, MACHINE)
ROW = TuningRow(graph="L1", precision="fp32", engine="openvino", milliseconds=1.5, batch_pixels=100)


@pytest.mark.parametrize(
    "change",
    [
        {"processor": "cpu y"},
        {"features": frozenset({"avx2"})},
        {"cores": 2},
        {"versions": {"openvino": "2026.2", "onnxruntime": "1.31"}},
        {"versions": {"onnxruntime": "1.31"}},
        {"engines": {"onnxruntime": {"cuda": ("fp32",), "cpu": ("fp32",)}}},
    ],
    ids=lambda change: "-".join(change),
)
def test_key_changes_with_every_fact_of_the_machine(change: dict[str, Any]) -> None:
    other = TuningKey.of(BUNDLE, dataclasses.replace(MACHINE, **change))
    assert other != KEY
    assert other.file_name != KEY.file_name


def test_key_changes_with_the_bundle() -> None:
    other = TuningKey.of(Bundle(Path("/nowhere"), manifest(), "b" * 64), MACHINE)
    assert other.file_name != KEY.file_name


def test_key_does_not_depend_on_the_order_of_facts() -> None:
    turned = dataclasses.replace(
        MACHINE,
        engines=dict(reversed(MACHINE.engines.items())),
        versions=dict(reversed(MACHINE.versions.items())),
    )
    assert TuningKey.of(BUNDLE, turned).file_name == KEY.file_name


ROWS = st.builds(
    TuningRow,
    graph=st.sampled_from(["L1", "accurate"]),
    precision=st.sampled_from(["fp32", "int8"]),
    engine=st.sampled_from(["openvino", "onnxruntime"]),
    milliseconds=st.floats(1e-4, 1e6),
    batch_pixels=st.integers(1, 10**9),
)


@given(st.lists(ROWS, max_size=5))
def test_find_gives_what_was_stored(tmp_path_factory: pytest.TempPathFactory, rows: list[TuningRow]) -> None:
    folder = tmp_path_factory.getbasetemp() / "tunings" / "new"
    tuning = Tuning(key=KEY, rows=tuple(rows))
    assert store_tuning(tuning, folder).parent == folder
    assert find_tuning(BUNDLE, MACHINE, folder) == tuning
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_row_is_that_of_graph_precision_and_engine() -> None:
    tuning = Tuning(key=KEY, rows=(ROW,))
    assert tuning.row("L1", "fp32", "openvino") == ROW
    assert (
        tuning.row("L1", "fp32", "onnxruntime")
        is tuning.row("L1", "int8", "openvino")
        is tuning.row("L2", "fp32", "openvino")
    )


def test_find_nothing_stored_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_tuning(BUNDLE, MACHINE, tmp_path / "missing") is None
    assert not caplog.records


@pytest.mark.parametrize("written", [b"", b"{", b"[]", b"\xff\xfe", b'{"key": {}}', None])
def test_find_damaged_file_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, written: bytes | None
) -> None:
    path = tmp_path / KEY.file_name
    path.mkdir() if written is None else path.write_bytes(written)
    assert find_tuning(BUNDLE, MACHINE, tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_find_tuning_of_another_machine_under_our_name_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Tuning(key=KEY.model_copy(update={"cores": 64}), rows=(ROW,))
    (tmp_path / KEY.file_name).write_text(foreign.model_dump_json())
    assert find_tuning(BUNDLE, MACHINE, tmp_path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_find_looks_in_the_cache_then_in_the_bundle(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "bundle", manifest(), BUNDLE.sha256)
    shipped, own = (Tuning(key=KEY, rows=(ROW,) * count) for count in (1, 2))
    store_tuning(shipped, bundle.folder / BUNDLE_FOLDER)
    assert find_tuning(bundle, MACHINE, tmp_path / "cache") == shipped
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / KEY.file_name).write_text("damaged")
    assert find_tuning(bundle, MACHINE, tmp_path / "cache") == shipped
    store_tuning(own, tmp_path / "cache")
    assert find_tuning(bundle, MACHINE, tmp_path / "cache") == own


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
    # Each of three candidates of five graphs: one run to prepare, two rounds; and the batch of one tile, prepared and timed.
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
