"""The rule of `server.runtime.selection` as a table."""

from typing import Any

import pytest

from server.errors import EngineUnavailable
from server.runtime.bundle import Manifest
from server.runtime.machine import Machine
from server.runtime.selection import (
    CPU_BATCH_PIXELS,
    Candidate,
    Selection,
    is_enabled,
    select,
    within_tolerance,
)
from server.runtime.tuning import Tuning, TuningKey, TuningRow
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.service import calibrated, manifest

GRAPHS = ("L1", "L2", "accurate")
CPU = {"onnxruntime": {"cpu": ("fp32", "int8")}}
BOTH = CPU | {"openvino": {"cpu": ("fp32", "bf16", "int8")}}
ONLY_FP32 = {"onnxruntime": {"cpu": ("fp32",)}, "openvino": {"cpu": ("fp32",)}}
GPU = {
    "onnxruntime": {"cuda": ("fp32", "fp16"), "cpu": ("fp32", "int8")},
    "openvino": {"cpu": ("fp32", "int8")},
}

SAFE = [("L1", "fp32", 0.9), ("L1", "bf16", 0.899), ("L1", "fp16", 0.9), ("L1", "int8", 0.8951)]
LOSSY = [("L1", "fp32", 0.9), ("L1", "bf16", 0.8), ("L1", "fp16", 0.8), ("L1", "int8", 0.8)]
# int8 is good on one engine and bad on the other.
SPLIT = [("L1", "fp32", 0.9), ("L1", "int8", 0.9, "onnxruntime"), ("L1", "int8", 0.5, "openvino")]


def machine(engines: dict[str, Any], *features: str) -> Machine:
    return Machine("cpu", frozenset(features), 2, engines, dict.fromkeys(engines, "1"))


def bundle(
    rows: list[tuple[Any, ...]] | None = None,
    precisions: tuple[str, ...] = ("fp32", "fp16", "int8"),
    **changes: Any,
) -> Manifest:
    graphs = [
        {
            "name": name,
            "level": level,
            "divisor": 4,
            "parameters": 1,
            "macs_per_pixel": 1.0,
            "files": {precision: f"{name}.{precision}.onnx" for precision in precisions},
        }
        for name, level in zip(GRAPHS, (1, 2, 2), strict=True)
    ]
    calibration = None if rows is None else calibrated(rows)
    return manifest(graphs=graphs, calibration=calibration, **changes)


def tuned(*rows: tuple[str, str, float, int], provider: str = "cpu") -> Tuning:
    """Rows of (precision, engine, milliseconds, batch pixels) for L1."""
    key = TuningKey(
        bundle="", processor="", features=(), cores=1, engines={}, providers=(), gpus=(), threads=1
    )
    points = [
        TuningRow(
            graph="L1",
            precision=precision,
            engine=engine,
            provider=provider,
            milliseconds=ms,
            batch_pixels=pixels,
        )
        for precision, engine, ms, pixels in rows
    ]
    return Tuning(key=key, rows=tuple(points))


def selected(
    document: Manifest,
    engines: dict[str, Any],
    *features: str,
    precision: str = "auto",
    tuning: Tuning | None = None,
    **options: Any,
) -> Selection:
    settings = RuntimeSettings(precision=precision)
    return select(document, machine(engines, *features), settings, BatchingSettings(), tuning, **options)


