"""The server's JSON, as it is: dictionaries whose keys a type checker knows."""

from collections.abc import Callable
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

# One of its keys is a keyword of Python.
Object = TypedDict(
    "Object",
    {
        "id": int,
        "class": int,
        "name": str,
        "pixels": NotRequired[int],
        "voxels": NotRequired[int],
        "area_mm2": NotRequired[float],
        "volume_mm3": NotRequired[float],
        "volume_ml": NotRequired[float],
        "centroid": list[float],
        "box": list[list[int]],
        "centroid_mm": NotRequired[list[float]],
        "box_mm": NotRequired[list[list[float]]],
        "mean_score": float | None,
        "touches_border": bool,
    },
)
"""One object. Coordinates are (row, column) of images and (x, y, z) of volumes as stored; boxes are half-open."""


class ClassStatistics(TypedDict):
    """All of one class."""

    value: int
    name: str
    pixels: NotRequired[int]
    voxels: NotRequired[int]
    fraction: float
    objects: int
    area_mm2: NotRequired[float]
    volume_ml: NotRequired[float]
    mean_score: float | None
    largest_score: float | None
    touches_border: bool
    note: NotRequired[str]


class Overlap(TypedDict):
    """With the reference."""

    iou: float
    dice: float


class Statistics(TypedDict):
    """The document of `format=json`."""

    model: str
    mode: str
    level: int
    precision: str
    engine: str
    requested: NotRequired[dict[str, Any]]
    degraded: NotRequired[str]
    size: dict[str, int]
    pixel_size_um: NotRequired[dict[str, float]]
    spacing_mm: NotRequired[dict[str, float]]
    postprocessing: NotRequired[dict[str, Any]]
    classes: list[ClassStatistics]
    objects: list[Object]
    objects_omitted: NotRequired[int]
    reference: NotRequired[dict[str, Overlap]]
    instances: NotRequired[dict[str, Any]]
    note: NotRequired[str]
    timings_ms: dict[str, float]
    # One of them, in base64, where include_mask was asked for.
    mask_png: NotRequired[str]
    mask_tiff: NotRequired[str]
    mask_nifti: NotRequired[str]
    mask_nrrd: NotRequired[str]
    mask_labels_png: NotRequired[str]
    mask_labels_tiff: NotRequired[str]
    mask_labels_nifti: NotRequired[str]


class ImageReport(TypedDict):
    """One image of a zip: status "ok" with the names of its files, or "failed" with what is wrong."""

    name: str
    status: Literal["ok", "failed"]
    detail: NotRequired[str]
    files: NotRequired[list[str]]
    model: NotRequired[str]
    mode: NotRequired[str]
    level: NotRequired[int]
    precision: NotRequired[str]
    postprocessing: NotRequired[dict[str, Any]]
    note: NotRequired[str]
    timings_ms: NotRequired[dict[str, float]]


class ModelSummary(TypedDict):
    """One line of the list of models."""

    name: str
    title: str
    dims: int
    levels: list[int]
    recommended_level: int
    precisions: list[str]
    uncertainty: bool
    default: bool


class Class(TypedDict):
    """One foreground class: its value in the mask, name and colour as #rrggbb."""

    value: int
    name: str
    color: str


class Serving(TypedDict):
    """What serves a graph at a precision."""

    graph: str
    precision: str
    engine: str
    provider: str
    auto: bool


class ModelCard(ModelSummary):
    """Everything about one model; `sha256` is of its manifest, which has the hashes of all its files."""

    sha256: str
    description: str
    intended_use: str
    channels: list[str]
    orientation: str | None
    spacing: list[float] | None
    normalization: str
    classes: list[Class]
    graphs: list[dict[str, Any]]
    calibration: dict[str, Any] | None
    held_out: dict[str, Any] | None
    comparison: list[dict[str, Any]]
    serving: list[Serving]
    license: dict[str, str]
    provenance: dict[str, str]


Progress: TypeAlias = Callable[[str, int, int], None]
"""Told how far one input is: the stage, windows done, windows in all."""


class Windows(TypedDict):
    """How far the network is."""

    done: int
    total: int


class JobDocument(TypedDict):
    """A job as it stands; times are UTC in ISO 8601."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: str | None
    windows: Windows
    queue_position: int | None
    eta_s: float | None
    created: str
    started: str | None
    finished: str | None
    expires: str | None
    model: str
    mode: str
    level: int
    precision: str
    links: dict[str, str | None]
    error: dict[str, Any] | None
