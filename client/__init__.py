"""Asks a segmentation server, or segments in this process, from Python and from the shell (httpx; never torch).

`Client` and `AsyncClient` know HTTP only; `Local` and `AsyncLocal` are the same without a server. Each is imported when it is first used, so
that neither needs what only the other one needs.
"""

from typing import TYPE_CHECKING, Any

from client.errors import SegmentError as SegmentError
from client.result import Result as Result

if TYPE_CHECKING:
    from client.aio import AsyncClient as AsyncClient
    from client.http import Client as Client
    from client.local import AsyncLocal as AsyncLocal
    from client.local import Local as Local

_HOMES = {"Client": "client.http", "AsyncClient": "client.aio", "Local": "client.local", "AsyncLocal": "client.local"}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'client' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