@pytest.mark.parametrize(
    ("engines", "features", "rows", "engine", "precision"),
    [
        pytest.param(ONLY_FP32, (), None, "openvino", "fp32", id="openvino before onnxruntime"),
        pytest.param(CPU, (), None, "onnxruntime", "fp32", id="no calibration: fp32"),
        pytest.param(CPU, ("avx_vnni",), None, "onnxruntime", "fp32", id="int8 needs a calibration"),
        pytest.param(
            BOTH, ("avx_vnni",), SAFE, "openvino", "int8", id="int8 where the processor multiplies it"
        ),
        pytest.param(BOTH, ("avx2", "fma"), SAFE, "openvino", "bf16", id="else bf16"),
        pytest.param(CPU, ("avx2",), SAFE, "onnxruntime", "fp32", id="else fp32"),
        pytest.param(BOTH, ("avx_vnni",), LOSSY, "openvino", "fp32", id="nothing that loses too much"),
        pytest.param(BOTH, ("avx_vnni",), SPLIT, "onnxruntime", "int8", id="each engine by its own row"),
        pytest.param(GPU, ("avx_vnni",), SAFE, "onnxruntime", "fp16", id="a GPU before the processor"),
        pytest.param(GPU, (), LOSSY, "onnxruntime", "fp32", id="a GPU at fp32"),
        pytest.param(GPU, (), None, "onnxruntime", "fp32", id="a GPU without calibration: fp32"),
    ],
)
def test_select_without_tuning_follows_the_order(
    engines: dict[str, Any], features: tuple[str, ...], rows: list[Any] | None, engine: str, precision: str
) -> None:
    selection = selected(bundle(rows), engines, *features)
    candidate = selection.choices["L1", precision].candidate
    assert (selection.auto["L1"], candidate.engine, selection.reason["L1"]) == (precision, engine, "rule")
    assert candidate.provider == ("cuda" if engines is GPU else "cpu")


def test_select_judges_each_graph_by_its_own_rows() -> None:
    rows = [*SAFE, ("L2", "fp32", 0.9), ("L2", "int8", 0.5), ("L2", "bf16", 0.5)]
    selection = selected(bundle(rows), BOTH, "avx_vnni")
    assert [selection.auto[graph] for graph in GRAPHS] == ["int8", "fp32", "fp32"]
    assert [selection.precisions(graph) for graph in GRAPHS] == [
        ("fp32", "bf16", "int8"),
        ("fp32",),
        ("fp32", "bf16"),
    ]


@pytest.mark.parametrize(
    ("rows", "engine", "precision", "pixels"),
    [
        pytest.param(
            [("fp32", "openvino", 1, 400), ("int8", "openvino", 2, 100)],
            "openvino",
            "fp32",
            400,
            id="precision",
        ),
        pytest.param(
            [("int8", "openvino", 2, 100), ("int8", "onnxruntime", 1, 300)],
            "onnxruntime",
            "int8",
            300,
            id="engine",
        ),
        pytest.param(
            [("int8", "openvino", 1, 10**9)],
            "openvino",
            "int8",
            BatchingSettings().max_batch_pixels,
            id="limit",
        ),
    ],
)
def test_select_with_tuning_takes_the_fastest(
    rows: list[Any], engine: str, precision: str, pixels: int
) -> None:
    selection = selected(bundle(SAFE), BOTH, tuning=tuned(*rows))
    choice = selection.choices["L1", precision]
    assert (selection.auto["L1"], choice.candidate.engine, choice.batch_pixels) == (precision, engine, pixels)
    assert (selection.reason["L1"], selection.reason["L2"]) == ("tuning", "rule")


def test_select_with_tuning_takes_nothing_that_loses_too_much() -> None:
    selection = selected(
        bundle(LOSSY), BOTH, tuning=tuned(("int8", "openvino", 0.1, 100), ("fp32", "openvino", 9, 200))
    )
    assert selection.auto["L1"] == "fp32"


@pytest.mark.parametrize(("provider", "reason"), [("cuda", "rule"), ("cpu", "tuning")])
def test_select_with_tuning_of_another_provider_follows_the_rule(provider: str, reason: str) -> None:
    tuning = tuned(("int8", "onnxruntime", 0.1, 100), provider=provider)
    selection = selected(bundle(SAFE), CPU, tuning=tuning)
    assert selection.reason["L1"] == reason
    assert (selection.choices["L1", "int8"].batch_pixels == 100) is (reason == "tuning")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_select_configured_precision_is_auto(precision: str) -> None:
    fast = tuned(("fp32", "openvino", 0.1, 100))
    selection = selected(bundle(SAFE), BOTH, "avx_vnni", precision=precision, tuning=fast)
    assert (selection.auto["L1"], selection.reason["L1"]) == (precision, "settings")


