"""The documents of MONAI Label's protocol: models and their names, parameters, and the multipart answer.

Written from what its clients send and read: its own Python client, which 3D Slicer's extension contains, the
extension itself, OHIF's panel and MITK's tool.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from server import __version__
from server.errors import InvalidParameter
from server.jobs.sessions import Session
from server.runtime.bundle import ACCURATE
from server.runtime.deployment import Deployment
from server.segment.registry import Registry, unknown_model
from server.segment.request import Response, SegmentParams

# Modes that are models of their own, beside one per level; `auto` only where the bundle has a curve.
MODES = ("accurate", "auto")

# Formats of the mask by `result_extension`.
EXTENSIONS = {
    "nrrd": "mask.nrrd",
    "seg.nrrd": "mask.nrrd",
    "nii.gz": "mask.nii.gz",
    "nii": "mask.nii.gz",
    "png": "mask.png",
    "tif": "mask.tiff",
    "tiff": "mask.tiff",
}

# Parameters of MONAI Label that change nothing here: masks are always uint8, compressed where the format is, and on
# the input's own grid with the values of the classes.
IGNORED = (
    "client_id",
    "model",
    "image",
    "device",
    "logging",
    "result_dtype",
    "result_compress",
    "restore_label_idx",
    "cache_transforms",
    "cache_transforms_in_memory",
    "cache_transforms_ttl",
)

# Parameters of POST /segment that the name of the model or `result_extension` decides.
DECIDED = ("model", "mode", "level", "format", "include_mask")
ALLOWED = tuple(name for name in SegmentParams.model_fields if name not in DECIDED)

# Longest `params` in characters.
MAX_PARAMS = 64 * 1024


class ModelInfo(BaseModel):
    """A model for a client: a bundle at a level, or in a mode."""

    type: str = "segmentation"
    labels: dict[str, int] = Field(description="class value by name")
    dimension: int = Field(description="2 for images, 3 for volumes")
    description: str
    config: dict[str, Any] = Field(
        description="parameters that a client may let its user change, with their defaults; of a list the first"
    )


class Info(BaseModel):
    """The first document that a client reads. It must not have a member `config`, by which Slicer knows servers that are too old."""

    name: str
    description: str
    version: str
    labels: list[str]
    models: dict[str, ModelInfo]
    trainers: dict[str, Any] = {}
    strategies: dict[str, Any] = {}
    scoring: dict[str, Any] = {}
    train_stats: dict[str, Any] = {}
    datastore: dict[str, int] = {"total": 0, "completed": 0}


class SessionInfo(BaseModel):
    """A session; times are seconds since 1970."""

    name: str
    create_ts: int
    last_access_ts: int
    expiry: int = Field(description="seconds after its last use until it is removed")


class NewSession(BaseModel):
    """The answer to the upload of a session's image."""

    session_id: str
    session_info: SessionInfo


class DatastoreImage(BaseModel):
    """The answer to the upload of an image with a name."""

    image: str


class AuthInfo(BaseModel):
    """Whether the server has API keys."""

    enabled: bool
    client_id: str = ""
    realm: str = ""


class Token(BaseModel):
    """Credentials of a client for the header `Authorization`: the key that was entered as password."""

    access_token: str | None
    token_type: str | None


def models(registry: Registry) -> dict[str, dict[str, Any]]:
    """Parameters of POST /segment by name of a model. Clients select the first one by default.

    Models of volumes come first, because most clients show volumes.
    """
    rows: dict[str, dict[str, Any]] = {}
    for deployment in sorted(registry.deployments.values(), key=lambda one: -one.manifest.dims):
        name, manifest = deployment.name, deployment.manifest
        for mode in MODES:
            if mode != "auto" or manifest.depth_curve is not None:
                rows[f"{name}-{mode}"] = {"model": name, "mode": mode}
        for level in reversed(manifest.levels):
            rows[f"{name}-L{level}"] = {"model": name, "mode": "fast", "level": level}
    return rows


def find_model(registry: Registry, name: str) -> dict[str, Any]:
    """The parameters of POST /segment that the name of a model stands for.

    Raises:
        UnknownModel: lists the names.
    """
    rows = models(registry)
    if name not in rows:
        raise unknown_model(name, rows)
    return rows[name]


def info(registry: Registry) -> Info:
    """The document of GET /info/."""
    described = {name: _model_info(registry.get(row["model"]), row) for name, row in models(registry).items()}
    labels = dict.fromkeys(label for model in described.values() for label in model.labels)
    return Info(
        name="UNet++ segmentation server",
        description="Automatic segmentation; each level of a UNet++ is a model of its own",
        version=__version__,
        labels=[*labels],
        models=described,
    )


