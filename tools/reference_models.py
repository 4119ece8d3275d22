"""docs/models/NAME.md: model cards of the shipped bundles, from their manifests."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from bench.table import RESULTS
from server.runtime.bundle import Graph, Manifest, read_bundle
from server.runtime.calibration import Measured
from server.runtime.curve import MAX_LOSS
from server.runtime.selection import is_enabled
from tools.markdown import page, table

BUNDLES = Path(__file__).parents[1] / "bundles"

# A request that can be run, and what a manifest does not hold: whom to name, and limits of the evaluation.
EXAMPLES = {
    "nuclei": "curl -F file=@server/web/samples/cells.png 'localhost:8000/segment?model=nuclei&mode=fast' -o mask.png",
    "hippocampus": "curl -F file=@server/web/samples/hippocampus.nii.gz "
    "'localhost:8000/segment?model=hippocampus&mode=fast' -o mask.nii.gz",
}
ATTRIBUTION = {
    "nuclei": "Weights trained by this project on the images of the 2018 Data Science Bowl, stage 1, with community "
    "corrections of the masks (CC0 1.0). The weights are licensed under Apache-2.0.",
    "hippocampus": "Weights trained by this project on task 4 (hippocampus) of the Medical Segmentation Decathlon (Antonelli "
    'et al., "The Medical Segmentation Decathlon", Nature Communications 13, 4128, 2022; data of Vanderbilt University '
    "Medical Center), which is licensed under CC-BY-SA 4.0. The weights are licensed under CC-BY-SA 4.0 as well: if you "
    "pass them on, changed or not, name these sources and keep the licence.",
}
LIMITS = {
    "nuclei": (
        "Touching nuclei are one object in the mask. `instances=true` splits them by their shape alone: "
        "[Post-processing and instances](../guides/instances.md).",
        "The paper reports mean IoU *with* background; *foreground* IoU is the stricter number. The tables have both.",
    ),
    "hippocampus": (
        "Crop the volume to the region first. In a whole head, which the network has never seen, it guesses.",
        "nnU-Net's published Dice on this task, by cross-validation with an ensemble, is about 0.90 (anterior) and 0.89 "
        "(posterior).",
    ),
}
COMMON_LIMITS = (
    "It is the result of one training run: differences of a few tenths of a point between levels mean nothing.",
    "Held-out images come from the same collection as the training images. Results on other scanners, stains or "
    "patients are not known: compare with references of your own (`reference=`).",
)

NORMALIZATION = {
    "zscore": "mean 0 and standard deviation 1 over the whole image or volume, computed once per request",
    "none": "none",
}


def card(name: str) -> str:
    """The page of one bundle."""
    bundle = read_bundle(BUNDLES / name)
    manifest = bundle.manifest
    parts = [
        f"{manifest.description}\n\n**{manifest.intended_use}**\n\n```sh\n{EXAMPLES[name]}\n```\n\n",
        f"`bundles/{name}` has the files; `GET /models/{name}` gives the card of a running server, with the engine and the "
        "precision that serve each level there.\n\n",
        "## Input and output\n\n" + table(("property", "value"), _properties(manifest)),
        _levels(manifest),
        *_measured(manifest),
        _recommended(manifest),
        _depth_curve(manifest),
        "## Limits\n\n"
        + "".join(f"- {text}\n" for text in (*_kinds(name), *LIMITS[name], *COMMON_LIMITS))
        + "\n",
        "## Data, licence and provenance\n\n" + f"{ATTRIBUTION[name]}\n\n",
        table(("property", "value"), _provenance(manifest, bundle.sha256)),
        "The network is the one of Zhou et al., DLMIA 2018; this is an independent implementation. `NOTICE` names a patent "
        "that may concern you.\n",
    ]
    return page(manifest.title, *parts)


def nuclei() -> str:
    """The card of the nuclei bundle."""
    return card("nuclei")


def hippocampus() -> str:
    """The card of the hippocampus bundle."""
    return card("hippocampus")


def _kinds(name: str) -> Iterator[str]:
    """The kind of image on which the network is weak, by the last run of `bench.kinds`, which is of the nuclei."""
    if name != "nuclei":
        return
    rows = [
        row for row in json.loads((RESULTS / "kinds.json").read_text()) if row["kind"] == "brightfield-gray"
    ]
    accurate, l1 = (f"{100 * mean(row['iou'][graph] for row in rows):.0f} %" for graph in ("accurate", "L1"))
    yield (
        f"It is weak on brightfield images, and L1 most of all: an IoU of {accurate} in accurate mode and of {l1} at L1, on the "
        f"{len(rows)} test images of this kind. Only 9 of the 371 training images are brightfield. "
        "[How pruning works](../pruning.md#what-l1-loses-on-which-images) has the other kinds."
    )


def _properties(manifest: Manifest) -> Iterator[tuple[str, str]]:
    is_volume = manifest.dims == 3
    yield "input", "volumes (3D)" if is_volume else "images (2D); volumes and stacks slice by slice"
    yield "channels", ", ".join(manifest.channels)
    yield "normalisation", NORMALIZATION[manifest.normalization]
    if manifest.orientation:
        yield "orientation", f"{manifest.orientation}; others are turned, and the mask is turned back"
    if manifest.spacing:
        sizes = " × ".join(f"{one:g}" for one in manifest.spacing)
        yield "spacing", f"{sizes} mm; others are resampled linearly, and the scores are brought back"
    elif not is_volume:
        yield "pixel size", "any; it is not resampled"
    window = " × ".join(map(str, manifest.window.size))
    yield "window", f"{window} {'voxels' if is_volume else 'pixels'}, overlap {manifest.window.overlap:.0%}"
    yield (
        "activation",
        manifest.activation + (f", foreground above {manifest.threshold}" if not is_volume else ""),
    )
    classes = ", ".join(f"{one.value} {one.name} (`{one.color}`)" for one in manifest.classes)
    yield "classes", f"0 background, {classes}"
    yield "accurate mode", "mean of the probabilities of all heads"
    yield "uncertainty", "yes" if manifest.head_std else "no"
    if manifest.objects:
        yield "objects", f"told apart by the network's own channel ({manifest.objects.kind})"
    if manifest.min_object_px:
        yield (
            "specks",
            f"with `instances=true` objects of fewer than {manifest.min_object_px} pixels are removed (`min_size_px`)",
        )
    if manifest.min_object_score:
        yield (
            "uncertain objects",
            f"with `instances=true` objects of a mean score below {manifest.min_object_score:g} are removed (`min_score`)",
        )


def _levels(manifest: Manifest) -> str:
    """The table of the levels; `work` against the deepest one."""
    deepest = max(graph.macs_per_pixel for graph in manifest.graphs if graph.name != "accurate")
    unit = "voxel" if manifest.dims == 3 else "pixel"

    def row(graph: Graph) -> tuple[str, ...]:
        work = f"{graph.macs_per_pixel / deepest:.0%}"
        return (
            graph.name,
            f"{graph.parameters:,}",
            f"{graph.macs_per_pixel / 1e3:.0f}",
            work,
            f"{graph.divisor}",
        )

    text = (
        "`accurate` averages the heads of all levels. Work is multiply-accumulates against the deepest level; the sides of a "
        "tile are multiples of the divisor.\n\n"
    )
    headings = ("graph", "parameters", f"kMAC per {unit}", "work", "divisor")
    return f"## Levels\n\n{text}" + table(headings, map(row, manifest.graphs))


def _measured(manifest: Manifest) -> Iterator[str]:
    measured = manifest.held_out
    if measured is None:
        return
    what, tile = ("volumes", "64³") if manifest.dims == 3 else ("images", "256²")
    yield (
        f"## Held-out results\n\n{measured.images} {what} ({measured.data}), which decided nothing; {measured.machine}, CPU "
        f"only. `ms` is the median of one tile of {tile}, batch 1. Rows with yes may be served: their IoU on the "
        "validation split is within 0.5 points of that of fp32.\n\n"
    )
    yield _rows(manifest, measured)
    yield from _flips(manifest, measured if measured.flips else manifest.calibration)
    if manifest.comparison:
        others = (
            (
                one.network,
                f"{one.parameters:,}",
                _percent(one.iou),
                _percent(one.mean_iou),
                _percent(one.dice),
            )
            for one in manifest.comparison
        )
        yield "Another network, trained on the same images, in float32:\n\n"
        yield table(("network", "parameters", "IoU %", "mean IoU %", "Dice %"), others)


def _flips(manifest: Manifest, measured: Measured | None) -> Iterator[str]:
    """Table of the gain of tta=flips at each level, and its price."""
    if measured is None or not measured.flips:
        return
    rows = (
        (
            row.graph,
            f"{row.copies}×",
            _percent(plain.iou),
            _percent(row.iou),
            f"{(row.iou - plain.iou) * 100:+.2f}",
            _percent(row.dice),
            *map(_percent, row.class_dice),
        )
        for row in measured.flips
        if (plain := measured.row(row.graph, "fp32"))
    )
    classes = [f"Dice % {one.name}" for one in manifest.classes] if len(manifest.classes) > 1 else []
    yield f"With `tta=flips`, at fp32 ({measured.data}); the price is the number of runs of each window:\n\n"
    yield table(("graph", "price", "IoU %", "IoU % with flips", "gain in points", "Dice %", *classes), rows)


def _rows(manifest: Manifest, measured: Measured) -> str:
    several = len(manifest.classes) > 1
    classes = [f"Dice % {one.name}" for one in manifest.classes] if several else []
    rows = (
        (
            row.graph,
            row.precision,
            row.engine,
            _percent(row.iou),
            _percent(row.mean_iou),
            _percent(row.dice),
            *(map(_percent, row.class_dice) if several else ()),
            f"{row.latency_ms:.1f}",
            "yes" if is_enabled(manifest, row.graph, row.precision, row.engine) else "no",
        )
        for row in measured.rows
    )
    headings = ("graph", "precision", "engine", "IoU %", "mean IoU %", "Dice %", *classes, "ms", "served")
    return table(headings, rows)


def _recommended(manifest: Manifest) -> str:
    calibration = manifest.calibration
    if calibration is None:
        return ""
    best, what = calibration.recommended, "volumes" if manifest.dims == 3 else "images"
    return (
        f"## Recommended level\n\n`mode=fast` without `level` serves level {best.level}. It was chosen on {calibration.images} "
        f"{what} ({calibration.data}): {best.why}. [Calibrate](calibrate.md) describes the rule.\n\n"
    )


def _depth_curve(manifest: Manifest) -> str:
    """The places on the curve of `mode=auto`."""
    curve, what = manifest.depth_curve, "volumes" if manifest.dims == 3 else "images"
    if curve is None:
        return ""
    chosen = curve.choose()
    rows = (
        (
            " → ".join(f"L{level}" for level in point.chain),
            ", ".join(f"{threshold:.4f}" for threshold in point.thresholds) or "–",
            ", ".join(f"{share:.0%}" for share in point.going_on) or "–",
            f"{point.work:.0%}",
            f"{point.loss:.2f} ± {point.error:.2f}",
            "yes" if point == chosen else "",
        )
        for point in curve.points
    )
    text = (
        f"Measured at fp32 on {curve.images} {what} ({curve.data}): {curve.method}. Points are of IoU, against L{manifest.levels[-1]}, with "
        f"their standard error. `mode=auto` takes the first row whose loss and standard error are together at most {MAX_LOSS:g}; `max_loss` sets another limit. [Depth that chooses itself](../pruning.md#depth-that-chooses-itself) explains "
        "the columns.\n\n"
    )
    headings = ("levels", "goes on above", f"{what} that go on", "work", "points lost", "default")
    return f"## Chains of mode=auto\n\n{text}" + table(headings, rows)


def _provenance(manifest: Manifest, sha256: str) -> Iterator[tuple[str, str]]:
    for what, licence in manifest.license.items():
        yield f"licence of the {what}", licence
    yield from manifest.provenance.items()
    yield "SHA-256 of the manifest", f"`{sha256}`"


def _percent(value: float) -> str:
    return f"{value * 100:.2f}"
