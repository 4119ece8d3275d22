"""Ray Serve, one replica, `@serve.batch`.

Followed: https://docs.ray.io/en/latest/serve/advanced-guides/dyn-req-batch.html ("`max_batch_size` ideally should be a
power of 2"; `batch_wait_timeout_s` by the latency that is wanted) and
https://docs.ray.io/en/latest/serve/advanced-guides/performance.html: `max_ongoing_requests` is raised from 5 (with
`async` methods "you might want to increase `max_ongoing_requests`", its example says 1000), the replica reserves
its cores, and the flags under "Enable throughput-optimized flags" are set in `contenders.py`; they ask to "avoid
blocking operations in your request path", so the graph runs in a thread.
"""

import asyncio
import signal
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from bench.peers.common import BATCH_WAIT_S, Model, arguments


@serve.deployment(max_ongoing_requests=1000)
class Segment:
    """One replica."""

    def __init__(self, graph: str, threads: int, max_batch: int) -> None:
        self._model = Model(graph, threads)
        self.answer.set_max_batch_size(max_batch)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=BATCH_WAIT_S)
    async def answer(self, bodies: list[bytes]) -> list[bytes]:
        """Bodies of several requests, one run."""
        return await asyncio.to_thread(self._model.answer, bodies)

    async def __call__(self, request: Request) -> Response:
        """One request: the body is the file."""
        return Response(await self.answer(await request.body()), media_type="image/png")


def main() -> None:
    """Serves until it is stopped."""
    given = arguments()
    ray.init(num_cpus=given.threads, include_dashboard=False, configure_logging=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": given.port})
    deployment: Any = Segment  # the decorator made it one
    replica = deployment.options(ray_actor_options={"num_cpus": given.threads})
    serve.run(
        replica.bind(str(given.graph.resolve()), given.threads, given.max_batch), route_prefix="/segment"
    )
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
