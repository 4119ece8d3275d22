"""MONAI's networks, built on the fly: every level against the module itself, which takes odd sizes."""

from functools import cache

import monai.networks.nets as monai
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from export.importing import PROBE, from_torch
from export.pack import import_network
from export.verify import verify
from server.runtime.bundle import Window
from tests.export.foreign.make import shuffle
from tests.export.test_foreign import open_engine, segment
from tests.support.cards import make_card

pytestmark = pytest.mark.long

PLAN = {
    "kernel_size": [[1, 3, 3], *[[3, 3, 3]] * 3],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
    "upsample_kernel_size": [[1, 2, 2], [2, 2, 2], [2, 2, 2]],
}
EXITS = ("deep_supervision_heads.1", "deep_supervision_heads.0", "output_block")

# Module, dims, submodules that are the heads.
NETWORKS = {
    "2D": (lambda: monai.BasicUNetPlusPlus(2, 1, 3, (3, 4, 5, 6, 7, 3), True), 2, ()),
    "2D interpolated": (
        lambda: monai.BasicUNetPlusPlus(
            2, 1, 3, (3, 4, 5, 6, 7, 3), True, norm="batch", act="swish", upsample="nontrainable"
        ),
        2,
        (),
    ),
    "3D": (lambda: monai.BasicUNetPlusPlus(3, 1, 3, (3, 4, 5, 6, 7, 3), True), 3, ()),
    "DynUNet": (
        lambda: monai.DynUNet(
            3, 1, 3, **PLAN, filters=[3, 4, 5, 6], deep_supervision=True, deep_supr_num=2,
            norm_name=("INSTANCE", {"affine": True}),
        ),
        3,
        EXITS,
    ),
}  # fmt: skip

UNETPP = ("2D", "2D interpolated", "3D")


@cache
def network_of(name):
    return shuffle(NETWORKS[name][0]())


def heads_of(name, image):
    """Logits of every head, shallowest first, enlarged to the input."""
    network, names = network_of(name), NETWORKS[name][2]
    if not names:
        return network(image)
    kept = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[one].register_forward_hook(lambda _, __, output, one=one: kept.update({one: output}))
        for one in names
    ]
    network(image)
    for hook in hooks:
        hook.remove()
    return [
        torch.nn.functional.interpolate(kept[one], size=image.shape[2:], mode="trilinear") for one in names
    ]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    @cache
    def make(name):
        _, dims, heads = NETWORKS[name]
        card = make_card(dims=dims, channels=1, classes=2, window={"size": [64] * dims, "overlap": 0.25})
        graph = from_torch(network_of(name), torch.rand(2, 1, *PROBE[dims]), heads)
        return import_network(graph, card, tmp_path_factory.mktemp("bundles") / "monai")

    return make


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("side", [64, 32])
def test_every_level_answers_as_the_module(name, side, bundle_of):
    bundle, dims = bundle_of(name), NETWORKS[name][1]
    size = (61, 37) if dims == 2 else (19, 45, 27)
    image = np.random.default_rng(0).normal(120, 40, (*size, 1)).clip(0, 255).astype(np.uint8)
    manifest = bundle.manifest.model_copy(update={"window": Window(size=(side,) * dims, overlap=0.25)})
    mean, std = image.mean(), image.std()
    # torch refuses instance normalisation of one value, which tiles of 16 leave to the deepest row.
    divisor = 32 if side == 32 else 2
    for index, level in enumerate(manifest.levels):

        def module(tiles, index=index):
            seen = torch.from_numpy(((tiles.pixels.astype(np.float64) - mean) / std).astype(np.float32))
            with torch.no_grad():
                return torch.softmax(heads_of(name, seen)[index], dim=1).numpy()

        graph = f"L{level}"
        right, right_mask, count = segment(manifest, graph, module, image, divisor)
        assert (count > 1) == (side == 32)
        for engine in ("onnxruntime", "openvino"):
            scores, mask, _ = segment(manifest, graph, open_engine(bundle, graph, engine), image, divisor)
            assert np.abs(scores - right).max() < 1e-4, (graph, engine)
            assert (mask == right_mask).mean() > 0.999


@pytest.mark.parametrize("name", UNETPP)
def test_divisors_parameters_and_work(name, bundle_of):
    """Parameters are those that a head's gradient reaches; the work of all heads is what torch counts."""
    manifest, network = bundle_of(name).manifest, network_of(name)
    image = torch.rand(1, 1, *PROBE[manifest.dims])
    assert manifest.levels == (1, 2, 3, 4)
    assert [manifest.graph(f"L{k}").divisor for k in manifest.levels] == [2, 4, 8, 16]
    if "interpolated" not in name:
        # There the exporter folds batch normalisation.
        for index, level in enumerate(manifest.levels):
            network.zero_grad()
            network(image)[index].sum().backward()
            reached = sum(one.numel() for one in network.parameters() if one.grad is not None)
            assert manifest.graph(f"L{level}").parameters == reached
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    work = manifest.graph("accurate").macs_per_pixel * image.numel()
    assert work == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)


def test_exits_of_a_plain_unet_are_levels_of_one_divisor(bundle_of):
    manifest = bundle_of("DynUNet").manifest
    assert manifest.levels == (1, 2, 3)
    assert [manifest.graph(f"L{k}").divisor for k in manifest.levels] == [8, 8, 8]


@pytest.mark.parametrize("name", ["2D", "DynUNet"])
def test_the_bundle_verifies(name, bundle_of):
    assert verify(bundle_of(name))