def session_info(session: Session) -> SessionInfo:
    """The document of a session."""
    return SessionInfo(
        name=session.id,
        create_ts=int(session.created),
        last_access_ts=int(session.used),
        expiry=int(session.expiry_s),
    )


def read_params(text: str) -> dict[str, Any]:
    """Reads the form field `params`.

    Raises:
        InvalidParameter: it is not a JSON object.
    """
    try:
        values = json.loads(text[: MAX_PARAMS + 1] or "{}")
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or len(text) > MAX_PARAMS:
        raise InvalidParameter(
            f"the form field params is not a JSON object of at most {MAX_PARAMS:,} characters, as "
            '{"result_extension": ".nrrd"}',
            parameter="params",
            value=text[:40],
        )
    return values


def segment_params(row: Mapping[str, Any], values: Mapping[str, Any]) -> SegmentParams:
    """The parameters of POST /segment.

    Args:
        row: parameters that the name of the model stands for.
        values: parameters of the client.

    Raises:
        InvalidParameter: a parameter is unknown or wrong.
    """
    chosen = {name: value for name, value in values.items() if name not in (*IGNORED, "result_extension")}
    for name in chosen:
        if name not in ALLOWED:
            raise InvalidParameter(
                f"unknown parameter {name!r:.60} in params; models here segment by themselves, without clicks or scribbles. There are: "
                f"{', '.join(('result_extension', *ALLOWED))}",
                parameter=name[:60],
                allowed=["result_extension", *ALLOWED],
            )
    return SegmentParams.parse({**chosen, **row, "format": _format(values.get("result_extension"))})


def result_params(response: Response) -> dict[str, Any]:
    """Members of `params` in the answer. Durations are in the headers, so that the same request has the same answer."""
    target = response.target
    document: dict[str, Any] = {
        "label_names": {c.name: c.value for c in target.manifest.classes},
        "model": target.model,
        "mode": target.mode,
        "level": target.level,
        "precision": target.precision,
    }
    optional = {"degraded": response.degraded, "note": response.note}
    return document | {name: value for name, value in optional.items() if value}


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A document as JSON."""
    return json.dumps(document).encode()


def multipart(params: Mapping[str, Any], body: bytes, filename: str) -> tuple[bytes, str, str]:
    """The answer with `params` and `image`, its media type, and the name that clients save the image by.

    The name tells images apart, because clients save them in one folder. MITK reads the body as of the text of the
    media type, which must therefore be the last header of a part.
    """
    digest = hashlib.sha256(body).hexdigest()[:32]
    stem, _, extension = filename.partition(".")
    name = f"{stem}-{digest}.{extension}"
    parts = (
        f'--{digest}\r\nContent-Disposition: form-data; name="params"\r\nContent-Type: application/json\r\n\r\n',
        json.dumps(params),
        f'\r\n--{digest}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n',
        "Content-Type: application/octet-stream\r\n\r\n",
    )
    whole = b"".join(("".join(parts).encode(), body, f"\r\n--{digest}--\r\n".encode()))
    return whole, f"multipart/form-data; boundary={digest}", name


def _model_info(deployment: Deployment, row: Mapping[str, Any]) -> ModelInfo:
    manifest = deployment.manifest
    served = {
        "accurate": "mean of all levels",
        "auto": "a level that suits each input",
        "fast": f"level {row.get('level')} of {max(manifest.levels)}",
    }
    config: dict[str, Any] = {"precision": ["auto", *_precisions(deployment, row)]}
    if manifest.mirror_axes:
        config["tta"] = ["none", "flips"]
    return ModelInfo(
        labels={c.name: c.value for c in manifest.classes},
        dimension=manifest.dims,
        description=f"{manifest.title}: {served[row['mode']]}",
        config=config | {"fill_holes": False, "keep_largest": False},
    )


def _precisions(deployment: Deployment, row: Mapping[str, Any]) -> list[str]:
    """The precisions at which all graphs of a model are served."""
    levels = [row["level"]] if row["mode"] == "fast" else deployment.manifest.levels
    graphs = [ACCURATE] if row["mode"] == ACCURATE else [f"L{level}" for level in levels]
    served = [deployment.selection.precisions(graph) for graph in graphs]
    return [precision for precision in served[0] if all(precision in others for others in served)]


def _format(extension: Any) -> str:
    """The format of the mask by `result_extension`; without one it is that of the input."""
    if extension is None:
        return "mask"
    row = EXTENSIONS.get(str(extension).removeprefix(".").lower())
    if row is None:
        allowed = [f".{name}" for name in EXTENSIONS]
        raise InvalidParameter(
            f"result_extension={extension!s:.40} does not exist; there are: {', '.join(allowed)}",
            parameter="result_extension",
            value=f"{extension}"[:40],
            allowed=allowed,
        )
    return row
