"""An imported network through the real server against its own file, run with what a training script does before it."""

import gzip
import io

import nibabel as nib
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import special

from export.agreement import deepest_masks, measure_agreement
from export.data import Picture
from export.importing import headed, open_session
from export.pack import import_network
from server import arrays
from server.app import create_app
from server.runtime.bundle import read_bundle
from server.runtime.engines import ENGINES
from server.segment.preprocess import place
from server.segment.sliding_window import infer_offline, make_sliding_window
from tests.support.cards import make_card
from tests.support.networks import unetpp
from tests.support.server import serving
from tests.support.service import quiet_settings

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def zscore(pixels):
    return (pixels - pixels.mean((0, 1))) / pixels.std((0, 1))


def percentile(pixels):
    low, high = np.percentile(pixels, (2, 98), axis=(0, 1))
    return ((pixels - low) / (high - low)).clip(0, 1)


def imagenet_bgr(pixels):
    return ((pixels / 255)[..., ::-1] - IMAGENET["mean"]) / IMAGENET["std"]


# [input] of a card, and the same in NumPy.
INPUTS = {
    "zscore": ({"normalization": "zscore"}, zscore),
    "percentile": ({"normalization": "percentile", "percentiles": [2, 98], "clip": [0, 1]}, percentile),
    "unit": ({"normalization": "unit", "channel_order": [2, 1, 0], **IMAGENET}, imagenet_bgr),
    "none": (
        {"normalization": "none", "mean": [100] * 3, "std": [50] * 3},
        lambda pixels: (pixels - 100) / 50,
    ),
}


@pytest.fixture(scope="module")
def pixels():
    """Blocks of colour of an odd size, in which all channels differ."""
    random = np.random.default_rng(0)
    blocks = random.integers(0, 255, (6, 8, 3)).repeat(9, 0).repeat(9, 1)[:51, :67]
    return np.clip(blocks * [1.0, 0.7, 0.4] + random.normal(0, 5, blocks.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def network():
    return unetpp(classes=3)


@pytest.fixture(scope="module", params=INPUTS)
def served(request, network, tmp_path_factory):
    """A client of a server with the bundle, the bundle, and the preprocessing in NumPy."""
    folder = tmp_path_factory.mktemp("bundles")
    seen, preprocess = INPUTS[request.param]
    card = make_card(classes=2, input=seen, window={"size": [96, 96], "overlap": 0.25})
    bundle = import_network(headed(network, 2, 3), card, folder / "mine")
    settings = quiet_settings(
        bundles=folder, runtime={"precision": "fp32", "engine": "onnxruntime", "tuning_folder": folder}
    )
    with serving(create_app(settings)) as client:
        yield client, bundle, preprocess


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("level", [1, 3])
def test_scores_are_those_of_the_file(served, network, pixels, level):
    client, bundle, preprocess = served
    height, width, _ = pixels.shape
    # The server pads to sides of 16, by reflection, after the statistics of the image.
    prepared = np.pad(
        preprocess(pixels.astype(np.float64)), [(0, -height % 16), (0, -width % 16), (0, 0)], mode="reflect"
    )
    feed = {"input": prepared.transpose(2, 0, 1)[None].astype(np.float32)}
    (logits,) = open_session(network).run([f"head{level}"], feed)
    expected = special.softmax(logits[0], axis=0)[:, :height, :width]
    answer = client.post(
        "/segment", params={"mode": "fast", "level": level, "format": "scores.tiff"}, content=png(pixels)
    )
    assert answer.status_code == 200, answer.text
    # Scores travel as bytes.
    scores = tifffile.imread(io.BytesIO(answer.content)) / 255
    assert np.abs(scores - expected[-scores.shape[0] :]).max() < 0.6 / 255
    graph = bundle.manifest.graph(f"L{level}")
    engine = ENGINES["onnxruntime"].open(bundle.path(graph.name, "fp32"), "fp32", "cpu", 1)
    image = arrays.Image(pixels)
    window = make_sliding_window(
        image, place(image.input_header, bundle.manifest, "auto"), bundle.manifest, graph
    )
    exact = engine.run(window.cut(range(1)))[0, :, :height, :width]
    assert np.abs(exact - expected).max() < 1e-4
    offline = infer_offline(image, bundle.manifest, graph, engine).classes
    clear = np.sort(expected, axis=0)
    clear = clear[-1] - clear[-2] > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(offline[clear], expected.argmax(0)[clear])
    mask = client.post("/segment", params={"mode": "fast", "level": level}, content=png(pixels))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask.content))), offline)


