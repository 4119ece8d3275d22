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
def errors_as_lines() -> Iterator[None]:
    """Prints errors meant for a person without a traceback, and exits with 1."""
    from export.card import ExportError
    from export.onnx_file import ImportRefused
    from export.verify import VerifyError
    from model.checkpoint import CheckpointError
    from model.reading import DataError

    try:
        yield
    except (ExportError, ImportRefused, VerifyError, CheckpointError, DataError) as error:
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
    from export.card import read_card
    from export.pack import export as run

    with errors_as_lines(), progress("exporting", _graph_files(checkpoint, int8=data is not None)) as update:
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
    # A graph per head and `accurate`, in fp32, fp16 and perhaps int8; the network; and the standard deviation of
    # several heads.
    return (
        (len(network.heads) + 1) * (2 + int8) + 1 + (len(network.heads) > 1)
        if isinstance(network, UNetPlusPlus)
        else None
    )


def add_uncertainty(bundle: Annotated[Path, BUNDLE]) -> None:
    """Add the graph behind format=uncertainty to a bundle that was exported without it; nothing else changes."""
    from export.pack import add_uncertainty as run

    with errors_as_lines():
        entry = run(bundle).manifest.files["head_std.onnx"]
    typer.echo(f"{bundle}/head_std.onnx: {entry.bytes / 1e3:.1f} kB\nnext: unetpp verify {bundle}")


def verify(
    bundle: Annotated[Path, BUNDLE],
    source: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="ONNX file that it was imported from, to be compared, too."
        ),
    ] = None,
) -> None:
    """Compare every level and precision with the network on the engines of this machine; exit 1 unless they agree.

    The network of a checkpoint runs in torch, that of an imported bundle uncut on ONNX Runtime.
    """
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
        with errors_as_lines(), progress("comparing with the network") as update:
            opened = read_bundle(bundle)
            update(total=combinations(opened) + (len(opened.manifest.all_graphs) if source else 0))
            run(opened, add, source)
    finally:
        console.print(table)
