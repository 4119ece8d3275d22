from pathlib import Path

import pytest

from server.errors import EngineUnavailable
from server.runtime import engines, machine
from server.runtime.engines import EngineRow
from server.runtime.machine import Machine, count_cores, read_machine, read_processor

X86 = "processor : 0\nmodel name : AMD EPYC 9B14\nflags : fpu avx2 fma avx512_vnni avx512_bf16\n\nprocessor : 1\nflags : fpu\n"
ARM = "processor : 0\nFeatures : fp asimd asimddp sve\n"


@pytest.mark.parametrize(
    ("text", "model", "features"),
    [
        (X86, "AMD EPYC 9B14", {"avx2", "fma", "avx512_vnni", "avx512_bf16"}),
        (ARM, None, {"asimddp", "sve"}),
        ("", None, set()),
    ],
    ids=["x86", "arm", "empty"],
)
def test_read_processor_of_linux(tmp_path: Path, text: str, model: str | None, features: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    name, read = read_processor(tmp_path / "cpuinfo")
    assert (name, read) == (model or name, features)
    assert name


def test_read_processor_elsewhere_has_no_features(tmp_path: Path) -> None:
    name, features = read_processor(tmp_path / "missing")
    assert name
    assert not features


@pytest.mark.parametrize(
    ("features", "fast"), [({"avx2", "avx512f"}, False), ({"avx_vnni"}, True), ({"asimddp"}, True)]
)
def test_machine_has_fast_int8_by_its_instructions(features: set[str], fast: bool) -> None:
    assert Machine("", frozenset(features), 1, {}, {}).has_fast_int8 is fast


def test_read_machine_lists_installed_engines() -> None:
    read = read_machine()
    assert read.engines.keys() == read.versions.keys() == {"onnxruntime", "openvino"}
    assert all("fp32" in providers["cpu"] for providers in read.engines.values())
    assert "unknown" not in read.versions.values()
    assert read.cores >= 1
    assert read_machine() == read


def test_read_machine_named_engine_alone() -> None:
    assert [*read_machine("onnxruntime").engines] == ["onnxruntime"]


def test_read_machine_named_engine_on_a_provider_that_it_does_not_have_is_refused() -> None:
    with pytest.raises(EngineUnavailable) as caught:
        read_machine("openvino", "cuda")
    assert caught.value.fields == {"engine": "openvino", "provider": "cuda"}


def test_read_machine_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = EngineRow(None, "no_such_module", lambda _: (), lambda _: [])  # type: ignore[arg-type]
    monkeypatch.setitem(engines.ENGINES, "openvino", missing)
    assert [*read_machine().engines] == ["onnxruntime"]
    with pytest.raises(EngineUnavailable) as caught:
        read_machine("openvino")
    assert caught.value.fields == {"engine": "openvino"}


def test_version_of_a_package_under_no_known_name_is_unknown() -> None:
    assert machine.package_version("no_such_module") == "unknown"


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("100000 100000", 1), ("150000 100000", 2), ("max 100000", 3), ("", 3), ("9900000 100000", 3)],
)
def test_count_cores_respects_the_quota_and_the_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, cores: int
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    assert count_cores(tmp_path / "cpu.max") == cores


def test_count_cores_where_there_is_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert count_cores(tmp_path / "missing") == 1
