"""The part of `unetpp calibrate` that fits the curve of `mode=auto`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import typer
from rich.console import Console
from rich.table import Table

from export.curve import write_curve
from export.data import Labelled
from server.cli_utils import progress
from server.runtime.bundle import read_bundle
from server.runtime.curve import MAX_LOSS, DepthCurve


def calibrate_curve(
    bundle: Path, images: Sequence[Labelled], data: str, reference: Literal["labels", "deepest level"]
) -> None:
    """Measures the curve on images with labels, or with masks of the deepest level, writes it and prints it."""
    with progress("measuring the curve of mode=auto") as update:
        curve = write_curve(
            read_bundle(bundle),
            images,
            data,
            reference,
            lambda done, total: update(completed=done, total=total),
        )
    Console().print(_table(curve))
    chosen = curve.choose()
    typer.echo(
        f"mode=auto: levels {_chain(chosen.chain)}, {chosen.work:.0%} of the work of the deepest, "
        f"{chosen.loss:.2f} ± {chosen.error:.2f} points lost (at most {MAX_LOSS:g}; {curve.reference}, {curve.data}, {curve.images} inputs)"
    )


def _table(curve: DepthCurve) -> Table:
    table = Table("levels", "goes on above", "inputs that go on", "work", "points lost")
    for point in curve.points:
        table.add_row(
            _chain(point.chain),
            " ".join(f"{threshold:.4f}" for threshold in point.thresholds) or "-",
            " ".join(f"{share:.0%}" for share in point.going_on) or "-",
            f"{point.work:.2f}",
            f"{point.loss:.2f} ± {point.error:.2f}",
        )
    return table


def _chain(levels: tuple[int, ...]) -> str:
    return " → ".join(f"L{level}" for level in levels)
