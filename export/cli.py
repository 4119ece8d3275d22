"""`unetpp export`, `verify` and `calibrate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from server.cli_utils import fail, progress

BUNDLE = typer.Argument(exists=True, file_okay=False, help="Folder of the bundle, e.g. bundles/nuclei.")
DATA = typer.Option(
    exists=True, file_okay=False, help="Folder with images/, labels/ and index.csv (columns id, split)."
)


@contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Prints errors meant for a person without a traceback, and exits with 1."""
    from export.pack import ExportError
    from export.verify import VerifyError
    from model.checkpoint import CheckpointError
    from model.reading import DataError

    try:
        yield
    except (ExportError, VerifyError, CheckpointError, DataError) as error:
        fail(str(error))


def export(
    checkpoint: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="best.safetensors of a training run.")
    ],
    card: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="TOML card, e.g. export/cards/nuclei.toml.")
    ],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder of the bundle; a bundle there is replaced.")
    ],
    data: Annotated[Path | None, DATA] = None,
) -> None:
    """Export a checkpoint as a bundle: every level and the averaged network; with --data also in int8."""
    from export.pack import export as run
    from export.pack import read_card

    with _errors_as_lines(), progress("exporting", _graph_files(checkpoint, int8=data is not None)) as update:
        bundle = run(
            checkpoint,
            read_card(card),
            out,
            data,
            lambda file: update(advance=1, description=f"wrote {file}"),
        )
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    typer.echo(f"{out}: {len(bundle.manifest.files)} files, {size / 1e6:.1f} MB\nnext: unetpp verify {out}")


def _graph_files(checkpoint: Path, *, int8: bool) -> int | None:
    """Counts the ONNX files that the export of a checkpoint writes; None where it will be refused."""
    from model.checkpoint import load
    from model.network import UNetPlusPlus

    network, _ = load(checkpoint)
    # A graph per head and `accurate`, in fp32, fp16 and perhaps int8; and the standard deviation of several
    # heads.
    return (
        (len(network.heads) + 1) * (2 + int8) + (len(network.heads) > 1)
        if isinstance(network, UNetPlusPlus)
        else None
    )


def add_uncertainty(bundle: Annotated[Path, BUNDLE]) -> None:
    """Add the graph behind format=uncertainty to a bundle that was exported without it; nothing else changes."""
    from export.pack import add_uncertainty as run

    with _errors_as_lines():
        entry = run(bundle).manifest.files["head_std.onnx"]
    typer.echo(f"{bundle}/head_std.onnx: {entry.bytes / 1e3:.1f} kB\nnext: unetpp verify {bundle}")


def verify(bundle: Annotated[Path, BUNDLE]) -> None:
    """Compare every level and precision with torch on the engines of this machine; exit 1 unless they agree."""
    from rich.console import Console
    from rich.table import Table

    from export.verify import Verdict, combinations
    from export.verify import verify as run
    from server.runtime.bundle import read_bundle

    table = Table("graph", "precision", "engine", "largest difference", "mask agreement", "verdict")
    console = Console()

    def add(v: Verdict) -> None:
        table.add_row(
            v.graph,
            v.precision,
            v.engine,
            f"{v.max_abs:.2e}",
            f"{v.agreement:.5f}",
            "ok" if v.passed else "FAILED",
        )
        update(advance=1)

    try:
        with _errors_as_lines(), progress("comparing with torch") as update:
            opened = read_bundle(bundle)
            update(total=combinations(opened))
            run(opened, add)
    finally:
        console.print(table)


def calibrate(
    bundle: Annotated[Path, BUNDLE],
    data: Annotated[Path, DATA],
    split: Annotated[str, typer.Option(help="Split of index.csv to measure on.")] = "val",
    held_out: Annotated[
        bool, typer.Option("--held-out", help="Record as the held-out result, which decides nothing.")
    ] = False,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Measure only this one again and keep the other rows; may be repeated."),
    ] = None,
    curve: Annotated[
        bool,
        typer.Option(
            "--curve", help="Measure only the curve of mode=auto; --data may then be images without labels."
        ),
    ] = False,
) -> None:
    """Measure IoU, Dice and latency of every level and precision, recommend a level, and fit the curve of mode=auto."""
    from rich.console import Console
    from rich.table import Table

    from export.calibrate import calibrate as run
    from export.cli_curve import calibrate_curve
    from server.runtime.bundle import CalibrationRow, read_bundle

    if curve:
        with _errors_as_lines():
            calibrate_curve(bundle, data, split)
        return
    table = Table("graph", "precision", "engine", "IoU", "mean IoU", "Dice", "ms")
    console = Console()

    def add(r: CalibrationRow) -> None:
        table.add_row(
            r.graph,
            r.precision,
            r.engine,
            f"{r.iou:.4f}",
            f"{r.mean_iou:.4f}",
            f"{r.dice:.4f}",
            f"{r.latency_ms:.1f}",
        )
        update(description=f"measured {r.graph} at {r.precision} on {r.engine}")

    def show(done: int, total: int) -> None:
        update(completed=done, total=total)

    try:
        with _errors_as_lines(), progress("measuring images") as update:
            run(
                read_bundle(bundle),
                data,
                split,
                held_out=held_out,
                precisions=precision or (),
                advance=add,
                on_progress=show,
            )
    finally:
        # Printed even after an interruption, because measuring takes minutes.
        if table.row_count:
            console.print(table)
    manifest = read_bundle(bundle).manifest
    if manifest.calibration and not held_out:
        typer.echo(
            f"recommended: level {manifest.calibration.recommended.level}: {manifest.calibration.recommended.why}"
        )
    if not held_out and not precision:
        with _errors_as_lines():
            calibrate_curve(bundle, data, split)
