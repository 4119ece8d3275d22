"""A typical first version: FastAPI, and the network in torch, eager, float32; no batching.

Followed: https://fastapi.tiangolo.com/async/ (blocking work belongs in a `def` route, which runs in the thread pool) and
https://fastapi.tiangolo.com/tutorial/request-files/ (`UploadFile`); https://www.starlette.io/threadpool/ for the pool's size:
more runs at once than there are cores only compete for them, and each takes the memory of its activations.
Choosing the layout is part of the first request, and so of the start-up.

The weights are those of the bundle, the network is pruned to the level.
"""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated

import anyio.to_thread
import torch
import uvicorn
from fastapi import FastAPI, File, Response

from bench.peers.common import arguments, decode, encode, feed, foreground
from export.graph import ServedGraph, level_networks
from model import checkpoint
from model.network import UNetPlusPlus
from server.runtime.bundle import WEIGHTS


def load(graph: Path) -> ServedGraph:
    """The network that an ONNX file of a bundle holds."""
    network, _ = checkpoint.load(graph.parent / WEIGHTS)
    if not isinstance(network, UNetPlusPlus):
        raise SystemExit("the bundle's weights are not a UNet++")
    return ServedGraph(level_networks(network)[graph.stem][1], "sigmoid").eval()


def run(graph: ServedGraph, body: bytes, layout: torch.memory_format) -> bytes:
    """PNG in, PNG out."""
    inputs = {name: torch.from_numpy(values) for name, values in feed([decode(body)]).items()}
    inputs["image"] = inputs["image"].contiguous(memory_format=layout)
    with torch.inference_mode():
        return encode(foreground(graph(**inputs)[0, 0].numpy()))


def faster_layout(graph: ServedGraph, body: bytes) -> torch.memory_format:
    """Channels first or last, whichever is faster for this network and size on this machine."""
    seconds = {}
    for layout in (torch.channels_last, torch.contiguous_format):
        graph.to(memory_format=layout)  # type: ignore[call-overload]
        run(graph, body, layout)
        begun = time.perf_counter()
        for _ in range(3):
            run(graph, body, layout)
        seconds[layout] = time.perf_counter() - begun
    best = min(seconds, key=lambda layout: seconds[layout])
    graph.to(memory_format=best)  # type: ignore[call-overload]
    return best


def main() -> None:
    """Serves until it is stopped."""
    given = arguments()
    torch.set_num_threads(given.threads)
    graph = load(given.graph)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = given.threads
        yield

    app = FastAPI(lifespan=lifespan)
    layout: torch.memory_format | None = None

    @app.post("/segment")
    def segment(image: Annotated[bytes, File()]) -> Response:
        nonlocal layout
        layout = layout or faster_layout(graph, image)
        return Response(run(graph, image, layout), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=given.port, log_level="warning")


if __name__ == "__main__":
    main()
