"""What commands have in common, here and in other packages: how errors are said, and where settings come from."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import typer

from server.errors import UnetppError

# Which extra brings a module that a subcommand may miss.
EXTRAS = {
    "torch": "train", "monai": "train", "safetensors": "train", "matplotlib": "train", "onnx": "train", "onnxscript": "train",
    "onnxruntime": "cpu", "openvino": "cpu", "httpx": "client",
}  # fmt: skip


def report_errors(command: Callable[..., Any]) -> Callable[..., Any]:
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


def read_settings(bundles: Path | None = None, host: str | None = None, port: int | None = None, insecure: bool = False) -> Any:
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
