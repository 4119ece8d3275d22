"""`unetpp add-levels`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.cli import BUNDLE, errors_as_lines
from server.cli_utils import fail, progress

if TYPE_CHECKING:
    from export.add_levels import Added


def add_levels(
    bundle: Annotated[Path, BUNDLE],
    images: Annotated[
        Path,
        typer.Option(exists=True, file_okay=False, help="Folder of images or volumes; no labels are needed."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Folder of the bundle with the levels; without it the bundle is replaced."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of labels named as the images: train on them instead of the deepest scores.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimisation steps at most.")] = 400,
    min_agreement: Annotated[
        float,
        typer.Option(min=0, max=1, help="IoU with the deepest level below which a level is not added."),
    ] = 0.8,
    force: Annotated[bool, typer.Option("--force", help="Add levels that agree less nevertheless.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the crops and of the held-out images.")] = 0,
) -> None:
    """Give a network with one head its shallower levels: they learn the deepest scores on images, without labels."""
    from export.add_levels import Observer, Options, progress_file
    from export.add_levels import add_levels as run
    from server.runtime.bundle import read_bundle

    place = progress_file((out or bundle).resolve())
    if place.is_file():
        typer.echo(f"going on with {place}")

    def show(done: int, agreement: dict[int, float]) -> None:
        levels = ", ".join(f"L{level} {value:.2f}" for level, value in agreement.items())
        update(completed=done, description=f"agreement {levels}")

    try:
        with errors_as_lines(), progress("reading images", steps) as update:
            observer = Observer(
                trained=show,
                skipped=lambda line: typer.echo(f"left out: {line}", err=True),
                wrote=lambda file: update(description=f"wrote {file}"),
            )
            options = Options(steps, min_agreement, force, seed)
            before = read_bundle(bundle)
            added = run(before, images, out, options, labels, observer)
    except KeyboardInterrupt:
        # Before the first measurement there is nothing to go on from.
        advice = f"goes on from {place}" if place.is_file() else "starts anew"
        fail(f"interrupted, the bundle is as it was; the same command {advice}")
    _print(added, min_agreement)
    old, folder = before.manifest, added.bundle.folder
    if old.calibration or old.agreement or old.held_out:
        typer.echo("measurements of the bundle were removed, because they miss the new levels")
    typer.echo(f"next: unetpp verify {folder}, then unetpp calibrate {folder} --images {images}")


def _print(added: "Added", min_agreement: float) -> None:
    """Prints the table of levels, and on what they stand."""
    from rich.console import Console
    from rich.table import Table

    manifest = added.bundle.manifest
    table = Table("level", "agreement with the deepest", "work", "offered")
    whole = manifest.graph("accurate").macs_per_pixel
    shares = {graph.name: graph.macs_per_pixel / whole for graph in manifest.graphs}
    for level, value in added.agreement.items():
        offered = "no" if level in added.left_out else "yes" if value >= min_agreement else "forced"
        share = shares.get(f"L{level}")
        table.add_row(f"L{level}", f"{value:.3f}", "" if share is None else f"{share:.0%}", offered)
    table.add_row(f"L{manifest.levels[-1]}", "", "100%", "as before")
    Console().print(table)
    distilled = manifest.distilled
    if distilled:
        typer.echo(
            f"{distilled.steps} steps on {distilled.images - distilled.held_out} images"
            f"{' with labels' if distilled.labels else ''}; agreement on {distilled.held_out} others"
        )
    if added.left_out:
        levels = ", ".join(f"L{level}" for level in added.left_out)
        typer.echo(f"{levels}: below --min-agreement {min_agreement:g}, not added")
