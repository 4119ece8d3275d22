"""LitServe, one worker on the CPU, batching on.

Followed: https://lightning.ai/docs/litserve/features/batching: `max_batch_size` and `batch_timeout` are given
to the `LitAPI`; its own `batch` stacks arrays of one size. Files come as a multipart form, which
`decode_request` gets as a mapping when its argument is annotated `Request`
(https://github.com/Lightning-AI/LitServe/pull/80: "there is no good way to post files ... base64, which
increases the payload size"). A `batch_timeout` of 0, the default, makes the worker poll its queue without
pause, which takes a whole core even when idle. `fast_queue` is on, because `LitServer` documents it for more
than 100 requests per second.
"""

from collections.abc import Sequence
from typing import Any

import litserve
import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray

from bench.peers.common import BATCH_WAIT_S, Model, arguments, decode, encode


class Segment(litserve.LitAPI):
    """The documented hooks, in the order in which they run."""

    def __init__(self, graph: str, threads: int, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=BATCH_WAIT_S, api_path="/segment")
        self._graph, self._threads = graph, threads

    def setup(self, device: str) -> None:  # noqa: ARG002 - the hook's signature
        """Opens the graph, once in the worker."""
        self._model = Model(self._graph, self._threads)

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        """Reads the file of a form."""
        return decode(request["image"].file.read())

    def predict(self, x: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Runs the graph once."""
        return self._model.run(x)

    def encode_response(self, output: NDArray[np.uint8]) -> Response:
        """Writes the mask as PNG."""
        return Response(encode(output), media_type="image/png")


def main() -> None:
    """Serves until it is stopped."""
    given = arguments()
    api: Any = Segment(str(given.graph), given.threads, given.max_batch)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=given.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
