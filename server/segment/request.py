"""The request parameters, the files and the deadline of a request, and its response.

`SegmentParams` is the only declaration of the request parameters: the query of POST /segment and POST /jobs,
the options of `unetpp segment`, the keyword arguments of the Python client, the form of the web page and the
reference page are made from it. This module imports no array library, so that clients can use it.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.errors import InvalidParameter
from server.settings import Precision

if TYPE_CHECKING:
    from server.arrays import Overlap
    from server.runtime.bundle import Manifest
    from server.segment.registry import Target

Mode = Literal["accurate", "fast", "auto"]
Priority = Literal["interactive", "batch"]

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, windows done, windows in all); stages are decode, infer, encode."""


def ignore_progress(stage: str, done: int, total: int) -> None:
    """Does nothing; the default of `on_progress`."""


# Pixels or mm of an object. Beyond it numbers are not exact any more.
MAX_OBJECT_SIZE = 1e15

# The post-processing steps in the order in which they are applied.
POSTPROCESSING = (
    "threshold",
    "fill_holes",
    "instances",
    "min_size_px",
    "min_size_mm2",
    "min_size_mm3",
    "min_score",
    "keep_largest",
)
MIN_SIZES = ("min_size_px", "min_size_mm2", "min_size_mm3")


class SegmentParams(BaseModel):
    """The request parameters. None means that the caller leaves the choice to the server."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode | None = Field(
        None,
        description="accurate (default): mean of all heads; fast: one level; auto: a level that suits each input",
    )
    level: int | None = Field(
        None,
        ge=1,
        le=5,
        description="depth of the network, 1 (fastest) to the deepest level of the model; implies mode=fast",
    )
    max_loss: float | None = Field(
        None,
        ge=0,
        le=100,
        description="points of IoU that mode=auto may lose against the deepest level on average, 0.25 if not given; implies mode=auto",
    )
    model: str | None = Field(None, max_length=63, description="bundle name; GET /models lists them")
    precision: Precision = Field(
        "auto",
        description="auto: the setting of the server, by default the fastest within 0.5 points of IoU of fp32, by the stored tuning or "
        "else by a fixed rule",
    )
    format: str | None = Field(
        None,
        max_length=500,
        description="mask, labels, scores, uncertainty: as the input, or as a suffix says (labels.tiff); json, csv, geojson, coco, "
        "overlay, dicomseg, ...; several by comma: a zip of them; else by Accept, else the mask",
    )
    include_mask: bool = Field(
        False, description="with format=json: the mask in base64, under a name that says its file type"
    )
    tta: Literal["none", "flips"] = Field(
        "none",
        description="test-time augmentation; flips: each window is also run mirrored along the axes that the network knows mirrored, and the "
        "scores are averaged: 4 runs for two axes, 8 for three",
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="foreground is what scores above it, of several classes the best one; by default that of the model card, and of several "
        "classes the one that scores best, background included",
    )
    fill_holes: bool = Field(False, description="holes that an object encloses become part of it")
    instances: bool = Field(
        False,
        description="touching objects of one class are split, by the network's own channel for objects where it has one, else by their "
        "shape; the mask is then their numbers",
    )
    min_size_px: int | None = Field(
        None,
        ge=0,
        le=int(MAX_OBJECT_SIZE),
        description="objects of fewer pixels (voxels) are removed; with instances=true by default those of the model card, 0 keeps all",
    )
    min_size_mm2: float | None = Field(
        None,
        ge=0,
        le=MAX_OBJECT_SIZE,
        description="images, and pages that are times: objects of a smaller area are removed; the pixel size must be known",
    )
    min_size_mm3: float | None = Field(
        None,
        ge=0,
        le=MAX_OBJECT_SIZE,
        description="volumes and stacks: objects of a smaller volume are removed",
    )
    min_score: float | None = Field(
        None,
        ge=0,
        le=1,
        description="objects whose mean score is lower are removed; with instances=true, and without threshold and fill_holes, by default the "
        "limit of the model card, 0 keeps all",
    )
    keep_largest: bool = Field(False, description="of each class only the largest object is kept")
    pixel_size_um: str | None = Field(
        None,
        max_length=100,
        description="images and stacks: 0.5, or 0.5x0.25 (height x width; of stacks also x page); replaces what the file says",
    )
    axis: Literal["auto", "0", "1", "2"] = Field(
        "auto", description="slices of a volume for a model of images: auto (coarsest spacing), 0, 1, 2"
    )
    nonfinite: Literal["refuse", "zero"] = Field(
        "refuse", description="values that are NaN or infinite: refuse, or zero"
    )
    axes: str = Field(
        "",
        max_length=20,
        description="of a TIFF, slowest first, as ZYX, TCYX, YXS; replaces its OME or ImageJ metadata",
    )
    channel: int | None = Field(
        None,
        ge=0,
        description="0, 1, ...: of an input with several channels this one alone; else colours, or the first",
    )
    series: str | None = Field(
        None,
        max_length=64,
        description="of a DICOM input with several series this one: its SeriesInstanceUID, or its number in the list that the error has",
    )
    deadline_ms: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="milliseconds after which the answer is of no use, also as header X-Deadline-Ms: refused at once where it cannot be "
        "met (429, or 422 if it never could be), cancelled when it has passed (504)",
    )
    min_level: int | None = Field(
        None,
        ge=1,
        le=5,
        description="under load the answer may come from a shallower level, down to this one, and its headers say so; never without",
    )

    @model_validator(mode="after")
    def _one_minimum_size(self) -> "SegmentParams":
        if len(self.min_sizes) > 1:
            raise ValueError(f"{' and '.join(self.min_sizes)} exclude each other; give one of them")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> "SegmentParams":
        """Validates parameters from any source: keyword arguments, command-line options, a stored job.

        Raises:
            InvalidParameter: names the parameter, its value and what is allowed.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise invalid_parameter(error.errors(), cls) from error

    @property
    def postprocessing(self) -> dict[str, Any]:
        """Requested post-processing by parameter name, in the order in which it is applied."""
        values = ((name, getattr(self, name)) for name in POSTPROCESSING)
        return {name: value for name, value in values if value is not None and value is not False}

    @property
    def changes_mask(self) -> bool:
        """Whether the mask is another than the level's own, so that it tells nothing of the level."""
        return bool(self.postprocessing) or self.tta != "none"

    @property
    def min_sizes(self) -> dict[str, int | float]:
        """The minimum size of an object, by parameter name: at most one entry."""
        return {name: value for name in MIN_SIZES if (value := getattr(self, name)) is not None}

    def with_object_limits(self, manifest: "Manifest") -> "SegmentParams":
        """Returns the parameters with the bundle's limits of objects, where `instances` is set and the request names none.

        The limit of the score was chosen for the pixels above the bundle's own threshold, so that it is left out where the request
        has another threshold, or fills holes with pixels below it.
        """
        if not self.instances:
            return self
        limits: dict[str, float] = {}
        if manifest.min_object_px and not self.min_sizes:
            limits["min_size_px"] = manifest.min_object_px
        same_pixels = self.threshold is None and not self.fill_holes
        if manifest.min_object_score and self.min_score is None and same_pixels:
            limits["min_score"] = manifest.min_object_score
        return self.model_copy(update=limits)

    @property
    def needs_objects(self) -> bool:
        """Whether the post-processing must know the separate objects of the mask."""
        return self.instances or self.keep_largest or any(self.min_sizes.values()) or bool(self.min_score)


