"""Which engine and precision serve a graph: a pure rule over facts that do not vary from start to start.

1. A GPU that this installation can use is preferred to the processor; `settings.provider` names another.
2. A precision is enabled for a graph if its calibrated IoU is within `IOU_TOLERANCE` of fp32. int8 needs a
    calibration. Without labels it is enough that its mask agrees with that of fp32 so well that no label
    could tell more of a difference.
3. Of several engines that offer an enabled precision, the faster one in the stored tuning serves it; without
   a tuning the first in `ENGINE_ORDER`.
4. `auto` is the precision that the settings name; else the fastest calibrated one in the stored tuning; else
   the first calibrated one in `PRECISION_ORDER` that the processor runs natively.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from server.errors import EngineUnavailable
from server.runtime.bundle import GRAPH_PRECISIONS, HEAD_STD, Manifest
from server.runtime.machine import Machine
from server.runtime.tuning import Tuning, TuningRow
from server.settings import BatchingSettings, RuntimeSettings

PRECISIONS = ("fp32", "bf16", "fp16", "int8")

# Largest loss of foreground IoU against fp32 at which a precision is enabled.
IOU_TOLERANCE = 0.005

# Fastest first. Measured with bench/levels.py and on every calibration so far: OpenVINO runs the same graphs
# two to three times faster than ONNX Runtime on CPUs, and int8 is faster than bf16, which is faster than
# fp32, where the processor has the instructions.
ENGINE_ORDER = ("openvino", "onnxruntime")
PRECISION_ORDER = {
    "cuda": ("fp16", "fp32"),
    "tensorrt": ("fp16", "int8", "fp32"),
    "cpu": ("int8", "bf16", "fp32", "fp16"),
}

# Pixels of one run on a CPU without a tuning: larger batches gain less than 5 % there, and delay the next
# request.
CPU_BATCH_PIXELS = 65_536


@dataclass(frozen=True)
class Candidate:
    """An engine, its execution provider and a precision."""

    engine: str
    provider: str
    precision: str


@dataclass(frozen=True)
class Choice:
    """Candidate that serves one graph at one precision.

    Attributes:
        candidate: the engine, provider and precision.
        batch_pixels: maximum of pixels or voxels in one run.
    """

    candidate: Candidate
    batch_pixels: int


@dataclass(frozen=True)
class Selection:
    """Choices that serve the graphs of a bundle.

    Attributes:
        choices: choices by (graph, precision), one for every precision that a request may name.
        auto: precision behind `precision=auto`, by graph.
        reason: source of `auto`, by graph: "settings", "tuning" or "rule".
    """

    choices: Mapping[tuple[str, str], Choice]
    auto: Mapping[str, str]
    reason: Mapping[str, str]

    def precisions(self, graph: str) -> tuple[str, ...]:
        """Precisions that a request for the graph may name."""
        return tuple(precision for precision in PRECISIONS if (graph, precision) in self.choices)


def within_tolerance(
    manifest: Manifest, graph: str, precision: str, engine: str | None = None
) -> bool | None:
    """Whether the IoU is within the tolerance of fp32; None where that is not known."""
    calibration = manifest.calibration
    row = calibration.row(graph, precision, engine) if calibration else None
    reference = calibration.row(graph, "fp32") if calibration else None
    if row and reference:
        return row.iou >= reference.iou - IOU_TOLERANCE
    compared = manifest.agreement.row(graph, precision, engine) if manifest.agreement else None
    # 1 - IoU obeys the triangle inequality (it is the Jaccard distance): against any labels the loss is not larger
    # than 1 - agreement. Less agreement may lose nothing, so that it decides nothing.
    return True if compared and compared.fp32_agreement >= 1 - IOU_TOLERANCE else None


def is_enabled(manifest: Manifest, graph: str, precision: str, engine: str | None = None) -> bool:
    """Whether requests may name the precision: never one that loses too much; int8 only where that was measured."""
    if graph == HEAD_STD:
        return precision == "fp32"
    verdict = precision == "fp32" or within_tolerance(manifest, graph, precision, engine)
    return verdict is True or (verdict is None and precision != "int8")


def select(
    manifest: Manifest,
    machine: Machine,
    settings: RuntimeSettings,
    batching: BatchingSettings,
    tuning: Tuning | None = None,
    excluded: Collection[tuple[str, Candidate]] = (),
) -> Selection:
    """Applies the rule.

    Args:
        manifest: manifest of the bundle, with its calibration.
        machine: facts of this machine, already restricted to the engine and provider of the settings.
        settings: precision that `auto` means.
        batching: limit of pixels in one run.
        tuning: measurements that belong to this bundle on this machine.
        excluded: (graph, candidate) that proved broken on this machine when they were opened.

    Raises:
        EngineUnavailable: a graph cannot be served by anything here, or not at the configured precision.
    """
    every = _candidates(manifest, machine)
    choices: dict[tuple[str, str], Choice] = {}
    auto, reason = {}, {}
    for graph in (one.name for one in manifest.all_graphs):
        working = [candidate for candidate in every if (graph, candidate) not in excluded]
        # GPUs where one of them works, else the CPU.
        preferred = [candidate for candidate in working if candidate.provider != "cpu"] or working
        for precision in PRECISIONS:
            able = [
                c
                for c in preferred
                if c.precision == precision and is_enabled(manifest, graph, precision, c.engine)
            ]
            if able:
                best = min(able, key=lambda c: _rank_engine(c, graph, tuning))
                choices[graph, precision] = Choice(best, _batch_pixels(best, graph, batching, tuning))
        served = {
            precision: choice.candidate for (name, precision), choice in choices.items() if name == graph
        }
        if not served:
            raise EngineUnavailable(
                _nothing_serves(manifest, machine, graph), graph=graph, engines=[*machine.engines]
            )
        auto[graph], reason[graph] = _auto(manifest, machine, graph, served, settings.precision, tuning)
    named = settings.precision
    if named != "auto" and not any(precision == named for _, precision in choices):
        there = sorted({precision for _, precision in choices})
        raise EngineUnavailable(
            f"precision {named!r} cannot be served here; possible: {', '.join(there)}",
            precision=named,
            allowed=there,
        )
    return Selection(choices, auto, reason)


def _candidates(manifest: Manifest, machine: Machine) -> list[Candidate]:
    """Every candidate of this machine that the bundle has a graph file for."""
    return [
        Candidate(engine, provider, precision)
        for engine, providers in machine.engines.items()
        for provider, precisions in providers.items()
        for precision in precisions
        if GRAPH_PRECISIONS[precision] in manifest.graph_precisions
    ]


def _rank_engine(candidate: Candidate, graph: str, tuning: Tuning | None) -> tuple[float, int]:
    row = _tuned(candidate, graph, tuning)
    return row.milliseconds if row else float("inf"), ENGINE_ORDER.index(candidate.engine)


def _auto(
    manifest: Manifest,
    machine: Machine,
    graph: str,
    served: Mapping[str, Candidate],
    configured: str,
    tuning: Tuning | None,
) -> tuple[str, str]:
    """The precision behind `auto`, and why."""
    if configured in served:
        return configured, "settings"
    safe = [p for p, c in served.items() if p == "fp32" or within_tolerance(manifest, graph, p, c.engine)]
    rows = {precision: _tuned(served[precision], graph, tuning) for precision in safe}
    timed = {precision: row.milliseconds for precision, row in rows.items() if row}
    if timed:
        return min(timed, key=lambda precision: timed[precision]), "tuning"
    provider = next(iter(served.values())).provider
    native = [p for p in safe if p != "int8" or provider != "cpu" or machine.has_fast_int8]
    order = PRECISION_ORDER[provider]
    return min(native or safe or served, key=order.index), "rule"


def _batch_pixels(candidate: Candidate, graph: str, batching: BatchingSettings, tuning: Tuning | None) -> int:
    if row := _tuned(candidate, graph, tuning):
        return min(row.batch_pixels, batching.max_batch_pixels)
    return (
        min(CPU_BATCH_PIXELS, batching.max_batch_pixels)
        if candidate.provider == "cpu"
        else batching.max_batch_pixels
    )


def _tuned(candidate: Candidate, graph: str, tuning: Tuning | None) -> TuningRow | None:
    if tuning is None:
        return None
    return tuning.row(graph, candidate.precision, candidate.engine, candidate.provider)


def _nothing_serves(manifest: Manifest, machine: Machine, graph: str) -> str:
    if not machine.engines:
        return (
            "no engine is installed; install one with: pip install '.[cpu]' in the project's folder ('.[gpu]' on a machine "
            "with an NVIDIA GPU)"
        )
    return f"{manifest.name}: nothing that runs here may serve {graph}; see the warnings above"
