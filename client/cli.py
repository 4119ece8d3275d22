"""`unetpp segment` and `unetpp compare`: in this process, or by a server.

Heavy imports happen inside, so that `--help` is quick and needs no extra.
"""

import asyncio
import contextlib
import functools
import re
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from client.options import with_options
from server.cli_utils import fail, read_settings

if TYPE_CHECKING:
    from client.documents import ModelCard, Progress
    from client.errors import SegmentError
    from client.inputs import Input

# What compare chooses itself.
COMPARED = ("mode", "level", "format", "include_mask", "instances", "min_level", "deadline_ms")

# As of a shell's own commands.
INTERRUPTED = 130

Server = Annotated[str | None, typer.Option(show_default="in this process", help="Address of a server.")]
KeyFile = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="File with the API key.")]
Authority = Annotated[Path | None, typer.Option("--ca", exists=True, dir_okay=False, help="Certificates to trust (PEM).")]
Unverified = Annotated[bool, typer.Option("--no-verify", help="Trust every certificate.")]
Timeout = Annotated[float, typer.Option(min=1, help="Seconds for one answer of the server, all tries included.")]
Bundles = Annotated[Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")]


@with_options
def segment(
    paths: Annotated[list[str], typer.Argument(help="Images, volumes, folders of them, patterns.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File of the answer, for one input.")] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, show_default="beside each input", help="Folder of the answers.")
    ] = None,
    recursive: Annotated[bool, typer.Option(help="Look into folders in folders.")] = True,
    reference: Annotated[Path | None, typer.Option(help="Mask to score against; for several inputs a folder.")] = None,
    report: Annotated[
        Path | None, typer.Option(dir_okay=False, show_default="run.json in --out", help="Report of the run, JSON.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out what the report says is done.")] = False,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Inputs at a time.")] = 2,
    server: Server = None,
    api_key_file: KeyFile = None,
    ca: Authority = None,
    no_verify: Unverified = False,
    timeout_s: Timeout = 600,
    as_job: Annotated[
        bool, typer.Option("--as-job", help="As jobs of the server; zips, large volumes and stacks are anyway.")
    ] = False,
    bundles: Bundles = None,
    *,
    asked: dict[str, Any],
) -> None:
    """Segment images and volumes, with the same options as POST /segment."""
    from client import inputs, journal
    from client.batch import Plan, card_of, run

    with _said():
        found = inputs.collect(paths, recursive=recursive, out=out)
        formats = asked.pop("format", "mask")
        if output and "," in formats:
            fail("-o names one file, and --format asks for several; use --out FOLDER")
        references = inputs.references(reference, found)
        inputs.check(found, out, output, references.values())
        kept = report or (out / "run.json" if out else None)
        if resume and kept is None:
            fail("--resume goes by the report of the run before; name it with --report, or use --out, which has one")
        before = journal.read(kept) if kept else {}
        params = _asking(server, api_key_file, ca, no_verify, timeout_s, as_job, bundles, asked.get("model"))
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
        plan = Plan({"formats": formats, **asked}, out, output, references, jobs, resume)

        async def work(shown: "_Shown") -> None:
            async with params:
                card = await card_of(params, asked.get("model"))
                notes = journal.Journal(kept, _head(card, server, {"format": formats, **asked}))
                notes.begin(found, before if resume else {})
                await run(params, card, plan, notes, shown)

        with _showing(len(found)) as shown:
            _through(work(shown), shown)
    _end(shown, len(found))


def compare(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The image or volume.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", show_default="image's name + _levels.png", help="The picture, PNG.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Mask to score against.")] = None,
    server: Server = None,
    api_key_file: KeyFile = None,
    ca: Authority = None,
    no_verify: Unverified = False,
    timeout_s: Timeout = 600,
    bundles: Bundles = None,
    *,
    asked: dict[str, Any],
) -> None:
    """Segment an image or a volume at every level: a table of time and agreement, and a picture.

    The picture shows images with each mask over them; of volumes and stacks a few slices, spread over what each mask has found.
    """
    from rich.console import Console
    from rich.table import Table

    from client import compare as comparing
    from client import inputs, journal
    from client.batch import card_of

    with _said():
        one = inputs.Input(image)
        if one.is_archive:
            fail(f"{one.shown} is a zip; compare takes one image or volume")
        target = output or one.answer(None, "levels.png")
        inputs.check([one], None, target, [reference] if reference else [])
        params = _asking(server, api_key_file, ca, no_verify, timeout_s, False, bundles, asked.get("model"))

        async def work(shown: "_Shown") -> tuple["ModelCard", list[comparing.Row], bytes | None]:
            async with params:
                card = await card_of(params, asked.get("model"))
                rows = await comparing.compare(params, card, image, reference, asked, shown.say)
                return card, rows, await comparing.input_picture(params, card, image, asked, rows)

        with _showing(None) as shown:
            outcome = _through(work(shown), shown)
        _end(shown, 1)
        card, rows, picture = outcome
        headings, cells = comparing.table(rows)
        table = Table(*headings, title=f"{one.shown}: {card['title']}")
        for line in cells:
            table.add_row(*line)
        journal.write(target, comparing.drawn(rows, picture))
        Console().print(table)
        typer.echo(f"agreement: IoU with the mask of accurate. {inputs.shown(target)}")


