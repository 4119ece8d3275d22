"""Tables of measurements in a manifest: with labels, and without."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A part of the manifest; fields that it does not know are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class CalibrationRow(Part):
    """One measured point: a graph at a precision on an engine.

    Attributes:
        graph: name of the graph.
        precision: fp32, bf16, fp16 or int8.
        engine: engine that produced the scores and the time.
        iou: foreground IoU per image, averaged over images (and classes); both empty counts 1.
        mean_iou: IoU per image, averaged over images and classes with the background, as in the paper.
        dice: foreground Dice per image, averaged.
        class_dice: Dice per class, averaged over images, in the order of the manifest's classes.
        class_iou: IoU per class, averaged over images; tables of earlier versions do not have it.
        latency_ms: median milliseconds of one run of a 256 x 256 tile (64^3 for volumes), batch 1.
    """

    graph: str
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    engine: str
    iou: float = Field(ge=0, le=1)
    mean_iou: float = Field(ge=0, le=1)
    dice: float = Field(ge=0, le=1)
    class_dice: tuple[float, ...] = ()
    class_iou: tuple[float, ...] = ()
    latency_ms: float = Field(gt=0)


class FlipsRow(Part):
    """A graph with tta=flips, at fp32.

    Attributes:
        graph: name of the graph.
        copies: runs of each window, which is the price against one run.
        iou, mean_iou, dice, class_dice: those of `CalibrationRow`.
    """

    graph: str
    copies: int = Field(ge=2)
    iou: float = Field(ge=0, le=1)
    mean_iou: float = Field(ge=0, le=1)
    dice: float = Field(ge=0, le=1)
    class_dice: tuple[float, ...] = ()


class Recommended(Part):
    """Level served for `mode=fast` without a level, the precision it was judged at, and why."""

    level: int
    precision: str
    why: str


class Measured(Part):
    """Measured points, with the data and the machine that they were measured on.

    Attributes:
        flips: with test-time augmentation; empty for a network that was not trained on mirrored inputs.
    """

    data: str
    images: int
    machine: str
    rows: tuple[CalibrationRow, ...]
    flips: tuple[FlipsRow, ...] = ()

    def row(self, graph: str, precision: str, engine: str | None = None) -> CalibrationRow | None:
        """The point measured on the engine, else the one with the lowest IoU on any, so that decisions are safe; or None."""
        rows = [r for r in self.rows if (r.graph, r.precision) == (graph, precision)]
        own = [r for r in rows if r.engine == engine]
        return min(own or rows, key=lambda r: r.iou, default=None)


class Calibration(Measured):
    """Measurements that decisions rest on: the recommended level, and which precisions `auto` may pick."""

    recommended: Recommended


class AgreementRow(Part):
    """One point measured without labels: masks are compared with masks of the same network, so that it says nothing of quality.

    Attributes:
        graph: name of the graph.
        precision: fp32, bf16, fp16 or int8.
        engine: engine that produced the mask and the time.
        agreement: foreground IoU with the mask of the deepest level at fp32, averaged over images (and
            classes); both empty counts 1.
        class_agreement: IoU with it per class, averaged over images.
        fp32_agreement: foreground IoU with the mask of the same graph at fp32, averaged over images (and classes).
        latency_ms: median milliseconds of one run of a 256 x 256 tile (64^3 for volumes), batch 1.
    """

    graph: str
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    engine: str
    agreement: float = Field(ge=0, le=1)
    class_agreement: tuple[float, ...] = ()
    fp32_agreement: float = Field(ge=0, le=1)
    latency_ms: float = Field(gt=0)


class Agreement(Part):
    """Points measured without labels, with the data and the machine that they were measured on.

    Attributes:
        deepest: graph that the others are compared with.
        recommended: shallowest level that agrees with it.
    """

    data: str
    images: int
    machine: str
    deepest: str
    rows: tuple[AgreementRow, ...]
    recommended: Recommended

    def row(self, graph: str, precision: str, engine: str | None = None) -> AgreementRow | None:
        """The point measured on the engine, else the one that agrees least with fp32 on any; or None."""
        rows = [r for r in self.rows if (r.graph, r.precision) == (graph, precision)]
        own = [r for r in rows if r.engine == engine]
        return min(own or rows, key=lambda r: r.fp32_agreement, default=None)


class Distilled(Part):
    """Levels that were added to a network with one head.

    Attributes:
        agreement: by level: IoU with the deepest level per class, mean over crops of images that were not trained on.
        images: number of images, those included.
        held_out: number of images that were not trained on.
        data: name of their folder.
        labels: name of the folder of labels that they were trained on; None where they learned the deepest scores.
        steps: optimisation steps.
    """

    agreement: dict[int, float]
    images: int
    held_out: int
    data: str
    labels: str | None = None
    steps: int
