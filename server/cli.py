"""The `unetpp` command. Subcommands of other packages join through the entry-point group `unetpp.commands`.

Heavy imports happen inside the subcommands, so that `unetpp --help` is quick and needs no extra.
"""

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NoReturn, cast

import typer

from server import __version__, logs
from server.errors import UnetppError

app = typer.Typer(
    name="unetpp",
    help="One trained UNet++, served at the depth each request can afford.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Which extra brings a module that a subcommand may miss.
EXTRAS = {
    "torch": "train", "monai": "train", "safetensors": "train", "matplotlib": "train", "onnx": "train", "onnxscript": "train",
    "onnxruntime": "cpu", "openvino": "cpu",
}  # fmt: skip


def spoken(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns errors meant for a person into one line and exit code 1, and names a missing extra."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            if missing not in EXTRAS:
                raise
            fail(
                f"this command needs {missing!r}, which is not installed; "
                f"install it with: pip install '.[{EXTRAS[missing]}]' in the project's folder"
            )
        except (UnetppError, OSError) as error:
            fail(str(error))

    return wrapped


def fail(text: str) -> NoReturn:
    """Prints an error and exits with 1."""
    typer.secho(f"error: {text}", fg="red", err=True)
    raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"unetpp {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """One trained UNet++, served at the depth each request can afford."""
    del version


@app.command()
@spoken
def serve(
    bundles: Annotated[Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [UNETPP_HTTP__HOST].")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on [UNETPP_HTTP__PORT].")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without keys [UNETPP_AUTH__INSECURE].")
    ] = False,
) -> None:
    """Start the HTTP server on every bundle under bundles/."""
    from server import listening
    from server.runtime import memory

    memory.keep_little()
    from server.api.auth import Keys
    from server.app import create_app, make_server, open_bundles
    from server.jobs.store import Store

    settings = _settings(bundles, host, port, insecure)
    logs.setup(settings.log.format)
    if hasattr(signal, "SIGHUP"):
        # It asks for a reload; until the server listens, the bundles are being read anyway.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getpid() == 1:
        # The kernel spares a container's first process from signals that it does not handle, i.e. until the server listens.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    # All that may be wrong with keys, ports and the folder of jobs is said in one line, before minutes of warming up.
    if settings.auth.keys_file:
        Keys(settings.auth.keys_file)
    # The folder stays taken from here to the end.
    with listening.bound(settings) as (sockets, ops_sockets), contextlib.closing(Store(settings.jobs)) as store:
        opened = open_bundles(settings)
        http = settings.http
        shown = _shown(http, http.host, http.port)
        ops = _shown(http, http.ops_host, http.ops_port) if http.ops_port else shown
        # Collectors take every line for an object.
        say = typer.echo if settings.log.format == "text" else logging.getLogger("server").info
        for name, bundle in opened.items():
            say(f"{name}: levels {', '.join(map(str, bundle.bundle.manifest.levels))}, precisions {', '.join(bundle.precisions)}")
        for what, address in (("page", f"{shown}/"), ("docs", f"{shown}/docs"), ("metrics", f"{ops}/metrics")):
            say(f"{what:8} {address}")
        server = make_server(settings, create_app(settings, opened, store), sockets, ops_sockets)
        server.run()
    if not server.started:
        raise typer.Exit(1)


def _shown(http: Any, host: str, port: int) -> str:
    """An address as a person would open it."""
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "") else host  # noqa: S104 - compared, not bound
    return f"{'https' if http.tls_cert else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


@app.command()
@spoken
def key(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, dots, dashes and underscores.")],
) -> None:
    """Make an API key, and the line by which the server's keys file knows it."""
    from server.api.auth import make

    secret, line = make(name)
    # The line alone on standard output, so that >> appends it to the file.
    typer.echo(f"the key of {name}, shown only now: {secret}\nthe line for the keys file (UNETPP_AUTH__KEYS_FILE):", err=True)
    typer.echo(line)


@app.command()
@spoken
def segment(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The image or volume.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where the answer goes [image's name + _mask].")] = None,
    mode: Annotated[str | None, typer.Option(help="accurate (default) or fast.")] = None,
    level: Annotated[int | None, typer.Option(help="1 (fastest) to 4 (deepest); implies fast.")] = None,
    model: Annotated[str | None, typer.Option(help="Bundle name.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16 or int8.")] = "auto",
    format: Annotated[  # noqa: A002 - the contract's word
        str | None, typer.Option(help="png, nifti, tiff, json, npz, png16 or overlay [as the input].")
    ] = None,
    include_mask: Annotated[bool, typer.Option("--include-mask", help="With json: the mask in base64.")] = False,
    axis: Annotated[str, typer.Option(help="Slices of a volume, for a model of images: auto, 0, 1 or 2.")] = "auto",
    nonfinite: Annotated[str, typer.Option(help="Values that are NaN or infinite: refuse or zero.")] = "refuse",
    reference: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Labels to score against.")] = None,
    bundles: Annotated[Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")] = None,
) -> None:
    """Segment an image or a volume in-process, with the same options as POST /segment."""
    import asyncio

    from rich.console import Console
    from rich.progress import Progress

    from server.app import make_segmenter, open_bundles
    from server.imaging.encode import choose
    from server.metrics import Metrics
    from server.segment.request import SegmentRequest

    settings = _settings(bundles)
    choose(format, None)
    if output and not output.parent.is_dir():
        fail(f"{output.parent} is not a folder")
    segmenter = make_segmenter(settings, open_bundles(settings), Metrics())

    wanted = SegmentRequest(model, mode, level, precision, format, None, include_mask, axis, nonfinite)
    console = Console(stderr=True)
    try:
        with contextlib.ExitStack() as files, Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            opened = [files.enter_context(path.open("rb")) if path else None for path in (image, reference)]
            task = bar.add_task(image.name)
            show = functools.partial(_show, bar, task)
            answer = asyncio.run(segmenter.segment(cast("BinaryIO", opened[0]), wanted, opened[1], show))
    finally:
        segmenter.close()
    name = image.name.removesuffix(".gz").removesuffix(image.with_suffix("").suffix if image.suffix == ".gz" else image.suffix)
    target = output or image.with_name(f"{name}_{answer.file}")
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_bytes(answer.body)
        partial.replace(target)
    finally:
        # Ctrl-C leaves nothing half-written.
        partial.unlink(missing_ok=True)
    route = answer.choice.route
    typer.echo(f"{target}  {answer.choice.model} {route.mode} L{route.level} {answer.choice.precision}, "
               f"{sum(answer.seconds.values()) * 1e3:.0f} ms")  # fmt: skip
    if answer.quality:
        typer.echo(f"IoU {answer.mean_iou:.4f}  Dice {answer.mean_dice:.4f}")
    if answer.note:
        typer.echo(f"note: {answer.note}")


def _show(bar: Any, task: Any, stage: str, done: int, total: int) -> None:
    bar.update(task, description=stage, completed=done, total=total)


@app.command()
@spoken
def models(
    bundles: Annotated[Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")] = None,
) -> None:
    """List the bundles with their levels, as calibrated."""
    from rich.console import Console
    from rich.table import Table

    from server.runtime.bundle import find_bundles, read_bundle

    for folder in find_bundles(_settings(bundles).bundles):
        manifest = read_bundle(folder).manifest
        table = Table("graph", "parameters", "kMAC/pixel", title=f"{manifest.name}: {manifest.title}")
        for heading in ("precision", "engine", "IoU", "mean IoU", "Dice", "ms"):
            table.add_column(heading)
        for graph in manifest.graphs:
            rows = [r for r in (manifest.calibration.rows if manifest.calibration else ()) if r.graph == graph.name]
            facts = (graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / 1e3:.0f}")
            for row in rows:
                scores = (f"{row.iou:.4f}", f"{row.mean_iou:.4f}", f"{row.dice:.4f}", f"{row.latency_ms:.1f}")
                table.add_row(*facts, row.precision, row.engine, *scores)
                facts = ("", "", "")
            if not rows:
                table.add_row(*facts, "-", "-", "not calibrated")
        Console().print(table)
        if manifest.calibration:
            c = manifest.calibration
            typer.echo(f"measured on {c.images} images of {c.data}, {c.machine}")
            typer.echo(f"recommended for mode=fast: level {c.recommended.level} ({c.recommended.why})")


def _settings(bundles: Path | None = None, host: str | None = None, port: int | None = None, insecure: bool = False) -> Any:
    """Settings from the environment, with the command line's on top."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from server.settings import Settings, unknown_variables

    try:
        settings = Settings()
    except SettingsError as error:
        fail(f"the settings in the environment are not valid: {error}")
    except ValidationError as error:
        lines = [f"UNETPP_{'__'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        fail("the settings in the environment are not valid: " + "; ".join(lines))
    if unknown := unknown_variables():
        fail(f"unknown settings in the environment: {', '.join(unknown)}; the README lists those that exist")
    http = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    update: dict[str, Any] = {"http": settings.http.model_copy(update=http)}
    if bundles is not None:
        update["bundles"] = bundles
    if insecure:
        update["auth"] = settings.auth.model_copy(update={"insecure": True})
    return settings.model_copy(update=update)


for _entry in sorted(entry_points(group="unetpp.commands"), key=lambda e: e.name):
    # An image may serve without the packages that train and export.
    with contextlib.suppress(ModuleNotFoundError):
        app.command(_entry.name)(spoken(_entry.load()))


if __name__ == "__main__":
    app()
