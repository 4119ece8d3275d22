"""Output of the command line during a run: a line per answer, and a progress bar on a terminal."""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any

from client.files import printable
from client.inputs import Input
from server.segment.request import OnProgress

# Outcome of an input whose answer is there from an earlier run.
SKIPPED = "complete already"


class Display:
    """Prints a line per answer.

    Args:
        update: changes the progress bar, as `rich.progress.Progress.update` does; None without a terminal.

    Attributes:
        failures: name and reason of each input that failed.
        skipped: number of inputs that were complete already.
    """

    def __init__(self, update: Any = None) -> None:
        self._update = update
        self.failures: list[tuple[str, str]] = []
        self.skipped = 0

    def label(self, text: str) -> None:
        """Shows what is being done."""
        if self._update:
            self._update(description=text)

    def started(self, one: Input) -> OnProgress:
        """Returns the progress callback of an input that is being started."""
        return functools.partial(self._show, one.path.name)

    def _show(self, name: str, stage: str, done: int, total: int) -> None:
        self.label(f"{name}: {stage} {done}/{total}")

    def finished(self, one: Input, message: str, *, failed: bool) -> None:
        """Shows the outcome of an input."""
        if self._update:
            self._update(advance=1)
        if failed:
            self.failures.append((printable(one.path), message))
        elif message == SKIPPED:
            self.skipped += 1
        else:
            # Through sys.stdout, which rich redirects so that lines appear above its bar.
            sys.stdout.write(f"{message}\n")
            sys.stdout.flush()


@contextlib.contextmanager
def open_display(total: int | None) -> Iterator[Display]:
    """Opens a display, with a bar for this number of inputs where standard error is a terminal."""
    if not sys.stderr.isatty():
        yield Display()
        return
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty()) as bars:
        yield Display(functools.partial(bars.update, bars.add_task("", total=total)))
