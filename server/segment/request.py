"""What is asked of a segmenter, and what it answers."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, BinaryIO

from jaxtyping import UInt8
from numpy import ndarray

from server.arrays import Image, Volume
from server.runtime.bundle import Manifest
from server.runtime.line import Lane
from server.segment import quality
from server.segment.modes import Route
from server.segment.postprocess import Postprocessing
from server.segment.served import Served


@dataclass(frozen=True)
class SegmentRequest:
    """What a caller may choose; None means the default. `name` is that of the file, for formats that tell it."""

    model: str | None = None
    mode: str | None = None
    level: int | None = None
    precision: str = "auto"
    format: str | None = None
    accept: str | None = None
    include_mask: bool = False
    axis: str = "auto"
    nonfinite: str = "refuse"
    axes: str = ""
    channel: int | None = None
    min_level: int | None = None
    threshold: float | None = None
    fill_holes: bool = False
    instances: bool = False
    min_size_px: int | None = None
    min_size_mm2: float | None = None
    min_size_mm3: float | None = None
    keep_largest: bool = False
    pixel_size_um: str | None = None
    name: str = ""

    @property
    def postprocessing(self) -> Postprocessing:
        """What is to be done with the mask."""
        return Postprocessing(**{f.name: getattr(self, f.name) for f in fields(Postprocessing)})


@dataclass(frozen=True)
class Terms:
    """When an answer is of use.

    Attributes:
        patience_s: what is predicted to take longer is refused.
        deadline: in seconds of `time.monotonic`, after which nothing more is begun.
        urgent: somebody waits for it; see `Caller`.
        begun: when the deadline was set.
    """

    patience_s: float = math.inf
    deadline: float = math.inf
    urgent: bool = True
    begun: float = field(default_factory=time.monotonic)

    @property
    def given_s(self) -> float:
        """At first."""
        return min(self.patience_s, self.deadline - self.begun)

    @property
    def allowed_s(self) -> float:
        """From now on."""
        return min(self.patience_s, self.deadline - time.monotonic())


@dataclass(frozen=True)
class Choice:
    """A request resolved against the open bundles, before any byte is decoded.

    Attributes:
        served: keeps the bundle open until the request is done, even if it is replaced meanwhile.
    """

    model: str
    served: Served
    manifest: Manifest
    route: Route
    precision: str
    lane: Lane


@dataclass(frozen=True)
class Sample:
    """An answer, with what it takes to find another one to the same input.

    Attributes:
        choice: what was served.
        source: the input.
        axis: see `SegmentRequest`.
        classes: of the mask, see `Mask`.
        raw: whether they are what the scores say, and nothing was done with them on request.
    """

    choice: Choice
    source: Image | Volume
    axis: str
    classes: UInt8[ndarray, "*size"]
    raw: bool = True


@dataclass(frozen=True)
class Answer:
    """The finished answer.

    Attributes:
        body: encoded mask.
        media_type: of the body.
        file: name of a file that holds it.
        requested: what was asked for.
        choice: what was served.
        degraded: why less was served than asked for: "deadline", "load", or "".
        seconds: time per phase: decode, plan, queue, infer, restore, encode.
        quality: overlap with the reference per class value, if one was given.
        note: what the caller should know, e.g. that further pages were not read.
        postprocessing: what was done with the mask on request, see `Postprocessing.asked`.
    """

    body: bytes
    media_type: str
    file: str
    requested: Route
    choice: Choice
    degraded: str
    seconds: dict[str, float]
    quality: dict[int, quality.Overlap]
    note: str
    postprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> bytes | BinaryIO:
        """What is sent, or kept."""
        return self.body

    def close(self) -> None:
        """Removes the file that holds it, if one does."""

    @property
    def mean_iou(self) -> float:
        """IoU with the reference, averaged over the foreground classes."""
        return sum(q.iou for q in self.quality.values()) / len(self.quality)

    @property
    def mean_dice(self) -> float:
        """Dice with the reference, averaged over the foreground classes."""
        return sum(q.dice for q in self.quality.values()) / len(self.quality)


@dataclass(frozen=True, kw_only=True)
class Archived(Answer):
    """The answer to a zip of images, on disk; whoever has it closes it.

    Attributes:
        zip: all answers and a report; `body` is empty.
    """

    zip: BinaryIO

    @property
    def content(self) -> bytes | BinaryIO:
        """What is sent, or kept."""
        return self.zip

    def close(self) -> None:
        """Removes the file."""
        self.zip.close()