def test_select_precision_configured_for_some_graphs_leaves_the_others_to_the_rule() -> None:
    selection = selected(bundle(SAFE), CPU, precision="int8")
    assert [(selection.auto[g], selection.reason[g]) for g in ("L1", "L2")] == [
        ("int8", "settings"),
        ("fp32", "rule"),
    ]


def test_select_batches_are_small_on_a_processor_and_large_on_a_gpu() -> None:
    assert selected(bundle(), CPU).choices["L1", "fp32"].batch_pixels == CPU_BATCH_PIXELS
    assert selected(bundle(), GPU).choices["L1", "fp32"].batch_pixels == BatchingSettings().max_batch_pixels


def test_select_without_a_file_offers_no_precision() -> None:
    assert selected(bundle(SAFE, ("fp32",)), BOTH, "avx_vnni").precisions("L1") == ("fp32", "bf16")


EXCLUDED = [Candidate("onnxruntime", "cuda", precision) for precision in ("fp32", "fp16")]


@pytest.mark.parametrize(
    ("engines", "excluded", "served"),
    [
        (BOTH, [Candidate("openvino", "cpu", "int8")], Candidate("onnxruntime", "cpu", "int8")),
        (CPU, [Candidate("onnxruntime", "cpu", "int8")], Candidate("onnxruntime", "cpu", "fp32")),
        (GPU, EXCLUDED[1:], EXCLUDED[0]),
        (GPU, EXCLUDED, Candidate("openvino", "cpu", "int8")),
        # fp32 itself may fail to run.
        (CPU, [Candidate("onnxruntime", "cpu", "fp32")], Candidate("onnxruntime", "cpu", "int8")),
    ],
    ids=["engine", "precision", "precision of a GPU", "GPU", "fp32"],
)
def test_select_excluded_candidates_are_not_used(
    engines: dict[str, Any], excluded: list[Candidate], served: Candidate
) -> None:
    rows = [(graph, precision, 0.9) for graph in GRAPHS for precision in ("fp32", "bf16", "fp16", "int8")]
    broken = [("L1", candidate) for candidate in excluded]
    selection = selected(bundle(rows), engines, "avx_vnni", excluded=broken)
    assert selection.choices["L1", selection.auto["L1"]].candidate == served
    assert not {(graph, choice.candidate) for (graph, _), choice in selection.choices.items()} & {*broken}
    # Other graphs are served as if nothing had been excluded.
    whole = selected(bundle(rows), engines, "avx_vnni")
    for graph in ("L2", "accurate"):
        assert selection.auto[graph] == whole.auto[graph]
        assert selection.choices[graph, selection.auto[graph]] == whole.choices[graph, whole.auto[graph]]


def test_select_only_a_lossy_precision_is_left_serves_it() -> None:
    excluded = [("L1", Candidate("onnxruntime", "cpu", "fp32"))]
    assert (
        selected(bundle(), {"onnxruntime": {"cpu": ("fp32", "bf16")}}, excluded=excluded).auto["L1"] == "bf16"
    )


HEAD_STD = {
    "name": "head_std",
    "level": 2,
    "divisor": 4,
    "parameters": 1,
    "macs_per_pixel": 1.0,
    "files": {"fp32": "std.onnx"},
}


def test_select_head_std_is_served_at_fp32_alone() -> None:
    selection = selected(bundle(SAFE, head_std=HEAD_STD), BOTH, "avx_vnni", precision="int8")
    assert (selection.auto["head_std"], selection.precisions("head_std")) == ("fp32", ("fp32",))


def test_select_nothing_installed_is_refused() -> None:
    with pytest.raises(EngineUnavailable) as caught:
        selected(bundle(), {})
    assert caught.value.fields == {"graph": "L1", "engines": []}


def test_select_everything_excluded_is_refused() -> None:
    excluded = [("L1", Candidate("onnxruntime", "cpu", "fp32"))]
    with pytest.raises(EngineUnavailable) as caught:
        selected(bundle(), {"onnxruntime": {"cpu": ("fp32",)}}, excluded=excluded)
    assert caught.value.fields == {"graph": "L1", "engines": ["onnxruntime"]}


