"""The report: results of the checks, the facts behind them, and the text and JSON that an operator pastes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server import __version__

Status = Literal["ok", "warning", "failed", "not_checked"]
STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failed": "bold red", "not_checked": "dim"}

# Columns of the text where it goes to a file or a pipe, because a bug report shows about so many.
PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: key of `CHECKS`, with the bundle or graph after a colon where there are several.
        status: failed means that the server would not start, or not do what the settings say.
        detail: sentence for a person.
        remedy: action that makes it ok; empty where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass
class Report:
    """All results.

    Attributes:
        checks: results in the order of `CHECKS`.
        facts: versions, hardware, bundles and settings, for programs.
    """

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return all(check.status != "failed" for check in self.checks)

    def document(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return {
            "healthy": self.healthy,
            "version": __version__,
            "facts": self.facts,
            "checks": [asdict(check) for check in self.checks],
        }

    def redacted(self, redact: Callable[[str], str]) -> "Report":
        """Returns the report with its texts redacted; names stay, because they are those of checks, bundles and packages."""
        checks = [Check(c.name, c.status, redact(c.detail), redact(c.remedy)) for c in self.checks]
        return Report(checks, _redacted(self.facts, redact))


def _redacted(value: Any, redact: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _redacted(one, redact) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(one, redact) for one in value]
    return redact(value) if isinstance(value, str) else value


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints the report for a person: colours and the full width on a terminal, plain text elsewhere."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        # `Text`, because square brackets in a message are not markup.
        status = Text(check.status.replace("_", " "), STYLES[check.status])
        table.add_row(status, Text(check.name), Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"remedy: {check.remedy}", "italic"))
    with console.capture() as text:
        console.print(table)
        console.print(Text(_verdict(report), "bold green" if report.healthy else "bold red"))
    for line in text.get().splitlines():
        # Cells are padded with spaces, which a paste need not have.
        console.file.write(f"{line.rstrip()}\n")


def _verdict(report: Report) -> str:
    counts = Counter(check.status for check in report.checks)
    words = [f"{counts[status]} {status.replace('_', ' ')}" for status in STYLES if counts[status]]
    return f"unetpp {__version__}: {'healthy' if report.healthy else 'NOT HEALTHY'} ({', '.join(words)})"
