"""Networks of other projects: every level answers as the original framework does, on odd sizes, tiled and untiled.

`foreign/` holds files and answers that their own classes gave (README.md there); MONAI's are built here.
"""

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special
from torch import nn

from export.cut import cut
from export.importing import PROBE, headed, open_session
from export.onnx_file import read_onnx
from export.pack import import_network
from export.verify import verify
from server.arrays import Image, Tiles, Volume
from server.runtime.bundle import ACCURATE, Bundle, Manifest, Window
from server.runtime.engines import ENGINES
from server.segment.merge import WindowMerger
from server.segment.preprocess import place
from server.segment.sliding_window import make_sliding_window
from tests.export.foreign.make import FAMILIES, HERE, STEPS, bgr_twice_scaled, zscore
from tests.support.cards import make_card

pytestmark = pytest.mark.long

IMAGENET = {"normalization": "unit", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

# What a person writes on the card; the network's own pipeline is in foreign/make.py.
CARDS = {
    "4uiiurz1": {
        "channels": 3, "classes": 2, "activation": "sigmoid-per-class",
        "input": {
            "normalization": "none", "channel_order": [2, 1, 0],
            "mean": [255 * one for one in IMAGENET["mean"]], "std": [255 * 255 * one for one in IMAGENET["std"]],
        },
    },
    "bigmb": {
        "channels": 3, "classes": 2, "activation": "sigmoid-per-class",
        "input": {"normalization": "unit", "mean": [0.5] * 3, "std": [0.5] * 3},
    },
    "shawnbit": {"channels": 1, "classes": 1, "activation": "softmax", "input": {"normalization": "unit"}, "aggregation": "mean-logit"},
    "zju": {"channels": 3, "classes": 2, "activation": "sigmoid-per-class", "input": {"normalization": "unit"}, "aggregation": "mean-logit"},
    "official-2d": {"channels": 3, "classes": 2, "input": {"normalization": "zscore"}},
    "official-3d": {"dims": 3, "channels": 1, "classes": 2, "input": {"normalization": "zscore"}},
    "nnunet-v2": {"dims": 3, "channels": 1, "classes": 2, "input": {"normalization": "zscore"}},
    "smp": {"channels": 3, "classes": 1, "activation": "softmax", "input": IMAGENET},
    "keras": {"channels": 1, "classes": 2, "activation": "sigmoid-per-class", "activation_included": True, "input": {"normalization": "unit"}},
}  # fmt: skip

LEVELS = {"smp": (4,), "bigmb": (4,), "nnunet-v2": (1, 2, 3), "official-2d": (1, 2, 3, 4, 5), "official-3d": (1, 2, 3, 4, 5)}  # fmt: skip

DIVISORS = {"smp": (32,), "bigmb": (16,), "nnunet-v2": (8, 8, 8), "official-2d": (2, 4, 8, 16, 32), "official-3d": (2, 4, 8, 16, 32)}  # fmt: skip

# Their heads come deepest first.
DEEPEST_FIRST = {"official-2d", "official-3d", "nnunet-v2"}


def card_of(name: str, side: int, overlap: float):
    fields = CARDS[name]
    return make_card(**fields, window={"size": [side] * fields.get("dims", 2), "overlap": overlap})


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    """Imports a family once, as `unetpp import` does."""

    @cache
    def make(name: str) -> Bundle:
        card = card_of(name, 64, 0.25)
        network = headed(read_onnx(HERE / f"{name}.onnx"), card.dims, len(card.channels))
        return import_network(network, card, tmp_path_factory.mktemp("bundles") / name)

    return make


def activated(logits: np.ndarray, activation: str, applied: bool = False) -> np.ndarray:
    """Scores of one head, written again."""
    if activation == "softmax":
        return special.softmax(logits, axis=1)
    scores = logits if applied else special.expit(logits)
    return (
        scores if activation == "sigmoid" else np.concatenate([1 - scores.max(1, keepdims=True), scores], 1)
    )


def source_of(values: np.ndarray) -> Image | Volume:
    return Image(values) if values.ndim == 3 else Volume(values, np.eye(4))


def segment(manifest: Manifest, name: str, engine, values: np.ndarray, divisor: int = 2):
    """The blended scores (K, *size) in float32, the mask, and the number of windows, as a request gets them."""
    graph = manifest.graph(name)
    graph = graph.model_copy(update={"divisor": max(graph.divisor, divisor)})
    source = source_of(values)
    placement = place(source.input_header, manifest, "auto")
    window = make_sliding_window(source, placement, manifest, graph)
    scores = np.empty((manifest.score_channels, *source.size), np.float32)
    threshold = manifest.threshold if manifest.score_channels == 1 else None
    merger = WindowMerger(
        window.windows,
        manifest.score_channels,
        threshold,
        placement.view(window.mask.classes),
        placement.view(scores, leading=1),
    )
    window = dataclasses.replace(window, merger=merger)
    for chunk in window.windows.chunks:
        window.merger.merge(chunk, engine(window.cut(chunk)))
    return scores, window.finish().classes, len(window.windows)


def open_engine(bundle: Bundle, graph: str, name: str):
    return ENGINES[name].open(Path(bundle.path(graph, "fp32")), "fp32", "cpu", 1).run


def expected(name: str, graph: str) -> np.ndarray:
    """Scores of the original, cut to the image; activation and aggregation as its own inference has them."""
    stored = np.load(HERE / f"{name}.npz")
    heads = [stored[f"head{k}"] for k in range(sum(key.startswith("head") for key in stored))]
    heads = heads[::-1] if name in DEEPEST_FIRST else heads
    if name == "nnunet-v2":
        inside = tuple(slice(0, side, STEPS[3]) for side in stored["image"].shape[:-1])
        heads = [
            one if one.shape == heads[-1].shape else upsampled(one, (16, 32, 24))[(..., *inside)]
            for one in heads
        ]
    card = card_of(name, 64, 0.25)
    if graph != ACCURATE:
        level = LEVELS.get(name, (1, 2, 3, 4)).index(int(graph[1:]))
        return activated(heads[level], card.activation, card.activation_included)[0]
    if card.aggregation == "mean-logit":
        return activated(np.mean(heads, axis=0), card.activation)[0]
    return np.mean([activated(one, card.activation, card.activation_included) for one in heads], axis=0)[0]


def upsampled(logits: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    return nn.functional.interpolate(torch.from_numpy(logits), size=size, mode="trilinear").numpy()


@pytest.mark.parametrize("name", CARDS)
def test_every_level_answers_as_the_original(name, bundle_of):
    bundle = bundle_of(name)
    image = np.load(HERE / f"{name}.npz")["image"]
    assert bundle.manifest.levels == LEVELS.get(name, (1, 2, 3, 4))
    assert tuple(one.divisor for one in bundle.manifest.graphs[:-1]) == DIVISORS.get(name, (2, 4, 8, 16))
    kept = tuple(slice(0, side, STEPS[image.ndim - 1]) for side in image.shape[:-1])
    for graph in [one.name for one in bundle.manifest.graphs]:
        right = expected(name, graph)
        # The levels differ, so that none can stand for another.
        assert right.std() > 1e-3
        for engine in ("onnxruntime", "openvino"):
            scores, mask, count = segment(bundle.manifest, graph, open_engine(bundle, graph, engine), image)
            assert count == 1
            assert np.abs(scores[(slice(None), *kept)] - right).max() < 1e-4, (graph, engine)
            clear = np.sort(right, axis=0)[-1] - np.sort(right, axis=0)[-2] > 2e-4
            assert np.array_equal(mask[kept][clear], right.argmax(0)[clear]), (graph, engine)


def normalise_of(name: str):
    return FAMILIES[name].normalise if name != "keras" else lambda image: image / 255


def framework(name: str, head: str, image: np.ndarray):
    """The person's own file on ONNX Runtime behind the network's own pipeline, tile by tile."""
    session = open_session(read_onnx(HERE / f"{name}.onnx"))
    card = card_of(name, 64, 0.25)
    strides = headed(read_onnx(HERE / f"{name}.onnx"), card.dims, len(card.channels)).strides(head)
    mean, std = image.mean(tuple(range(image.ndim - 1))), image.std(tuple(range(image.ndim - 1)))

    def run(tiles: Tiles) -> np.ndarray:
        pixels = np.moveaxis(tiles.pixels, 1, -1).astype(np.float64)
        # The statistics are those of the whole image, whichever tile it is.
        seen = (pixels - mean) / std if normalise_of(name) is zscore else normalise_of(name)(pixels)
        fed = np.ascontiguousarray(np.moveaxis(seen, -1, 1), np.float32)
        logits = session.run([head], {session.get_inputs()[0].name: fed})[0]
        if max(strides) > 1:
            logits = upsampled(logits, tuple(np.multiply(logits.shape[2:], strides)))
        return activated(logits, card.activation, card.activation_included)

    return run


@pytest.mark.parametrize("name", CARDS)
def test_tiles_answer_as_the_original(name, bundle_of):
    """Every tile, blended: networks that look at all of a tile answer otherwise than on the whole image, in the original too."""
    bundle = bundle_of(name)
    image = np.load(HERE / f"{name}.npz")["image"]
    image = np.concatenate([image, image[::-1], image], axis=0)[: 75 if image.ndim == 3 else 45]
    small = Window(size=(32,) * bundle.manifest.dims, overlap=0.25)
    manifest = bundle.manifest.model_copy(update={"window": small})
    network = headed(read_onnx(HERE / f"{name}.onnx"), manifest.dims, len(manifest.channels))
    # The whole network, which the original is, takes no smaller tiles than its deepest level.
    divisor = manifest.graphs[-1].divisor
    for level, head in zip(manifest.levels, network.heads, strict=True):
        graph = f"L{level}"
        right, right_mask, _ = segment(manifest, graph, framework(name, head, image), image, divisor)
        engine = open_engine(bundle, graph, "onnxruntime")
        scores, mask, count = segment(manifest, graph, engine, image, divisor)
        assert count > 1
        assert np.abs(scores - right).max() < 1e-4, graph
        assert (mask == right_mask).mean() > 0.999


@pytest.mark.parametrize("name", CARDS)
def test_a_cut_gives_the_bits_of_the_head(name):
    fields = CARDS[name]
    network = headed(read_onnx(HERE / f"{name}.onnx"), fields.get("dims", 2), fields["channels"])
    size = PROBE[network.dims]
    image = np.random.default_rng(1).normal(size=(2, network.channels, *size)).astype(np.float32)
    whole = open_session(network.model)
    answers = whole.run(network.heads, {whole.get_inputs()[0].name: image})
    for head, answer in zip(network.heads, answers, strict=True):
        part = open_session(cut(network.model, [head]))
        assert np.array_equal(part.run(None, {part.get_inputs()[0].name: image})[0], answer), head


# Not official-3d, which takes minutes: five levels on volumes of 64 voxels a side.
@pytest.mark.parametrize("name", sorted(CARDS.keys() - {"official-3d"}))
def test_the_bundle_verifies_against_the_file(name, bundle_of):
    assert verify(bundle_of(name), source=HERE / f"{name}.onnx")


def test_the_wrong_order_of_channels_is_another_answer():
    """The reference would notice it: this network's input is BGR, scaled twice."""
    image = np.load(HERE / "4uiiurz1.npz")["image"]
    assert np.abs(bgr_twice_scaled(image) - bgr_twice_scaled(image[..., ::-1])).max() > 1e-3
