"""The ceiling: a loop around ONNX Runtime, arrays in, arrays out, one image at a time, no HTTP and no PNG."""

import time
from collections.abc import Sequence
from pathlib import Path

from bench.peers.common import Model, decode, feed
from bench.peers.load import Outcome, Summary, summarise


class BareLoop:
    """ONNX Runtime in this process.

    Attributes:
        masks: (h, w) of 0 and 1 per file; the reference for all contenders.
    """

    def __init__(self, graph: Path, threads: int, files: Sequence[bytes]) -> None:
        images = [decode(file) for file in files]
        self._model = Model(graph, threads)
        self._feeds = [feed([image]) for image in images]
        self.masks = [self._model.run([image])[0] for image in images]

    def run(self, seconds: float) -> Summary:
        """Runs the graph on one image after the other for a time."""
        outcomes: list[Outcome] = []
        start = now = time.perf_counter()
        while now - start < seconds:
            self._model.session.run(None, self._feeds[len(outcomes) % len(self._feeds)])
            begun, now = now, time.perf_counter()
            outcomes.append(Outcome(begun - start, now - start))
        return summarise(outcomes)
