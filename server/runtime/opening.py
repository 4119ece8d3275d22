"""Opens a bundle for serving: picks engines by measuring, checks the golden pairs, warms up."""

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
from jaxtyping import Float32, Shaped
from numpy import ndarray

from server.arrays import Scores, Tiles
from server.errors import BundleDamaged, EngineUnavailable, UnetppError
from server.runtime import memory
from server.runtime.bundle import ACCURATE, GRAPH_PRECISIONS, HEAD_STD, MANIFEST, Bundle, Manifest, read_bundle, sha256
from server.runtime.engines import ENGINES, Engine
from server.settings import BatchingSettings, RuntimeSettings

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp16", "int8")

# `auto` accepts a precision that loses at most this much foreground IoU against fp32.
IOU_TOLERANCE = 0.005

# Largest mean absolute difference of scores on the golden pairs. fp32 differs by rounding alone; the
# others are judged by IoU in calibration, and here only a broken engine should stand out.
GOLDEN_TOLERANCE = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.01, "int8": 0.08}

RACE_TILE = {2: 128, 3: 32}
RACE_RUNS = 5
# Of every graph at every precision: few, as a bundle may have fifteen and the server should start within seconds.
GRAPH_RUNS = 3

# A batch is doubled for as long as that makes a tile so much faster; more would only delay those who come next.
WORTHWHILE = 0.95

# Where `head_std` is at home.
WHOLE = ACCURATE, "fp32"

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class OpenBundle:
    """A bundle with an engine for every graph and served precision.

    Attributes:
        bundle: what is on disk.
        engines: by (graph, precision).
        auto: the precision behind `precision=auto`, by graph.
        pace: seconds per pixel or voxel of one tile, as measured at start, by (graph, precision).
        measured_pixels: of that tile.
        batch_pixels: what one run should hold at most, as measured at start, by (graph, precision).
        spread: runs `head_std` at fp32, where the bundle has it; it is the engine of `accurate` at fp32 too, so that the weights are in
            memory once, and shares its pace.
    """

    bundle: Bundle
    engines: dict[tuple[str, str], Engine]
    auto: dict[str, str]
    pace: dict[tuple[str, str], float] = field(default_factory=dict)
    measured_pixels: int = 1
    batch_pixels: dict[tuple[str, str], int] = field(default_factory=dict)
    head_std: Engine | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions that a request may name."""
        return tuple(p for p in PRECISIONS if any(p == served for _, served in self.engines))


class WithoutHeadStd:
    """`accurate` of an engine that runs `head_std`, whose first channels are the same to the bit.

    Measured with ONNX Runtime and OpenVINO on CPUs: the last channel takes at most 4 % of the time of a run, an engine of its own
    40 to 95 MB.
    """

    def __init__(self, whole: Engine) -> None:
        self._whole = whole
        self.name, self.provider = whole.name, whole.provider

    def run(self, tiles: Tiles) -> Scores:
        """See `Engine.run`."""
        return self._whole.run(tiles)[:, :-1]

    def release(self) -> None:
        """See `Engine.release`."""
        self._whole.release()


class Turns(Protocol):
    """Makes a call when the device is free, and gives what it returns: others may be served by the device meanwhile."""

    def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Waits for the turn, and for the call's end."""
        ...


