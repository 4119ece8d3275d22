"""Command-line options made from other declarations: one per field of `SegmentParams`, or per argument of a function."""

import inspect
import itertools
from collections.abc import Callable
from typing import Annotated, Any, get_args

import typer

from server.segment.request import SegmentParams


def parameter_options(without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Returns an option for each request parameter; its value is None unless it is given.

    Args:
        without: names of fields that get no option.
    """
    return [
        _option(name, str if kind is None else kind, field.description or "")
        for name, field in SegmentParams.model_fields.items()
        if name not in without
        for kind in [
            next(
                (one for one in (bool, int, float) if one in (field.annotation, *get_args(field.annotation))),
                None,
            )
        ]
    ]


def _option(name: str, kind: type, description: str) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", help=description, show_default=False)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]  # made at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def function_options(function: Callable[..., Any], without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Returns the arguments of a function, which are annotated for typer.

    Args:
        function: takes the options as keyword arguments.
        without: names of arguments that get no option.
    """
    return [
        one
        for name, one in inspect.signature(function, eval_str=True).parameters.items()
        if name not in without
    ]


def with_options(**groups: list[inspect.Parameter]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces arguments of a command that take a dictionary by one option per entry; those that are None are left out.

    Args:
        groups: options by the name of the argument.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def expanded(**values: Any) -> Any:
            collected = {
                group: {one.name: value for one in options if (value := values.pop(one.name)) is not None}
                for group, options in groups.items()
            }
            return command(**values, **collected)

        own = function_options(command, tuple(groups))
        options = [
            one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for one in (*own, *itertools.chain(*groups.values()))
        ]
        expanded.__name__, expanded.__doc__ = command.__name__, command.__doc__
        expanded.__annotations__ = {one.name: one.annotation for one in options}
        expanded.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]  # typer reads it
        return expanded

    return decorate
