import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.runtime.bundle import Bundle
from server.runtime.machine import Machine
from server.runtime.tuning import BUNDLE_FOLDER, Tuning, TuningKey, TuningRow, find_tuning, store_tuning
from tests.support.service import manifest

MACHINE = Machine(
    "cpu x", frozenset({"avx2", "fma"}), 4, {"openvino": {"cpu": ("fp32",)}, "onnxruntime": {"cpu": ("fp32",)}},
    {"openvino": "2026.1", "onnxruntime": "1.31"},
)  # fmt: skip
BUNDLE = Bundle(Path("/nowhere"), manifest(), "a" * 64)
KEY = TuningKey.of(BUNDLE, MACHINE)
ROW = TuningRow(
    graph="L1", precision="fp32", engine="openvino", provider="cpu", milliseconds=1.5, batch_pixels=100
)


@pytest.mark.parametrize(
    "change",
    [
        {"processor": "cpu y"},
        {"features": frozenset({"avx2"})},
        {"cores": 2},
        {"versions": {"openvino": "2026.2", "onnxruntime": "1.31"}},
        {"versions": {"onnxruntime": "1.31"}},
        {"engines": {"onnxruntime": {"cuda": ("fp32",), "cpu": ("fp32",)}}},
        {"gpus": ("NVIDIA X", "600.1")},
    ],
    ids="-".join,
)
def test_key_changes_with_every_fact_of_the_machine(change: dict[str, Any]) -> None:
    other = TuningKey.of(BUNDLE, dataclasses.replace(MACHINE, **change))
    assert other != KEY
    assert other.file_name != KEY.file_name


def test_key_changes_with_the_bundle() -> None:
    other = TuningKey.of(Bundle(Path("/nowhere"), manifest(), "b" * 64), MACHINE)
    assert other.file_name != KEY.file_name


@pytest.mark.parametrize(("threads", "fits"), [(0, True), (4, True), (2, False)])
def test_find_goes_by_the_threads_of_a_run(tmp_path: Path, threads: int, fits: bool) -> None:
    """0 are all of the four cores."""
    store_tuning(Tuning(key=KEY, rows=(ROW,)), tmp_path)
    assert (find_tuning(BUNDLE, MACHINE, tmp_path, threads) is not None) is fits


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
    provider=st.sampled_from(["cpu", "cuda"]),
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


def test_row_is_that_of_graph_precision_engine_and_provider() -> None:
    tuning = Tuning(key=KEY, rows=(ROW,))
    points = [
        ("L1", "fp32", "openvino", "cpu"),
        ("L1", "fp32", "onnxruntime", "cpu"),
        ("L1", "int8", "openvino", "cpu"),
        ("L2", "fp32", "openvino", "cpu"),
        ("L1", "fp32", "openvino", "cuda"),
    ]
    assert [tuning.row(*point) for point in points] == [ROW, None, None, None, None]


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
