"""Command-line options made from other declarations: one per field of `SegmentParams`, or per argument of a function."""

import inspect
import itertools
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from server.segment.request import SegmentParams


def parameter_options(without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Returns an option for each request parameter but some; its value is None unless it is given."""
    return [_option(name, field) for name, field in SegmentParams.model_fields.items() if name not in without]


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    types = (field.annotation, *get_args(field.annotation))
    kind = next((one for one in (bool, int, float) if one in types), str)
    option = typer.Option(f"--{name.replace('_', '-')}", help=field.description, show_default=False)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]  # made at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def function_options(function: Callable[..., Any], without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Returns the arguments of a function, annotated for typer, but some."""
    parameters = inspect.signature(function, eval_str=True).parameters
    return [one for name, one in parameters.items() if name not in without]


def with_options(**groups: list[inspect.Parameter]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces arguments of a command that take a dictionary by one option per entry; None is left out."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def expanded(**values: Any) -> Any:
            collected = {
                group: {one.name: value for one in options if (value := values.pop(one.name)) is not None}
                for group, options in groups.items()
            }
            return command(**values, **collected)

        own = function_options(command, tuple(groups))
        every = itertools.chain(own, *groups.values())
        options = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in every]
        expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
        expanded.__annotations__ = {one.name: one.annotation for one in options}
        expanded.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # typer reads it
        return expanded

    return decorate
