"""Requests to /jobs, their events, and an engine that waits while it is shut."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from server.arrays import Tiles
from tests.support.files import GOOD, picture_bytes
from tests.support.service import bright

Checked = Callable[..., Any]
DARK = picture_bytes(np.full((16, 16), 3, dtype=np.uint8))


class Gate:
    """An engine that waits while it is shut, and fails on an image that is dark all over."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self._entered = threading.Semaphore(0)

    def __call__(self, tiles: Tiles) -> np.ndarray:
        self._entered.release()
        assert self.open.wait(60)
        if (tiles.pixels == 3).all():
            raise ValueError("a secret of the engine")
        return bright(tiles)

    def wait(self) -> None:
        """Until a batch has come."""
        assert self._entered.acquire(timeout=60)

    def opens_after_drain(self, app: FastAPI) -> FastAPI:
        """An application whose engine ends its batch once the server drains, because a batch cannot be stopped."""
        operations = app.state.operations

        def drain() -> None:
            operations.drain()
            self.open.set()

        app.state.operations = dataclasses.replace(operations, drain=drain)
        return app


def post(client: httpx.Client, query: str = "", body: bytes = GOOD) -> dict[str, Any]:
    answer = client.post(f"/jobs{query}", content=body)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


def parsed(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def watching(client: httpx.Client, id_: str) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
    with client.stream("GET", f"/jobs/{id_}/events") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store, no-transform"
        yield parsed(answer.iter_lines())


def last_event(client: httpx.Client, id_: str) -> tuple[str, dict[str, Any]]:
    with watching(client, id_) as events:
        return list(events)[-1]
