"""Measures what serves a bundle fastest on this machine: what `unetpp tune` does, and nothing else does."""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from server.errors import EngineUnavailable, TuningTooNoisy
from server.runtime import golden
from server.runtime.bundle import read_bundle
from server.runtime.deployment import Deployment
from server.runtime.device import DeviceThread
from server.runtime.engines import Engine
from server.runtime.loader import open_engine
from server.runtime.machine import read_machine
from server.runtime.selection import Candidate, is_enabled
from server.runtime.tuning import Tuning, TuningKey, TuningRow
from server.settings import BatchingSettings, RuntimeSettings

log = logging.getLogger(__name__)

# Side of the tile that is timed, per number of dimensions.
TILE_SIDE = {2: 128, 3: 32}

# Rounds over all candidates in turn, so that whatever else runs slows all alike; the minimum counts.
MIN_ROUNDS, MAX_ROUNDS = 5, 100

# A batch is doubled for as long as a tile becomes so much faster; more would only delay the next request.
WORTHWHILE = 0.95

# Largest difference between the minima of the even and the odd rounds at which a measurement is stored.
NOISE = 0.15


@dataclass
class _Timed:
    """One candidate for a graph, and its times in milliseconds."""

    graph: str
    candidate: Candidate
    engine: Engine
    times: list[float] = field(default_factory=list)

    @property
    def noise(self) -> float:
        """Relative difference between the minima of the even and the odd rounds."""
        even, odd = min(self.times[::2]), min(self.times[1::2])
        return abs(even - odd) / min(even, odd)


def tune(
    folder: Path,
    runtime: RuntimeSettings,
    batching: BatchingSettings,
    limit_s: float,
    advance: Callable[[str], None] = lambda graph: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """Measures every enabled candidate of every graph of a bundle.

    Args:
        folder: folder of the bundle.
        runtime: engine and provider to restrict the candidates to; a precision named there does not.
        batching: limits of a batch.
        limit_s: seconds after which no further round begins.
        advance: callback with the name of each graph that has been measured.
        clock: function that returns seconds and never goes back.

    Raises:
        TuningTooNoisy: the rounds differ too much to be stored; names the largest difference.
        BundleDamaged, EngineUnavailable: a graph cannot be opened.
    """
    bundle = read_bundle(folder)
    machine = read_machine(runtime.engine, runtime.provider)
    automatic = runtime.model_copy(update={"precision": "auto"})
    # Refuses a bundle that nothing here can serve.
    Deployment(bundle, machine, automatic, batching)
    # For each engine alone, because a selection has one engine per precision.
    deployments = [
        Deployment(bundle, replace(machine, engines={name: providers}), automatic, batching)
        for name, providers in machine.engines.items()
        if providers
    ]
    device = DeviceThread()
    rows: list[TuningRow] = []
    stop_at = clock() + limit_s
    try:
        for graph in (one.name for one in bundle.manifest.graphs):
            candidates = [timed for deployment in deployments for timed in _open(deployment, graph)]
            channels = len(bundle.manifest.channels)
            rows += _measure(candidates, bundle.manifest.dims, channels, batching, device, stop_at, clock)
            advance(graph)
    finally:
        device.close()
    return Tuning(key=TuningKey.of(bundle, machine, runtime.threads), rows=tuple(rows))


def _open(deployment: Deployment, graph: str) -> Iterator[_Timed]:
    """Opens a graph at each precision that may serve it; a candidate that cannot be opened is left out, as in serving."""
    for (name, precision), instance in list(deployment.instances.items()):
        candidate = instance.choice.candidate
        if name == graph and is_enabled(deployment.manifest, graph, precision, candidate.engine):
            try:
                yield _Timed(graph, candidate, open_engine(deployment, instance))
            except EngineUnavailable as error:
                log.warning("not measured: %s", error)


def _measure(
    candidates: list[_Timed],
    dims: int,
    channels: int,
    batching: BatchingSettings,
    device: DeviceThread,
    stop_at: float,
    clock: Callable[[], float],
) -> list[TuningRow]:
    """Times the candidates in turn.

    Raises:
        TuningTooNoisy: the rounds differ too much.
    """
    side = TILE_SIDE[dims]
    tile = golden.noise(1, channels, [side] * dims)
    for candidate in candidates:
        # The first run of a size prepares the next ones.
        device.run_blocking(candidate.engine.run, tile)
    for number in itertools.count(1):
        for candidate in candidates:
            candidate.times.append(device.run_blocking(_time, clock, candidate.engine.run, tile) * 1e3)
        quiet = number >= MIN_ROUNDS and max(candidate.noise for candidate in candidates) <= NOISE
        if quiet or number >= MAX_ROUNDS or (number >= 2 and clock() > stop_at):
            break
    noise = max(candidate.noise for candidate in candidates)
    if noise > NOISE:
        raise TuningTooNoisy(
            f"the times of {candidates[0].graph} differ by {noise:.0%} between rounds (limit {NOISE:.0%}), so nothing is stored; "
            "stop what else runs on this machine, or give more time with --limit-s",
            limit=NOISE,
            actual=round(noise, 3),
            graph=candidates[0].graph,
        )
    pixels = side**dims
    largest = max(1, min(batching.max_batch, batching.max_batch_pixels // pixels))
    return [
        TuningRow(
            graph=timed.graph,
            precision=timed.candidate.precision,
            engine=timed.candidate.engine,
            provider=timed.candidate.provider,
            milliseconds=round(min(timed.times), 4),
            batch_pixels=pixels * tune_batch_size(timed.engine, dims, channels, largest, device, clock),
        )
        for timed in candidates
    ]


def tune_batch_size(
    engine: Engine, dims: int, channels: int, largest: int, device: DeviceThread, clock: Callable[[], float]
) -> int:
    """Tiles of one run: doubled while a tile becomes clearly faster by it, and the device has the memory."""
    best, count = math.inf, 1
    while count <= largest:
        tiles = golden.noise(count, channels, [TILE_SIDE[dims]] * dims)
        try:
            device.run_blocking(engine.run, tiles)
            taken = min(device.run_blocking(_time, clock, engine.run, tiles) for _ in range(3)) / count
        except Exception as error:  # noqa: BLE001 - every runtime has its own for a device whose memory is full
            log.warning("a batch of %d tiles fails, so smaller ones are run: %s", count, error)
            break
        if taken > WORTHWHILE * best:
            break
        best, count = taken, 2 * count
    return max(1, count // 2)


def _time(clock: Callable[[], float], call: Callable[..., object], *args: object) -> float:
    started = clock()
    call(*args)
    return clock() - started
