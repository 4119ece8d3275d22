"""A network with a channel for objects: exported, imported, verified, served."""

import io
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy import ndimage

from export.add_levels import add_levels
from export.card import ExportError
from export.golden import synthetic_cells
from export.graph import fold_batch_norm, round_to_fp16
from export.importing import headed
from export.pack import export, import_network
from export.verify import verify
from model import checkpoint
from model.config import UNetPlusPlusConfig
from model.losses import deep_supervision_loss
from model.network import UNetPlusPlus
from model.objects import targets
from server.app import create_app
from server.runtime.bundle import ObjectChannel, read_bundle
from server.segment.labels import label, relabel_in_scan_order
from server.segment.watershed import split, split_by_interior
from tests.support.cards import make_card
from tests.support.networks import unetpp
from tests.support.server import serving
from tests.support.service import quiet_settings

DISTANCE = ObjectChannel(kind="distance", saddle=0.7)


@pytest.fixture(scope="module")
def network():
    """Depth 2, trained for a moment on cells and on the distance to their edge."""
    torch.manual_seed(0)
    config = UNetPlusPlusConfig(in_channels=3, widths=(6, 8, 10), norm="batch", objects=("distance",))
    network = UNetPlusPlus(config).train()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(80):
        pixels = np.stack([synthetic_cells((48, 48), 3, 100 + 4 * step + k) for k in range(4)])
        values = normalised(pixels)
        labels = (pixels.mean(-1) > 70).astype(np.uint8)
        made = np.stack([targets(ndimage.label(one)[0], ("distance",), reach=4) for one in labels])
        loss = deep_supervision_loss(network(values), torch.from_numpy(labels), torch.from_numpy(made))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return round_to_fp16(fold_batch_norm(network.eval()))


def normalised(pixels):
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    std, mean = torch.std_mean(values, dim=(2, 3), keepdim=True, correction=0)
    return (values - mean) / std


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network, card, discs):
    """The checkpoint and its bundle."""
    folder = tmp_path_factory.mktemp("bundles")
    checkpoint.save(network, folder / "network.safetensors", {"recipe": {"data": {"flip": [0, 1]}}})
    told = card.model_copy(update={"name": "objects", "objects": DISTANCE})
    export(folder / "network.safetensors", told, folder / "objects", discs)
    return folder


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    settings = quiet_settings(
        bundles=folder / "objects",
        runtime={
            "precision": "fp32",
            "engine": "onnxruntime",
            "tuning_folder": tmp_path_factory.mktemp("tuning"),
        },
    )
    with serving(create_app(settings)) as client:
        yield client


PIXELS = np.concatenate([synthetic_cells((96, 64), 3, seed) for seed in (5, 6)], axis=1)


def png(pixels=PIXELS):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def scores_of(network, pixels=PIXELS):
    """(2, H, W) of each head, by torch."""
    with torch.no_grad():
        return [torch.sigmoid(one)[0].numpy() for one in network(normalised(pixels[None]))]


def numbered(mask, interior, saddle):
    labels, count = label(mask.astype(np.uint8))
    count = split_by_interior(labels, count, interior, (1.0, 1.0), saddle)
    return relabel_in_scan_order(labels, count)[0]


@pytest.mark.parametrize("query", ["mode=fast&level=1", "mode=fast&level=2", "mode=accurate"])
def test_objects_are_those_of_the_networks_own_channel(client, network, query):
    heads = scores_of(network)
    score = {"1": heads[0], "2": heads[1]}.get(query[-1], np.mean(heads, axis=0))
    response = client.post(f"/segment?{query}&instances=true&format=labels.tiff,json", content=png())
    assert response.status_code == 200, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as answer:
        names = answer.namelist()
        labels = tifffile.imread(io.BytesIO(answer.read(next(n for n in names if n.endswith("tiff")))))
    expected = numbered(score[0] > 0.5, score[1].astype(np.float16), DISTANCE.saddle)
    assert expected.max() > 3
    # The last bits of scores decide ties of plateaus.
    assert (labels == expected).mean() > 0.99
    # By shape they would be others.
    shapes, count = label((score[0] > 0.5).astype(np.uint8))
    count = split(shapes, count, (1.0, 1.0))
    assert ((labels > 0) == (shapes > 0)).mean() > 0.99
    assert not np.array_equal(relabel_in_scan_order(shapes, count)[0], expected)


