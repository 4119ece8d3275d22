"""Responses with a file that is kept, of which GET may request a part (RFC 9110, 14.2)."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

import anyio
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, MalformedRangeHeader, RangeNotSatisfiable
from starlette.types import Receive, Scope, Send

from server.jobs.file_store import KeptFile


class KeptFileResponse(FileResponse):
    """Starlette's response with a file, which reads over a Range that it cannot read.

    Args:
        kept: the file.
        headers: headers of the response.
    """

    def __init__(self, kept: KeptFile, headers: Mapping[str, str]) -> None:
        # The path is never opened, and the type is in the headers.
        super().__init__("kept", headers=headers, stat_result=kept.stat)
        self._kept = kept

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        # Some servers would send the file at a path by themselves.
        scope = {**scope, "extensions": {}}
        if scope["method"] != "GET":
            # Range has a meaning for GET alone.
            scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]
        await super().__call__(scope, receive, send)

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        """Overrides the method of Starlette 1.10, which opens a path."""
        file = anyio.wrap_file(await anyio.to_thread.run_sync(self._kept.open))
        try:
            yield file
        finally:
            # Also after the client has gone.
            with anyio.CancelScope(shield=True):
                await file.aclose()

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        """Overrides Starlette's method: a unit or a range that cannot be read counts as no Range, for which the result is [].

        Raises:
            HTTPException: none of the range lies in the file.
        """
        if http_range.partition("=")[0].strip().lower() != "bytes":
            return []
        try:
            return super()._parse_range_header(http_range, file_size)
        except MalformedRangeHeader:
            return []
        except RangeNotSatisfiable as error:
            raise HTTPException(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                f"the range {http_range!r:.60} lies outside of the file, which has {file_size:,} bytes; request a part of these",
                {"Content-Range": f"bytes */{file_size}"},
            ) from error

    @classmethod
    def _parse_ranges(cls, range_: str, file_size: int) -> list[tuple[int, int]]:
        """Overrides Starlette's method: of several ranges those count that lie in the file, if any does."""
        ranges = super()._parse_ranges(range_, file_size)
        return [(start, end) for start, end in ranges if 0 <= start < file_size] or ranges