def invalid_parameter(problems: Sequence[Any], model: type[BaseModel] = SegmentParams) -> InvalidParameter:
    """The error for pydantic's findings on request parameters: the first one in fields, all of them in words."""
    sentences = []
    for problem in problems:
        *_, name = problem["loc"] or ("",)
        if problem["type"] == "extra_forbidden":
            sentences.append(
                f"unknown parameter {str(name)[:60]!r}; there are: {', '.join(model.model_fields)}"
            )
        elif not problem["loc"] or name == "query":
            sentences.append(problem["msg"].removeprefix("Value error, "))
        else:
            sentences.append(f"{name}={problem.get('input')!s:.60}: {problem['msg']}")
    first = problems[0]
    *_, parameter = first["loc"] or (None,)
    unknown = first["type"] == "extra_forbidden"
    return InvalidParameter(
        "; ".join(sentences),
        parameter=None if parameter == "query" else str(parameter)[:60] if parameter else None,
        value=None if unknown else str(first.get("input"))[:60],
        allowed=[*model.model_fields] if unknown else (first.get("ctx") or {}).get("expected"),
    )


@dataclass(frozen=True)
class Upload:
    """The files of a request. The code that opened them closes them.

    Attributes:
        file: encoded input, seekable, at its start.
        reference: encoded label image or volume to score against.
        name: file name as the caller gave it, for formats that repeat it.
        accept: media types that the caller accepts (RFC 9110), used where `format` is not set.
    """

    file: BinaryIO
    reference: BinaryIO | None = None
    name: str = ""
    accept: str | None = None


