"""The `unetpp` command. Subcommands of other packages join through the entry-point group `unetpp.commands`.

Heavy imports happen inside the subcommands, so that `unetpp --help` is quick and needs no extra.
"""

import contextlib
import logging
import os
import signal
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from server import __version__, logs
from server.cli_utils import read_settings, report_errors

app = typer.Typer(
    name="unetpp",
    help="One trained UNet++, served at the depth each request can afford.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
@report_errors
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

    memory.limit_malloc_arenas()
    from server.api.auth import Keys
    from server.app import create_app, make_server
    from server.jobs.store import Store
    from server.service import open_service

    settings = read_settings(bundles, host, port, insecure)
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
        service = open_service(settings)
        service.open()
        http = settings.http
        shown = _shown(http, http.host, http.port)
        ops = _shown(http, http.ops_host, http.ops_port) if http.ops_port else shown
        # Collectors take every line for an object.
        say = typer.echo if settings.log.format == "text" else logging.getLogger("server").info
        for name, deployment in service.registry.deployments.items():
            levels = ", ".join(map(str, deployment.manifest.levels))
            say(f"{name}: levels {levels}, precisions {', '.join(deployment.precisions)}")
        for what, address in (("page", f"{shown}/"), ("docs", f"{shown}/docs"), ("metrics", f"{ops}/metrics")):
            say(f"{what:8} {address}")
        server = make_server(settings, create_app(settings, service, store), sockets, ops_sockets)
        server.run()
    if not server.started:
        raise typer.Exit(1)


def _shown(http: Any, host: str, port: int) -> str:
    """An address as a person would open it."""
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "") else host  # noqa: S104 - compared, not bound
    return f"{'https' if http.tls_cert else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


@app.command()
@report_errors
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
@report_errors
def models(
    bundles: Annotated[Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")] = None,
) -> None:
    """List the bundles with their levels, as calibrated."""
    from rich.console import Console
    from rich.table import Table

    from server.runtime.bundle import find_bundles, read_bundle

    for folder in find_bundles(read_settings(bundles).bundles):
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


@app.command()
@report_errors
def tune(
    bundle: Annotated[Path | None, typer.Argument(help="A bundle; all of UNETPP_BUNDLES if not given.")] = None,
    limit_s: Annotated[float, typer.Option(min=1, help="Seconds after which no further round begins, per bundle.")] = 120,
) -> None:
    """Measure which engine and precision are fastest on this machine, and store it for every start.

    The result is valid for the bundle, the engines' versions, the processor and its cores: copy the file to each replica of the
    same kind, or into the bundle's folder `tuning/`. Without it the server goes by a fixed rule.
    """
    from rich.console import Console
    from rich.table import Table

    from server.runtime.bundle import find_bundles
    from server.runtime.tune import tune as measure
    from server.runtime.tuning import store_tuning

    settings = read_settings(bundle)
    for folder in find_bundles(settings.bundles):
        tuning = measure(folder, settings.runtime, settings.batching, limit_s)
        table = Table("graph", "precision", "engine", "ms", "batch pixels", title=folder.name)
        for row in tuning.rows:
            table.add_row(row.graph, row.precision, row.engine, f"{row.milliseconds:.2f}", f"{row.batch_pixels:,}")
        Console().print(table)
        typer.echo(f"stored: {store_tuning(tuning, settings.runtime.tuning_folder)}")


for _entry in sorted(entry_points(group="unetpp.commands"), key=lambda e: e.name):
    # An image may serve without the packages that train and export.
    with contextlib.suppress(ModuleNotFoundError):
        app.command(_entry.name)(report_errors(_entry.load()))


if __name__ == "__main__":
    app()
