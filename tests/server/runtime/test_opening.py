import dataclasses
import itertools
import json
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from server.runtime.engines.fake import FakeEngine
from server.runtime.opening import (
    GRAPH_RUNS,
    RACE_TILE,
    WORTHWHILE,
    _auto,
    _worthwhile,
    cores,
    golden_head_std,
    golden_tiles,
    offered,
    open_bundle,
)

from server.arrays import Tiles
from server.errors import BundleDamaged, EngineUnavailable
from server.runtime import opening
from server.runtime.bundle import Bundle, read_bundle
from server.runtime.engines import ENGINES, EngineRow
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import rewrite_hashes
from tests.support.service import calibrated, manifest

ORT = {"engine": "onnxruntime", "threads": 1}


def retouch_golden(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    path = folder / "golden.npz"
    with np.load(path) as arrays:
        held = dict(arrays)
    edit(held)
    with path.open("wb") as file:
        np.savez(file, **held)
    rewrite_hashes(folder)


@pytest.fixture
def golden_engines(monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path) -> dict[str, EngineRow]:
    """Engines that know the golden answers by heart; rows may be exchanged."""
    pairs = [*golden_tiles(shipped_bundle / "golden.npz")]
    answers = {(graph, tiles.pixels.tobytes()): scores for graph, tiles, scores in pairs}
    answers |= {("head_std", tiles.pixels.tobytes()): scores for tiles, scores in golden_head_std(pairs)}

    def open_graph(path: Path, precision: str, provider: str, threads: int) -> FakeEngine:
        graph = path.name.split(".")[0]
        engine = FakeEngine(
            lambda t: answers.get(
                (graph, t.pixels.tobytes()), np.zeros((len(t), 1 + (graph == "head_std"), *t.pixels.shape[2:]), np.float32)
            )
        )
        engine.provider = provider
        return engine

    rows = {
        "onnxruntime": EngineRow(open_graph, "numpy", lambda provider: ("fp32", "fp16") if provider == "cuda" else ("fp32", "int8"),
                                 lambda wanted: ["cuda", "cpu"] if wanted == "auto" else [wanted]),
    }  # fmt: skip
    monkeypatch.setattr(opening, "ENGINES", rows)
    return rows


def test_opens_the_shipped_bundle(shipped_bundle: Path) -> None:
    opened = open_bundle(shipped_bundle, RuntimeSettings(**ORT))
    shipped = opened.bundle.manifest
    assert opened.engines.keys() == {(g.name, p) for g in shipped.graphs for p in ("fp32", "int8") if offered(shipped, g.name, p)}
    assert {engine.name for engine in opened.engines.values()} == {"onnxruntime"}
    assert opened.auto.keys() == {"L1", "L2", "L3", "L4", "accurate"}


class TestSpread:
    def test_its_weights_are_in_memory_once(self, shipped_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened_files = []
        row = ENGINES["onnxruntime"]

        def open_graph(path: Path, *rest: Any) -> Any:
            opened_files.append(path.name)
            return row.open(path, *rest)

        monkeypatch.setitem(ENGINES, "onnxruntime", dataclasses.replace(row, open=open_graph))
        opened = open_bundle(shipped_bundle, RuntimeSettings(**ORT))
        assert opened.head_std is not None
        assert "accurate.onnx" not in opened_files
        assert opened_files.count("head_std.onnx") == 1
        # What stands in for accurate gives what its own graph would, to the bit.
        accurate = opened.engines["accurate", "fp32"]
        assert (accurate.name, accurate.provider) == ("onnxruntime", "cpu")
        tiles = opening.noise(2, 3, [48, 64])
        own = row.open(shipped_bundle / "accurate.onnx", "fp32", "cpu", 1).run(tiles)
        assert np.array_equal(accurate.run(tiles), own)
        assert opened.head_std.run(tiles).shape == (2, 2, 48, 64)

    def test_what_the_golden_pairs_say(self) -> None:
        tiles = opening.noise(1, 1, [2, 2])
        heads = [np.full((1, 3, 2, 2), share, np.float32) for share in (0.1, 0.3, 0.8)]
        accurate = np.mean(heads, axis=0)
        pairs = [("L1", tiles, heads[0]), ("L2", tiles, heads[1]), ("L3", tiles, heads[2]), ("accurate", tiles, accurate)]
        ((given, found),) = golden_head_std(pairs)
        assert given is tiles
        assert np.array_equal(found[:, :3], accurate)
        assert found[:, 3] == pytest.approx(np.std([0.1, 0.3, 0.8]), abs=1e-6)

    def test_one_that_is_wrong(self, copied_bundle: Path) -> None:
        # Another level's scores move what the heads' deviation should be; the levels themselves are looked at by others.
        bundle = read_bundle(copied_bundle)
        pairs = [*golden_tiles(bundle.golden)]
        whole = ENGINES["onnxruntime"].open(copied_bundle / "head_std.onnx", "fp32", "cpu", 1)
        opening._check_head_std(bundle, whole, pairs, opening.at_once)
        moved = [(graph, tiles, scores + (0.01 if graph == "L1" else 0)) for graph, tiles, scores in pairs]
        with pytest.raises(BundleDamaged, match=r"spread\.onnx: onnxruntime on cpu leaves the spread of the golden scores by 0\.0"):
            opening._check_head_std(bundle, whole, moved, opening.at_once)

    def test_a_file_of_another_graph(self, copied_bundle: Path) -> None:
        shutil.copy(copied_bundle / "accurate.onnx", copied_bundle / "head_std.onnx")
        rewrite_hashes(copied_bundle)
        with pytest.raises(BundleDamaged, match=r"spread\.onnx"):
            open_bundle(copied_bundle, RuntimeSettings(**ORT))

    def test_a_bundle_of_before_opens(self, copied_bundle: Path) -> None:
        path = copied_bundle / "manifest.json"
        document = json.loads(path.read_text())
        del document["head_std"], document["files"]["head_std.onnx"]
        path.write_text(json.dumps(document))
        (copied_bundle / "head_std.onnx").unlink()
        opened = open_bundle(copied_bundle, RuntimeSettings(**ORT))
        assert opened.head_std is None
        assert ("accurate", "fp32") in opened.engines


class TestGolden:
    def test_other_scores(self, copied_bundle: Path) -> None:
        retouch_golden(copied_bundle, lambda held: held.update({"scores/L2/wide": held["scores/L2/wide"] + 0.01}))
        with pytest.raises(BundleDamaged, match=r"L2\.onnx.*leaves the golden scores by 0\.01"):
            open_bundle(copied_bundle, RuntimeSettings(**ORT))

    @pytest.mark.usefixtures("golden_engines")
    def test_not_a_number(self, copied_bundle: Path) -> None:
        retouch_golden(copied_bundle, lambda held: held.update({"scores/L2/wide": held["scores/L2/wide"] * np.nan}))
        with pytest.raises(BundleDamaged, match="L2"):
            open_bundle(copied_bundle, RuntimeSettings())

    @pytest.mark.usefixtures("golden_engines")
    def test_another_shape(self, copied_bundle: Path) -> None:
        retouch_golden(copied_bundle, lambda held: held.update({"scores/L2/wide": held["scores/L2/wide"][..., :-1]}))
        with pytest.raises(BundleDamaged, match="L2"):
            open_bundle(copied_bundle, RuntimeSettings())

    @pytest.mark.usefixtures("golden_engines")
    def test_a_graph_without_a_pair(self, copied_bundle: Path) -> None:
        retouch_golden(copied_bundle, lambda held: [held.pop(key) for key in list(held) if key.startswith("scores/L2/")])
        with pytest.raises(BundleDamaged, match=r"golden\.npz.*L2"):
            open_bundle(copied_bundle, RuntimeSettings())

    @pytest.mark.usefixtures("golden_engines")
    @pytest.mark.parametrize("data", [b"", b"nonsense", b"PK\3\4nonsense", b"\x93NUMPY\1\0"])
    def test_not_an_archive(self, copied_bundle: Path, data: bytes) -> None:
        (copied_bundle / "golden.npz").write_bytes(data)
        rewrite_hashes(copied_bundle)
        with pytest.raises(BundleDamaged, match=r"golden\.npz: cannot be read"):
            open_bundle(copied_bundle, RuntimeSettings())

    @pytest.mark.usefixtures("golden_engines")
    def test_input_missing(self, copied_bundle: Path) -> None:
        retouch_golden(copied_bundle, lambda held: held.pop("mean/wide"))
        with pytest.raises(BundleDamaged, match=r"golden\.npz: cannot be read"):
            open_bundle(copied_bundle, RuntimeSettings())


def test_a_graph_that_is_not_onnx(copied_bundle: Path) -> None:
    (copied_bundle / "L1.onnx").write_bytes(b"nonsense")
    rewrite_hashes(copied_bundle)
    with pytest.raises(BundleDamaged, match=r"L1\.onnx"):
        open_bundle(copied_bundle, RuntimeSettings(**ORT))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("old", "new"), [(b"\x04Conv", b"\x04Evil"), (b"weights.safetensors", b"../outside/data.bin")])
def test_engines_refuse_strange_operators_and_paths(copied_bundle: Path, engine: str, old: bytes, new: bytes) -> None:
    """Also where the check of the bundle would let them pass."""
    (copied_bundle.parent / "outside").mkdir()
    (copied_bundle.parent / "outside" / "data.bin").write_bytes((copied_bundle / "weights.safetensors").read_bytes())
    graph = copied_bundle / "L1.onnx"
    assert old in graph.read_bytes()
    graph.write_bytes(graph.read_bytes().replace(old, new))
    with pytest.raises(Exception, match=r"(?i)evil|external|outside"):
        ENGINES[engine].open(graph, "fp32", "cpu", 1)


def test_damage_is_no_reason_to_fall_back(copied_bundle: Path) -> None:
    """L3 is what engines are measured with: on the CPU all of them would fail."""
    (copied_bundle / "L3.onnx").write_bytes(b"nonsense")
    rewrite_hashes(copied_bundle)
    with pytest.raises(BundleDamaged, match=r"L3\.onnx"):
        open_bundle(copied_bundle, RuntimeSettings(threads=1))


def test_cuda_on_a_machine_without(shipped_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"'cuda'.*pip install '\.\[gpu\]'"):
        open_bundle(shipped_bundle, RuntimeSettings(provider="cuda"))


def test_openvino_on_cuda(shipped_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match=r"openvino.*cuda"):
        open_bundle(shipped_bundle, RuntimeSettings(provider="cuda", engine="openvino"))


@pytest.mark.usefixtures("golden_engines")
def test_a_precision_that_is_not_there(shipped_bundle: Path) -> None:
    with pytest.raises(EngineUnavailable, match="'bf16' cannot be served here; possible: "):
        open_bundle(shipped_bundle, RuntimeSettings(precision="bf16"))


@pytest.mark.usefixtures("golden_engines")
def test_a_configured_precision_is_auto(shipped_bundle: Path) -> None:
    opened = open_bundle(shipped_bundle, RuntimeSettings(precision="fp16"))
    assert set(opened.auto.values()) == {"fp16"}


def test_an_engine_that_is_not_installed(shipped_bundle: Path, golden_engines: dict[str, EngineRow]) -> None:
    row = golden_engines["onnxruntime"]
    golden_engines["onnxruntime"] = EngineRow(row.open, "no_such_module", row.precisions, row.providers)
    with pytest.raises(EngineUnavailable, match="pip install no_such_module"):
        open_bundle(shipped_bundle, RuntimeSettings(engine="onnxruntime"))
    with pytest.raises(EngineUnavailable, match=r"pip install '\.\[cpu\]' in the project's folder"):
        open_bundle(shipped_bundle, RuntimeSettings())


@pytest.mark.usefixtures("golden_engines")
def test_a_gpu_that_works_serves_alone(shipped_bundle: Path) -> None:
    opened = open_bundle(shipped_bundle, RuntimeSettings())
    assert {engine.provider for engine in opened.engines.values()} == {"cuda"}
    assert opened.precisions == ("fp32", "fp16")


class TestGpuThatFails:
    @pytest.fixture(params=["opening", "running"])
    def failing(self, request: pytest.FixtureRequest, golden_engines: dict[str, EngineRow]) -> None:
        row = golden_engines["onnxruntime"]

        def open_graph(path: Path, precision: str, provider: str, threads: int) -> Any:
            if provider == "cuda" and request.param == "opening":
                raise EngineUnavailable("no driver")

            def broken(tiles: Tiles) -> np.ndarray:
                raise RuntimeError("no driver")

            return FakeEngine(broken) if provider == "cuda" else row.open(path, precision, provider, threads)

        golden_engines["onnxruntime"] = EngineRow(open_graph, row.module, row.precisions, row.providers)

    @pytest.mark.usefixtures("failing")
    @pytest.mark.parametrize("engine", ["auto", "onnxruntime"])
    def test_auto_falls_back_loudly(self, shipped_bundle: Path, caplog: pytest.LogCaptureFixture, engine: str) -> None:
        with caplog.at_level(logging.WARNING):
            opened = open_bundle(shipped_bundle, RuntimeSettings(engine=engine))
        assert {engine.provider for engine in opened.engines.values()} == {"cpu"}
        loud = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(loud) == 2  # fp32 and fp16
        assert all("FALLING BACK" in text and "cuda" in text and "no driver" in text for text in loud)

    @pytest.mark.usefixtures("failing")
    def test_nothing_left_to_fall_back_to(self, shipped_bundle: Path, golden_engines: dict[str, EngineRow]) -> None:
        row = golden_engines["onnxruntime"]
        golden_engines["onnxruntime"] = dataclasses.replace(row, providers=lambda wanted: ["cuda"])
        with pytest.raises(EngineUnavailable, match=r"onnxruntime on cuda cannot run.*no driver"):
            open_bundle(shipped_bundle, RuntimeSettings(engine="onnxruntime"))

    @pytest.mark.usefixtures("failing")
    def test_a_named_one_must_work(self, shipped_bundle: Path) -> None:
        with pytest.raises(EngineUnavailable, match=r"cuda.*no driver"):
            open_bundle(shipped_bundle, RuntimeSettings(provider="cuda"))


class TestAuto:
    """`chosen` is in the order of speed."""

    def auto(self, order: list[str], wanted: str = "auto", rows: list[tuple[str, str, float]] | None = None) -> str:
        known = manifest(calibration=calibrated(rows) if rows is not None else None)
        return _auto(known, "L2", dict.fromkeys(order, "fake"), wanted)

    def test_without_calibration_fp32(self) -> None:
        assert self.auto(["int8", "bf16", "fp16", "fp32"]) == "fp32"

    def test_the_fastest_that_is_close_enough(self) -> None:
        rows = [("L2", "fp32", 0.8), ("L2", "int8", 0.79), ("L2", "fp16", 0.7951), ("L2", "bf16", 0.8)]
        assert self.auto(["int8", "fp16", "bf16", "fp32"], rows=rows) == "fp16"

    def test_fp32_where_it_is_faster(self) -> None:
        assert self.auto(["fp32", "int8"], rows=[("L2", "fp32", 0.8), ("L2", "int8", 0.9)]) == "fp32"

    def test_each_graph_by_its_own_rows(self) -> None:
        assert self.auto(["int8", "fp32"], rows=[("L1", "fp32", 0.8), ("L1", "int8", 0.8)]) == "fp32"
        assert self.auto(["int8", "fp32"], rows=[("L2", "int8", 0.8)]) == "fp32"

    def test_by_the_row_of_the_engine_that_serves(self) -> None:
        rows = [("L2", "fp32", 0.8), ("L2", "int8", 0.8, "good"), ("L2", "int8", 0.7, "bad")]
        known = manifest(calibration=calibrated(rows))
        picked = {engine: _auto(known, "L2", {"int8": engine, "fp32": "good"}, "auto") for engine in ("good", "bad", "unknown")}
        assert picked == {"good": "int8", "bad": "fp32", "unknown": "fp32"}

    def test_configured(self) -> None:
        assert self.auto(["int8", "fp32"], wanted="int8") == "int8"

    def test_no_fp32_there(self) -> None:
        assert self.auto(["int8"]) == "int8"

    def test_configured_but_not_offered(self, caplog: pytest.LogCaptureFixture) -> None:
        assert self.auto(["bf16", "fp32"], wanted="int8") == "fp32"
        assert "L2 is not offered at the configured precision int8" in caplog.text


class Slow(FakeEngine):
    """Takes a while on top of what it runs."""

    def __init__(self, engine: Any, seconds: float) -> None:
        super().__init__(engine.run)
        self.seconds = seconds

    def run(self, tiles: Tiles) -> np.ndarray:
        time.sleep(self.seconds)
        return super().run(tiles)


def test_auto_is_the_fastest_of_each_graph(
    copied_bundle: Path, golden_engines: dict[str, EngineRow], caplog: pytest.LogCaptureFixture
) -> None:
    """int8 wins the race over L3, but is slower than fp32 at L1."""
    right = golden_engines["onnxruntime"]

    def open_graph(path: Path, precision: str, provider: str, threads: int) -> Any:
        seconds = {("L1.int8.onnx", "int8"): 0.02, ("L3.onnx", "fp32"): 0.02}.get((path.name, precision), 0.001)
        return Slow(right.open(path, precision, provider, threads), seconds)

    golden_engines["onnxruntime"] = dataclasses.replace(right, open=open_graph, providers=lambda wanted: ["cpu"])
    path = copied_bundle / "manifest.json"
    rows = [(graph, precision, 0.8) for graph in ("L1", "L3") for precision in ("fp32", "int8")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": calibrated(rows)}))
    with caplog.at_level(logging.INFO):
        opened = open_bundle(copied_bundle, RuntimeSettings())
    assert opened.auto["L1"] == "fp32"
    assert opened.auto["L3"] == "int8"
    assert re.search(r"nuclei L3 int8: fake on cpu, \d+\.\d ms, batches of \d+ \(auto\)", caplog.text)


def test_a_precision_that_this_machine_computes_badly_is_not_offered(
    shipped_bundle: Path, golden_engines: dict[str, EngineRow], caplog: pytest.LogCaptureFixture
) -> None:
    right = golden_engines["onnxruntime"]

    def open_graph(path: Path, precision: str, provider: str, threads: int) -> Any:
        engine = right.open(path, precision, provider, threads)
        if precision != "fp16" or not path.name.startswith("L2"):
            return engine
        return FakeEngine(lambda tiles: 1 - engine.run(tiles))

    golden_engines["onnxruntime"] = dataclasses.replace(right, open=open_graph)
    opened = open_bundle(shipped_bundle, RuntimeSettings())
    assert ("L2", "fp16") not in opened.engines
    assert ("L3", "fp16") in opened.engines
    assert opened.auto["L2"] == "fp32"
    assert "NOT OFFERED" in caplog.text


class TestOffered:
    """int8 must be known to be good; the others must not be known to be bad."""

    @pytest.mark.parametrize(
        ("precision", "iou", "expected"),
        [
            ("fp32", None, True), ("int8", None, False), ("bf16", None, True), ("fp16", None, True),
            ("int8", 0.7951, True), ("int8", 0.7949, False), ("bf16", 0.7951, True), ("bf16", 0.7949, False),
        ],
    )  # fmt: skip
    def test_by_calibration(self, precision: str, iou: float | None, expected: bool) -> None:
        rows = [("L2", "fp32", 0.8), *([("L2", precision, iou)] if iou is not None else [])]
        assert offered(manifest(calibration=calibrated(rows)), "L2", precision) is expected

    @pytest.mark.parametrize(("engine", "expected"), [("good", True), ("bad", False), ("unknown", False), (None, False)])
    def test_each_engine_by_its_own_row(self, engine: str | None, expected: bool) -> None:
        rows = [("L2", "fp32", 0.8), ("L2", "int8", 0.8, "good"), ("L2", "int8", 0.7, "bad")]
        assert offered(manifest(calibration=calibrated(rows)), "L2", "int8", engine) is expected

    @pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
    def test_without_calibration(self, precision: str) -> None:
        assert offered(manifest(), "L2", precision)
        assert not offered(manifest(), "L2", "int8")


class TestCores:
    @pytest.mark.parametrize(
        ("quota", "expected"),
        [
            ("max 100000\n", 8), ("150000 100000\n", 2), ("200000 100000\n", 2), ("1000 100000\n", 1), ("9900000 100000\n", 8),
            ("", 8), ("nonsense", 8),
        ],
    )  # fmt: skip
    def test_quota(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, expected: int) -> None:
        monkeypatch.setattr(opening.os, "sched_getaffinity", lambda pid: set(range(8)))
        (tmp_path / "cpu.max").write_text(quota)
        assert cores(tmp_path / "cpu.max") == expected

    def test_affinity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(opening.os, "sched_getaffinity", lambda pid: {1, 5, 7})
        assert cores(tmp_path / "missing") == 3

    def test_where_there_is_no_affinity(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(opening.os, "sched_getaffinity")
        monkeypatch.setattr(opening.os, "cpu_count", lambda: 6)
        assert cores(tmp_path / "missing") == 6

    @pytest.mark.parametrize(("configured", "given"), [(0, 5), (2, 2)])
    def test_engines_are_told(
        self,
        shipped_bundle: Path,
        golden_engines: dict[str, EngineRow],
        monkeypatch: pytest.MonkeyPatch,
        configured: int,
        given: int,
    ) -> None:
        monkeypatch.setattr(opening, "cores", lambda: 5)
        right, told = golden_engines["onnxruntime"], set()

        def open_graph(path: Path, precision: str, provider: str, threads: int) -> Any:
            told.add(threads)
            return right.open(path, precision, provider, threads)

        golden_engines["onnxruntime"] = dataclasses.replace(right, open=open_graph)
        open_bundle(shipped_bundle, RuntimeSettings(threads=configured))
        assert told == {given}


def test_copies_are_as_good(copied_bundle: Path, tmp_path: Path) -> None:
    """A bundle may move: nothing in it names a folder."""
    moved = shutil.move(copied_bundle, tmp_path / "elsewhere")
    assert read_bundle(Path(moved)).manifest.name == "nuclei"


class TestWorthwhile:
    """How many tiles one run should hold, with the seconds of a run by how many it holds."""

    def found(
        self,
        monkeypatch: pytest.MonkeyPatch,
        seconds: Callable[[int], float],
        most: int = 64,
        breaks_at: int = 10**9,
        dims: int = 2,
    ) -> tuple[int, list[int]]:
        """The answer, and the sizes of all runs."""

        def run(tiles: Tiles) -> np.ndarray:
            if len(tiles) >= breaks_at:
                raise RuntimeError("out of memory")
            assert tiles.pixels.shape[2:] == (RACE_TILE[dims],) * dims
            return np.zeros((len(tiles), 1, *tiles.pixels.shape[2:]), np.float32)

        def timed(engine: FakeEngine, tiles: Tiles) -> float:
            engine.run(tiles)
            return seconds(len(tiles))

        monkeypatch.setattr(opening, "_timed", timed)
        engine = FakeEngine(run)
        bundle = Bundle(Path("/nowhere"), manifest(dims=dims))
        return _worthwhile(bundle, engine, most), engine.batches

    def test_stops_where_doubling_no_longer_pays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Of a run 8 parts are for starting it, and one for each tile: 9, 5, 3, 2, 1.5, 1.25, ...
        assert self.found(monkeypatch, lambda n: 8.0 + n)[0] == 64
        for start, best in ((0.0, 1), (0.05, 1), (0.2, 2), (1.0, 16), (2.0, 32)):
            count, runs = self.found(monkeypatch, lambda n, start=start: start + n)
            assert count == best
            # It looked no further than one doubling that did not pay.
            assert set(runs) == {2**k for k in range(best.bit_length() + 1)}

    @pytest.mark.parametrize(("gain", "best"), [(0.0, 1), (0.04, 1), (0.06, 64)])
    def test_a_tile_must_be_clearly_faster(self, monkeypatch: pytest.MonkeyPatch, gain: float, best: int) -> None:
        assert pytest.approx(0.05) == 1 - WORTHWHILE
        assert self.found(monkeypatch, lambda n: n * (1 - gain) ** np.log2(n))[0] == best

    def test_a_device_that_gets_slower_is_not_pressed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.found(monkeypatch, lambda n: 1.0 if n <= 8 else 100.0)[0] == 8

    @pytest.mark.parametrize(("most", "count"), [(0, 1), (1, 1), (2, 2), (3, 2), (16, 16), (48, 32), (64, 64)])
    def test_never_more_than_allowed(self, monkeypatch: pytest.MonkeyPatch, most: int, count: int) -> None:
        found, runs = self.found(monkeypatch, lambda n: 1.0, most)
        assert found == count
        assert max(runs, default=0) <= most

    @pytest.mark.parametrize(("breaks_at", "count"), [(1, 1), (2, 1), (8, 4), (40, 32)])
    def test_a_device_that_is_full_is_not_pressed(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, breaks_at: int, count: int
    ) -> None:
        found, runs = self.found(monkeypatch, lambda n: 1.0, breaks_at=breaks_at)
        assert found == count
        assert sum(size >= breaks_at for size in runs) == 1
        assert "tiles fails, smaller ones are run: out of memory" in caplog.text

    def test_the_best_of_some_runs_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The rest was slowed by whatever else goes on."""
        turn = itertools.count()
        assert self.found(monkeypatch, lambda n: 1.0 if next(turn) % GRAPH_RUNS == 1 else 1000.0 * n)[0] == 64

    def test_volumes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.found(monkeypatch, lambda n: 1.0 + n, dims=3)[0] == 16


@pytest.mark.usefixtures("golden_engines")
@pytest.mark.parametrize(
    ("max_batch", "max_pixels", "tiles"), [(64, 4_194_304, 64), (4, 4_194_304, 4), (64, 40_000, 2), (64, 4096, 1)]
)
def test_what_is_found_is_within_the_settings(
    monkeypatch: pytest.MonkeyPatch, shipped_bundle: Path, max_batch: int, max_pixels: int, tiles: int
) -> None:
    monkeypatch.setattr(opening, "_timed", lambda engine, tiles: 1.0)
    opened = open_bundle(shipped_bundle, RuntimeSettings(), BatchingSettings(max_batch=max_batch, max_batch_pixels=max_pixels))
    assert opened.batch_pixels.keys() == opened.engines.keys() == opened.pace.keys()
    assert opened.measured_pixels == 128 * 128
    assert set(opened.batch_pixels.values()) == {min(tiles * 128 * 128, max_pixels)}
    assert set(opened.pace.values()) == {1 / (128 * 128)}