compare = with_options(compare, without=COMPARED)


def _asking(
    server: str | None,
    key_file: Path | None,
    ca: Path | None,
    no_verify: bool,
    timeout_s: float,
    as_job: bool,
    bundles: Path | None,
    model: str | None,
) -> Any:
    """Who segments: a server, or this process."""
    if server is None:
        if as_job or key_file or ca or no_verify:
            fail("--as-job, --api-key-file, --ca and --no-verify are for a server; name it with --server")
        from client.local import AsyncLocal, narrowed

        return AsyncLocal(settings=narrowed(read_settings(bundles), model))
    if bundles:
        fail("--bundles is for work in this process; a server has its own")
    if ca and no_verify:
        fail("--ca names whom to trust, and --no-verify trusts everyone; name one of them")
    from client.aio import AsyncClient
    from client.remote import Remote

    try:
        client = AsyncClient(server, api_key_file=key_file, timeout_s=timeout_s, verify=not no_verify if ca is None else ca)
    except ValueError as error:
        fail(str(error))
    return Remote(client, as_job=as_job)


def _head(card: "ModelCard", server: str | None, options: dict[str, Any]) -> dict[str, Any]:
    from client.journal import now
    from server import __version__

    return {
        "version": __version__,
        # Without a password in it.
        "server": server and re.sub(r"//[^/@]*@", "//", server),
        "model": {"name": card["name"], "sha256": card["sha256"]},
        "options": options,
        "started": now(),
    }


class _Shown:
    """What is shown of a run: a line for each answer, and bars on a terminal."""

    def __init__(self, bar: Any, total: int | None) -> None:
        self._bar = bar
        self._all = bar.add_task("all" if total else "", total=total)
        self._tasks: dict[Input, Any] = {}
        self.failures: list[tuple[str, str]] = []
        self.skipped = 0
        self.interrupted = False
        self.ended_by: SegmentError | None = None

    def say(self, text: str) -> None:
        """What is at work."""
        self._bar.update(self._all, description=text)

    def began(self, one: "Input") -> "Progress":
        """See `Watcher`."""
        self._tasks[one] = self._bar.add_task(one.path.name, total=None)
        return functools.partial(self._windows, one)

    def _windows(self, one: "Input", stage: str, done: int, total: int) -> None:
        self._bar.update(self._tasks[one], description=f"{one.path.name}: {stage}", completed=done, total=total)

    def ended(self, one: "Input", text: str, *, failed: bool) -> None:
        """See `Watcher`."""
        self._bar.remove_task(self._tasks.pop(one))
        self._bar.advance(self._all)
        if failed:
            self.failures.append((one.shown, text))
        elif text == "as before":
            self.skipped += 1
        else:
            # Through what rich has put there, which writes above the bars; typer's echo would go around it.
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


@contextlib.contextmanager
def _showing(total: int | None) -> Iterator[_Shown]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    # Answers that are written to a file must not go to the terminal.
    bar = Progress(console=console, transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty())
    with bar:
        yield _Shown(bar, total)


def _through(work: Coroutine[Any, Any, Any], shown: _Shown) -> Any:
    from client.errors import APIKeyMiddleware, SegmentError

    try:
        return asyncio.run(work)
    except KeyboardInterrupt:
        shown.interrupted = True
    except SegmentError as error:
        if isinstance(error, APIKeyMiddleware):
            # The server speaks of headers.
            error.detail += "; --api-key-file FILE sends the one in a file"
        shown.ended_by = error
    return None


def _end(shown: _Shown, total: int) -> None:
    """Says what failed, and ends with the exit code that tells it."""
    if shown.skipped:
        typer.echo(f"{shown.skipped} of {total} were done before")
    if shown.failures and total == 1:
        fail(shown.failures[0][1])
    if shown.ended_by:
        typer.secho(f"error: {shown.ended_by}", fg="red", err=True)
    if shown.failures:
        lines = "".join(f"\n  {name}: {text}" for name, text in sorted(shown.failures))
        typer.secho(f"error: {len(shown.failures)} of {total} failed:{lines}", fg="red", err=True)
    if shown.interrupted:
        _interrupted()
    if shown.failures or shown.ended_by:
        raise typer.Exit(1)


def _interrupted() -> NoReturn:
    typer.secho("interrupted", err=True)
    raise typer.Exit(INTERRUPTED)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Errors meant for a person in one line."""
    from client.errors import SegmentError
    from client.inputs import InputError

    try:
        yield
    except (SegmentError, InputError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        # While bundles are opened: nothing is begun.
        _interrupted()
