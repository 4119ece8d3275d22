import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from server.errors import BundleDamaged, NotReady
from server.runtime.deployment import ENGINE_BYTES, Deployment, read_deployment, read_deployments
from server.runtime.device import DeviceThread
from server.runtime.loader import Loader
from server.settings import BatchingSettings, RuntimeSettings
from tests.support.bundles import write_nonsense_bundle
from tests.support.loading import GRAPHS, Scene, names, open_deployments


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
    with pytest.raises(NotReady):
        await first
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


def test_forget_ends_the_opening_in_the_background(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    scene.gate.clear()
    background = loader.open_in_background([deployment])
    loader.forget(deployment)
    scene.gate.set()
    background.result(60)
    assert names(scene) == ["L2"]
    # The graph whose opening had begun is left to the requests that hold it.
    assert open_deployments(deployment) == {"L2 int8"}
    assert loader.count_open() == 0


def test_forget_keeps_what_is_opened_for_the_last_requests_out_of_the_budget(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    assert loader.count_open() == 1
    loader.forget(deployment)
    loader.submit(deployment, deployment.instances["L1", "int8"]).result(60)
    assert loader.count_open() == 0


def test_submit_after_a_failure_for_good_raises_it_without_opening_again(scene: Scene) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    scene.broken = {"L1.int8"}
    for _ in range(3):
        with pytest.raises(BundleDamaged) as caught:
            loader.submit(deployment, deployment.instances["L1", "int8"]).result(60)
        assert caught.value.fields == {"file": "L1.int8.onnx"}
    assert names(scene) == ["L1"]
    # What follows in the background goes on beside it.
    loader.open_in_background([deployment]).result(60)
    assert names(scene) == ["L1", "L2", "accurate", "L3", "L4"]


@pytest.mark.parametrize("file", ["L1.int8.onnx", "weights.safetensors", "golden.npz"])
def test_submit_graph_whose_files_were_replaced_is_refused(scene: Scene, file: str) -> None:
    deployment, loader = scene.deployment(), scene.loader()
    loader.open_recommended(deployment)
    original = (scene.folder / file).read_bytes()
    (scene.folder / file).write_bytes(original[::-1])
    closed = deployment.instances["L1", "int8"]
    with pytest.raises(BundleDamaged) as caught:
        loader.submit(deployment, closed).result(60)
    assert caught.value.fields == {"file": file}
    # What is open goes on.
    recommended = deployment.recommended
    assert loader.submit(deployment, recommended).result(60) is recommended.engine
    assert names(scene) == ["L2"]
    # It is no failure for good: the files may be copied back.
    (scene.folder / file).write_bytes(original)
    assert loader.submit(deployment, closed).result(60) is closed.engine


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
