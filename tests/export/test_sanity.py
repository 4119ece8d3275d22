"""Wrong cards against networks whose answers are known: a detector of red squares, and what is said about it."""

import numpy as np
import pytest
from PIL import Image

from export.data import pictures, with_labels
from export.importing import headed
from export.pack import import_network
from export.sanity import check
from tests.support.cards import make_card
from tests.support.networks import Builder

RED = ((12.0, 0.0, -12.0), -6.0)


def detector(weights=RED, *, shallow=None, end="", steep=1.0):
    """Two 1 × 1 convolutions, each with a head: the second head detects; the first, too, unless it has other weights."""
    build = Builder(2, 18)

    def point(value, values, bias, name):
        weight = build.constant(np.reshape(values, (1, -1, 1, 1)), f"{name}.weight")
        return build.add("Conv", value, weight, build.constant([bias], f"{name}.bias"), name=name)

    first = point("input", *(shallow or weights), "first")
    found = point("input", *weights, "found")
    second = point(found, [steep], 0.0, "second" if not end else "logits")
    if end:
        second = build.add(end, second, name="second")
        first = build.add(end, first, name="ended")
    return headed(build.model(3, [first, second]), 2, 3)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Red and, elsewhere, blue squares on black; the red ones are labelled."""
    root = tmp_path_factory.mktemp("squares")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for number in range(3):
        pixels = np.zeros((40, 50, 3), np.uint8)
        pixels[5 : 15 + number, 5:15, 0] = 255
        pixels[20:30, 25:45, 2] = 255
        Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        Image.fromarray(pixels[..., 0]).save(root / "labels" / f"{number}.png")
    return root


@pytest.fixture
def findings(squares, tmp_path):
    """What is said of a network with a card, by whether it is a warning."""

    def run(network, *, labels=False, **card):
        bundle = import_network(
            network, make_card(**({"input": {"normalization": "unit"}} | card)), tmp_path / "b"
        )
        items = (
            with_labels(squares / "images", squares / "labels", bundle.manifest)
            if labels
            else pictures(squares / "images", bundle.manifest)
        )
        found = check(bundle, [*items])
        return [one.text for one in found if one.warning], [one.text for one in found if not one.warning]

    return run


def test_a_right_card_gives_no_warning(findings):
    warnings, notes = findings(detector(), labels=True)
    assert warnings == []
    assert notes == [
        "IoU with the labels of 3 images: 1.000",
        "with the channels in the other order (BGR against RGB) it is 0.000: the card's order is better",
    ]


def test_colours_in_the_other_order_are_told_by_labels(findings):
    bgr = ((-12.0, 0.0, 12.0), -6.0)
    ((warning,), _) = findings(detector(bgr), labels=True)
    assert "IoU with the labels of 3 images: 0.000" in warning
    assert "it is 1.000: write channel_order = [2, 1, 0] in [input]" in warning
    right = {"normalization": "unit", "channel_order": [2, 1, 0]}
    assert findings(detector(bgr), labels=True, input=right)[0] == []
    ((warning,), _) = findings(detector(), labels=True, input=right)
    assert "remove channel_order" in warning


@pytest.mark.parametrize(("network", "card", "words"), [
    # Raw bytes before a network that was trained on 0 to 1.
    (detector(((30.0, 0.0, -30.0), -15.0)), {"input": {"normalization": "none"}}, "scores are all 0 or 1: the values are likely far larger"),
    # Values divided twice.
    (detector(), {"input": {"normalization": "unit", "std": [9e4] * 3}}, "scores are 0.002 everywhere"),
    (detector(((0.0, 0.0, 0.0), -4.0)), {}, "scores are 0.018 everywhere"),
    (detector(((1.0, 0.0, 1.0), -3.0)), {}, "the mask is empty on all of 3 images"),
    (detector(((1.0, 0.0, 1.0), 3.0)), {}, "the mask covers all of 3 images"),
    (detector(shallow=((0.0, 0.0, 0.0), -1.0)), {}, "level 1 agrees with the deepest to 0.00 (IoU): its head was likely never trained"),
])  # fmt: skip
def test_what_cannot_be_right_is_told(findings, network, card, words):
    warnings, _ = findings(network, **card)
    assert any(words in warning for warning in warnings), warnings


def test_scores_beyond_zero_and_one(findings):
    """A graph that ends in a node that tells nothing: the card claims an activation."""
    build = Builder(2, 18)
    weight = build.constant(np.reshape([20.0, 0, -20.0], (1, 3, 1, 1)), "w")
    logits = build.add("Conv", "input", weight, name="logits")
    out = build.add("Add", logits, build.constant(0.0, "zero"), name="out")
    warnings, _ = findings(headed(build.model(3, [out]), 2, 3), activation_included=True)
    assert any("scores reach from -20 to 20: the network gives logits" in one for one in warnings)


def test_a_sigmoid_applied_twice(findings):
    """Behind a node that hides it, so that only the answers tell."""
    build = Builder(2, 18)
    weight = build.constant(np.reshape([20.0, 0, -20.0], (1, 3, 1, 1)), "w")
    score = build.add("Sigmoid", build.add("Conv", "input", weight, name="logits"), name="score")
    out = build.add("Mul", score, build.constant(1.0, "one"), name="out")
    warnings, _ = findings(headed(build.model(3, [out]), 2, 3))
    assert any("scores lie between 0.5 and 0.73: the sigmoid is applied twice" in one for one in warnings)


def test_little_overlap_with_labels_is_told(findings):
    green = ((0.0, 12.0, 0.0), -3.0)
    warnings, _ = findings(detector(green), labels=True)
    assert any(
        "0.000, so little that the card or the order of the classes is likely wrong" in w for w in warnings
    )
