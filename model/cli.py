"""`unetpp train`."""

from pathlib import Path
from typing import Annotated, NoReturn

import typer


def fail(text: str) -> NoReturn:
    """Prints an error meant for a person and exits with 1."""
    typer.secho(f"error: {text}", fg="red", err=True)
    raise typer.Exit(1)


def train(
    recipe: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="TOML recipe, e.g. model/recipes/nuclei.toml.")
    ],
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="Folder with images/, labels/, index.csv (id, split)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(file_okay=False, help="Folder of the run; a run found there goes on where it stopped."),
    ],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override, e.g. --set optimisation.epochs=10 --set architecture=unet."),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Checkpoint, or weights.safetensors of a bundle, that a new run begins from.",
        ),
    ] = None,
) -> None:
    """Train a UNet++ (or a U-Net the same way), deep supervision on all heads; resumable."""
    from rich.console import Console

    from model.reading import DataError
    from model.recipe import RecipeError, read_recipe
    from model.train import train as run

    try:
        best = run(read_recipe(recipe, override or []), data, out, Console(), weights)
    except (DataError, RecipeError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail(f"interrupted; the same command goes on after the last finished epoch in {out}")
    typer.echo(best)
