from pathlib import Path
from typing import Any

import pytest

from server.errors import InvalidParameter, UnknownModel
from server.imaging.encode import ENCODERS
from server.runtime.bundle import Bundle
from server.runtime.deployment import Deployment
from server.runtime.machine import Machine
from server.segment.registry import MODES, Registry, Target
from server.segment.request import SegmentParams
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.curves import curve, point
from tests.support.service import calibrated, manifest

HEAD_STD = {
    "name": "head_std",
    "level": 4,
    "divisor": 16,
    "parameters": 1,
    "macs_per_pixel": 4,
    "files": {"fp32": "std.onnx"},
}
# A format that shows the standard deviation over the heads.
UNCERTAINTY = next(name for name, row in ENCODERS.items() if "head_std" in row.needs)
# L3 alone may be served at bf16 too, which is what `auto` means there.
ROWS = [(f"L{level}", "fp32", 0.9) for level in (1, 2, 3, 4)] + [("accurate", "fp32", 0.9)]
ROWS += [(graph, "bf16", 0.9 if graph == "L3" else 0.5) for graph in ("L1", "L2", "L3", "L4", "accurate")]


def deployment(name: str = "fake", **changes: Any) -> Deployment:
    machine = Machine("cpu", frozenset(), 1, {"openvino": {"cpu": ("fp32", "bf16")}}, {"openvino": "1"})
    document = manifest(name=name, **({"calibration": calibrated(ROWS)} | changes))
    return Deployment(Bundle(Path("/nowhere"), document), machine, RuntimeSettings(), BatchingSettings())


def resolve(changes: dict[str, Any] | None = None, **params: Any) -> Target:
    return Registry({"fake": deployment(**(changes or {}))}, "fake").resolve(SegmentParams(**params))


