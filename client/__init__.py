"""Segments by a server or in this process, from Python and from the shell (httpx; never torch).

Each name is imported at its first use, because `Client` needs no engine and `Local` needs no httpx.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from client.aio import AsyncClient as AsyncClient
    from client.http import Client as Client
    from client.local import AsyncLocal as AsyncLocal
    from client.local import Local as Local
    from client.result import Result as Result
    from server.errors import UnetppError as SegmentError  # noqa: F401

_EXPORTS = {
    "AsyncClient": ("client.aio", "AsyncClient"),
    "AsyncLocal": ("client.local", "AsyncLocal"),
    "Client": ("client.http", "Client"),
    "Local": ("client.local", "Local"),
    "Result": ("client.result", "Result"),
    "SegmentError": ("server.errors", "UnetppError"),
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'client' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(importlib.import_module(module), attribute)
