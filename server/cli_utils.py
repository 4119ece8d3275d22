"""Helpers of all commands, here and in other packages: how errors are printed, and where settings come from."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import typer

from server.errors import Misconfigured, UnetppError

# Which extra brings a module that a subcommand may miss.
EXTRAS = dict.fromkeys(("torch", "monai", "safetensors", "matplotlib", "onnx", "onnxscript"), "train") | {
    "onnxruntime": "cpu",
    "openvino": "cpu",
    "httpx": "client",
}


def report_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a command: errors meant for a person become one line and exit code 1; a missing extra is named."""

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


@contextlib.contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows a progress bar on a terminal, and nothing elsewhere; yields rich's `update` of its one task."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield functools.partial(bar.update, bar.add_task(description, total=total))


def refuse_unknown_variables() -> None:
    """Checks that every variable with our prefix is a setting.

    Raises:
        Misconfigured: names those that are not.
    """
    from server.settings import unknown_variables

    if unknown := unknown_variables():
        raise Misconfigured(
            f"settings in the environment that are not read: {'; '.join(unknown)}; the manual's page 'Settings' lists those that exist"
        )


def parse_settings() -> Any:
    """Reads the settings from the environment, unknown variables aside.

    Raises:
        Misconfigured: names the settings whose values are not valid.
    """
    from pydantic import ValidationError

    from server.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        lines = [f"UNETPP_{'__'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        text = "the settings in the environment are not valid: " + "; ".join(lines)
        raise Misconfigured(text) from error


def read_settings(
    bundles: Path | None = None, host: str | None = None, port: int | None = None, insecure: bool = False
) -> Any:
    """Reads the settings from the environment; options of the command line take precedence.

    Raises:
        Misconfigured: a variable with our prefix is not a setting, or a value is not valid.
    """
    refuse_unknown_variables()
    settings = parse_settings()
    http = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    update: dict[str, Any] = {"http": settings.http.model_copy(update=http)}
    if bundles is not None:
        update["bundles"] = bundles
    if insecure:
        update["auth"] = settings.auth.model_copy(update={"insecure": True})
    return settings.model_copy(update=update)