def test_select_configured_precision_that_no_graph_has_is_refused() -> None:
    with pytest.raises(EngineUnavailable) as caught:
        selected(bundle(LOSSY), CPU, precision="int8")
    assert caught.value.fields == {"precision": "int8", "allowed": ["fp32"]}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize(
    ("iou", "enabled"),
    [(None, None), (0.95, True), (0.9, True), (0.8951, True), (0.8949, False), (0.1, False)],
)
def test_is_enabled_within_half_a_point_of_fp32(
    precision: str, iou: float | None, enabled: bool | None
) -> None:
    document = bundle([("L1", "fp32", 0.9), *([("L1", precision, iou)] if iou is not None else [])])
    assert within_tolerance(document, "L1", precision) is enabled
    # Not measured: whatever is a rounding alone is taken on trust, quantisation is not.
    assert is_enabled(document, "L1", precision) is (precision != "int8" if enabled is None else enabled)


@pytest.mark.parametrize(
    ("engine", "enabled"), [("onnxruntime", True), ("openvino", False), ("unmeasured", False), (None, False)]
)
def test_is_enabled_by_the_row_of_the_engine_else_the_worst(engine: str | None, enabled: bool) -> None:
    assert is_enabled(bundle(SPLIT), "L1", "int8", engine) is enabled


def test_is_enabled_without_calibration() -> None:
    document = bundle()
    enabled = {
        precision: is_enabled(document, "L1", precision) for precision in ("fp32", "bf16", "fp16", "int8")
    }
    assert enabled == {"fp32": True, "bf16": True, "fp16": True, "int8": False}


def agreed(rows: list[tuple[Any, ...]]) -> dict[str, Any]:
    """An agreement from (graph, precision, agreement with fp32[, engine])."""
    return {
        "data": "images",
        "images": 1,
        "machine": "none",
        "deepest": "L2",
        "rows": [
            {
                "graph": graph,
                "precision": precision,
                "engine": engine[0] if engine else "onnxruntime",
                "agreement": 0.7,
                "fp32_agreement": same,
                "latency_ms": 1,
            }
            for graph, precision, same, *engine in rows
        ],
        "recommended": {"level": 1, "precision": "fp32", "why": "a test"},
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
@pytest.mark.parametrize(("same", "verdict"), [(1, True), (0.995, True), (0.9949, None), (0.1, None)])
def test_without_labels_a_precision_is_proved_by_its_agreement_with_fp32(
    precision: str, same: float, verdict: bool | None
) -> None:
    document = bundle(agreement=agreed([("L1", "fp32", 1), ("L1", precision, same)]))
    assert within_tolerance(document, "L1", precision) is verdict
    # Less agreement may lose nothing, so that it is as if nothing had been measured.
    assert is_enabled(document, "L1", precision) is (precision != "int8" or verdict is True)


def test_without_labels_the_row_of_the_engine_counts_else_the_worst() -> None:
    rows = [("L1", "int8", 1, "onnxruntime"), ("L1", "int8", 0.9, "openvino")]
    document = bundle(agreement=agreed(rows))
    enabled = {
        engine: is_enabled(document, "L1", "int8", engine) for engine in ("onnxruntime", "openvino", None)
    }
    assert enabled == {"onnxruntime": True, "openvino": False, None: False}


def test_labels_decide_where_there_are_both() -> None:
    document = bundle(LOSSY, agreement=agreed([("L1", "int8", 1)]))
    assert within_tolerance(document, "L1", "int8") is False
    # Calibrated at other precisions alone: the agreement tells of this one.
    document = bundle([("L1", "fp32", 0.9)], agreement=agreed([("L1", "int8", 1)]))
    assert within_tolerance(document, "L1", "int8") is True


def test_recommended_level_of_calibration_then_agreement_then_the_deepest() -> None:
    assert bundle().recommended_level == 2
    assert bundle(agreement=agreed([])).recommended_level == 1
    both = bundle(SAFE, agreement=agreed([]))
    assert both.recommended_level == both.calibration.recommended.level  # type: ignore[union-attr]
