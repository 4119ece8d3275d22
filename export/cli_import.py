"""`unetpp import`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from export.cli import errors_as_lines
from server.cli_utils import fail, progress

if TYPE_CHECKING:
    from export.card import Card
    from export.importing import HeadedGraph
    from server.runtime.bundle import Bundle


def import_network(
    model: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="ONNX file of a network.")],
    card: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TOML card that describes the network.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the bundle; a bundle there is replaced.")
    ] = None,
    heads: Annotated[
        str, typer.Option(help="Names of the tensors that are the heads, by commas; without, the outputs.")
    ] = "",
    images: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of images like those to be served: int8, and checks."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Folder of their labels, under the same names: more checks."
        ),
    ] = None,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Print where the network can be cut, and write nothing.")
    ] = False,
) -> None:
    """Make a bundle of any trained network with heads, from its ONNX file and a card."""
    if inspect:
        with errors_as_lines():
            _print_inspection(model)
        return
    if card is None or out is None:
        fail("--card and --out are needed; unetpp import MODEL --inspect needs neither")
    if labels and not images:
        fail("--labels needs --images")
    from export.card import read_card
    from export.fit import warnings
    from export.pack import import_network as run

    skip = skipped_once()
    with errors_as_lines(), progress("importing") as update:
        description = read_card(card)
        network = _read(model, description, heads)
        update(total=(len(network.heads) + 1) * (3 if images else 2) + 1 + (len(network.heads) > 1))
        bundle = run(
            network,
            description,
            out,
            images,
            advance=lambda file: update(advance=1, description=f"wrote {file}"),
            skip=skip,
            labels=labels,
        )
    _print_bundle(bundle, model)
    for warning in warnings(network, description):
        _warn(warning)
    if images:
        _check(bundle, images, labels, skip)
    typer.echo(f"next: unetpp verify {out} --source {model}\n      unetpp calibrate {out} --images FOLDER")


def skipped_once() -> Callable[[str], None]:
    """Returns a function that prints a line on a file that is left out, each once."""
    lines: set[str] = set()

    def skip(line: str) -> None:
        if line not in lines:
            lines.add(line)
            typer.echo(f"left out: {line}", err=True)

    return skip


def _warn(text: str) -> None:
    typer.secho(f"warning: {text}", fg="yellow", err=True)


def _read(model: Path, card: "Card", heads: str) -> "HeadedGraph":
    """Reads the graph with heads.

    Raises:
        ExportError: the card does not say `dims`.
        ImportRefused: the file cannot be used.
    """
    from export.card import ExportError
    from export.importing import headed
    from export.onnx_file import read_onnx

    if card.dims is None:
        raise ExportError("the card of a network that is imported needs dims: 2 for images, 3 for volumes")
    names = [name.strip() for name in heads.split(",") if name.strip()]
    return headed(read_onnx(model), card.dims, len(card.channels), names, model.name)


def _print_bundle(bundle: "Bundle", model: Path) -> None:
    from export.weights import stored_kind
    from server.runtime.bundle import WEIGHTS

    manifest = bundle.manifest
    size = sum(entry.bytes for entry in manifest.files.values())
    levels = ", ".join(map(str, manifest.levels))
    typer.echo(
        f"{bundle.folder}: {len(manifest.files)} files, {size / 1e6:.1f} MB; "
        f"{'levels' if len(manifest.levels) > 1 else 'level'} {levels}; weights in {stored_kind(bundle.folder / WEIGHTS)}"
    )
    if len(manifest.levels) == 1:
        typer.echo(
            f"{model.name} has one output, which is level {levels}. For others: name the tensors that give scores with "
            f"--heads (unetpp import {model} --inspect lists what there is), or train heads without labels: "
            f"unetpp add-levels {bundle.folder} --images FOLDER"
        )


def _check(bundle: "Bundle", images: Path, labels: Path | None, skip: Callable[[str], None]) -> None:
    from itertools import islice

    from export.data import Labelled, Picture, pictures, with_labels
    from export.sanity import IMAGES, check
    from model.reading import DataError

    manifest = bundle.manifest
    items: Iterator[Picture | Labelled] = pictures(images, manifest, "train", skip)
    if labels:
        items = with_labels(images, labels, manifest, "train", skip)
    try:
        with progress("checking the card on images"):
            findings = check(bundle, [*islice(items, IMAGES)])
    except DataError as error:
        # The bundle is written and may well be right.
        _warn(f"not checked: {error}")
        return
    for finding in findings:
        (_warn if finding.warning else typer.echo)(finding.text)


def _print_inspection(model: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from export.inspection import inspect

    found = inspect(model)
    dims, channels = found.network.dims, found.network.channels
    table = Table(
        "tensor", "what", "node", "channels", "stride", "MACs", "parameters",
        title=f"{model.name}: {dims}D, {channels} channel{'s' if channels > 1 else ''}, opset {found.network.opset}",
    )  # fmt: skip
    # Whole names, because --heads takes them.
    table.columns[0].overflow = "fold"
    for place in found.places:
        node = f"X^{{0,{place.column}}}" if place.column else "–"
        table.add_row(
            place.name, place.kind, node, str(place.channels), str(place.stride),
            f"{place.macs:.1%}", f"{place.parameters:.1%}",
        )  # fmt: skip
    Console().print(table)
    for name in found.odd:
        shape = found.network.shapes[name]
        typer.echo(f"output {name!r} of shape {shape} is no map of scores per pixel")
    outputs = [place for place in found.places if place.kind == "output"]
    if len(outputs) == 1:
        typer.echo(
            "one output: a bundle of it has one level. Nodes are features, not scores: unetpp add-levels trains heads on them"
        )
