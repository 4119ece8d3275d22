"""The table of checks, and the run over it: every check ends in words, whatever it meets."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from server.doctor import bundles, gpu, hardware, job_store, operations
from server.doctor.context import Context, captured
from server.doctor.redact import redactor
from server.doctor.report import Check, Report

# Seconds of one check. A driver that has lost its GPU may never answer. Graphs are many, and take turns.
LIMIT_S, GRAPHS_LIMIT_S = 120.0, 600.0


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        run: generator of results; reads and sets what later checks need in the context.
        needs_settings: whether it cannot run without valid settings.
        limit_s: seconds after which the next check begins.
    """

    run: Callable[[Context], Iterator[Check]]
    needs_settings: bool = True
    limit_s: float = LIMIT_S


# In this order, because later checks use what earlier ones learned.
CHECKS: dict[str, Row] = {
    "settings": Row(operations.check_settings, needs_settings=False),
    "packages": Row(hardware.check_packages, needs_settings=False),
    "engines": Row(hardware.check_engines, needs_settings=False),
    "processor": Row(hardware.check_processor, needs_settings=False),
    "memory": Row(hardware.check_memory, needs_settings=False),
    "disk": Row(hardware.check_disk),
    "open files": Row(hardware.check_open_files, needs_settings=False),
    "gpu": Row(gpu.check_gpu, needs_settings=False),
    "bundles": Row(bundles.check_bundles),
    "cuda": Row(gpu.check_cuda),
    "tuning": Row(bundles.check_tuning),
    "graphs": Row(bundles.check_graphs, limit_s=GRAPHS_LIMIT_S),
    "ports": Row(operations.check_ports),
    "keys": Row(operations.check_keys),
    "tls": Row(operations.check_tls),
    "jobs": Row(job_store.check_jobs),
}


def examine(bundles_folder: Path | None = None, checks: Mapping[str, Row] = CHECKS) -> Report:
    """Runs all checks, one after the other.

    Args:
        bundles_folder: folder that replaces UNETPP_BUNDLES.
        checks: table of checks.

    Returns:
        The report, without paths, hosts and users.
    """
    report = Report()
    with captured() as output, _quiet_logs():
        context = Context(bundles_folder, output, facts=report.facts)
        for name, row in checks.items():
            if row.needs_settings and context.settings is None:
                report.checks.append(Check(name, "not_checked", "the settings are not valid"))
            else:
                report.checks += _run(name, row, context)
    return report.redacted(redactor(context.settings))


def _run(name: str, row: Row, context: Context) -> list[Check]:
    """Runs one check in a thread, which is left behind if it does not end."""
    results: list[Check] = []
    thread = threading.Thread(
        target=_collect, args=(name, row, context, results), daemon=True, name=f"doctor {name}"
    )
    thread.start()
    thread.join(row.limit_s)
    if thread.is_alive():
        text = f"it has not ended within {row.limit_s:g} s"
        remedy = "try again on an idle machine; if a GPU does not answer, restart the host"
        return [*results, Check(name, "failed", text, remedy)]
    return results


def _collect(name: str, row: Row, context: Context, results: list[Check]) -> None:
    try:
        results.extend(row.run(context))
    except Exception as error:  # noqa: BLE001 - whatever a check meets, the others still run
        text = f"the check itself failed: {type(error).__name__}: {error}"
        results.append(Check(name, "failed", text, "report this text as a bug"))


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keeps the server's log out of the report, because the checks say the same."""
    log = logging.getLogger("server")
    before = log.disabled, log.propagate
    handler = logging.NullHandler()
    log.addHandler(handler)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.disabled, log.propagate = before
