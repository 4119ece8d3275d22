"""The `unetpp` command. Subcommands of other packages join through the entry-point group `unetpp.commands`.

Heavy imports happen inside the subcommands, so that `unetpp --help` is quick and needs no extra.
"""

import contextlib
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from server import __version__, logs
from server.cli_utils import progress, read_settings, report_errors

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
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """One trained UNet++, served at the depth each request can afford."""
    del version


@app.command()
@report_errors
def serve(
    bundles: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [UNETPP_HTTP__HOST].")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on [UNETPP_HTTP__PORT].")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without keys [UNETPP_AUTH__INSECURE].")
    ] = False,
) -> None:
    """Start the HTTP server on a bundle, or on every bundle of a folder."""
    settings = read_settings(bundles, host, port, insecure)
    _serve(settings, None)


@app.command()
@report_errors
def node(
    aet: Annotated[str | None, typer.Option(help="AE title of the node.")] = None,
    host: Annotated[str | None, typer.Option(help="Address that the node listens on.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="TCP port of the node.")] = None,
    forward: Annotated[str | None, typer.Option(help="Destination of the answers, as AET@HOST:PORT.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Rules, callers, TLS and DICOMweb servers [UNETPP_DICOM__CONFIG].")
    ] = None,
    bundles: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")
    ] = None,
    http_host: Annotated[
        str | None, typer.Option(help="Address of the HTTP server [UNETPP_HTTP__HOST].")
    ] = None,
    http_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the HTTP server [UNETPP_HTTP__PORT].")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without keys [UNETPP_AUTH__INSECURE].")
    ] = False,
) -> None:
    """Start the HTTP server with a DICOM node, which segments what modalities send and sends the answers on.

    Options replace what the table [node] of the configuration says; the manual's page 'PACS' describes it.
    """
    from server.dicom.config import SETTING, parse_config
    from server.pacs import read_dicom

    settings = read_settings(bundles, http_host, http_port, insecure)
    if config is not None:
        settings = settings.model_copy(update={"dicom": settings.dicom.model_copy(update={"config": config})})
    found = read_dicom(settings)
    values: dict[str, Any] = found.model_dump(exclude_unset=True) if found else {}
    options = {"aet": aet, "host": host, "port": port, "forward": forward}
    table = values.get("node") or {}
    values["node"] = table | {name: value for name, value in options.items() if value is not None}
    _serve(
        settings,
        parse_config(
            values, "the options and the configuration" if found else f"the options, without {SETTING}"
        ),
    )


def _serve(settings: Any, dicom: Any) -> None:
    """Serves until a signal stops it.

    Args:
        settings: settings of the operator.
        dicom: configuration of PACS and node; None takes that of the settings.
    """
    from server import listening
    from server.runtime import memory

    memory.limit_malloc_arenas()
    from server.api.auth import Keys
    from server.app import create_app, make_server
    from server.jobs.stores import open_store
    from server.pacs import read_dicom
    from server.service import open_service

    logs.setup(settings.log.format)
    if hasattr(signal, "SIGHUP"):
        # Ignored until the server listens, because the bundles are being read anyway.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getpid() == 1:
        # Because the kernel keeps signals without a handler from a container's first process, and the server
        # has none until it listens.
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    # Mistakes in keys, ports and the jobs folder are reported before bundles are read.
    if settings.auth.keys_file:
        Keys(settings.auth.keys_file)
    dicom = dicom or read_dicom(settings)
    # The jobs folder stays locked from here to the end.
    with (
        listening.bound(settings) as (sockets, ops_sockets),
        contextlib.closing(open_store(settings.jobs)) as store,
    ):
        service = open_service(settings)
        service.open()
        # Collectors parse every line as JSON, so that nothing else may be printed.
        write = typer.echo if settings.log.format == "text" else logging.getLogger("server").info
        for line in (*_describe_models(service.registry), *_describe_addresses(settings.http)):
            write(line)
        server = make_server(settings, create_app(settings, service, store, dicom), sockets, ops_sockets)
        server.run()
    if not server.started:
        raise typer.Exit(1)


def _describe_models(registry: Any) -> Iterator[str]:
    """Yields what `precision=auto` means for the graphs of each deployment, and why."""
    from server.runtime.selection import REASONS

    for name, deployment in registry.deployments.items():
        yield f"{name} (default)" if name == registry.default else name
        selection = deployment.selection
        graphs: dict[tuple[str, str], list[str]] = {}
        for graph, precision in selection.auto.items():
            candidate = selection.choices[graph, precision].candidate
            served = f"{precision:4}  {candidate.engine} on {candidate.provider}"
            graphs.setdefault((served, REASONS[selection.reason[graph]]), []).append(graph)
        for (served, reason), names in graphs.items():
            yield f"  {served:24}  {' '.join(names):26}  {reason}"


def _describe_addresses(http: Any) -> Iterator[str]:
    """Yields the addresses as a person would open them."""
    main = _url(http, http.host, http.port)
    ops = _url(http, http.ops_host, http.ops_port) if http.ops_port else main
    for what, address in (("page", f"{main}/"), ("docs", f"{main}/docs"), ("metrics", f"{ops}/metrics")):
        yield f"{what:8} {address}"


def _url(http: Any, host: str, port: int) -> str:
    name = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "") else host  # noqa: S104 - compared, not bound
    return f"{'https' if http.tls_cert else 'http'}://{f'[{name}]' if ':' in name else name}:{port}"


