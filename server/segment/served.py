"""What is open for requests: replaced as a whole when bundles are reloaded, while requests keep what they began with."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from server.runtime.bundle import HEAD_STD
from server.runtime.line import Lane
from server.runtime.opening import WHOLE, OpenBundle
from server.runtime.pace import Pace
from server.settings import BatchingSettings


@dataclass(frozen=True, eq=False)
class Served:
    """An open bundle and the lanes to its engines. It stays open for as long as anybody holds this.

    Attributes:
        opened: the bundle.
        lanes: by (graph, precision); `head_std` among them, where it is open.
    """

    opened: OpenBundle
    lanes: Mapping[tuple[str, str], Lane]


def serve(name: str, opened: OpenBundle, batching: BatchingSettings) -> Served:
    """Lanes to the engines of a bundle, whose pace is what was measured when it was opened."""
    lanes = {
        (graph, precision): Lane(
            name, graph, precision, engine,
            Pace({opened.measured_pixels: opened.pace.get((graph, precision), 0.0)}),
            batching.max_batch,
            opened.batch_pixels.get((graph, precision), batching.max_batch_pixels),
        )
        for (graph, precision), engine in opened.engines.items()
    }  # fmt: skip
    if opened.head_std:
        lanes[HEAD_STD, "fp32"] = dataclasses.replace(lanes[WHOLE], graph=HEAD_STD, engine=opened.head_std)
    return Served(opened, lanes)
