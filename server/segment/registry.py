"""Deployments by name, and what a request resolves to. One row per mode."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from server.errors import EngineUnavailable, InvalidParameter, UnknownModel
from server.imaging import encode as encoding
from server.runtime.bundle import ACCURATE, HEAD_STD, Manifest
from server.runtime.curve import MAX_LOSS, CurvePoint
from server.runtime.deployment import Deployment, ModelInstance
from server.segment.request import SegmentParams

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """The graph that a request resolves to. Holding it keeps its deployment usable, even if the bundle is replaced meanwhile.

    Attributes:
        deployment: the bundle.
        mode: "accurate", "fast" or "auto".
        level: depth of the graph; of `auto` the deepest that its chain may serve.
        instance: the model instance that runs it.
        alternatives: targets that may be served instead, deepest first, because `min_level` allows them.
        chain: targets of `auto` that are run one after another until an answer is certain enough, shallowest first;
            the last one has the level and the instance of this target. Empty for other modes.
        point: place on the curve that the chain comes from.
    """

    deployment: Deployment
    mode: str
    level: int
    instance: ModelInstance
    alternatives: tuple["Target", ...] = ()
    chain: tuple["Target", ...] = ()
    point: CurvePoint | None = None

    @property
    def model(self) -> str:
        """Name of the bundle."""
        return self.deployment.name

    @property
    def manifest(self) -> Manifest:
        """Manifest of the bundle."""
        return self.deployment.manifest

    @property
    def graph(self) -> str:
        """Name of the graph in the manifest."""
        return self.instance.graph.name

    @property
    def precision(self) -> str:
        """Precision that is served, never "auto"."""
        return self.instance.choice.candidate.precision

    def at_precision(self, precision: str) -> "Target":
        """Returns the target with this graph, and those of its chain, at a precision that a request names, or "auto".

        Raises:
            InvalidParameter: lists the precisions at which the graph is served.
        """
        instance = self.deployment.find(self.graph, precision)
        if instance is None:
            allowed = ("auto", *self.deployment.selection.precisions(self.graph))
            raise InvalidParameter(
                f"precision={precision!r} is not served for {self.graph} of {self.model!r}; there are: {', '.join(allowed)}",
                parameter="precision",
                value=precision,
                allowed=list(allowed),
            )
        return replace(
            self, instance=instance, chain=tuple(target.at_precision(precision) for target in self.chain)
        )

    @property
    def runs(self) -> tuple["Target", ...]:
        """Targets that are run for this one: those of its chain, or itself."""
        return self.chain or (self,)

    def continues_after(self, step: int, share: float) -> bool:
        """Whether the next target of the chain is run after the one at index `step`.

        Args:
            step: index in `runs`.
            share: share of uncertain pixels in its answer.
        """
        return self.point is not None and step < len(self.chain) - 1 and share > self.point.thresholds[step]

    def limited(self, steps: slice) -> "Target":
        """The target with a part of its chain."""
        chain = self.chain[steps]
        return replace(chain[-1], chain=chain, point=self.point and self.point.limited(steps))


def _target(deployment: Deployment, mode: str, graph: str) -> Target:
    """A graph at `precision=auto`."""
    instance = deployment.find_auto(graph)
    return Target(deployment, mode, instance.graph.level, instance)


def _accurate(deployment: Deployment, params: SegmentParams) -> Target:
    if params.level is not None:
        raise InvalidParameter(
            f"level={params.level} does not go with mode=accurate, which averages all heads; use mode=fast&level={params.level}, "
            "or leave the level out",
            parameter="level",
            value=params.level,
        )
    return _target(deployment, "accurate", ACCURATE)


def _fast(deployment: Deployment, params: SegmentParams) -> Target:
    manifest = deployment.manifest
    served = manifest.recommended_level if params.level is None else params.level
    if served not in manifest.levels:
        raise InvalidParameter(
            f"level={served} does not exist in {manifest.name!r}; it has levels {', '.join(map(str, manifest.levels))}",
            parameter="level",
            value=served,
            allowed=list(manifest.levels),
        )
    return _target(deployment, "fast", f"L{served}")


def _auto(deployment: Deployment, params: SegmentParams) -> Target:
    if params.level is not None:
        raise InvalidParameter(
            f"level={params.level} does not go with mode=auto, which chooses it; use mode=fast&level={params.level}, or leave "
            "the level out",
            parameter="level",
            value=params.level,
        )
    curve = deployment.manifest.depth_curve
    if curve is None:
        raise InvalidParameter(
            f"mode=auto needs a curve that {deployment.name!r} does not have; use another mode, or have the operator add it with: "
            "unetpp calibrate BUNDLE --data DATA --curve",
            parameter="mode",
            value="auto",
            remedy="unetpp calibrate BUNDLE --data DATA --curve",
        )
    point = curve.choose(MAX_LOSS if params.max_loss is None else params.max_loss)
    chain = tuple(_target(deployment, "auto", f"L{level}") for level in point.chain)
    return replace(chain[-1], chain=chain, point=point)


MODES: dict[str, Callable[[Deployment, SegmentParams], Target]] = {
    "accurate": _accurate,
    "fast": _fast,
    "auto": _auto,
}


class Registry:
    """The deployments that are served.

    Args:
        deployments: deployments by name.
        default: name of the deployment for requests without `model`.

    Raises:
        UnknownModel: the default is not among the deployments.
    """

    def __init__(self, deployments: Mapping[str, Deployment], default: str) -> None:
        self.default = default
        self._deployments: Mapping[str, Deployment] = {}
        self.swap(deployments)

    @property
    def deployments(self) -> Mapping[str, Deployment]:
        """Deployments by name."""
        return self._deployments

    def swap(self, deployments: Mapping[str, Deployment]) -> None:
        """Serves other deployments from now on; requests that have begun keep theirs.

        Raises:
            UnknownModel: the default is not among them; nothing has changed.
        """
        if self.default not in deployments:
            raise UnknownModel(
                f"the default model {self.default!r} is not among the bundles: {', '.join(deployments)}",
                value=self.default,
                allowed=list(deployments),
            )
        self._deployments = dict(deployments)

    def get(self, name: str) -> Deployment:
        """A deployment.

        Raises:
            UnknownModel: lists the names.
        """
        if name not in self._deployments:
            raise UnknownModel(
                f"model={name!r:.70} is not served here; there are: {', '.join(self._deployments)}",
                parameter="model",
                value=name,
                allowed=list(self._deployments),
            )
        return self._deployments[name]

    def resolve_accurate(self, deployment: Deployment) -> Target:
        """The accurate target of a deployment at `precision=auto`."""
        return _target(deployment, "accurate", ACCURATE)

    def resolve(self, params: SegmentParams) -> Target:
        """The model, mode, level and precision of a request; without a mode, a level means fast, max_loss auto, neither accurate.

        Raises:
            UnknownModel, InvalidParameter: list what exists.
        """
        return resolve_target(self.get(params.model if params.model is not None else self.default), params)


def resolve_target(deployment: Deployment, params: SegmentParams) -> Target:
    """The mode, level and precision of a request to a deployment, and what may be served instead.

    Raises:
        InvalidParameter: lists what exists.
    """
    _check_tta(deployment, params)
    target = MODES[_mode(params)](deployment, params)
    if encoding.requires(params.format, HEAD_STD):
        return _with_head_std(target, params)
    return _with_alternatives(target.at_precision(params.precision), params)


async def run_with_fallback(
    target: Target, params: SegmentParams, call: Callable[[Target], Awaitable[T]]
) -> T:
    """Awaits a call on a target, and on another where this machine proves unable to run it, which the first to open a graph finds.

    Raises:
        EngineUnavailable: nothing on this machine can run it.
    """
    while True:
        try:
            return await call(target)
        except EngineUnavailable:
            again = resolve_target(target.deployment, params)
            if again == target:
                raise
            target = again


def unknown_model(name: str, names: Collection[str]) -> UnknownModel:
    """The error for a name that a door does not serve."""
    return UnknownModel(
        f"model {name!r:.70} is not served here; there are: {', '.join(names)}",
        parameter="model",
        value=name[:70],
        allowed=[*names],
    )


def _check_tta(deployment: Deployment, params: SegmentParams) -> None:
    """Refuses mirrors for a network that may not know them, whose answers would be worthless.

    Raises:
        InvalidParameter: the manifest names no axis.
    """
    if params.tta == "flips" and not deployment.manifest.mirror_axes:
        raise InvalidParameter(
            f"tta=flips needs a network that was trained on mirrored inputs, and the manifest of {deployment.name!r} names no axis "
            "(mirror_axes); leave tta out",
            parameter="tta",
            value=params.tta,
        )


def _mode(params: SegmentParams) -> str:
    """The mode of a request.

    Raises:
        InvalidParameter: `max_loss` does not go with it.
    """
    implied = "accurate" if params.level is None else "fast"
    mode = params.mode or (implied if params.max_loss is None else "auto")
    if params.max_loss is not None and mode != "auto":
        raise InvalidParameter(
            f"max_loss does not go with mode={mode}; use mode=auto, or leave max_loss out",
            parameter="max_loss",
            value=params.max_loss,
        )
    return mode


def _with_alternatives(requested: Target, params: SegmentParams) -> Target:
    """The target with those that may be served instead, deepest first, down to the level that the caller accepts.

    Raises:
        InvalidParameter: `min_level` is not a level, or is deeper than the requested one.
    """
    min_level, levels = params.min_level, requested.manifest.levels
    if min_level is None:
        return requested
    if min_level not in levels or min_level > requested.level:
        raise InvalidParameter(
            f"min_level={min_level} must be one of {', '.join(map(str, levels))} and no deeper than the level asked for, which is "
            f"{requested.level}",
            parameter="min_level",
            value=min_level,
            allowed=[level for level in levels if level <= requested.level],
        )
    shallowest = requested.runs[0].level
    if requested.chain:
        # Nor does `auto` itself choose a level that the caller does not accept.
        first = next(i for i, target in enumerate(requested.chain) if target.level >= min_level)
        requested = requested.limited(slice(first, None))
    shorter = [requested.limited(slice(n)) for n in range(len(requested.chain) - 1, 0, -1)]
    fixed = [level for level in reversed(levels) if min_level <= level < shallowest]
    targets = [*shorter, *(_target(requested.deployment, "fast", f"L{level}") for level in fixed)]
    # A shallower level may not be served at the requested precision.
    named, precisions = params.precision, requested.deployment.selection.precisions
    served = (target for target in targets if named in ("auto", *precisions(target.graph)))
    return replace(requested, alternatives=tuple(target.at_precision(named) for target in served))


def _with_head_std(target: Target, params: SegmentParams) -> Target:
    """The target that also gives the standard deviation over the heads, which format=uncertainty shows.

    Raises:
        InvalidParameter: a parameter does not go with it, or the bundle has no such graph.
    """
    reasons = {
        "mode": (
            target.graph != ACCURATE,
            f"needs the heads of all levels, which mode={target.mode} does not run; use mode=accurate",
        ),
        "min_level": (params.min_level is not None, "needs all levels; leave min_level out"),
        "precision": (params.precision not in ("auto", "fp32"), "is computed at fp32; leave precision out"),
        "model": (
            target.manifest.head_std is None,
            f"needs a graph that {target.model!r} does not have: its network has one head, or its bundle is of an earlier version, "
            "to which the operator can add the graph with: unetpp add-uncertainty",
        ),
    }
    for parameter, (wrong, reason) in reasons.items():
        if wrong:
            raise InvalidParameter(
                f"format=uncertainty {reason}", parameter=parameter, value=getattr(params, parameter)
            )
    return replace(target, instance=target.deployment.instances[HEAD_STD, "fp32"])
