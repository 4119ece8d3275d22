"""What the API returns as JSON, for the documentation."""

from pydantic import BaseModel

from server.runtime.bundle import Calibration, Class, Comparison, Graph, Manifest, Measured
from server.runtime.opening import OpenBundle


class Serving(BaseModel):
    """Which engine serves a graph at a precision, and whether `precision=auto` picks it."""

    graph: str
    precision: str
    engine: str
    provider: str
    auto: bool


class ModelSummary(BaseModel):
    """One line of the list of models."""

    name: str
    title: str
    dims: int
    levels: tuple[int, ...]
    recommended_level: int
    precisions: tuple[str, ...]
    default: bool


class ModelCard(ModelSummary):
    """Everything about one model."""

    description: str
    intended_use: str
    channels: tuple[str, ...]
    normalization: str
    classes: tuple[Class, ...]
    graphs: tuple[Graph, ...]
    calibration: Calibration | None
    held_out: Measured | None
    comparison: tuple[Comparison, ...]
    serving: tuple[Serving, ...]
    license: dict[str, str]
    provenance: dict[str, str]


class Problem(BaseModel):
    """RFC 9457 problem document; `detail` says what is wrong and what to do."""

    type: str
    title: str
    status: int
    detail: str


def summary(opened: OpenBundle, default: str) -> ModelSummary:
    """The line of an open bundle."""
    return ModelSummary(**_summary(opened.bundle.manifest, opened, default))


def card(opened: OpenBundle, default: str) -> ModelCard:
    """The card of an open bundle."""
    manifest = opened.bundle.manifest
    serving = tuple(
        Serving(graph=graph, precision=precision, engine=e.name, provider=e.provider, auto=opened.auto[graph] == precision)
        for (graph, precision), e in sorted(opened.engines.items())
    )
    return ModelCard(
        **_summary(manifest, opened, default),
        description=manifest.description,
        intended_use=manifest.intended_use,
        channels=manifest.channels,
        normalization=manifest.normalization,
        classes=manifest.classes,
        graphs=manifest.graphs,
        calibration=manifest.calibration,
        held_out=manifest.held_out,
        comparison=manifest.comparison,
        serving=serving,
        license=manifest.license,
        provenance=manifest.provenance,
    )


def _summary(manifest: Manifest, opened: OpenBundle, default: str) -> dict[str, object]:
    return {
        "name": manifest.name,
        "title": manifest.title,
        "dims": manifest.dims,
        "levels": manifest.levels,
        "recommended_level": manifest.recommended_level,
        "precisions": opened.precisions,
        "default": manifest.name == default,
    }