def test_without_instances_the_channel_changes_nothing(client, network):
    heads = scores_of(network)
    mask = np.asarray(
        Image.open(io.BytesIO(client.post("/segment?level=2&mode=fast", content=png()).content))
    )
    assert ((mask > 0) == (heads[1][0] > 0.5)).mean() > 0.999
    stored = client.post("/segment?level=2&mode=fast&format=scores.npz", content=png()).content
    with np.load(io.BytesIO(stored)) as file:
        assert max(file[name].ndim == 3 and len(file[name]) for name in file.files) == 1


def test_uncertainty_keeps_the_channels_apart(client, network):
    heads = np.stack([one[0] for one in scores_of(network)])
    query = "mode=accurate&instances=true&format="
    both = client.post(f"/segment?{query}uncertainty.tiff,labels.tiff", content=png())
    alone = client.post(f"/segment?{query}labels.tiff", content=png())
    with zipfile.ZipFile(io.BytesIO(both.content)) as answer:
        files = {name: tifffile.imread(io.BytesIO(answer.read(name))) for name in answer.namelist()}
    (uncertainty,) = (pixels for name, pixels in files.items() if "uncertainty" in name)
    (labels,) = (pixels for name, pixels in files.items() if "labels" in name)
    np.testing.assert_allclose(uncertainty, heads.std(axis=0), atol=2e-3)
    assert (labels == tifffile.imread(io.BytesIO(alone.content))).mean() > 0.99


def test_flips_average_the_channel_of_objects_too(client, network):
    copies = [(), (1,), (2,), (1, 2)]
    scores = np.mean(
        [
            np.flip(scores_of(network, np.flip(PIXELS, [axis - 1 for axis in axes]).copy())[1], axes)
            for axes in copies
        ],
        axis=0,
    )
    answer = client.post(
        "/segment?mode=fast&level=2&tta=flips&instances=true&format=labels.tiff", content=png()
    )
    expected = numbered(scores[0] > 0.5, scores[1].astype(np.float16), DISTANCE.saddle)
    assert (tifffile.imread(io.BytesIO(answer.content)) == expected).mean() > 0.99


def test_the_model_card_says_it(client):
    assert client.get("/models/objects").json()["objects"] == {"kind": "distance", "saddle": 0.7}


def test_it_verifies_in_every_precision(folder):
    verdicts = verify(read_bundle(folder / "objects"))
    assert all(verdict.passed for verdict in verdicts)


def test_a_card_that_says_something_else_is_refused(folder, card, make_network, tmp_path):
    for objects, path in (("boundary", folder / "network.safetensors"), ("distance", tmp_path / "plain")):
        if path.name == "plain":
            checkpoint.save(make_network(), path, {})
        told = card.model_copy(update={"objects": ObjectChannel(kind=objects)})
        with pytest.raises(ExportError, match=rf'the card says objects\.kind = "{objects}"'):
            export(path, told, tmp_path / "out", None)


def test_a_card_that_says_nothing_takes_the_networks_own(folder, card, tmp_path):
    plain = card.model_copy(update={"objects": None})
    bundle = export(folder / "network.safetensors", plain, tmp_path / "out", None)
    assert bundle.manifest.objects == ObjectChannel(kind="distance")


@pytest.mark.parametrize("kind", ["centre", "boundary"])
def test_an_imported_network_with_two_channels(tmp_path, kind):
    card = make_card(objects={"kind": kind, "saddle": 0.8}, mirror_axes=[0, 1])
    bundle = import_network(headed(unetpp(classes=2), 2, 3), card, tmp_path / "mine")
    assert bundle.manifest.objects == ObjectChannel(kind=kind, saddle=0.8)
    with pytest.raises(
        ExportError, match="have 1 channel, and the card has objects, which need a second one"
    ):
        import_network(headed(unetpp(classes=1), 2, 3), card, tmp_path / "other")
    with pytest.raises(ExportError, match=r"the heads have 2 channels.*needs objects on the card"):
        import_network(headed(unetpp(classes=2), 2, 3), make_card(), tmp_path / "other")


def test_levels_cannot_be_added_by_labels(tmp_path, discs):
    card = make_card(objects={"kind": "distance"})
    bundle = import_network(headed(unetpp(classes=2, heads=(3,)), 2, 3), card, tmp_path / "mine")
    with pytest.raises(ExportError, match="label maps say nothing of the network's channel for objects"):
        add_levels(bundle, discs / "images", labels=discs / "labels")
