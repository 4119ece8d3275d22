"""What proves broken when it is opened: damage, or a candidate that this machine computes badly."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import BundleDamaged, EngineUnavailable
from server.runtime.golden import head_std_pairs, read_pairs
from server.settings import RuntimeSettings
from tests.support.bundles import rewrite_hashes
from tests.support.loading import GPU, GRAPHS, Scene, open_deployments


@pytest.mark.parametrize(
    "change",
    [
        {"scores_L2_0": np.zeros((1, 1, 16, 16), np.float32)},
        {"scores_L2_0": np.full((1, 1, 16, 16), np.nan, np.float32)},
        {"scores_L2_0": np.zeros((1, 1, 16, 17), np.float32)},
        {"scores_L2_0": None},
        {"image_0": None},
    ],
    ids=["scores", "not a number", "shape", "no pair", "no input"],
)
def test_open_golden_pair_that_differs_at_fp32_is_damage(scene: Scene, change: dict[str, Any]) -> None:
    scene.deployment()
    scene.write_golden(**change)
    with pytest.raises(BundleDamaged):
        scene.loader().open_recommended(scene.deployment(runtime=RuntimeSettings(precision="fp32")))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 and nothing", b"\x93NUMPY"], ids=["empty", "zip", "npy"])
def test_open_golden_file_that_cannot_be_read_is_damage(scene: Scene, data: bytes) -> None:
    scene.deployment()
    (scene.folder / "golden.npz").write_bytes(data)
    rewrite_hashes(scene.folder)
    with pytest.raises(BundleDamaged) as caught:
        scene.loader().open_recommended(scene.deployment())
    assert caught.value.fields == {"file": "golden.npz"}


def test_open_graph_that_a_cpu_engine_cannot_read_is_damage(scene: Scene) -> None:
    scene.broken = {"L2.int8"}
    with pytest.raises(BundleDamaged) as caught:
        scene.loader().open_recommended(scene.deployment())
    assert caught.value.fields == {"file": "L2.int8.onnx"}


def wrong(tiles: Tiles) -> np.ndarray:
    return 1 - tiles.pixels


def failing(tiles: Tiles) -> np.ndarray:
    raise RuntimeError("out of memory")


def test_open_recommended_precision_that_this_machine_computes_badly_is_excluded(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.scores = {"L2.int8": wrong}
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    assert scene.opened == ["L2 onnxruntime cpu int8", "L2 onnxruntime cpu fp32"]
    assert deployment.selection.precisions("L2") == ("fp32",)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["ERROR"]
    # It says nothing of the other graphs, whose answers stay what they are.
    loader.open_in_background([deployment]).result(60)
    assert scene.opened[2:] == [f"{graph} onnxruntime cpu int8" for graph in ("accurate", "L1", "L3", "L4")]


def test_open_in_background_after_an_exclusion_opens_the_next_candidate_of_that_graph(scene: Scene) -> None:
    scene.scores = {"accurate.int8": wrong}
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    loader.open_in_background([deployment]).result(60)
    served = {graph: "fp32" if graph == "accurate" else "int8" for graph in GRAPHS}
    assert deployment.selection.auto == served
    assert open_deployments(deployment) == {f"{graph} {precision}" for graph, precision in served.items()}


def test_open_graph_that_a_processor_cannot_run_now_is_kept(scene: Scene) -> None:
    """Memory may be full for a moment, and another precision would give other bytes."""
    scene.scores = {"L2.int8": failing}
    deployment, loader = scene.deployment(), scene.loader()
    with pytest.raises(EngineUnavailable) as caught:
        loader.open_recommended(deployment)
    assert caught.value.fields == {"engine": "onnxruntime", "provider": "cpu"}
    scene.scores = {}
    loader.open_recommended(deployment)
    assert deployment.recommended.name == "L2 int8"


async def test_exclude_leaves_instances_to_the_requests_that_hold_them(scene: Scene) -> None:
    from server.segment.registry import Registry
    from server.segment.request import SegmentParams

    deployment, loader = scene.deployment(), scene.loader()
    target = Registry({"fake": deployment}, "fake").resolve(SegmentParams(level=1))
    deployment.exclude(target.instance)
    assert target.precision == "int8"
    assert ("L1", "int8") not in deployment.instances
    assert await loader.ensure_open(target.deployment, target.instance) is target.instance.engine


def test_exclude_last_candidate_of_a_graph_is_refused_and_leaves_the_others_as_they_were(
    scene: Scene,
) -> None:
    deployment = scene.deployment()
    deployment.exclude(deployment.find_auto("L1"))
    with pytest.raises(EngineUnavailable) as caught:
        deployment.exclude(deployment.find_auto("L1"))
    assert caught.value.fields["graph"] == "L1"
    assert deployment.find_auto("L1").name == "L1 fp32"
    deployment.exclude(deployment.find_auto("L3"))
    assert deployment.find_auto("L3").name == "L3 fp32"


def test_open_recommended_gpu_that_fails_leaves_the_processor(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.broken = {"tensorrt"}
    deployment = scene.deployment(GPU)
    scene.loader().open_recommended(deployment)
    assert scene.opened == ["L2 onnxruntime tensorrt int8", "L2 openvino cpu fp32"]
    assert {deployment.find_auto(graph).choice.candidate.provider for graph in GRAPHS} == {"cpu"}
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]


def test_open_gpu_that_worked_before_is_kept(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """A later failure may pass, and the processor would give other bytes."""
    deployment, loader = scene.deployment(GPU), scene.loader()
    loader.open_recommended(deployment)
    scene.broken = {"tensorrt"}
    before = dict(deployment.selection.choices)
    with pytest.raises(EngineUnavailable):
        loader.submit(deployment, deployment.find_auto("L1")).result(60)
    assert deployment.selection.choices == before
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    scene.broken = set()
    assert loader.submit(deployment, deployment.find_auto("L1")).result(60) is not None


def test_open_recommended_gpu_that_computes_a_precision_badly_serves_another(scene: Scene) -> None:
    scene.scores = {("onnxruntime", "tensorrt", "int8"): wrong}
    scene.loader().open_recommended(scene.deployment(GPU))
    assert scene.opened == ["L2 onnxruntime tensorrt int8", "L2 onnxruntime tensorrt fp32"]


def test_open_recommended_gpu_that_is_named_must_work(scene: Scene) -> None:
    scene.broken = {"tensorrt"}
    deployment = scene.deployment(GPU, runtime=RuntimeSettings(provider="tensorrt"))
    with pytest.raises(EngineUnavailable) as caught:
        scene.loader().open_recommended(deployment)
    assert caught.value.fields == {"engine": "onnxruntime", "provider": "tensorrt"}
    assert len(scene.opened) == 1


def test_open_recommended_gpu_that_is_named_and_computes_badly_is_not_excluded(scene: Scene) -> None:
    scene.scores = {("onnxruntime", "tensorrt", "int8"): wrong}
    runtime = RuntimeSettings(provider="tensorrt", precision="int8")
    deployment = scene.deployment(GPU, runtime=runtime)
    with pytest.raises(EngineUnavailable):
        scene.loader().open_recommended(deployment)
    assert deployment.precisions == ("fp32", "int8")


def test_open_recommended_nothing_left_is_refused(scene: Scene) -> None:
    scene.scores = {("onnxruntime", "cpu", "fp32"): failing}
    deployment = scene.deployment({"onnxruntime": {"cpu": ("fp32",)}})
    with pytest.raises(EngineUnavailable):
        scene.loader().open_recommended(deployment)


def test_golden_head_std_is_the_standard_deviation_of_the_levels(shipped_bundle: Path) -> None:
    every = list(read_pairs(shipped_bundle / "golden.npz"))
    (_, derived), *_ = head_std_pairs(every)
    heads = np.stack(
        [next(scores for name, _, scores in every if name == f"L{level}") for level in (1, 2, 3, 4)]
    )
    # Behind the channels of a level, and of that of the class.
    assert derived.shape[1] == heads.shape[2] + 1
    assert np.allclose(derived[:, -1], heads[:, :, 0].std(axis=0), atol=1e-6)
