"""A trained network becomes a bundle, and proves it (torch, onnx, onnxruntime)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from export.card import Card
    from server.runtime.bundle import Bundle


def from_torch(
    module: "nn.Module",
    example: "Tensor",
    card: "Card | Path | str",
    heads: Sequence[str] = (),
    *,
    out: Path | str,
    images: Path | str | None = None,
) -> "Bundle":
    """Makes a bundle of a torch module.

    Args:
        module: network; it returns one tensor or several, or `heads` names submodules.
        example: (N, C, h, w[, d]) float32 input; sizes that the network can take.
        card: description of the network, or its TOML file.
        heads: names of submodules whose outputs are the heads.
        out: folder of the bundle; an existing bundle there is replaced.
        images: folder of images that set int8's ranges; without it there are no int8 graphs.

    Raises:
        ImportRefused: the module cannot be exported, or has no such submodule.
        ExportError: network and card do not fit, or `out` is something else than a bundle.
    """
    from export.card import read_card
    from export.importing import from_torch as to_graph
    from export.pack import import_network

    described = read_card(Path(card)) if isinstance(card, str | Path) else card
    network = to_graph(module, example, heads)
    return import_network(network, described, Path(out), None if images is None else Path(images))
