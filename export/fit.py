"""Whether a card describes a network: refused in words where it cannot, and a warning where it may not."""

from collections.abc import Iterator

import numpy as np
import onnx

from export.card import Card, ExportError, Input
from export.cut import weight
from export.importing import MAX_LEVELS, HeadedGraph
from export.tail import Activation

# Nodes that change no value of a map, so that an activation before them is still its end.
TRANSPARENT = {"Identity", "Cast", "Transpose", "Resize", "Upsample", "Slice", "Squeeze", "Unsqueeze"}

LINEAR = {"Conv", "ConvTranspose", "MatMul", "Gemm", "BatchNormalization"}
ACTIVATIONS = {"Sigmoid": ("sigmoid", "sigmoid-per-class"), "Softmax": ("softmax",)}

ARITHMETIC = {"Sub", "Add", "Mul", "Div", "BatchNormalization", "Cast", "Identity"}


def check_fit(network: HeadedGraph, card: Card) -> tuple[Input, Activation]:
    """Refuses a card that describes another network.

    Returns:
        Preprocessing and activation, which a card of an import must have.

    Raises:
        ExportError: says what is missing or differs, and what to write.
    """
    missing = [name for name in ("dims", "input", "activation") if getattr(card, name) is None]
    if card.input is None or card.activation is None or missing:
        raise ExportError(f"the card of a network that is imported needs {', '.join(missing)}")
    if card.dims != network.dims:
        raise ExportError(f"the card says dims = {card.dims}, the network has {network.dims}")
    check_channels(card, network.channels)
    if len(network.heads) > MAX_LEVELS:
        raise ExportError(
            f"the network has {len(network.heads)} heads; a bundle has levels 1 to {MAX_LEVELS}"
        )
    _check_classes(network.shapes[network.heads[-1]][1], card)
    for head in network.heads:
        _check_activation(network, head, card)
    return card.input, card.activation


def check_channels(card: Card, channels: int) -> None:
    """Refuses a card that names another number of channels than a network takes.

    Raises:
        ExportError: says both numbers.
    """
    if len(card.channels) != channels:
        raise ExportError(f"the card names {len(card.channels)} channels, the network takes {channels}")


def _check_classes(channels: int, card: Card) -> None:
    classes, activation, objects = len(card.classes), card.activation or "sigmoid", card.objects is not None
    expected = {"sigmoid": 1 + objects, "softmax": classes + 1, "sigmoid-per-class": classes}[activation]
    if channels == expected and (activation != "sigmoid" or classes == 1):
        return
    meaning = {
        "sigmoid": "one channel of one class, and one of objects" if objects else "one channel, of one class",
        "softmax": "the background and then a channel per class",
        "sigmoid-per-class": "a channel per class, without the background",
    }
    if activation == "sigmoid" and channels == 1:
        raise ExportError(
            "the heads have 1 channel, and the card has objects, which need a second one; remove objects"
        )
    fitting = ["softmax needs as many classes as channels without the first"] if channels > 1 else []
    fitting += ["sigmoid-per-class as many classes as channels"] if channels > 1 else ["sigmoid is for that"]
    fitting += (
        ["a second channel that tells objects apart needs objects on the card"] if channels == 2 else []
    )
    raise ExportError(
        f"the heads have {channels} {'channels' if channels > 1 else 'channel'}, and the card has {classes} "
        f"{'classes' if classes > 1 else 'class'} with activation = {activation!r}, which is {meaning[activation]}; "
        + ", ".join(fitting)
    )


def _check_activation(network: HeadedGraph, head: str, card: Card) -> None:
    """Compares the card's activation with the node that a head ends in, where that tells."""
    end = _end(network.model, head)
    if end == "LogSoftmax":
        raise ExportError(f"head {head!r:.60} gives logarithms (LogSoftmax); export the network without it")
    if end in ACTIVATIONS and not card.activation_included:
        raise ExportError(
            f"head {head!r:.60} ends in {end}, so that it would be applied twice; write activation_included = true in the card"
        )
    if end in ACTIVATIONS and card.activation not in ACTIVATIONS[end]:
        raise ExportError(
            f"head {head!r:.60} ends in {end}, and the card says activation = {card.activation!r}; "
            f"write activation = {ACTIVATIONS[end][0]!r}"
        )
    if end in LINEAR and card.activation_included:
        raise ExportError(
            f"head {head!r:.60} ends in {end}, which gives logits; remove activation_included = true from the card"
        )


def _end(model: onnx.ModelProto, tensor: str) -> str:
    """The operator that makes a tensor, whatever only moves, resizes or renames it afterwards; "" for an input."""
    makers = {name: node for node in model.graph.node for name in node.output}
    while tensor in makers and makers[tensor].op_type in TRANSPARENT:
        tensor = makers[tensor].input[0]
    return makers[tensor].op_type if tensor in makers else ""


def warnings(network: HeadedGraph, card: Card) -> Iterator[str]:
    """Yields what in a network and its card may be a mistake."""
    inside = [*_normalisation_inside(network.model)]
    if inside and card.input and (card.input.mean or card.input.std or card.input.normalization != "none"):
        yield (
            f"the graph itself begins with {', '.join(inside)}, after what [input] of the card does; where that is its "
            'normalisation, write normalization = "none" and leave out mean and std'
        )


def _normalisation_inside(model: onnx.ModelProto) -> Iterator[str]:
    """Yields the arithmetic with constants between the input of a graph and its first other node."""
    tensor = model.graph.input[0].name
    while True:
        readers = [node for node in model.graph.node if tensor in node.input]
        if len(readers) != 1 or readers[0].op_type not in ARITHMETIC:
            return
        (node,) = readers
        values = next((v for name in node.input if (v := weight(model, name)) is not None), None)
        if node.op_type not in ("Cast", "Identity"):
            shown = "" if values is None else f" {', '.join(f'{v:.4g}' for v in np.ravel(values)[:4])}"
            yield f"{node.op_type}{shown}"
        tensor = node.output[0]