@dataclass(frozen=True)
class QoS:
    """Time limits and priority of a request.

    Attributes:
        timeout_s: limit in seconds; a request that is predicted to take longer is refused.
        deadline: time of `time.monotonic` after which nothing more is begun.
        priority: "interactive" for callers who wait, "batch" for jobs and shadow evaluation, which get what
            the former leave.
        started: time of `time.monotonic` when the deadline was set.
        choice: number of the target among the requested one and its alternatives that was chosen for several
            inputs together; None where the time limits choose it.
    """

    timeout_s: float = math.inf
    deadline: float = math.inf
    priority: Priority = "interactive"
    started: float = field(default_factory=time.monotonic)
    choice: int | None = None

    @property
    def budget_s(self) -> float:
        """Seconds that the request had when it started."""
        return min(self.timeout_s, self.deadline - self.started)

    @property
    def remaining_s(self) -> float:
        """Seconds that it has from now on."""
        return min(self.timeout_s, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Response:
    """The finished answer.

    Attributes:
        body: encoded answer; an open temporary file for a zip of many, which `close` removes.
        media_type: media type of the body.
        filename: name of a file that holds it.
        requested: target that the request resolved to.
        target: target that was served.
        degraded: "deadline" or "load" where a shallower level was served than requested, else "".
        timings: seconds per phase: open, decode, queue, infer, restore, postprocess, encode.
        overlaps: IoU and Dice with the reference per class value; empty without one.
        note: remark for the caller, e.g. that further pages were not read.
        postprocessing: applied post-processing by parameter name.
        uncertain_share: share of uncertain pixels in the answer of `mode=auto`, else None.
    """

    body: bytes | BinaryIO
    media_type: str
    filename: str
    requested: "Target"
    target: "Target"
    degraded: str
    timings: dict[str, float]
    overlaps: dict[int, "Overlap"] = field(default_factory=dict)
    note: str = ""
    postprocessing: Mapping[str, Any] = field(default_factory=dict)
    uncertain_share: float | None = None

    def close(self) -> None:
        """Removes the temporary file, if there is one."""
        if not isinstance(self.body, bytes):
            self.body.close()

    @property
    def mean_iou(self) -> float:
        """IoU with the reference, averaged over the foreground classes."""
        return sum(overlap.iou for overlap in self.overlaps.values()) / len(self.overlaps)

    @property
    def mean_dice(self) -> float:
        """Dice with the reference, averaged over the foreground classes."""
        return sum(overlap.dice for overlap in self.overlaps.values()) / len(self.overlaps)
