"""Models of the Open Inference Protocol: each bundle, and an alias per level and mode for tools that pass no parameters."""

from dataclasses import dataclass
from typing import Any

from server import __version__
from server.errors import UnknownModel
from server.runtime.deployment import Deployment
from server.segment.registry import Registry, unknown_model

SERVER = "unetpp"
EXTENSIONS = ("binary_tensor_data", "parameters", "model_configuration", "model_repository", "statistics")

# The one version of each model; a bundle is replaced as a whole.
VERSION = "1"

# Files of this kind are run, by which engine and at which precision is in GET /models.
PLATFORM = "onnx_onnxv1"

IMAGE, FILES = "image", "bytes"
MASK, SCORES = "mask", "scores"
INPUTS, OUTPUTS = (IMAGE, FILES), (MASK, SCORES)

# Names of data types in Triton's model configuration.
CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


@dataclass(frozen=True)
class Model:
    """A model by the name that callers use.

    Attributes:
        name: name in the URL.
        deployment: bundle that serves it.
        decided: request parameters that its name decides.
    """

    name: str
    deployment: Deployment
    decided: dict[str, Any]


def models(registry: Registry) -> dict[str, Model]:
    """All models by name. A bundle that has the name of an alias comes first."""
    rows = {name: Model(name, one, {}) for name, one in registry.deployments.items()}
    for name, deployment in registry.deployments.items():
        manifest = deployment.manifest
        aliases: dict[str, dict[str, Any]] = {
            f"{name}-l{level}": {"mode": "fast", "level": level} for level in manifest.levels
        }
        aliases[f"{name}-accurate"] = {"mode": "accurate"}
        if manifest.depth_curve is not None:
            aliases[f"{name}-auto"] = {"mode": "auto"}
        for alias, decided in aliases.items():
            rows.setdefault(alias, Model(alias, deployment, decided))
    return rows


def find_model(registry: Registry, name: str, version: str = "") -> Model:
    """A model.

    Raises:
        UnknownModel: lists the names, or the version does not exist.
    """
    rows = models(registry)
    if name not in rows:
        raise unknown_model(name, rows)
    if version not in ("", VERSION):
        raise UnknownModel(
            f"model {name!r:.70} has no version {version!r:.40}; there is: {VERSION}",
            parameter="version",
            value=version[:40],
            allowed=[VERSION],
        )
    return rows[name]


def server_metadata() -> dict[str, Any]:
    """The document of GET /v2."""
    return {"name": SERVER, "version": __version__, "extensions": [*EXTENSIONS]}


def model_metadata(model: Model) -> dict[str, Any]:
    """The document of GET /v2/models/NAME; the first axis counts the images of a request."""
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": PLATFORM,
        "inputs": [_row(*row) for row in _inputs(model)],
        "outputs": [_row(*row) for row in _outputs(model)],
    }


def model_config(model: Model, max_batch: int) -> dict[str, Any]:
    """The document of GET /v2/models/NAME/config, in the form of Triton's model configuration."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": SERVER,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": max_batch,
        # One of them is given.
        "input": [_config_row(*row) | {"optional": True} for row in _inputs(model)],
        "output": [_config_row(*row) for row in _outputs(model)],
        "instance_group": [{"name": model.name, "kind": "KIND_AUTO", "count": 1}],
        "dynamic_batching": {},
        "model_transaction_policy": {"decoupled": False},
        "parameters": {name: {"string_value": f"{value}"} for name, value in model.decided.items()},
    }


def repository_index(registry: Registry) -> list[dict[str, str]]:
    """The document of POST /v2/repository/index."""
    return [{"name": name, "version": VERSION, "state": "READY", "reason": ""} for name in models(registry)]


def _inputs(model: Model) -> list[tuple[str, str, list[int]]]:
    manifest = model.deployment.manifest
    datatype = "UINT8" if manifest.dims == 2 else "FP32"
    return [
        (IMAGE, datatype, [-1, *[-1] * manifest.dims, len(manifest.channels)]),
        (FILES, "BYTES", [-1, 1]),
    ]


def _outputs(model: Model) -> list[tuple[str, str, list[int]]]:
    manifest = model.deployment.manifest
    size = [-1] * manifest.dims
    return [(MASK, "UINT8", [-1, *size]), (SCORES, "FP16", [-1, manifest.score_channels, *size])]


def _row(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _config_row(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    """A tensor without the axis that counts images, which `max_batch_size` stands for."""
    return {"name": name, "data_type": CONFIG_TYPES.get(datatype, f"TYPE_{datatype}"), "dims": shape[1:]}
