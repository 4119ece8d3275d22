"""Makes the service that both doors of this package stand on: the HTTP application and the client that works in-process."""

from collections.abc import Mapping

from server.errors import UnknownModel
from server.metrics import Metrics
from server.runtime.deployment import Deployment, read_deployments
from server.runtime.device import DeviceRunner
from server.runtime.latency import LatencyModel
from server.segment.registry import Registry
from server.segment.service import SegmentationService
from server.settings import Settings


def open_service(
    settings: Settings,
    deployments: Mapping[str, Deployment] | None = None,
    device: DeviceRunner | None = None,
    latency: LatencyModel | None = None,
) -> SegmentationService:
    """Makes the service over every bundle of the settings; graphs are opened at first use, or by `service.open()`.

    Args:
        settings: settings of the server, with the folder of the bundles.
        deployments: deployments by name; by default they are read from `settings.bundles`.
        device: runner of the graphs; by default a thread of its own.
        latency: model that predicts seconds of work; by default an empty one.

    Raises:
        BundleDamaged, EngineUnavailable: names the bundle and the reason.
        UnknownModel: the configured default model is not among the bundles.
    """
    if deployments is None:
        deployments = read_deployments(settings.bundles, settings.runtime, settings.batching)
    registry = Registry(deployments, find_default(settings, deployments))
    return SegmentationService(
        registry, settings.runtime, settings.batching, settings.limits, Metrics(), device, latency
    )


def find_default(settings: Settings, deployments: Mapping[str, Deployment]) -> str:
    """Finds the model that answers requests without `model`: the configured one, else the only or first.

    Raises:
        UnknownModel: the configured one is not among the bundles.
    """
    default = settings.default_model
    if default in deployments:
        return default
    if "default_model" in settings.model_fields_set:
        raise UnknownModel(
            f"UNETPP_DEFAULT_MODEL={default} is not among the bundles: {', '.join(deployments)}",
            setting="UNETPP_DEFAULT_MODEL",
            value=default,
            allowed=list(deployments),
        )
    return next(iter(deployments))