@app.command()
@report_errors
def key(
    name: Annotated[
        str, typer.Argument(help="Name of the key: letters, digits, dots, dashes and underscores.")
    ],
) -> None:
    """Make an API key, and the line by which the server's keys file knows it."""
    from server.api.auth import make

    secret, line = make(name)
    # The line alone on standard output, so that >> appends it to the file.
    typer.echo(
        f"the key of {name}, shown only now: {secret}\nthe line for the keys file (UNETPP_AUTH__KEYS_FILE):",
        err=True,
    )
    typer.echo(line)


@app.command()
@report_errors
def models(
    bundles: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")
    ] = None,
) -> None:
    """List the bundles with their levels, as calibrated."""
    from rich.console import Console
    from rich.table import Table

    from server.runtime.bundle import read_bundle
    from server.runtime.deployment import find_bundles

    for folder in find_bundles(read_settings(bundles).bundles):
        manifest = read_bundle(folder).manifest
        table = Table("graph", "parameters", "kMAC/pixel", title=f"{manifest.name}: {manifest.title}")
        headings, measured = _measured(manifest)
        for heading in ("precision", "engine", *headings, "ms"):
            table.add_column(heading)
        for graph in manifest.graphs:
            rows = [cells for name, *cells in measured if name == graph.name]
            facts = (graph.name, f"{graph.parameters:,}", f"{graph.macs_per_pixel / 1e3:.0f}")
            for cells in rows:
                table.add_row(*facts, *cells)
                facts = ("", "", "")
            if not rows:
                table.add_row(*facts, "-", "-", "not calibrated")
        Console().print(table)
        if c := manifest.calibration or manifest.agreement:
            labels = "" if manifest.calibration else " without labels"
            typer.echo(f"measured on {c.images} images of {c.data}{labels}, {c.machine}")
            typer.echo(f"recommended for mode=fast: level {c.recommended.level} ({c.recommended.why})")


def _measured(manifest: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings of the scores in a manifest, and its rows: graph, precision, engine, scores, milliseconds."""
    scores: list[tuple[Any, tuple[float, ...]]] = []
    if manifest.agreement and not manifest.calibration:
        # Never under the heading IoU, because the deepest level is not a reference.
        headings: tuple[str, ...] = (f"agreement with {manifest.agreement.deepest}",)
        scores = [(row, (row.agreement,)) for row in manifest.agreement.rows]
    else:
        headings = ("IoU", "mean IoU", "Dice")
        rows = manifest.calibration.rows if manifest.calibration else ()
        scores = [(row, (row.iou, row.mean_iou, row.dice)) for row in rows]
    return headings, [
        (row.graph, row.precision, row.engine, *(f"{value:.4f}" for value in values), f"{row.latency_ms:.1f}")
        for row, values in scores
    ]


@app.command()
@report_errors
def doctor(
    bundles: Annotated[
        Path | None, typer.Option(help="A bundle or a folder of bundles [UNETPP_BUNDLES].")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the text.")
    ] = False,
) -> None:
    """Check this installation, and print what to paste into a bug report; exit 1 if the server would not work.

    Versions, hardware, GPU, bundles, graphs, ports, keys and folders. Nothing is changed, and paths, hosts
    and keys are left out. Warnings do not change the exit code.
    """
    from server.doctor.checks import examine
    from server.doctor.report import print_report

    report = examine(bundles)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Because a terminal without UTF-8 must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    if as_json:
        typer.echo(json.dumps(report.document(), indent=1))
    else:
        print_report(report)
    sys.stdout.flush()
    if any(thread.name.startswith("doctor ") for thread in threading.enumerate()):
        # A check that hangs in a driver would keep the process alive.
        os._exit(1)
    raise typer.Exit(0 if report.healthy else 1)


@app.command()
@report_errors
def tune(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle; all of UNETPP_BUNDLES if not given.")
    ] = None,
    limit_s: Annotated[
        float, typer.Option(min=1, help="Seconds after which no further round begins, per bundle.")
    ] = 120,
) -> None:
    """Measure which engine and precision are fastest on this machine, and store the result for every start.

    The result holds for this bundle, these versions of the engines, this processor and its cores. Copy the
    file to each replica of the same kind, or into the bundle's folder `tuning/`. Without a result the server
    goes by a fixed rule. On a busy machine nothing is stored, and the exit code is 1.
    """
    from server.runtime.bundle import read_bundle
    from server.runtime.deployment import find_bundles
    from server.runtime.tune import tune as measure
    from server.runtime.tuning import store_tuning

    settings = read_settings(bundle)
    for folder in find_bundles(settings.bundles):
        graphs = len(read_bundle(folder).manifest.graphs)
        with progress(f"measuring {folder.name}", graphs) as update:
            tuning = measure(
                folder, settings.runtime, settings.batching, limit_s, lambda graph: update(advance=1)
            )
        path = store_tuning(tuning, settings.runtime.tuning_folder)
        _print_tuning(folder.name, tuning.rows)
        typer.echo(f"stored in {path}; `unetpp serve` and `unetpp segment` use it from their next start on")


def _print_tuning(title: str, rows: Iterable[Any]) -> None:
    """Prints the measurements, fastest first for each graph."""
    from rich.console import Console
    from rich.table import Table

    table = Table("graph", "precision", "engine", "ms per tile", "pixels at once", title=title)
    for row in sorted(rows, key=lambda row: (row.graph, row.milliseconds)):
        table.add_row(
            row.graph, row.precision, row.engine, f"{row.milliseconds:.2f}", f"{row.batch_pixels:,}"
        )
    Console().print(table)


for _entry in sorted(entry_points(group="unetpp.commands"), key=lambda e: e.name):
    # Suppressed, because an image may serve without the packages that train and export.
    with contextlib.suppress(ModuleNotFoundError):
        app.command(_entry.name)(report_errors(_entry.load()))


if __name__ == "__main__":
    app()
