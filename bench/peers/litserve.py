"""LitServe, one worker on the CPU, batching on.

Followed: https://lightning.ai/docs/litserve/features/batching: `max_batch_size` and `batch_timeout` are given to the
`LitAPI`; `batch` and `unbatch` where inputs are not tensors. Files come as a multipart form, which `decode_request`
gets as a mapping when its argument is annotated `Request`
(https://github.com/Lightning-AI/LitServe/pull/80: "there is no good way to post files ... base64, which increases the
payload size"). `timeout` is raised from its 30 s, as its own log advises ("You can adjust the timeout by providing the
`timeout` argument"), so that a long queue is not an error. A `batch_timeout` of 0, the default, makes the worker
poll its queue without pause, which takes a whole core even when idle. `fast_queue` is on, as `LitServer` documents for more
than 100 requests per second; on 2 busy cores, taking turns with the default, it was as fast (101 and 97 per second at L1).
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
        """Once in the worker."""
        self._model = Model(self._graph, self._threads)

    def decode_request(self, request: Request) -> NDArray[np.uint8]:
        """A form with one file."""
        return decode(request["image"].file.read())

    def batch(self, inputs: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """Stacking is part of the shared work."""
        return list(inputs)

    def predict(self, x: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """One run of the graph."""
        return self._model.run(x)

    def unbatch(self, output: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        """One mask per request."""
        return output

    def encode_response(self, output: NDArray[np.uint8]) -> Response:
        """PNG."""
        return Response(encode(output), media_type="image/png")


def main() -> None:
    """Serves until it is stopped."""
    given = arguments()
    api: Any = Segment(str(given.graph), given.threads, given.max_batch)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600, fast_queue=True)
    server.run(host="127.0.0.1", port=given.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
