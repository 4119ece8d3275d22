"""All graphs on one input: what each costs, and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.batch import Segmenting
from client.documents import ModelCard
from client.picture import sheet
from client.result import Result

# A graph that has not seen an input of this size yet may prepare for it first; so the quickest of a few runs counts.
RUNS = 3
# Of what takes longer than this one run is enough.
LONG_MS = 5000.0
# Pictures in a row and pixels of their longer sides: of images, and of volumes and stacks, which are mosaics of slices.
IMAGES, MOSAICS = (6, 360), (3, 640)


@dataclass(frozen=True)
class Row:
    """A graph.

    Attributes:
        name: "L1" ... or "accurate".
        result: its quickest answer.
        overlay: its mask over the input, as the server draws it.
        agreement: IoU of its mask with that of accurate, mean over the foreground classes.
        speed_up: how much quicker than accurate it is.
    """

    name: str
    result: Result
    overlay: bytes
    agreement: float
    speed_up: float

    @property
    def total_ms(self) -> float:
        """All phases."""
        return total_ms(self.result)


def total_ms(result: Result) -> float:
    """All phases."""
    return sum(result.timings_ms.values())


async def compare(
    params: Segmenting,
    card: ModelCard,
    path: Path,
    reference: Path | None,
    asked: Mapping[str, Any],
    progress: Callable[[str], None],
) -> list[Row]:
    """Asks every level, then accurate.

    Args:
        params: who segments.
        card: of the model.
        path: the input.
        reference: mask to score against.
        asked: the other parameters.
        progress: told of each graph by name.
    """
    graphs: dict[str, dict[str, Any]] = {f"L{level}": {"mode": "fast", "level": level} for level in card["levels"]}
    graphs["accurate"] = {"mode": "accurate"}
    runs: dict[str, list[Result]] = {}
    for name, which in graphs.items():
        progress(name)
        # The first is to be thrown away, so it may take the time to draw; of a long one nobody sees it in the time.
        runs[name] = [await params.segment(path, formats=("mask", "overlay"), reference=reference, **asked, **which)]
        while len(runs[name]) < RUNS and total_ms(runs[name][0]) < LONG_MS:
            runs[name].append(await params.segment(path, formats=("mask",), reference=reference, **asked, **which))
    results = {name: min(several, key=total_ms) for name, several in runs.items()}
    best = results["accurate"]
    values = [one["value"] for one in card["classes"]]
    return [
        Row(
            name,
            result,
            runs[name][0].files["overlay.png"],
            agreement(result.mask, best.mask, values),
            total_ms(best) / max(total_ms(result), 1e-9),
        )
        for name, result in results.items()
    ]


async def input_picture(params: Segmenting, card: ModelCard, path: Path, asked: Mapping[str, Any], rows: list[Row]) -> bytes | None:
    """The input as the server shows it, from the quickest graph; None of volumes and stacks."""
    if "mask.png" not in rows[0].result.files:
        return None
    result = await params.segment(path, formats=("picture",), **asked, mode="fast", level=min(card["levels"]))
    return result.files["picture.png"]


def agreement(mask: NDArray[Any], other: NDArray[Any], values: list[int]) -> float:
    """IoU of two masks, mean over the classes; where both are empty they agree."""
    scores = []
    for value in values:
        one, two = mask == value, other == value
        union = np.count_nonzero(one | two)
        scores.append(np.count_nonzero(one & two) / union if union else 1.0)
    return float(np.mean(scores))


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, for people: what the network took, what everything else took, and what came of it."""
    scored = rows[0].result.iou is not None
    headings = ["graph", "precision", "network ms", "other ms", "total ms", "faster", "agreement"]
    return headings + (["IoU", "Dice"] if scored else []), [_cells(row) for row in rows]


def _cells(row: Row) -> list[str]:
    result = row.result
    network_ms = result.timings_ms.get("infer", 0.0)
    spent = [f"{network_ms:.1f}", f"{row.total_ms - network_ms:.1f}", f"{row.total_ms:.1f}"]
    cells = [row.name, result.precision, *spent, f"{row.speed_up:.1f}×", f"{row.agreement:.4f}"]
    return cells + ([] if result.iou is None else [f"{result.iou:.4f}", f"{result.dice:.4f}"])


def drawn(rows: list[Row], picture: bytes | None) -> bytes:
    """The overlays side by side, as PNG.

    Args:
        rows: of all graphs.
        picture: of the input, if it is an image.
    """
    panels = [] if picture is None else [("input", picture)]
    for row in rows:
        score = f"agreement {row.agreement:.3f}" if row.result.iou is None else f"IoU {row.result.iou:.3f}"
        panels.append((f"{row.name}  {row.total_ms:,.0f} ms\n{score}", row.overlay))
    columns, side = MOSAICS if picture is None else IMAGES
    return sheet(panels, side, columns)
