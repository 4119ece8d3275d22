"""The JSON documents of the API, from which its documentation is generated."""

from datetime import UTC, datetime
from typing import Literal, overload

from pydantic import BaseModel, ConfigDict, Field

from server.jobs.active import JobStatus
from server.runtime.bundle import HEAD_STD, Class, Comparison, Graph, Manifest, ObjectChannel
from server.runtime.calibration import Agreement, Calibration, Distilled, Measured
from server.runtime.curve import DepthCurve
from server.runtime.deployment import Deployment


class Serving(BaseModel):
    """The engine that serves a graph at a precision, whether `precision=auto` picks it, and why."""

    graph: str
    precision: str
    engine: str
    provider: str
    auto: bool
    selected_by: str


class ModelSummary(BaseModel):
    """A model in the list of models."""

    name: str
    title: str
    dims: int
    levels: tuple[int, ...]
    recommended_level: int
    precisions: tuple[str, ...]
    uncertainty: bool
    auto: bool
    default: bool


class ModelCard(ModelSummary):
    """Everything about one model; `sha256` is that of its manifest, which holds those of all its files."""

    sha256: str
    description: str
    intended_use: str
    channels: tuple[str, ...]
    orientation: str | None
    spacing: tuple[float, float, float] | None
    normalization: str
    mirror_axes: tuple[int, ...] | None
    objects: ObjectChannel | None
    classes: tuple[Class, ...]
    graphs: tuple[Graph, ...]
    calibration: Calibration | None
    agreement: Agreement | None
    held_out: Measured | None
    comparison: tuple[Comparison, ...]
    distilled: Distilled | None
    depth_curve: DepthCurve | None
    serving: tuple[Serving, ...]
    license: dict[str, str]
    provenance: dict[str, str]


class Problem(BaseModel):
    """Problem document (RFC 9457): `detail` is for people, and further members have the same facts for programs."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(
        description="address of the entry of the code, on this server", examples=["/errors#unknown-model"]
    )
    title: str = Field(description="the status in words", examples=["Not Found"])
    status: int = Field(description="HTTP status", examples=[404])
    code: str = Field(description="kind of the error, for programs", examples=["unknown-model"])
    detail: str = Field(
        description="what is wrong, the limit and the remedy, for people",
        examples=["model='x' is not served here; there are: nuclei"],
    )


class Windows(BaseModel):
    """Windows that the network has done, and all of them."""

    done: int
    total: int


class JobDocument(BaseModel):
    """A job; times are UTC."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    stage: str | None
    windows: Windows
    queue_position: int | None
    eta_s: float | None
    created: datetime
    started: datetime | None
    finished: datetime | None
    expires: datetime | None
    model: str
    mode: str
    level: int
    precision: str
    links: dict[str, str | None]
    error: Problem | None


def job_document(status: JobStatus) -> JobDocument:
    """The document of a job for its owner."""
    job, spec = status.job, status.job.spec
    url = f"/jobs/{job.id}"
    return JobDocument(
        id=job.id,
        state=job.state,
        stage=status.stage,
        windows=Windows(done=status.done, total=status.total),
        queue_position=status.position,
        eta_s=None if status.eta_s is None else round(status.eta_s, 1),
        created=_utc(job.created),
        started=_utc(job.started),
        finished=_utc(job.finished),
        expires=_utc(status.expires),
        model=spec.model,
        mode=spec.mode,
        level=spec.level,
        precision=spec.precision,
        links={
            "self": url,
            "events": f"{url}/events",
            "result": f"{url}/result" if job.result else None,
            "preview": f"{url}/preview" if job.preview else None,
        },
        error=Problem(**job.problem) if job.problem else None,
    )


def summary(deployment: Deployment, default: str) -> ModelSummary:
    """The summary of a deployment."""
    return ModelSummary(**_summary(deployment.manifest, deployment, default))


def card(deployment: Deployment, default: str) -> ModelCard:
    """The model card of a deployment."""
    manifest, selection = deployment.manifest, deployment.selection
    serving = tuple(
        Serving(
            graph=graph,
            precision=precision,
            engine=choice.candidate.engine,
            provider=choice.candidate.provider,
            auto=selection.auto[graph] == precision,
            selected_by=selection.reason[graph],
        )
        for (graph, precision), choice in sorted(selection.choices.items())
        if graph != HEAD_STD
    )
    return ModelCard(
        **_summary(manifest, deployment, default),
        sha256=deployment.bundle.sha256,
        description=manifest.description,
        intended_use=manifest.intended_use,
        channels=manifest.channels,
        orientation=manifest.orientation,
        spacing=manifest.spacing,
        normalization=manifest.normalization,
        mirror_axes=manifest.mirror_axes,
        objects=manifest.objects,
        classes=manifest.classes,
        graphs=manifest.graphs,
        calibration=manifest.calibration,
        agreement=manifest.agreement,
        held_out=manifest.held_out,
        comparison=manifest.comparison,
        distilled=manifest.distilled,
        depth_curve=manifest.depth_curve,
        serving=serving,
        license=manifest.license,
        provenance=manifest.provenance,
    )


def _summary(manifest: Manifest, deployment: Deployment, default: str) -> dict[str, object]:
    return {
        "name": manifest.name,
        "title": manifest.title,
        "dims": manifest.dims,
        "levels": manifest.levels,
        "recommended_level": manifest.recommended_level,
        "precisions": deployment.precisions,
        "uncertainty": manifest.head_std is not None,
        "auto": manifest.depth_curve is not None,
        "default": manifest.name == default,
    }


@overload
def _utc(seconds: float) -> datetime: ...


@overload
def _utc(seconds: float | None) -> datetime | None: ...


def _utc(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
