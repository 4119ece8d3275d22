"""One input at every level: time, agreement and pictures side by side."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from client.batch import Segmenter
from client.result import Result

# The quickest of a few runs counts, because a graph may be opened or prepared by its first one; a long run is
# not repeated.
RUNS, LONG_MS = 3, 5000.0

# Panels per row and pixels of their longer side, of images and of the mosaics that stand for volumes and
# stacks.
IMAGES, MOSAICS = (6, 360), (3, 640)

# Pixels between panels, below each for its text, and of the narrowest panel.
GAP, TEXT, NARROWEST = 8, 34, 180


@dataclass(frozen=True)
class Row:
    """The answer of one graph.

    Attributes:
        name: "L1", ..., "auto (L2)" with the level that served, or "accurate".
        result: answer of the quickest run.
        overlay: PNG of the mask over the input.
        agreement: IoU with the mask of accurate, mean over the foreground classes.
        speed_up: time of accurate divided by this one's.
    """

    name: str
    result: Result
    overlay: bytes
    agreement: float
    speed_up: float

    @property
    def cells(self) -> list[str]:
        """The row of the table."""
        result, network_ms = self.result, self.result.timings_ms.get("infer", 0.0)
        times = [f"{one:.1f}" for one in (network_ms, result.total_ms - network_ms, result.total_ms)]
        scores = [f"{one:.4f}" for one in (self.agreement, result.iou, result.dice) if one is not None]
        return [self.name, result.precision, *times, f"{self.speed_up:.1f}×", *scores]


HEADINGS = ("graph", "precision", "network ms", "other ms", "total ms", "faster", "agreement", "IoU", "Dice")


async def compare(
    segmenter: Segmenter,
    card: dict[str, Any],
    path: Path,
    parameters: Mapping[str, Any],
    progress: Callable[[str], None],
) -> tuple[list[Row], bytes | None]:
    """Segments an input at every level, in mode auto where the model has a curve, and in mode accurate.

    Args:
        segmenter: server or service.
        card: card of the model.
        path: input.
        parameters: request parameters; max_loss is for mode auto alone.
        progress: callback with the name of each graph, before it is run.

    Returns:
        One row per graph, and the input as PNG if it is an image.
    """
    graphs: dict[str, dict[str, Any]] = {
        f"L{level}": {"mode": "fast", "level": level} for level in card["levels"]
    }
    common = {name: value for name, value in parameters.items() if name != "max_loss"}
    if card.get("auto"):
        graphs["auto"] = {"mode": "auto", "max_loss": parameters.get("max_loss")}
    graphs["accurate"] = {"mode": "accurate"}
    results: dict[str, Result] = {}
    overlays: dict[str, bytes] = {}
    for name, graph in graphs.items():
        progress(name)
        runs = [await segmenter.segment(path, formats=("mask", "overlay"), **common, **graph)]
        overlays[name] = next(data for file, data in runs[0].files.items() if file.startswith("overlay."))
        while len(runs) < RUNS and runs[0].total_ms < LONG_MS:
            runs.append(await segmenter.segment(path, formats=("mask",), **common, **graph))
        results[name] = min(runs, key=lambda run: run.total_ms)
    best, values, rows = results["accurate"], [one["value"] for one in card["classes"]], []
    for name, one in results.items():
        overlap, speed_up = agreement(one.mask, best.mask, values), best.total_ms / max(one.total_ms, 1e-9)
        shown = f"auto (L{one.level})" if name == "auto" else name
        rows.append(Row(shown, one, overlays[name], overlap, speed_up))
    if best.mask.ndim > 2:
        return rows, None
    graph = next(iter(graphs.values()))
    result = await segmenter.segment(path, formats=("picture",), **common, **graph)
    return rows, next(iter(result.files.values()))


def agreement(mask: NDArray[Any], other: NDArray[Any], values: list[int]) -> float:
    """Computes the IoU of two masks, mean over the classes; a class that is in neither counts as 1."""
    scores = []
    for value in values:
        union = np.count_nonzero((mask == value) | (other == value))
        scores.append(np.count_nonzero((mask == value) & (other == value)) / union if union else 1.0)
    return float(np.mean(scores))


def draw(rows: list[Row], picture: bytes | None) -> bytes:
    """Draws the input and the overlays of all graphs side by side, as PNG."""
    panels = [] if picture is None else [("input", picture)]
    for row in rows:
        score = f"agreement {row.agreement:.3f}" if row.result.iou is None else f"IoU {row.result.iou:.3f}"
        panels.append((f"{row.name}  {row.result.total_ms:,.0f} ms\n{score}", row.overlay))
    return contact_sheet(panels, *(MOSAICS if picture is None else IMAGES))


def contact_sheet(panels: Sequence[tuple[str, bytes]], columns: int, side: int) -> bytes:
    """Draws pictures in a grid, each with its text below, scaled so that the longer side of the largest has `side` pixels."""
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for _, data in panels]
    scale = side / max(max(picture.size) for picture in pictures)
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    pictures = [
        one.resize((max(1, round(one.width * scale)), max(1, round(one.height * scale))), filter_)
        for one in pictures
    ]
    width = max(NARROWEST, *(picture.width for picture in pictures)) + GAP
    height = max(picture.height for picture in pictures) + TEXT + GAP
    sheet = Image.new(
        "RGB", (width * min(columns, len(panels)) + GAP, height * -(-len(panels) // columns) + GAP), "white"
    )
    for number, ((text, _), picture) in enumerate(zip(panels, pictures, strict=True)):
        left, top = GAP + number % columns * width, GAP + number // columns * height
        sheet.paste(picture, (left, top))
        ImageDraw.Draw(sheet).multiline_text((left, top + picture.height + 4), text, fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()
