"""Describes the deployments to the metrics, so that every label value is known before the first request."""

from collections.abc import Mapping

from server.metrics import ModelInfo
from server.runtime.deployment import Deployment


def describe(deployments: Mapping[str, Deployment]) -> list[ModelInfo]:
    """One row per deployment."""
    return [_describe(name, deployment) for name, deployment in deployments.items()]


def _describe(name: str, deployment: Deployment) -> ModelInfo:
    manifest, selection = deployment.manifest, deployment.selection
    rows = manifest.calibration.rows if manifest.calibration else ()
    routes = [("accurate", manifest.graph("accurate").level, "accurate")]
    routes += [("fast", level, f"L{level}") for level in manifest.levels]
    if manifest.depth_curve:
        routes += [("auto", level, f"L{level}") for level in sorted(manifest.depth_curve.levels)]
    return ModelInfo(
        model=name,
        dims=manifest.dims,
        sha256=deployment.bundle.sha256,
        routes=tuple(routes),
        classes=tuple(one.name for one in manifest.classes),
        engines=tuple(
            (
                graph,
                precision,
                choice.candidate.engine,
                choice.candidate.provider,
                str(selection.auto[graph] == precision).lower(),
                selection.reason[graph],
            )
            for (graph, precision), choice in selection.choices.items()
        ),
        calibrated=tuple(
            (row.graph, row.precision, row.engine, row.iou, row.dice, row.latency_ms / 1e3) for row in rows
        ),
        tuning_key=deployment.tuning_key.digest,
        tuned=deployment.tuning is not None,
    )
