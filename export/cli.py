"""`unetpp export`, `verify` and `calibrate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from model.cli import fail

BUNDLE = typer.Argument(exists=True, file_okay=False, help="Folder of the bundle, e.g. bundles/nuclei.")
DATA = typer.Option(exists=True, file_okay=False, help="Folder with images/, labels/ and index.csv (columns id, split).")


@contextmanager
def _spoken() -> Iterator[None]:
    """Errors meant for a person, without a traceback."""
    from export.pack import ExportError
    from export.verify import VerifyError
    from model.checkpoint import CheckpointError
    from model.data import DataError

    try:
        yield
    except (ExportError, VerifyError, CheckpointError, DataError) as error:
        fail(str(error))


def export(
    checkpoint: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="best.safetensors of a training run.")],
    card: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="TOML card, e.g. export/cards/nuclei.toml.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the bundle; a bundle there is replaced.")],
    data: Annotated[Path | None, DATA] = None,
) -> None:
    """Export a checkpoint as a bundle: every level and the averaged network; with --data also in int8."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from export.pack import export as run
    from export.pack import read_card

    with _spoken(), Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=Console()) as bar:
        task = bar.add_task("exporting")
        bundle = run(checkpoint, read_card(card), out, data, lambda step: bar.update(task, description=f"wrote {step}"))
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    typer.echo(f"{out}: {len(bundle.manifest.files)} files, {size / 1e6:.1f} MB\nnext: unetpp verify {out}")


def verify(bundle: Annotated[Path, BUNDLE]) -> None:
    """Compare every level and precision with torch on the engines of this machine; exit 1 unless they agree."""
    from rich.console import Console
    from rich.table import Table

    from export.verify import Verdict
    from export.verify import verify as run
    from server.runtime.bundle import read_bundle

    table = Table("graph", "precision", "engine", "largest difference", "mask agreement", "verdict")
    console = Console()

    def add(v: Verdict) -> None:
        table.add_row(v.graph, v.precision, v.engine, f"{v.max_abs:.2e}", f"{v.agreement:.5f}", "ok" if v.passed else "FAILED")

    try:
        with _spoken(), console.status("comparing with torch"):
            run(read_bundle(bundle), add)
    finally:
        console.print(table)


def calibrate(
    bundle: Annotated[Path, BUNDLE],
    data: Annotated[Path, DATA],
    split: Annotated[str, typer.Option(help="Split of index.csv to measure on.")] = "val",
    held_out: Annotated[bool, typer.Option("--held-out", help="Record as the held-out result, which decides nothing.")] = False,
) -> None:
    """Measure IoU, Dice and latency of every level and precision, and recommend a level."""
    from rich.console import Console
    from rich.table import Table

    from export.calibrate import calibrate as run
    from server.runtime.bundle import CalibrationRow, read_bundle

    table = Table("graph", "precision", "engine", "IoU", "mean IoU", "Dice", "ms")
    console = Console()

    def add(r: CalibrationRow) -> None:
        table.add_row(r.graph, r.precision, r.engine, f"{r.iou:.4f}", f"{r.mean_iou:.4f}", f"{r.dice:.4f}", f"{r.latency_ms:.1f}")
        status.update(f"measured {r.graph} at {r.precision}")

    with _spoken(), console.status("measuring") as status:
        run(read_bundle(bundle), data, split, held_out=held_out, advance=add)
    console.print(table)
    manifest = read_bundle(bundle).manifest
    if manifest.calibration and not held_out:
        typer.echo(f"recommended: level {manifest.calibration.recommended.level}: {manifest.calibration.recommended.why}")