def fields(changes: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """Of the error with which a request is refused."""
    with pytest.raises((InvalidParameter, UnknownModel)) as caught:
        resolve(changes, **params)
    return caught.value.fields


@pytest.mark.parametrize(
    ("params", "mode", "level", "graph", "precision"),
    [
        ({}, "accurate", 4, "accurate", "fp32"),
        ({"mode": "accurate"}, "accurate", 4, "accurate", "fp32"),
        ({"mode": "fast"}, "fast", 2, "L2", "fp32"),
        ({"level": 1}, "fast", 1, "L1", "fp32"),
        ({"mode": "fast", "level": 4}, "fast", 4, "L4", "fp32"),
        ({"level": 3}, "fast", 3, "L3", "bf16"),
        ({"level": 3, "precision": "fp32"}, "fast", 3, "L3", "fp32"),
        ({"level": 3, "precision": "bf16"}, "fast", 3, "L3", "bf16"),
    ],
)
def test_resolve_mode_level_and_precision(
    params: dict[str, Any], mode: str, level: int, graph: str, precision: str
) -> None:
    target = resolve(**params)
    assert (target.mode, target.level, target.graph, target.precision) == (mode, level, graph, precision)
    assert (target.model, target.instance.graph.name, target.alternatives) == ("fake", graph, ())
    assert target.mode in MODES


def test_resolve_fast_without_calibration_is_the_deepest_level() -> None:
    assert resolve({"calibration": None}, mode="fast").graph == "L4"


def test_resolve_level_that_does_not_exist_is_refused() -> None:
    assert fields(level=5) == {"parameter": "level", "value": 5, "allowed": [1, 2, 3, 4]}


def test_resolve_accurate_takes_no_level() -> None:
    assert fields(mode="accurate", level=3) == {"parameter": "level", "value": 3}


def test_resolve_precision_that_is_not_served_is_refused() -> None:
    assert fields(level=1, precision="bf16") == {
        "parameter": "precision",
        "value": "bf16",
        "allowed": ["auto", "fp32"],
    }


def test_resolve_model_that_does_not_exist_is_refused() -> None:
    assert fields(model="other") == {"parameter": "model", "value": "other", "allowed": ["fake"]}


AUTO = {"depth_curve": curve(point((1, 2), 0.3, work=0.2, loss=1.0), point((2, 3), 0.1, loss=0.2))}


class TestAuto:
    @pytest.mark.parametrize(
        ("params", "chain"),
        [
            ({"mode": "auto"}, ["L2", "L3"]),
            ({"mode": "auto", "max_loss": 1.0}, ["L1", "L2"]),
            ({"max_loss": 0.0}, ["L4"]),
        ],
    )
    def test_auto_is_the_chain_with_the_least_work_within_the_loss(
        self, params: dict[str, Any], chain: list[str]
    ) -> None:
        target = resolve(AUTO, **params)
        assert [one.graph for one in target.runs] == chain
        assert {one.mode for one in (target, *target.runs)} == {"auto"}
        assert (target.graph, target.level) == (chain[-1], int(chain[-1][1]))

    @pytest.mark.parametrize(("share", "goes_on"), [(0.0, False), (0.1, False), (0.11, True)])
    def test_auto_goes_on_above_the_threshold(self, share: float, goes_on: bool) -> None:
        target = resolve(AUTO, mode="auto")
        assert target.continues_after(0, share) is goes_on
        assert not target.continues_after(1, share)

    def test_other_modes_never_go_on(self) -> None:
        assert not resolve(AUTO, level=2).continues_after(0, 1.0)

    def test_auto_precision_is_that_of_every_level(self) -> None:
        assert [one.precision for one in resolve(AUTO, mode="auto").runs] == ["fp32", "bf16"]
        named = resolve(AUTO, mode="auto", precision="fp32")
        assert [one.precision for one in (*named.runs, named)] == ["fp32"] * 3

    @pytest.mark.parametrize(
        ("changes", "params", "parameter"),
        [
            ({}, {"mode": "auto"}, "mode"),
            (AUTO, {"mode": "auto", "level": 2}, "level"),
            (AUTO, {"max_loss": 1.0, "level": 2}, "level"),
            (AUTO, {"mode": "fast", "max_loss": 1.0}, "max_loss"),
            (AUTO, {"mode": "accurate", "max_loss": 1.0}, "max_loss"),
            (AUTO, {"mode": "auto", "min_level": 4}, "min_level"),
            (AUTO, {"mode": "auto", "precision": "bf16"}, "precision"),
            (AUTO | {"head_std": HEAD_STD}, {"mode": "auto", "format": UNCERTAINTY}, "mode"),
        ],
    )
    def test_auto_does_not_go_with_some_parameters(
        self, changes: dict[str, Any], params: dict[str, Any], parameter: str
    ) -> None:
        assert fields(changes, **params)["parameter"] == parameter

    def test_auto_without_a_curve_names_the_command(self) -> None:
        assert fields(mode="auto")["remedy"] == "unetpp calibrate BUNDLE --data DATA --curve"

    @pytest.mark.parametrize(
        ("min_level", "chain", "alternatives"),
        [
            (1, ["L2", "L3"], [("auto", ["L2"]), ("fast", ["L1"])]),
            (2, ["L2", "L3"], [("auto", ["L2"])]),
            (3, ["L3"], []),
        ],
    )
    def test_auto_alternatives_are_shorter_chains_and_then_levels(
        self, min_level: int, chain: list[str], alternatives: list[tuple[str, list[str]]]
    ) -> None:
        target = resolve(AUTO, mode="auto", min_level=min_level)
        assert [one.graph for one in target.runs] == chain
        assert [(one.mode, [run.graph for run in one.runs]) for one in target.alternatives] == alternatives


@pytest.mark.parametrize("axes", [None, ()])
def test_flips_of_a_network_that_may_not_know_them_are_refused(axes: tuple[int, ...] | None) -> None:
    assert fields({"mirror_axes": axes}, tta="flips") == {"parameter": "tta", "value": "flips"}
    assert resolve({"mirror_axes": axes}).mode == "accurate"


class TestAlternatives:
    @pytest.mark.parametrize(
        ("params", "graphs"),
        [
            ({"min_level": 1}, ["L3", "L2", "L1"]),
            ({"min_level": 4}, []),
            ({"level": 4, "min_level": 2}, ["L3", "L2"]),
            ({"level": 2, "min_level": 2}, []),
            ({"mode": "fast", "min_level": 1}, ["L1"]),
            # A precision that is named is kept; where it is not served, that level is no alternative.
            ({"level": 4, "min_level": 1, "precision": "fp32"}, ["L3", "L2", "L1"]),
        ],
    )
    def test_alternatives_are_shallower_deepest_first(
        self, params: dict[str, Any], graphs: list[str]
    ) -> None:
        target = resolve(**params)
        assert [one.graph for one in target.alternatives] == graphs
        assert {one.mode for one in target.alternatives} <= {"fast"}

    def test_alternatives_at_a_named_precision_are_those_that_have_it(self) -> None:
        rows = [("accurate", "bf16", 0.9), *ROWS]
        (only,) = resolve({"calibration": calibrated(rows[:-1])}, min_level=1, precision="bf16").alternatives
        assert (only.graph, only.precision) == ("L3", "bf16")

    @pytest.mark.parametrize(
        ("params", "allowed"), [({"min_level": 5}, [1, 2, 3, 4]), ({"level": 2, "min_level": 3}, [1, 2])]
    )
    def test_min_level_that_does_not_exist_or_is_deeper_is_refused(
        self, params: dict[str, Any], allowed: list[int]
    ) -> None:
        assert fields(**params) == {
            "parameter": "min_level",
            "value": params["min_level"],
            "allowed": allowed,
        }


class TestHeadStd:
    @pytest.mark.parametrize("precision", ["auto", "fp32"])
    @pytest.mark.parametrize(
        "format_", [UNCERTAINTY, f"mask,{UNCERTAINTY}"], ids=["alone", "beside the mask"]
    )
    def test_uncertainty_runs_head_std(self, precision: str, format_: str) -> None:
        target = resolve({"head_std": HEAD_STD}, format=format_, precision=precision)
        assert (target.mode, target.level, target.graph, target.precision) == (
            "accurate",
            4,
            "head_std",
            "fp32",
        )

    @pytest.mark.parametrize(
        ("params", "parameter"),
        [
            ({"level": 4}, "mode"),
            ({"mode": "fast"}, "mode"),
            ({"min_level": 2}, "min_level"),
            ({"precision": "bf16"}, "precision"),
        ],
    )
    def test_uncertainty_does_not_go_with_some_parameters(
        self, params: dict[str, Any], parameter: str
    ) -> None:
        assert fields({"head_std": HEAD_STD}, format=UNCERTAINTY, **params)["parameter"] == parameter

    def test_uncertainty_of_a_bundle_without_the_graph_is_refused(self) -> None:
        assert fields(format=UNCERTAINTY)["parameter"] == "model"


class TestRegistry:
    def test_registry_default_must_be_among_the_deployments(self) -> None:
        with pytest.raises(UnknownModel) as caught:
            Registry({"fake": deployment()}, "other")
        assert caught.value.fields == {"value": "other", "allowed": ["fake"]}

    def test_resolve_names_the_model(self) -> None:
        registry = Registry({name: deployment(name) for name in ("fake", "other")}, "fake")
        assert (
            registry.resolve(SegmentParams(model="other")).model,
            registry.resolve(SegmentParams()).model,
        ) == ("other", "fake")
        assert registry.resolve_accurate(registry.get("other")).graph == "accurate"

    def test_swap_serves_others_from_now_on_and_leaves_targets_alone(self) -> None:
        before, after = deployment(), deployment()
        registry = Registry({"fake": before}, "fake")
        target = registry.resolve(SegmentParams())
        registry.swap({"fake": after})
        assert target.deployment is before
        assert registry.resolve(SegmentParams()).deployment is after

    def test_swap_without_the_default_changes_nothing(self) -> None:
        registry = Registry({"fake": deployment()}, "fake")
        with pytest.raises(UnknownModel):
            registry.swap({"other": deployment("other")})
        assert [*registry.deployments] == ["fake"]
