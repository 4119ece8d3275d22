import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.arrays import Tiles
from server.errors import BundleDamaged, EngineUnavailable, NotReady
from server.runtime import engines
from server.runtime.bundle import read_bundle
from server.runtime.deployment import Deployment, read_deployment, read_deployments
from server.runtime.device import DeviceThread
from server.runtime.engines import EngineRow
from server.runtime.golden import head_std_pairs, read_pairs
from server.runtime.loader import ENGINE_BYTES, Loader
from server.runtime.machine import Machine
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import rewrite_hashes, write_nonsense_bundle
from tests.support.service import FakeEngine, calibrated

CPU = {"onnxruntime": {"cpu": ("fp32", "int8")}}
GPU = {"onnxruntime": {"tensorrt": ("fp32", "int8"), "cpu": ("fp32",)}, "openvino": {"cpu": ("fp32",)}}
GRAPHS = ("L1", "L2", "L3", "L4", "accurate")
FILES = {name: {"fp32": f"{name}.onnx", "int8": f"{name}.int8.onnx"} for name in GRAPHS}
SAFE = calibrated(
    [(graph, precision, 0.9) for graph in GRAPHS for precision in ("fp32", "int8")], recommended=2
)


def graphs(parameters: int = 1) -> list[dict[str, Any]]:
    levels = zip(GRAPHS, (1, 2, 3, 4, 4), strict=True)
    same = {"divisor": 16, "parameters": parameters, "macs_per_pixel": 1.0}
    return [{"name": name, "level": level, "files": FILES[name], **same} for name, level in levels]


