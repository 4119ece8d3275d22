"""`unetpp segment` and `unetpp compare`, in this process or by a server. Heavy imports happen inside the commands."""

import asyncio
import re
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from client.options import function_options, parameter_options, with_options
from server.cli_utils import fail, read_settings

if TYPE_CHECKING:
    from client.display import Display

# Parameters that `compare` chooses itself.
CHOSEN = ("mode", "level", "format", "include_mask", "instances", "min_level", "deadline_ms")

# Exit status of a command that Ctrl-C has ended, as in a shell.
INTERRUPTED = 130


def connect(
    server: Annotated[
        str | None, typer.Option(show_default="in this process", help="Address of a server.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File with the API key.")
    ] = None,
    ca: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Trusted certificates (PEM).")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Trust every certificate.")] = False,
    timeout_s: Annotated[
        float, typer.Option(min=1, help="Seconds for one answer of a server, all attempts included.")
    ] = 600,
    bundles: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")
    ] = None,
    as_job: Annotated[
        bool,
        typer.Option("--as-job", help="Send everything as jobs, not only zips, large volumes and stacks."),
    ] = False,
) -> Any:
    """Opens bundles, or a client of a server."""
    if server is None:
        if as_job or api_key_file or ca or no_verify:
            fail("--as-job, --api-key-file, --ca and --no-verify need a server; name it with --server")
        from client.local import AsyncLocal

        try:
            return AsyncLocal(settings=read_settings(bundles))
        except KeyboardInterrupt:
            _interrupted()
    if bundles:
        fail("--bundles is for work in this process; a server has its own bundles")
    if ca and no_verify:
        fail("--ca and --no-verify contradict each other; give one of them")
    from client.aio import AsyncClient
    from client.remote import Remote

    try:
        client = AsyncClient(
            server, api_key_file=api_key_file, timeout_s=timeout_s, verify=ca or not no_verify
        )
    except ValueError as error:
        fail(str(error))
    return Remote(client, as_job=as_job)


@with_options(connection=function_options(connect), parameters=parameter_options())
def segment(
    paths: Annotated[
        list[str], typer.Argument(help="Images, volumes, folders of them, patterns.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of the answer, for one input.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, show_default="beside each input", help="Folder of the answers."),
    ] = None,
    recursive: Annotated[bool, typer.Option(help="Search folders in folders.")] = True,
    reference: Annotated[
        Path | None, typer.Option(help="Mask to score against; for several inputs a folder.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(dir_okay=False, show_default="run.json in --out", help="Report of the run, JSON."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip what the report calls done.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Inputs at a time.")] = 2,
    *,
    connection: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    """Segment images and volumes, with the same options as POST /segment."""
    from client.batch import Batch, model_card
    from client.display import open_display
    from client.inputs import check_outputs, collect, match_references
    from client.report import Report, now, read_report
    from client.request import segment_params
    from server import __version__

    inputs = collect(paths, recursive=recursive, out=out)
    formats = parameters.pop("format", "mask")
    segment_params(formats, parameters)
    if output and "," in formats:
        fail("-o names one file, but --format has several; use --out FOLDER")
    references = match_references(reference, inputs)
    check_outputs(inputs, out, output, references.values())
    report = report or (out / "run.json" if out else None)
    if report is None and resume:
        fail("--resume needs the report of the run before; name it with --report, or use --out")
    before = read_report(report) if report else {}
    model, server = parameters.get("model"), connection.get("server")
    segmenter = connect(**connection)
    if report:
        report.parent.mkdir(parents=True, exist_ok=True)

    async def run(display: "Display") -> None:
        async with segmenter:
            card = await model_card(segmenter, model)
            head = {
                "version": __version__,
                # Without a password in it.
                "server": server and re.sub(r"//[^/@]*@", "//", server),
                "model": {"name": card["name"], "sha256": card["sha256"]},
                "options": {"format": formats, **parameters},
                "started": now(),
            }
            outcomes = Report(report, head)
            outcomes.begin(inputs, before if resume else {})
            arguments = {"formats": formats, **parameters}
            batch = Batch(
                segmenter, card, arguments, outcomes, display, out, output, references, jobs, resume
            )
            await batch.run()

    with open_display(len(inputs)) as display:
        error = _run(run(display))
    _exit(display, len(inputs), error)


@with_options(connection=function_options(connect, without=("as_job",)), parameters=parameter_options(CHOSEN))
def compare(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The image or volume.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default="image's name + _levels.png", help="The picture, PNG."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Mask to score against.")
    ] = None,
    *,
    connection: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    """Segment an image or a volume at every level: a table of time and agreement, and a picture.

    The picture shows images with each mask over them; of volumes and stacks a few slices, spread over each
    mask.
    """
    from rich.console import Console
    from rich.table import Table

    from client import compare as comparison
    from client.batch import model_card
    from client.display import open_display
    from client.files import printable, replacing
    from client.inputs import Input, check_outputs
    from client.request import segment_params

    one = Input(image)
    if one.is_archive:
        fail(f"{printable(image)} is a zip; compare takes one image or volume")
    segment_params((), parameters)
    target = output or one.output(None, "levels.png")
    check_outputs([one], None, output, [reference] if reference else [], answers=("levels",))
    segmenter = connect(**connection)
    tables: list[Table] = []

    async def run(display: "Display") -> None:
        async with segmenter:
            card = await model_card(segmenter, parameters.get("model"))
            arguments = {"reference": reference, **parameters}
            rows, picture = await comparison.compare(segmenter, card, image, arguments, display.label)
        columns = len(rows[0].cells)
        table = Table(*comparison.HEADINGS[:columns], title=f"{printable(image)}: {card['title']}")
        for row in rows:
            table.add_row(*row.cells)
        with replacing(target) as file:
            file.write(comparison.draw(rows, picture))
        tables.append(table)

    with open_display(None) as display:
        error = _run(run(display))
    _exit(display, 1, error)
    Console().print(*tables)
    typer.echo(f"agreement: IoU with the mask of accurate. {printable(target)}")


def _run(work: Coroutine[Any, Any, None]) -> BaseException | None:
    """Runs a command's work and returns what ended it early."""
    from server.errors import UnetppError

    try:
        asyncio.run(work)
    except (UnetppError, OSError, KeyboardInterrupt) as error:
        return error
    return None


def _exit(display: "Display", total: int, error: BaseException | None) -> None:
    """Reports failures, and ends the process with the exit status for them."""
    from server.errors import Unauthorized

    if display.skipped:
        typer.echo(f"{display.skipped} of {total} were done before")
    messages, failures = [], sorted(display.failures)
    if failures:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in failures)
        messages.append(failures[0][1] if total == 1 else f"{len(failures)} of {total} failed:{lines}")
    if error and not isinstance(error, KeyboardInterrupt):
        hint = "; name the file of the key with --api-key-file" if isinstance(error, Unauthorized) else ""
        messages.append(f"{error}{hint}")
    for message in messages:
        typer.secho(f"error: {message}", fg="red", err=True)
    if isinstance(error, KeyboardInterrupt):
        _interrupted()
    if messages:
        raise typer.Exit(1)


def _interrupted() -> NoReturn:
    typer.secho("interrupted", err=True)
    raise typer.Exit(INTERRUPTED)
