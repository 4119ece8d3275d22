"""A server for batch work: what takes long is sent as a job, which also reports its progress."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any, Self

from client.aio import AsyncClient
from client.files import byte_size, is_archive
from client.result import Result
from server.segment.request import OnProgress, ignore_progress

# Parameters that a job does not have.
INTERACTIVE = ("deadline_ms", "min_level")


class Remote:
    """A server with the interface of `AsyncLocal`.

    Args:
        client: client of the server, which is closed with this object.
        as_job: whether everything is sent as a job.
        job_bytes: file size from which an input is sent as a job; a zip always is, because its images take
            long however small it is.
    """

    def __init__(
        self, client: AsyncClient, *, as_job: bool = False, job_bytes: int = 8 * 1024 * 1024
    ) -> None:
        self.models, self.model = client.models, client.model
        self._client, self._as_job, self._job_bytes = client, as_job, job_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def segment(
        self, source: Path, *, progress: OnProgress = ignore_progress, **parameters: Any
    ) -> Result:
        """Segments one input; a job is removed from the server in the end, also when this is cancelled."""
        size = await asyncio.to_thread(byte_size, source)
        is_long = size >= self._job_bytes or await asyncio.to_thread(is_archive, source)
        if not (
            self._as_job or (is_long and not any(parameters.get(name) is not None for name in INTERACTIVE))
        ):
            return await self._client.segment(source, **parameters)
        job = await self._client.submit(source, **parameters)
        try:
            await job.wait(
                lambda one: progress(
                    one["stage"] or one["state"], one["windows"]["done"], one["windows"]["total"]
                )
            )
            return await job.result()
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(5):
                    await job.cancel()
