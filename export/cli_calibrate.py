"""`unetpp calibrate`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.cli import BUNDLE, DATA, errors_as_lines
from server.cli_utils import fail, progress

if TYPE_CHECKING:
    from typing import Literal

    from export.data import Labelled
    from server.runtime.bundle import Bundle
    from server.runtime.calibration import AgreementRow, CalibrationRow, Measured

    # Images with labels, the text that tells what they are, and what the labels are.
    Evaluated = tuple[list[Labelled], str, Literal["labels", "deepest level"]]


def calibrate(
    bundle: Annotated[Path, BUNDLE],
    data: Annotated[Path | None, DATA] = None,
    split: Annotated[str, typer.Option(help="Split of index.csv to measure on.")] = "val",
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Instead of --data: a folder of images in any nesting."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of their labels, under the same names."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="HTML report; with --images calibration-<name>.html if not given."),
    ] = None,
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Record as the held-out result, which decides nothing.")
    ] = False,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Measure only this one again and keep the other rows; may be repeated."),
    ] = None,
    curve: Annotated[bool, typer.Option("--curve", help="Measure only the curve of mode=auto.")] = False,
) -> None:
    """Measure every level and precision, recommend a level, and fit the curve of mode=auto; without labels by agreement."""
    from server.runtime.bundle import read_bundle

    _check_options(data, images, labels, report, held_out, precision)
    opened = read_bundle(bundle)
    if images and report is None:
        # Not into the bundle, because the page shows images, and bundles are copied to servers.
        report = Path(f"calibration-{opened.manifest.name}.html")
    if curve:
        with errors_as_lines():
            evaluated = _read(opened, data, images, labels, split)
    elif images and not labels:
        evaluated = _without_labels(opened, images, split, report)
    else:
        evaluated = _with_labels(opened, data, images, labels, split, report, held_out, precision or [])
    if curve or not (held_out or precision):
        from export.cli_curve import calibrate_curve

        with errors_as_lines():
            calibrate_curve(opened.folder, *evaluated)
    if report and not curve:
        typer.echo(f"report: {report} (it shows images: keep it where they may be seen)")


def _check_options(
    data: Path | None,
    images: Path | None,
    labels: Path | None,
    report: Path | None,
    held_out: bool,
    precision: list[str] | None,
) -> None:
    if (data is None) == (images is None):
        fail("give either --data (a folder with index.csv) or --images (any folder)")
    if labels and not images:
        fail("--labels needs --images; a folder of --data has its labels")
    if images and not labels and (held_out or precision):
        fail("--held-out and --precision need labels")
    if report and not report.parent.is_dir():
        fail(f"--report {report}: the folder {report.parent} does not exist; make it first")


def _with_labels(
    bundle: "Bundle",
    data: Path | None,
    images: Path | None,
    labels: Path | None,
    split: str,
    report: Path | None,
    held_out: bool,
    precisions: list[str],
) -> "Evaluated":
    from rich.console import Console
    from rich.table import Table

    from export.calibrate import calibrate as measure
    from export.report import write_report
    from server.runtime.bundle import read_bundle

    several = len(bundle.manifest.classes) > 1
    names = [one.name for one in bundle.manifest.classes] if several else []
    table = Table(
        "graph", "precision", "engine", "IoU", "mean IoU", "Dice", *(f"Dice {one}" for one in names), "ms"
    )

    def add(r: "CalibrationRow") -> None:
        scores = (r.iou, r.mean_iou, r.dice, *r.class_dice)
        table.add_row(
            r.graph, r.precision, r.engine, *(f"{value:.4f}" for value in scores), f"{r.latency_ms:.1f}"
        )
        update(description=f"measured {r.graph} at {r.precision} on {r.engine}")

    try:
        with errors_as_lines(), progress("measuring images") as update:
            items, what, kind = _read(bundle, data, images, labels, split)
            measured = measure(
                bundle,
                items,
                what,
                held_out=held_out,
                precisions=precisions,
                advance=add,
                on_progress=_shown(update),
            )
            calibration = read_bundle(bundle.folder).manifest.calibration
            if report:
                update(description="writing the report")
                write_report(report, bundle, items, measured if held_out else calibration or measured)
        _print_flips(measured)
    finally:
        # Printed even after an interruption, because measuring takes minutes.
        if table.row_count:
            Console().print(table)
    if calibration and not held_out:
        _print_recommended(calibration.recommended.level, calibration.recommended.why)
    return items, what, kind


def _print_flips(measured: "Measured") -> None:
    """Prints what tta=flips gains at fp32, and its price."""
    for row in measured.flips:
        plain = measured.row(row.graph, "fp32")
        if plain:
            typer.echo(
                f"{row.graph} with tta=flips: IoU {row.iou:.4f} ({(row.iou - plain.iou) * 100:+.2f} points), {row.copies} runs per window"
            )


def _read(
    bundle: "Bundle", data: Path | None, images: Path | None, labels: Path | None, split: str
) -> "Evaluated":
    """Reads the images of any kind of folder; without labels the masks of the deepest level stand in their place."""
    from export.agreement import deepest_masks
    from export.cli_import import skipped_once
    from export.data import labelled, pictures, with_labels

    manifest, skip = bundle.manifest, skipped_once()
    if data:
        return [*labelled(data, split, manifest)], f"{data.name}, {split} split", "labels"
    if images is None:
        raise ValueError("there is a folder of data or one of images")
    name = images.resolve().name
    if labels:
        items = [*with_labels(images, labels, manifest, split, skip)]
        return items, f"{name} with labels of {labels.resolve().name}", "labels"
    return deepest_masks(bundle, [*pictures(images, manifest, split, skip)]), name, "deepest level"


def _without_labels(bundle: "Bundle", images: Path, split: str, report: Path | None) -> "Evaluated":
    from rich.console import Console
    from rich.table import Table

    from export.agreement import measure_agreement
    from export.report import write_report

    manifest = bundle.manifest
    deepest = f"L{manifest.levels[-1]}"
    whole = max(graph.macs_per_pixel for graph in manifest.graphs)
    table = Table(
        "graph", "precision", "engine", f"agreement with {deepest}", "agreement with fp32", "work", "ms"
    )

    def add(r: "AgreementRow") -> None:
        work = f"{manifest.graph(r.graph).macs_per_pixel / whole:.0%}"
        table.add_row(
            r.graph, r.precision, r.engine, f"{r.agreement:.4f}", f"{r.fp32_agreement:.4f}", work,
            f"{r.latency_ms:.1f}",
        )  # fmt: skip
        update(description=f"measured {r.graph} at {r.precision} on {r.engine}")

    try:
        with errors_as_lines(), progress(f"masks of {deepest}") as update:
            items, what, kind = _read(bundle, None, images, None, split)
            measured = measure_agreement(bundle, items, what, add, _shown(update))
            if report:
                update(description="writing the report")
                write_report(report, bundle, items, measured)
    finally:
        if table.row_count:
            Console().print(table)
    _print_recommended(measured.recommended.level, measured.recommended.why)
    if manifest.calibration:
        typer.echo("the bundle keeps its calibration with labels, which decides")
    return items, what, kind


def _shown(update: Callable[..., None]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        update(completed=done, total=total)

    return show


def _print_recommended(level: int, why: str) -> None:
    typer.echo(f"recommended: level {level}: {why}")
