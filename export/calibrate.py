"""Measures IoU, Dice and latency of each level and precision on labelled data, and writes them into the manifest."""

import itertools
import platform
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from export.data import Labelled
from export.pack import update_manifest
from export.verify import runnable
from model.reading import DataError
from server.runtime.bundle import Bundle, Graph, Manifest
from server.runtime.calibration import Calibration, CalibrationRow, FlipsRow, Measured, Recommended
from server.runtime.engines import ENGINES, Engine
from server.runtime.golden import noise
from server.runtime.machine import count_cores
from server.runtime.selection import IOU_TOLERANCE, PRECISIONS
from server.segment.flips import NO_FLIPS, Flips, flips
from server.segment.quality import overlap
from server.segment.sliding_window import infer_offline

LATENCY_SIDE = {2: 256, 3: 64}
LATENCY_RUNS = 11


def calibrate(
    bundle: Bundle,
    images: Sequence[Labelled],
    data: str,
    *,
    held_out: bool,
    precisions: Collection[str] = (),
    advance: Callable[[CalibrationRow], None] = lambda row: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Measures every graph at every precision on every engine and writes the table into the manifest.

    Args:
        bundle: bundle to measure; its manifest is rewritten.
        images: images with labels; decisions belong on validation data.
        data: text that tells what they are.
        held_out: whether to write the table as the held-out result, which decides nothing.
        precisions: precisions to measure again, the other rows of the table are kept; none means all.
        advance: callback with each row.
        on_progress: callback after each image of each row, with the number of images done and in all.

    Raises:
        DataError: rows to keep were measured on other data or another machine.
        ExportError, BundleDamaged: the bundle was changed meanwhile.
    """
    manifest = bundle.manifest
    facts = {"data": data, "images": len(images), "machine": machine()}
    before = manifest.held_out if held_out else manifest.calibration
    rows = _kept(before, facts, precisions) if precisions else []
    mirrors = [*before.flips] if before and precisions and "fp32" not in precisions else []
    pairs = [pair for pair in runnable(bundle) if not precisions or pair[1] in precisions]
    measured_once = {"fp32"} & {precision for _, precision in pairs}
    copies = flips("flips", manifest.mirror_axes)
    mirrored = bool(measured_once) and len(copies) > 1
    per_graph = len(measured_once) + sum(p != "fp32" for _, p in pairs) + mirrored
    total = len(manifest.graphs) * per_graph * len(images)
    scored = itertools.count(1)
    for graph in manifest.graphs:
        for precision, engines in open_engines(bundle, graph, pairs):
            timed = sorted(
                ((latency_of(engine, manifest), engine) for engine in engines), key=lambda pair: pair[0]
            )
            # At fp32 only the fastest is scored, because `verify` proves that all engines agree to 1e-4.
            for latency, engine in timed[:1] if precision == "fp32" else timed:
                row = CalibrationRow(
                    graph=graph.name,
                    precision=precision,
                    engine=engine.name,
                    latency_ms=round(latency * 1e3, 3),
                    **_quality(engine, manifest, graph, images, lambda: on_progress(next(scored), total)),
                )
                rows.append(row)
                advance(row)
            if mirrored and precision == "fp32":
                quality = _quality(
                    timed[0][1], manifest, graph, images, lambda: on_progress(next(scored), total), copies
                )
                quality.pop("class_iou")
                mirrors.append(FlipsRow(graph=graph.name, copies=len(copies), **quality))
    order = [graph.name for graph in manifest.graphs]
    rows.sort(key=lambda row: (order.index(row.graph), PRECISIONS.index(row.precision), row.latency_ms))
    measured = Measured.model_validate({**facts, "rows": tuple(rows), "flips": tuple(mirrors)})
    if held_out:
        update_manifest(bundle, held_out=measured)
    else:
        recommended = recommend(manifest, measured)
        update_manifest(
            bundle, calibration=Calibration.model_validate({**dict(measured), "recommended": recommended})
        )
    return measured


def _kept(
    before: Measured | None, facts: dict[str, object], precisions: Collection[str]
) -> list[CalibrationRow]:
    """Returns the rows of the other precisions, if they are of the same data and machine."""
    if before is None:
        return []
    if before.model_dump(include=set(facts)) != facts:
        raise DataError(f"the other rows are not of {facts['data']} on this machine; measure all precisions")
    return [row for row in before.rows if row.precision not in precisions]


def recommend(manifest: Manifest, measured: Measured) -> Recommended:
    """Returns the shallowest level whose fastest row within tolerance of its own fp32 is also within tolerance of the best row."""
    best = max((r for r in measured.rows if r.precision == "fp32"), key=lambda r: r.iou)
    for level in manifest.levels:
        rows = [r for r in measured.rows if r.graph == f"L{level}"]
        reference = next(r for r in rows if r.precision == "fp32")
        enabled = [r for r in rows if r.iou >= reference.iou - IOU_TOLERANCE]
        row = min(enabled, key=lambda r: r.latency_ms)
        if row.iou >= best.iou - IOU_TOLERANCE:
            place = "the shallowest level within"
            break
    else:
        place = "the deepest level, as none is within"
    why = (
        f"{place} {IOU_TOLERANCE * 100:g} points of the best IoU ({best.graph} at fp32: {best.iou:.4f}); "
        f"at {row.precision} it has {row.iou:.4f} and takes {row.latency_ms:.1f} ms against {best.latency_ms:.1f} ms"
    )
    return Recommended(level=level, precision=row.precision, why=why)


def mean_overlap(
    classes: UInt8[ndarray, "*size"], label: UInt8[ndarray, "*size"], values: list[int]
) -> list[float]:
    """Returns foreground IoU, IoU averaged with the background, foreground Dice, Dice and IoU per class, of one image."""
    foreground = [overlap(classes == value, label == value) for value in values]
    background = overlap(classes == 0, label == 0)
    iou = float(np.mean([o.iou for o in foreground]))
    with_background = float(np.mean([*[o.iou for o in foreground], background.iou]))
    return [
        iou,
        with_background,
        float(np.mean([o.dice for o in foreground])),
        *(o.dice for o in foreground),
        *(o.iou for o in foreground),
    ]


def machine() -> str:
    """Returns the processor and its cores, for the table's caption."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = f"{lines[0]}, {len(lines)} cores" if lines else name
    return name


def open_engines(
    bundle: Bundle, graph: Graph, pairs: list[tuple[str, str]]
) -> list[tuple[str, list[Engine]]]:
    """Opens the engines of (engine, precision) pairs, by precision."""
    opened: dict[str, list[Engine]] = {}
    for engine, precision in pairs:
        opened.setdefault(precision, []).append(
            ENGINES[engine].open(bundle.path(graph.name, precision), precision, "cpu", count_cores())
        )
    return list(opened.items())


def open_fp32(bundle: Bundle, graph: str) -> Engine:
    """Opens a graph at fp32 on the first installed engine; `verify` proves that all agree to 1e-4."""
    name = next(name for name, row in ENGINES.items() if row.installed)
    return ENGINES[name].open(bundle.path(graph, "fp32"), "fp32", "cpu", count_cores())


def latency_of(engine: Engine, manifest: Manifest) -> float:
    """Median seconds of one run of one tile."""
    tiles = noise(1, len(manifest.channels), [LATENCY_SIDE[manifest.dims]] * manifest.dims)
    engine.run(tiles)
    times = []
    for _ in range(LATENCY_RUNS):
        started = time.perf_counter()
        engine.run(tiles)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _quality(
    engine: Engine,
    manifest: Manifest,
    graph: Graph,
    images: Sequence[Labelled],
    advance: Callable[[], None],
    copies: Flips = NO_FLIPS,
) -> dict[str, Any]:
    """Measures the fields of a row that say how good it is."""
    values = [c.value for c in manifest.classes]
    scores = []
    for item in images:
        mask = infer_offline(item.image, manifest, graph, engine, copies=copies)
        scores.append(mean_overlap(mask.classes, item.label, values))
        advance()
    iou, mean_iou, dice, *by_class = [
        round(float(np.mean(column)), 5) for column in zip(*scores, strict=True)
    ]
    classes = len(values) if len(values) > 1 else 0
    return {
        "iou": iou,
        "mean_iou": mean_iou,
        "dice": dice,
        "class_dice": tuple(by_class[:classes]),
        "class_iou": tuple(by_class[len(by_class) - classes :]),
    }
