"""What the metrics are told of the open bundles: whatever a label may say of them is known before the first request."""

from collections.abc import Mapping

from server.metrics import ModelInfo
from server.runtime.opening import OpenBundle
from server.segment import modes


def known(bundles: Mapping[str, OpenBundle]) -> list[ModelInfo]:
    """A row per bundle."""
    return [_known(name, opened) for name, opened in bundles.items()]


def _known(name: str, opened: OpenBundle) -> ModelInfo:
    manifest = opened.bundle.manifest
    rows = manifest.calibration.rows if manifest.calibration else ()
    return ModelInfo(
        model=name,
        dims=manifest.dims,
        sha256=opened.bundle.sha256,
        routes=tuple((route.mode, route.level, route.graph) for route in modes.routes(manifest)),
        classes=tuple(one.name for one in manifest.classes),
        engines=tuple(
            (graph, precision, engine.name, engine.provider, str(opened.auto[graph] == precision).lower())
            for (graph, precision), engine in opened.engines.items()
        ),
        calibrated=tuple((row.graph, row.precision, row.engine, row.iou, row.dice, row.latency_ms / 1e3) for row in rows),
    )
