"""A page about a calibration: table, plot, recommendation and the worst images; one HTML file that loads nothing."""

import base64
import datetime
import heapq
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from jaxtyping import Float64, Shaped, UInt8
from numpy import ndarray
from PIL import Image as Pillow

from export.calibrate import mean_overlap, open_fp32
from export.data import Labelled
from model.checkpoint import atomic
from server.arrays import Image
from server.runtime.bundle import Bundle, Manifest
from server.runtime.calibration import Agreement, AgreementRow, CalibrationRow, Measured
from server.segment.sliding_window import infer_offline

# Worst images shown per level, and pixels of the longer side of each.
WORST, SIDE = 3, 240

# Red, green, blue of pixels that the level has alone, that the reference has alone, and that both have.
LEVEL_ONLY, REFERENCE_ONLY, BOTH = (230, 97, 0), (64, 120, 255), (40, 170, 90)

# Share of the colour in a coloured pixel.
OPACITY = 0.55

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left } figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top }
figcaption { font-size: 13px; max-width: 240px; overflow-wrap: anywhere } .key { padding: 0 .5em; color: #fff; border-radius: 3px }
</style></head><body>
<h1>$title</h1>
<p>$stands</p>
<h2>Recommendation</h2><p><b>Level $level</b> at $precision: $why.</p>
<h2>$score and time</h2>
<p>$meaning Time is the median of one tile of $tile, batch 1, on $machine.</p>
<img alt="$score against milliseconds" src="$plot">
<table><thead><tr>$heads</tr></thead><tbody>
$rows
</tbody></table>
<h2>Worst images of each level</h2>
<p>Coloured: <span class="key" style="background: rgb$both">both</span> the level and $reference,
<span class="key" style="background: rgb$alone">the level alone</span>,
<span class="key" style="background: rgb$missed">$reference alone</span>. Of a volume the slice that differs most.</p>
$worst
</body></html>
""")


@dataclass(frozen=True)
class Shown:
    """One image under a level: its path, its score, and a PNG picture."""

    id: str
    score: float
    picture: bytes


def write_report(
    path: Path, bundle: Bundle, images: Sequence[Labelled], measured: Measured | Agreement
) -> None:
    """Writes the page.

    Args:
        path: HTML file.
        bundle: bundle that was measured.
        images: images with labels, or with the deepest level's masks in their place.
        measured: table of the images.
    """
    manifest = bundle.manifest
    unlabelled = isinstance(measured, Agreement)
    recommended = measured.recommended if hasattr(measured, "recommended") else None
    side = "256 × 256 pixels" if manifest.dims == 2 else "64 × 64 × 64 voxels"
    heads, rows = _table(manifest, measured)
    text = PAGE.substitute(
        title=f"{escape(manifest.title)}: calibration",
        stands=_stands(manifest, measured),
        level=recommended.level if recommended else "–",
        precision=recommended.precision if recommended else "–",
        why=escape(recommended.why) if recommended else "a held-out result decides nothing",
        score="Agreement" if unlabelled else "IoU",
        meaning=_meaning(measured),
        tile=side,
        machine=escape(measured.machine),
        plot=_data_uri(_plot(measured)),
        heads="".join(f"<th>{escape(one)}</th>" for one in heads),
        rows="\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows),
        reference="the deepest level" if unlabelled else "the label",
        both=BOTH,
        alone=LEVEL_ONLY,
        missed=REFERENCE_ONLY,
        worst="\n".join(_worst_of(bundle, level, images) for level in manifest.levels),
    )
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _stands(manifest: Manifest, measured: Measured | Agreement) -> str:
    labels = " without labels" if isinstance(measured, Agreement) else ""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"Model <b>{escape(manifest.name)}</b>, {measured.images} images of {escape(measured.data)}{labels}, {today}. "
        "Whether the network was trained on some of these images cannot be seen here; where it was, every figure of quality "
        "is too good."
    )


def _meaning(measured: Measured | Agreement) -> str:
    if isinstance(measured, Agreement):
        return (
            f"Agreement is the IoU of a mask with the mask of the deepest level ({measured.deepest} at fp32), mean over the "
            "images. It is not a quality, because the deepest level may be wrong."
        )
    return "IoU is that of the foreground with the labels, mean over the images and classes."


def _score(row: CalibrationRow | AgreementRow) -> float:
    return row.agreement if isinstance(row, AgreementRow) else row.iou


def _table(manifest: Manifest, measured: Measured | Agreement) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of all rows; per class where there are several."""
    names = [one.name for one in manifest.classes] if len(manifest.classes) > 1 else []
    whole = max(graph.macs_per_pixel for graph in manifest.graphs)
    heads = ["graph", "precision", "engine", "parameters", "work", "ms"]
    if isinstance(measured, Agreement):
        heads += [f"agreement with {measured.deepest}", *names, "agreement with fp32"]
    else:
        heads += ["IoU", *(f"IoU {name}" for name in names), "Dice", *(f"Dice {name}" for name in names)]
    rows = []
    for row in measured.rows:
        graph = manifest.graph(row.graph)
        facts = [row.graph, row.precision, row.engine, f"{graph.parameters:,}"]
        facts += [f"{graph.macs_per_pixel / whole:.0%}", f"{row.latency_ms:.1f}"]
        values = (
            [row.agreement, *row.class_agreement, row.fp32_agreement]
            if isinstance(row, AgreementRow)
            else [row.iou, *row.class_iou, row.dice, *row.class_dice]
        )
        rows.append(facts + [f"{value:.4f}" for value in values])
    return heads, rows


def _plot(measured: Measured | Agreement) -> bytes:
    """Draws scores against time, a colour per precision, each graph by its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for precision in dict.fromkeys(row.precision for row in measured.rows):
        rows = [row for row in measured.rows if row.precision == precision]
        axes.scatter([row.latency_ms for row in rows], [_score(row) for row in rows], label=precision)
        for row in rows:
            place = (row.latency_ms, _score(row))
            axes.annotate(row.graph, place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    unlabelled = isinstance(measured, Agreement)
    axes.set(xlabel="milliseconds per tile", xscale="log")
    axes.set_ylabel("agreement with the deepest level (IoU)" if unlabelled else "IoU")
    for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        which("{x:g}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _worst_of(bundle: Bundle, level: int, images: Sequence[Labelled]) -> str:
    """The images on which a level at fp32 differs most from the references."""
    manifest = bundle.manifest
    graph = manifest.graph(f"L{level}")
    engine = open_fp32(bundle, graph.name)
    values = [one.value for one in manifest.classes]
    worst: list[tuple[float, int, Shown]] = []
    for number, item in enumerate(images):
        mask = infer_offline(item.image, manifest, graph, engine).classes
        score = mean_overlap(mask, item.label, values)[0]
        if score < 1 and (len(worst) < WORST or -score > worst[0][0]):
            shown = Shown(item.id, score, _picture(item, mask))
            (heapq.heappush if len(worst) < WORST else heapq.heappushpop)(worst, (-score, -number, shown))
    figures = [_figure(shown) for _, _, shown in sorted(worst, reverse=True)]
    return f"<h3>Level {level}</h3>\n" + ("\n".join(figures) or "<p>It differs on none.</p>")


def _figure(shown: Shown) -> str:
    source = _data_uri(shown.picture)
    return f'<figure><img alt="" src="{source}"><figcaption>{escape(shown.id)}: {shown.score:.3f}</figcaption></figure>'


def _picture(item: Labelled, mask: UInt8[ndarray, "*size"]) -> bytes:
    """A PNG of an image, coloured by where the mask and the reference lie."""
    values, label = item.image.values, item.label
    if not isinstance(item.image, Image):
        differing = np.count_nonzero(mask != label, axis=(0, 1))
        index = int(differing.argmax())
        # Upright: the first axis of a volume runs along a row.
        values, mask, label = (np.swapaxes(one[:, :, index], 0, 1) for one in (values, mask, label))
    picture = _grey_or_colour(values)
    for where, colour in (
        ((mask > 0) & (label != mask), LEVEL_ONLY),
        ((label > 0) & (mask == 0), REFERENCE_ONLY),
        ((mask > 0) & (label == mask), BOTH),
    ):
        picture[where] = (1 - OPACITY) * picture[where] + OPACITY * np.array(colour)
    image = Pillow.fromarray(picture.astype(np.uint8))
    factor = SIDE / max(image.size)
    size = tuple(max(1, round(side * factor)) for side in image.size)
    file = io.BytesIO()
    image.resize((size[0], size[1]), Pillow.Resampling.BOX if factor < 1 else Pillow.Resampling.NEAREST).save(
        file, "PNG"
    )
    return file.getvalue()


def _grey_or_colour(values: Shaped[ndarray, "H W C"]) -> Float64[ndarray, "H W 3"]:
    """Values between their 1st and 99th percentile as 0 to 255, in three channels."""
    low, high = np.percentile(values, (1, 99))
    scaled = np.clip((values.astype(np.float64) - low) / max(float(high - low), 1e-12), 0, 1) * 255
    three: Float64[ndarray, "H W 3"] = (
        np.repeat(scaled[..., :1], 3, axis=-1) if values.shape[-1] != 3 else scaled
    )
    return three


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
