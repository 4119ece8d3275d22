"""Measures without labels: agreement of every level with the deepest, and of every precision with fp32, and latency."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from export.calibrate import latency_of, machine, mean_overlap, open_engines, open_fp32
from export.data import Labelled, Picture
from export.pack import update_manifest
from export.verify import runnable
from model.reading import DataError
from server.runtime.bundle import Bundle, Graph, Manifest
from server.runtime.calibration import Agreement, AgreementRow, Recommended
from server.runtime.engines import Engine
from server.runtime.selection import IOU_TOLERANCE, PRECISIONS
from server.segment.sliding_window import infer_offline

# Agreement (IoU) with the deepest level from which a shallower one is recommended. It is a convention: only labels can
# tell what a level costs in quality.
RECOMMENDED_AGREEMENT = 0.95

Classes = UInt8[ndarray, "*size"]


def deepest_masks(
    bundle: Bundle, images: Sequence[Picture], advance: Callable[[], None] = lambda: None
) -> list[Labelled]:
    """Returns the images with the mask of the deepest level at fp32 in the place of a label.

    Raises:
        DataError: all masks are empty, with which any level that finds nothing would agree.
    """
    manifest = bundle.manifest
    graph = manifest.graph(f"L{manifest.levels[-1]}")
    engine = open_fp32(bundle, graph.name)
    made = []
    for item in images:
        made.append(Labelled(item.id, item.image, infer_offline(item.image, manifest, graph, engine).classes))
        advance()
    if not any(item.label.any() for item in made):
        raise DataError(
            f"the deepest level finds nothing in {len(made)} images, so that levels cannot be compared; "
            "use images that hold what it segments, and check the card"
        )
    return made


def measure_agreement(
    bundle: Bundle,
    images: Sequence[Labelled],
    data: str,
    advance: Callable[[AgreementRow], None] = lambda row: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Agreement:
    """Measures every graph at every precision on every engine and writes the table into the manifest.

    Args:
        bundle: bundle to measure; its manifest is rewritten.
        images: images with the masks of `deepest_masks`.
        data: text that tells what they are.
        advance: callback with each row.
        on_progress: callback after each image of each row, with the number of images done and in all.

    Raises:
        ExportError, BundleDamaged: the bundle was changed meanwhile.
    """
    manifest = bundle.manifest
    pairs = runnable(bundle)
    total = len(manifest.graphs) * (1 + sum(p != "fp32" for _, p in pairs)) * len(images)
    counter = itertools.count(1)
    rows: list[AgreementRow] = []
    for graph in manifest.graphs:
        exact: list[Classes] = []
        by_precision = dict(open_engines(bundle, graph, pairs))
        for precision in sorted(by_precision, key=PRECISIONS.index):
            timed = sorted(
                ((latency_of(engine, manifest), engine) for engine in by_precision[precision]),
                key=lambda pair: pair[0],
            )
            # At fp32 only the fastest, because `verify` proves that all engines agree to 1e-4.
            for latency, engine in timed[:1] if precision == "fp32" else timed:
                masks = _masks(engine, manifest, graph, images, lambda: on_progress(next(counter), total))
                exact = exact or masks
                row = _row(graph, precision, engine, latency, masks, images, exact, manifest)
                rows.append(row)
                advance(row)
    measured = Agreement(
        data=data,
        images=len(images),
        machine=machine(),
        deepest=f"L{manifest.levels[-1]}",
        rows=tuple(rows),
        recommended=recommend(manifest, rows),
    )
    update_manifest(bundle, agreement=measured)
    return measured


def _masks(
    engine: Engine,
    manifest: Manifest,
    graph: Graph,
    images: Sequence[Labelled],
    advance: Callable[[], None],
) -> list[Classes]:
    masks = []
    for item in images:
        masks.append(infer_offline(item.image, manifest, graph, engine).classes)
        advance()
    return masks


def _row(
    graph: Graph,
    precision: str,
    engine: Engine,
    latency: float,
    masks: list[Classes],
    images: Sequence[Labelled],
    exact: list[Classes],
    manifest: Manifest,
) -> AgreementRow:
    values = [one.value for one in manifest.classes]
    with_deepest = [mean_overlap(mask, item.label, values) for mask, item in zip(masks, images, strict=True)]
    with_fp32 = [mean_overlap(mask, other, values)[0] for mask, other in zip(masks, exact, strict=True)]
    by_class = np.mean(with_deepest, axis=0)[-len(values) :] if len(values) > 1 else ()
    return AgreementRow.model_validate(
        {
            "graph": graph.name,
            "precision": precision,
            "engine": engine.name,
            "agreement": _mean([row[0] for row in with_deepest]),
            "class_agreement": tuple(round(float(one), 5) for one in by_class),
            "fp32_agreement": _mean(with_fp32),
            "latency_ms": round(latency * 1e3, 3),
        }
    )


def _mean(values: list[float]) -> float:
    # Rounded down: 0.999999 is not full agreement.
    return float(np.floor(np.mean(values) * 1e5) / 1e5)


def recommend(manifest: Manifest, rows: Sequence[AgreementRow]) -> Recommended:
    """Returns the shallowest level that agrees with the deepest, at its fastest precision that agrees with fp32."""
    deepest = f"L{manifest.levels[-1]}"
    exact = {row.graph: row for row in rows if row.precision == "fp32"}
    level = next(
        one for one in manifest.levels
        if exact[f"L{one}"].agreement >= RECOMMENDED_AGREEMENT or f"L{one}" == deepest
    )  # fmt: skip
    safe = [
        row for row in rows
        if row.graph == f"L{level}" and (row.precision == "fp32" or row.fp32_agreement >= 1 - IOU_TOLERANCE)
    ]  # fmt: skip
    row = min(safe, key=lambda one: one.latency_ms)
    if len(manifest.levels) == 1:
        why = "the only level"
    elif row.graph == deepest:
        why = f"no shallower level agrees with it to {RECOMMENDED_AGREEMENT:g} (IoU of the masks)"
    else:
        why = (
            f"the shallowest level whose masks agree with those of {deepest} to {RECOMMENDED_AGREEMENT:g} (IoU): "
            f"{exact[row.graph].agreement:.4f}"
        )
    why += (
        f"; at {row.precision} it takes {row.latency_ms:.1f} ms against {exact[deepest].latency_ms:.1f} ms. "
    )
    why += "Measured without labels: how good the masks are is not known"
    return Recommended(level=level, precision=row.precision, why=why)
