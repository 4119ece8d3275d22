"""LitServe with requests that carry a batch of decoded images, (N, H, W, 3) bytes in a multipart form.

Set up as `litserve.py`, without batching of its own: a request is a batch.
"""

from typing import Any

import litserve
import numpy as np
from fastapi import Request, Response
from numpy.typing import NDArray

from bench.peers.common import Model, arguments


class Segment(litserve.LitAPI):
    """The documented hooks, in the order in which they run."""

    def __init__(self, graph: str, threads: int, side: int) -> None:
        super().__init__(api_path="/segment")
        self._graph, self._threads, self._side = graph, threads, side

    def setup(self, device: str) -> None:  # noqa: ARG002 - the hook's signature
        """Opens the graph, once in the worker."""
        self._model = Model(self._graph, self._threads)

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        """Reads the file of a form."""
        pixels = np.frombuffer(request["image"].file.read(), np.uint8)
        return pixels.reshape(-1, self._side, self._side, 3)

    def predict(self, x: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
        """Runs the graph once."""
        return self._model.run(list(x))

    def encode_response(self, output: list[NDArray[np.uint8]]) -> Response:
        """Sends the masks as bytes."""
        return Response(np.stack(output).tobytes(), media_type="application/octet-stream")


def main() -> None:
    """Serves until it is stopped; `--max-batch` is the side of the images."""
    given = arguments()
    api: Any = Segment(str(given.graph), given.threads, given.max_batch)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(host="127.0.0.1", port=given.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
