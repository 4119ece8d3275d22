"""The options of commands that segment: the parameters of POST /segment, with dashes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Option:
    """One parameter of the server.

    Attributes:
        name: as in the query.
        kind: what its text is read as; the server knows which values there are.
        help: for `--help`.
    """

    name: str
    kind: type
    help: str

    @property
    def parameter(self) -> inspect.Parameter:
        """As a function has it that typer reads; None, which is not sent, unless given."""
        flags = f"--{self.name.replace('_', '-')}"
        told = Annotated[self.kind | None, typer.Option(flags, help=self.help, show_default=False)]  # type: ignore[name-defined]
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=told)


OPTIONS = (
    Option("mode", str, "accurate (default): mean of all heads; fast: one level."),
    Option("level", int, "1 (fastest) to 4 (deepest); implies fast."),
    Option("model", str, "Bundle name."),
    Option("precision", str, "auto, fp32, bf16, fp16 or int8."),
    Option("format", str, "One or several, by comma: mask, png, tiff, nifti, json, overlay, ... (else as the input)."),
    Option("include_mask", bool, "With json: the mask in base64."),
    Option("axis", str, "Slices of a volume, for a model of images: auto, 0, 1 or 2."),
    Option("nonfinite", str, "Values that are NaN or infinite: refuse or zero."),
    Option("min_level", int, "Under load the answer may be of a shallower level, down to this one."),
    Option("deadline_ms", float, "Milliseconds after which the answer is of no use."),
    Option("threshold", float, "0 to 1: foreground is where the score is above it (else the model's)."),
    Option("min_size_px", int, "Objects of fewer pixels or voxels are removed."),
    Option("min_size_mm2", float, "Objects of less area are removed (images)."),
    Option("min_size_mm3", float, "Objects of less volume are removed (volumes)."),
    Option("fill_holes", bool, "Holes inside of objects are filled."),
    Option("keep_largest", bool, "Only the largest object of each class is kept."),
    Option("instances", bool, "Objects that touch are split."),
    Option("pixel_size_um", str, "Of images and stacks: 0.5, or 0.5x0.25 (height x width)."),
    Option("axes", str, "Of a TIFF, e.g. ZYX or TCYX."),
    Option("channel", int, "Of an input with several channels this one alone, from 0."),
)


def with_options(command: Callable[..., Any], without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """A command whose argument `asked` is spelled out as `OPTIONS`; those that are given arrive in it by name.

    Args:
        command: takes the rest as it is.
        without: options that it has not.
    """
    plain = inspect.signature(command, eval_str=True)
    options = [option for option in OPTIONS if option.name not in without]

    def spelled(**given: Any) -> Any:
        asked = {option.name: value for option in options if (value := given.pop(option.name)) is not None}
        return command(**given, asked=asked)

    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, parameter in plain.parameters.items() if name != "asked"
    ]
    parameters = [*own, *(option.parameter for option in options)]
    spelled.__name__, spelled.__doc__ = command.__name__, command.__doc__
    spelled.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    spelled.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect and typer look there first
    return spelled