def at_once(call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The turns of whoever has the device alone."""
    return call(*args, **kwargs)


@dataclass(frozen=True)
class _Candidate:
    precision: str
    engine: str
    provider: str


def golden_tiles(file: Path) -> Iterator[tuple[str, Tiles, Shaped[ndarray, "N K *tile"]]]:
    """The golden pairs of a bundle: (graph, input, expected fp32 scores), one or more per graph."""
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
        for key in sorted(name for name in arrays.files if name.startswith("scores/")):
            _, graph, case = key.split("/")
            pixels, mean, inverse_std = (arrays[f"{part}/{case}"] for part in ("image", "mean", "inverse_std"))
            yield graph, Tiles(pixels, mean, inverse_std), arrays[key]


def golden_head_std(
    pairs: Iterable[tuple[str, Tiles, Shaped[ndarray, "N K *tile"]]],
) -> list[tuple[Tiles, Shaped[ndarray, "N K+1 *tile"]]]:
    """What `head_std` should answer, in the order of the pairs of `accurate`: it follows from those of the levels, each one of the heads."""
    by_graph: dict[str, list[tuple[Tiles, Shaped[ndarray, "N K *tile"]]]] = {}
    for graph, tiles, scores in pairs:
        by_graph.setdefault(graph, []).append((tiles, scores))
    accurate = by_graph.pop(ACCURATE, [])
    found = []
    for (tiles, mean), *heads in zip(accurate, *by_graph.values(), strict=False):
        # Of several classes the first is the background; 1 - background deviates as much.
        head_std = np.std([scores[:, :1] for _, scores in heads], axis=0)
        found.append((tiles, np.concatenate([mean, head_std], axis=1)))
    return found


def open_bundle(
    folder: Path, settings: RuntimeSettings, batching: BatchingSettings | None = None, in_turn: Turns = at_once
) -> OpenBundle:
    """Reads, checks, opens and warms a bundle, and finds how much each graph should run at once.

    Args:
        folder: of the bundle.
        settings: which engines may run it.
        batching: limits of a batch.
        in_turn: every run takes a turn of its own. So those who are served wait for one run at most, and the runs that are
            timed have the device to themselves.

    Raises:
        BundleDamaged: a file is damaged, or an engine's scores leave the golden ones; names which.
        EngineUnavailable: a configured engine, provider or precision cannot run here.
    """
    bundle = read_bundle(folder)
    batching = batching or BatchingSettings()
    settings = settings.model_copy(update={"threads": settings.threads or cores()})
    chosen = _choose(bundle, settings, in_turn)
    names = [graph.name for graph in bundle.manifest.graphs]
    engines = {
        (name, precision): _open(bundle, name, candidate, settings.threads)
        for precision, candidate in chosen.items()
        for name in names
        if offered(bundle.manifest, name, precision, candidate.engine)
        and not (bundle.manifest.head_std and (name, precision) == WHOLE)
    }
    head_std = None
    if bundle.manifest.head_std and "fp32" in chosen:
        head_std = _open(bundle, HEAD_STD, chosen["fp32"], settings.threads)
        engines[WHOLE] = WithoutHeadStd(head_std)
    _check_golden(bundle, engines, head_std, in_turn)
    if bare := [name for name in names if not any(graph == name for graph, _ in engines)]:
        raise EngineUnavailable(f"{folder}: nothing that runs here may serve {', '.join(bare)}; see the warnings above")
    seconds = _race(bundle, engines, GRAPH_RUNS, in_turn)
    pixels = RACE_TILE[bundle.manifest.dims] ** bundle.manifest.dims
    most = min(batching.max_batch, batching.max_batch_pixels // pixels)
    tiles = {key: _worthwhile(bundle, engine, most, in_turn) for key, engine in engines.items()}
    for engine in engines.values():
        in_turn(engine.release)
    # Compiling leaves hundreds of MB in the C library's free lists.
    memory.malloc_trim()
    if sha256(folder / MANIFEST) != bundle.sha256:
        raise BundleDamaged(f"{folder}: was replaced while it was opened; try again")
    auto = {}
    for name in names:
        ranked = {p: engines[graph, p].name for graph, p in sorted(engines, key=lambda key: seconds[key]) if graph == name}
        auto[name] = _auto(bundle.manifest, name, ranked, settings.precision)
    for (name, precision), engine in sorted(engines.items()):
        picked = " (auto)" if auto[name] == precision else ""
        log.info(
            "%s %s %s: %s on %s, %.1f ms, batches of %d%s", bundle.manifest.name, name, precision, engine.name, engine.provider,
            seconds[name, precision] * 1e3, tiles[name, precision], picked,
        )  # fmt: skip
    pace = {key: seconds[key] / pixels for key in engines}
    found = {key: min(count * pixels, batching.max_batch_pixels) for key, count in tiles.items()}
    return OpenBundle(bundle, engines, auto, pace, pixels, found, head_std)


def _worthwhile(bundle: Bundle, engine: Engine, most: int, in_turn: Turns = at_once) -> int:
    """Tiles of one run: doubled while a tile becomes clearly faster by it, and the device has the memory."""
    dims = bundle.manifest.dims
    best, count = math.inf, 1
    while count <= most:
        tiles = noise(count, len(bundle.manifest.channels), [RACE_TILE[dims]] * dims)
        try:
            in_turn(engine.run, tiles)
            taken = min(in_turn(_timed, engine, tiles) for _ in range(GRAPH_RUNS)) / count
        except Exception as error:  # noqa: BLE001 - every runtime has its own for a device whose memory is full
            log.warning("a batch of %d tiles fails, smaller ones are run: %s", count, error)
            break
        if taken > WORTHWHILE * best:
            break
        best, count = taken, 2 * count
    return max(1, count // 2)


def _timed(engine: Engine, tiles: Tiles) -> float:
    begun = time.perf_counter()
    engine.run(tiles)
    return time.perf_counter() - begun


def cores(quota: Path = CGROUP_QUOTA) -> int:
    """Cores that this process may really use: its affinity and, in a container, the quota of its cgroup, rounded up."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = map(int, quota.read_text().split())
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return here
    return min(here, math.ceil(microseconds / period))


def faithful(manifest: Manifest, graph: str, precision: str, engine: str | None = None) -> bool | None:
    """Whether the calibrated IoU is within the tolerance of fp32; None where it was not measured.

    Engines differ at reduced precisions: see `Measured.row` for which row counts.
    """
    calibration = manifest.calibration
    row = calibration.row(graph, precision, engine) if calibration else None
    reference = calibration.row(graph, "fp32") if calibration else None
    return row.iou >= reference.iou - IOU_TOLERANCE if row and reference else None


def offered(manifest: Manifest, graph: str, precision: str, engine: str | None = None) -> bool:
    """Whether requests may have the precision: never one known to lose too much; int8 only where it is known not to."""
    verdict = precision == "fp32" or faithful(manifest, graph, precision, engine)
    return verdict is True or (verdict is None and precision != "int8")


def candidates(bundle: Bundle, settings: RuntimeSettings) -> list[_Candidate]:
    """Every (precision, engine, provider) that this machine and the settings allow.

    Raises:
        EngineUnavailable: nothing is left.
    """
    names = [settings.engine] if settings.engine != "auto" else list(ENGINES)
    found: list[_Candidate] = []
    for name in names:
        row = ENGINES[name]
        if not row.installed:
            if settings.engine == name:
                raise EngineUnavailable(f"engine {name!r} is not installed; install it with: pip install {row.module}")
            continue
        for provider in row.providers(settings.provider):
            there = (p for p in row.precisions(provider) if GRAPH_PRECISIONS[p] in bundle.manifest.graph_precisions)
            wanted = (p for p in there if any(offered(bundle.manifest, graph.name, p, name) for graph in bundle.manifest.graphs))
            found += [_Candidate(precision, name, provider) for precision in wanted]
        if settings.engine == name and not found:
            raise EngineUnavailable(f"engine {name!r} does not run on provider {settings.provider!r}; set one of them to auto")
    return found


def _choose(bundle: Bundle, settings: RuntimeSettings, in_turn: Turns) -> dict[str, _Candidate]:
    """The fastest candidate of each precision."""
    measured: dict[_Candidate, float] = {}
    failed: list[str] = []
    usable_gpu = False
    for candidate in sorted(candidates(bundle, settings), key=lambda c: c.provider == "cpu"):
        # A GPU that works beats every CPU: there is nothing to race.
        if usable_gpu and candidate.provider == "cpu":
            continue
        try:
            measured[candidate] = _try(bundle, candidate, settings.threads, in_turn)
        except Exception as error:
            # Every CPU opens a graph that is sound.
            if isinstance(error, BundleDamaged) and candidate.provider == "cpu":
                raise
            problem = f"{candidate.engine} on {candidate.provider} cannot run {bundle.folder} at {candidate.precision}: {error}"
            if settings.provider != "auto":
                raise EngineUnavailable(problem) from error
            log.warning("FALLING BACK: %s", problem)
            failed.append(problem)
            continue
        usable_gpu = usable_gpu or candidate.provider != "cpu"
        log.info(
            "measured %s on %s at %s: %.1f ms", candidate.engine, candidate.provider, candidate.precision, measured[candidate] * 1e3
        )
    if not measured:
        raise EngineUnavailable(
            "; ".join(failed)
            or "no engine can run here; install one with: pip install '.[cpu]' in the project's folder "
            "('.[gpu]' on a machine with an NVIDIA GPU)"
        )
    # Of each precision the fastest comes last, and stays.
    fastest = {c.precision: c for c in sorted(measured, key=lambda c: measured[c], reverse=True)}
    if settings.precision != "auto" and settings.precision not in fastest:
        raise EngineUnavailable(f"precision {settings.precision!r} cannot be served here; possible: {', '.join(fastest)}")
    return fastest


def _try(bundle: Bundle, candidate: _Candidate, threads: int, in_turn: Turns) -> float:
    """Median seconds of one tile through the graph of middle cost: much like the rest, and quick to compile."""
    graph = sorted(bundle.manifest.graphs, key=lambda g: g.macs_per_pixel)[len(bundle.manifest.graphs) // 2]
    key = graph.name, candidate.precision
    return _race(bundle, {key: _open(bundle, graph.name, candidate, threads)}, RACE_RUNS, in_turn)[key]


def _race(bundle: Bundle, engines: Mapping[tuple[str, str], Engine], runs: int, in_turn: Turns) -> dict[tuple[str, str], float]:
    """Median seconds of one tile through each engine; in turns, so that whatever else runs slows all alike."""
    tiles = noise(1, len(bundle.manifest.channels), [RACE_TILE[bundle.manifest.dims]] * bundle.manifest.dims)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for _ in range(1 + runs):
        for key, engine in engines.items():
            times[key].append(in_turn(_timed, engine, tiles))
    # The first run of a size prepares the next ones.
    return {key: statistics.median(taken[1:]) for key, taken in times.items()}


def _open(bundle: Bundle, graph: str, candidate: _Candidate, threads: int) -> Engine:
    path = bundle.path(graph, candidate.precision)
    try:
        return ENGINES[candidate.engine].open(path, candidate.precision, candidate.provider, threads)
    except UnetppError:
        raise
    except Exception as error:  # every runtime raises its own
        raise BundleDamaged(f"{path}: {candidate.engine} on {candidate.provider} cannot open it: {error}") from error


def _auto(manifest: Manifest, graph: str, fastest_first: Mapping[str, str], wanted: str) -> str:
    """The configured precision where the graph has it, else the fastest that is known to be close enough to fp32.

    Args:
        manifest: with the calibration, if any.
        graph: which graph.
        fastest_first: the engine of each precision that the graph is served at.
        wanted: the configured precision.
    """
    if wanted in fastest_first:
        return wanted
    if wanted != "auto":
        log.warning("%s %s is not offered at the configured precision %s", manifest.name, graph, wanted)
    good = (p for p, engine in fastest_first.items() if p == "fp32" or faithful(manifest, graph, p, engine))
    return next(good, next(iter(fastest_first)))


def _check_golden(bundle: Bundle, engines: dict[tuple[str, str], Engine], head_std: Engine | None, in_turn: Turns) -> None:
    """Also the warm-up: every engine has run once when this returns; those of a bad reduced precision are removed."""
    try:
        pairs = list(golden_tiles(bundle.golden))
    except Exception as error:  # zipfile and zlib raise their own
        raise BundleDamaged(f"{bundle.golden}: cannot be read: {error}") from error
    if missing := {name for name, _ in engines} - {graph for graph, _, _ in pairs}:
        raise BundleDamaged(f"{bundle.golden}: has no pair for {', '.join(sorted(missing))}")
    for (name, precision), engine in list(engines.items()):
        difference = max(mean_difference(in_turn(engine.run, tiles), scores) for graph, tiles, scores in pairs if graph == name)
        if difference <= GOLDEN_TOLERANCE[precision]:
            continue
        file = bundle.path(HEAD_STD if head_std and (name, precision) == WHOLE else name, precision)
        problem = (
            f"{file}: {engine.name} on {engine.provider} at {precision} leaves the golden "
            f"scores by {difference:.2g} on average (limit {GOLDEN_TOLERANCE[precision]:g})"
        )
        if precision == "fp32":
            raise BundleDamaged(problem)
        # The files are sound (their hashes are checked); this machine computes the precision badly.
        log.error("NOT OFFERED: %s", problem)
        del engines[name, precision]
    if head_std:
        _check_head_std(bundle, head_std, pairs, in_turn)


def _check_head_std(
    bundle: Bundle, engine: Engine, pairs: list[tuple[str, Tiles, Shaped[ndarray, "N K *tile"]]], in_turn: Turns
) -> None:
    """Of its other channels it is known by then that they are those of `accurate`."""
    for tiles, scores in golden_head_std(pairs):
        difference = mean_difference(in_turn(engine.run, tiles)[:, -1:], scores[:, -1:])
        if difference > GOLDEN_TOLERANCE["fp32"]:
            raise BundleDamaged(
                f"{bundle.path(HEAD_STD, 'fp32')}: {engine.name} on {engine.provider} leaves the spread of the golden scores by "
                f"{difference:.2g} on average (limit {GOLDEN_TOLERANCE['fp32']:g})"
            )


def mean_difference(scores: Scores, expected: Shaped[ndarray, "N K *tile"]) -> float:
    """Mean absolute difference; infinite where the shapes differ or a value is not finite."""
    if scores.shape != expected.shape:
        return float("inf")
    difference = float(np.abs(scores - expected.astype(np.float32)).mean())
    return difference if np.isfinite(difference) else float("inf")


def noise(count: int, channels: int, size: list[int]) -> Tiles:
    """Seeded random tiles with the statistics of z-scored noise."""
    random = np.random.default_rng(0)
    pixels: Float32[ndarray, "N C *tile"] = random.standard_normal((count, channels, *size), dtype=np.float32)
    ones = np.ones((count, channels, *[1] * len(size)), dtype=np.float32)
    return Tiles(pixels, ones * 0, ones)