def test_tiles_see_the_statistics_of_the_whole_image(served, pixels):
    """Larger than a window: the server's answer is that of the same windows without a queue."""
    client, bundle, _ = served
    large = np.tile(pixels, (4, 3, 1))[:190, :170]
    engine = ENGINES["onnxruntime"].open(bundle.path("accurate", "fp32"), "fp32", "cpu", 1)
    image = arrays.Image(large)
    offline = infer_offline(image, bundle.manifest, bundle.manifest.graph("accurate"), engine).classes
    mask = client.post("/segment", content=png(large))
    assert mask.status_code == 200, mask.text
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(mask.content))), offline)


def test_a_volume_by_percentiles(tmp_path):
    """Of three dimensions, in another orientation than the network's."""
    network = unetpp(dims=3, channels=1, widths=(3, 4, 5), heads=(1, 2))
    seen = {
        "normalization": "percentile",
        "percentiles": [1, 99],
        "clip": [0, 1],
        "mean": [0.5],
        "std": [0.25],
    }
    card = make_card(dims=3, channels=1, input=seen, window={"size": [32] * 3, "overlap": 0.25})
    import_network(headed(network, 3, 1), card, tmp_path / "mine")
    voxels = np.random.default_rng(0).normal(-300, 400, (15, 21, 18)).astype(np.int16)
    low, high = np.percentile(voxels, (1, 99))
    # The file's second axis points the other way than the network's.
    prepared = ((((voxels - low) / (high - low)).clip(0, 1) - 0.5) / 0.25)[:, ::-1]
    padded = np.pad(prepared, [(0, -side % 4) for side in prepared.shape], mode="reflect")
    (logits,) = open_session(network).run(["head2"], {"input": padded[None, None].astype(np.float32)})
    expected = special.expit(logits[0, 0])[:15, :21, :18][:, ::-1]
    settings = quiet_settings(
        bundles=tmp_path, runtime={"precision": "fp32", "engine": "onnxruntime", "tuning_folder": tmp_path}
    )
    file = nib.Nifti1Image(voxels, np.diag([1.0, -1, 1, 1])).to_bytes()
    with serving(create_app(settings)) as client:
        answer = client.post("/segment", params={"mode": "fast", "level": 2}, content=file)
        assert answer.status_code == 200, answer.text
    mask = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(answer.content)).dataobj)
    clear = np.abs(expected - 0.5) > 1e-3
    assert clear.mean() > 0.9
    assert np.array_equal(mask[clear] > 0, expected[clear] > 0.5)


def test_models_shows_agreement_and_never_as_iou(tmp_path, pixels):
    bundle = import_network(headed(unetpp(), 2, 3), make_card(), tmp_path / "mine")
    image = arrays.Image(pixels)
    items = deepest_masks(bundle, [Picture("a", image)])
    measured = measure_agreement(bundle, items, "plates")
    settings = quiet_settings(bundles=tmp_path, runtime={"engine": "onnxruntime", "tuning_folder": tmp_path})
    with serving(create_app(settings)) as client:
        card = client.get("/models/mine").json()
        metrics = client.get("/metrics").text
    assert card["calibration"] is None
    assert card["agreement"]["deepest"] == "L3"
    assert len(card["agreement"]["rows"]) == len(measured.rows)
    assert not {"iou", "dice"} & {*card["agreement"]["rows"][0]}
    assert card["recommended_level"] == measured.recommended.level
    assert (
        "unetpp_model_calibrated" not in metrics or 'model="mine"' not in metrics.split("calibrated")[1][:200]
    )


def test_a_bundle_holds_only_what_the_manifest_lists(tmp_path):
    bundle = import_network(headed(unetpp(), 2, 3), make_card(), tmp_path / "mine")
    assert {path.name for path in bundle.folder.iterdir()} == {*bundle.manifest.files, "manifest.json"}
    assert read_bundle(bundle.folder).manifest == bundle.manifest


def test_unit_is_the_range_of_the_file_also_where_pixels_become_floats(tmp_path, pixels):
    """A grey network sees the mean of the colours, and resampled volumes are floats: both still have the file's range."""
    grey = np.repeat(pixels[..., :1], 3, axis=-1)
    card = make_card(channels=1, input={"normalization": "unit"})
    bundle = import_network(headed(unetpp(channels=1), 2, 1), card, tmp_path / "bundle")
    manifest = bundle.manifest
    windows = [
        make_sliding_window(image, place(image.input_header, manifest, "auto"), manifest, manifest.graphs[0])
        for image in (arrays.Image(grey), arrays.Image(grey[..., :1]))
    ]
    assert np.array_equal(windows[0].input.inverse_std, windows[1].input.inverse_std)
    assert windows[0].input.inverse_std == pytest.approx(1 / 255)