class Scene:
    """A bundle of nonsense whose golden pairs say that a graph gives what it is given, fake engines, and a loader."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.device = folder / "fake", DeviceThread()
        self.opened: list[str] = []
        self.threads: set[int] = set()
        self.loaders: list[Loader] = []
        self.gate = threading.Event()
        self.gate.set()
        # What an engine gives, and what opening it does, by (engine, provider, precision) or file.
        self.scores: dict[Any, Callable[[Tiles], np.ndarray]] = {}
        self.broken: set[Any] = set()
        for name in ("onnxruntime", "openvino"):
            patch.setitem(
                engines.ENGINES,
                name,
                EngineRow(self._opener(name), "numpy", lambda _: ("fp32",), lambda _: ["cpu"]),
            )

    def _opener(self, name: str) -> Any:
        def open_graph(path: Path, precision: str, provider: str, threads: int) -> FakeEngine:
            assert self.gate.wait(60)
            self.threads.add(threads)
            self.opened.append(f"{path.stem.split('.')[0]} {name} {provider} {precision}")
            key = (name, provider, precision)
            if {key, provider, path.stem} & self.broken:
                raise RuntimeError("no such device")
            return FakeEngine(self.scores.get(path.stem, self.scores.get(key, lambda tiles: tiles.pixels)))

        return open_graph

    def deployment(
        self, engines: dict[str, Any] = CPU, features: tuple[str, ...] = ("avx_vnni",), runtime: RuntimeSettings | None = None,
        **changes: Any,
    ) -> Deployment:  # fmt: skip
        if not self.folder.exists():
            write_nonsense_bundle(self.folder, **({"graphs": graphs(), "calibration": SAFE} | changes))
            self.write_golden()
        machine = Machine("cpu", frozenset(features), 3, engines, dict.fromkeys(engines, "1"))
        return Deployment(read_bundle(self.folder), machine, runtime or RuntimeSettings(), BatchingSettings())

    def write_golden(self, **changes: np.ndarray | None) -> None:
        pixels = np.random.default_rng(0).random((1, 1, 16, 16), dtype=np.float32)
        ones = np.ones((1, 1, 1, 1), np.float32)
        arrays = {"image/0": pixels, "mean/0": ones * 0, "inverse_std/0": ones}
        arrays |= {f"scores/{graph}/0": pixels for graph in GRAPHS}
        arrays |= {key.replace("_", "/"): value for key, value in changes.items()}
        np.savez(
            self.folder / "golden.npz", **{key: value for key, value in arrays.items() if value is not None}
        )
        rewrite_hashes(self.folder)

    def loader(self, memory_bytes: int = 10**12) -> Loader:
        self.loaders.append(Loader(self.device, memory_bytes))
        return self.loaders[-1]

    def close(self) -> None:
        self.gate.set()
        for loader in self.loaders:
            loader.close()
        self.device.close()


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path, monkeypatch)
    yield made
    made.close()


def names(scene: Scene) -> list[str]:
    return [line.split()[0] for line in scene.opened]


def open_deployments(deployment: Deployment) -> set[str]:
    return {one.name for one in deployment.instances.values() if one.engine}


def test_open_recommended_opens_that_graph_alone(scene: Scene) -> None:
    deployment = scene.deployment()
    scene.loader().open_recommended(deployment)
    assert scene.opened == ["L2 onnxruntime cpu int8"]
    assert deployment.recommended.engine is not None
    assert deployment.recommended.last_success > 0
    assert scene.threads == {3}


def test_open_in_background_opens_the_others_of_auto_most_useful_first(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    loader.open_in_background([deployment]).result(60)
    assert names(scene) == ["L2", "accurate", "L1", "L3", "L4"]
    assert open_deployments(deployment) == {f"{graph} int8" for graph in GRAPHS}


async def test_ensure_open_goes_next_and_opens_once_for_many_callers(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    scene.gate.clear()
    background = loader.open_in_background([deployment])
    instance = deployment.instances["L4", "fp32"]
    waiting = [asyncio.create_task(loader.ensure_open(deployment, instance)) for _ in range(5)]
    await asyncio.sleep(0)
    # A caller who leaves does not stop what the others wait for.
    waiting[0].cancel()
    scene.gate.set()
    opened = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(opened[0], asyncio.CancelledError)
    assert opened[1:] == [instance.engine] * 4
    await asyncio.wrap_future(background)
    assert scene.opened[:2] == ["L2 onnxruntime cpu int8", "L4 onnxruntime cpu fp32"]
    assert Counter(scene.opened).most_common(1)[0][1] == 1
    assert await loader.ensure_open(deployment, instance) is instance.engine


def test_open_in_background_leaves_out_what_the_memory_has_no_room_for(scene: Scene) -> None:
    deployment = scene.deployment()
    loader = scene.loader(int(2.5 * ENGINE_BYTES))
    loader.open_in_background([deployment]).result(60)
    assert names(scene) == ["L2", "accurate"]


def test_submit_closes_the_least_recently_used_for_room(scene: Scene) -> None:
    deployment = scene.deployment()
    loader = scene.loader(int(2.5 * ENGINE_BYTES))
    l1, l2, l3 = (deployment.instances[graph, "int8"] for graph in ("L1", "L2", "L3"))
    for instance in (l1, l2):
        loader.submit(deployment, instance).result()
    l1.last_use = l2.last_use + 1
    loader.submit(deployment, l3).result()
    assert [one.engine is not None for one in (l1, l2, l3)] == [True, False, True]
    # Opened anew where it is needed again; and one that is larger than all the memory is opened alone.
    loader.submit(deployment, l2).result()
    assert names(scene) == ["L1", "L2", "L3", "L2"]
    small = scene.loader(1)
    small.submit(deployment, l1).result()


def test_open_in_background_failure_is_logged_and_the_rest_is_opened(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    scene.broken = {"accurate.int8"}
    loader.open_in_background([deployment]).result(60)
    assert names(scene) == ["L2", "accurate", "L1", "L3", "L4"]
    assert [record.levelname for record in caplog.records] == ["ERROR"]


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


@pytest.mark.parametrize("scores", [wrong, failing])
def test_open_recommended_precision_that_this_machine_computes_badly_is_excluded(
    scene: Scene, caplog: pytest.LogCaptureFixture, scores: Any
) -> None:
    scene.scores = {("onnxruntime", "cpu", "int8"): scores}
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    assert scene.opened == ["L2 onnxruntime cpu int8", "L2 onnxruntime cpu fp32"]
    assert deployment.precisions == ("fp32",)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["ERROR"]
    # What follows in the background is what the rule now says.
    loader.open_in_background([deployment]).result(60)
    assert scene.opened[2:] == [f"{graph} onnxruntime cpu fp32" for graph in ("accurate", "L1", "L3", "L4")]


def test_open_in_background_after_an_exclusion_follows_the_rule_anew(scene: Scene) -> None:
    scene.scores = {"accurate.int8": wrong}
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    loader.open_in_background([deployment]).result(60)
    assert set(deployment.selection.auto.values()) == {"fp32"}
    assert open_deployments(deployment) == {f"{graph} fp32" for graph in GRAPHS}


async def test_exclude_leaves_instances_to_the_requests_that_hold_them(scene: Scene) -> None:
    from server.segment.registry import Registry
    from server.segment.request import SegmentParams

    scene.scores = {"accurate.int8": wrong}
    deployment, loader = scene.deployment(), scene.loader()
    target = Registry({"fake": deployment}, "fake").resolve(SegmentParams(level=1))
    accurate = deployment.instances["accurate", "int8"]
    with pytest.raises(EngineUnavailable):
        await loader.ensure_open(deployment, accurate)
    assert target.precision == "int8"
    assert ("L1", "int8") not in deployment.instances
    assert await loader.ensure_open(target.deployment, target.instance) is target.instance.engine


def test_open_recommended_gpu_that_fails_leaves_the_processor(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.broken = {"tensorrt"}
    scene.loader().open_recommended(scene.deployment(GPU))
    assert scene.opened == ["L2 onnxruntime tensorrt int8", "L2 openvino cpu fp32"]
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]


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


async def test_close_while_opening_refuses_who_waits(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    scene.gate.clear()
    first, second = (
        asyncio.create_task(loader.ensure_open(deployment, deployment.instances[graph, "fp32"]))
        for graph in ("L1", "L2")
    )
    await asyncio.sleep(0)
    closing = asyncio.create_task(asyncio.to_thread(loader.close))
    with pytest.raises(NotReady):
        await second
    scene.gate.set()
    await closing
    assert (await first).name == "fake"
    with pytest.raises(NotReady):
        await loader.ensure_open(deployment, deployment.instances["L3", "fp32"])
    assert scene.opened == ["L1 onnxruntime cpu fp32"]
    assert loader.open_in_background([deployment]).done()


def test_open_after_the_device_was_closed_is_refused(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    scene.device.close()
    with pytest.raises(NotReady):
        loader.open_recommended(deployment)
    assert deployment.precisions == ("fp32", "int8")


def test_forget_frees_the_memory_of_a_deployment(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader(int(5.5 * ENGINE_BYTES))
    loader.open_in_background([deployment]).result(60)
    loader.forget(deployment)
    again = scene.deployment()
    loader.open_in_background([again]).result(60)
    assert len(open_deployments(again)) == len(open_deployments(deployment)) == 5


def test_batch_limit_follows_pixels_and_settings(scene: Scene) -> None:
    instance = scene.deployment().recommended
    assert [
        instance.batch_limit(tile) for tile in ((512, 512), (256, 256), (128, 128), (16, 16), (16, 16, 16))
    ] == [1, 1, 4, 64, 16]


class TestReadDeployments:
    def write(self, root: Path, *folders: str, **changes: Any) -> None:
        for folder in folders:
            write_nonsense_bundle(root / folder, **{"name": folder} | changes)

    def read(self, root: Path, **options: Any) -> dict[str, Deployment]:
        return read_deployments(
            root, RuntimeSettings(tuning_folder=root / "tuning"), BatchingSettings(), **options
        )

    def test_read_deployments_keeps_the_unchanged_ones(self, tmp_path: Path) -> None:
        self.write(tmp_path, "a", "b")
        before = self.read(tmp_path)
        assert [*before] == ["a", "b"]
        self.write(tmp_path, "c")
        (tmp_path / "b" / "manifest.json").write_text((tmp_path / "b" / "manifest.json").read_text() + "\n")
        after = self.read(tmp_path, before=before)
        assert [after[name] is before.get(name) for name in ("a", "b", "c")] == [True, False, False]

    def test_read_deployments_two_of_one_name_are_refused(self, tmp_path: Path) -> None:
        self.write(tmp_path, "a", "b", name="same")
        with pytest.raises(BundleDamaged) as caught:
            self.read(tmp_path)
        assert caught.value.fields == {"name": "same"}


def test_read_deployment_opens_the_shipped_bundles(
    shipped_bundle: Path, volume_bundle: Path, tmp_path: Path
) -> None:
    device = DeviceThread()
    loader = Loader(device, 10**12)
    for folder in (shipped_bundle, volume_bundle):
        deployment = read_deployment(folder, RuntimeSettings(tuning_folder=tmp_path), BatchingSettings())
        loader.open_recommended(deployment)
        loader.submit(deployment, deployment.instances["head_std", "fp32"]).result()
    loader.close()
    device.close()


def test_golden_head_std_is_the_standard_deviation_of_the_levels(shipped_bundle: Path) -> None:
    every = list(read_pairs(shipped_bundle / "golden.npz"))
    (_, derived), *_ = head_std_pairs(every)
    heads = np.stack(
        [next(scores for name, _, scores in every if name == f"L{level}") for level in (1, 2, 3, 4)]
    )
    assert derived.shape[1] == 2
    assert np.allclose(derived[:, 1:], heads.std(axis=0), atol=1e-6)
