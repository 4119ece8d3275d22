"""A server as batch work uses it: what takes long goes there as a job, and how far it is comes back."""

import asyncio
import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.aio import AsyncClient, AsyncJob
from client.documents import JobDocument, ModelCard, ModelSummary, Progress
from client.result import Result
from client.sources import is_zip

# Volumes and stacks of more take longer than one likes to hold a connection open for.
JOB_BYTES = 8 * 1024 * 1024
VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")
TIFFS = (".tif", ".tiff")

# What only makes sense where somebody waits; jobs refuse them.
URGENT = ("deadline_ms", "min_level")


class Remote:
    """A client with the interface of `AsyncLocal`.

    Args:
        client: of the server.
        as_job: send everything as a job.
    """

    def __init__(self, client: AsyncClient, *, as_job: bool) -> None:
        self._client = client
        self._as_job = as_job

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._client.aclose()

    async def models(self) -> list[ModelSummary]:
        """What is open there."""
        return await self._client.models()

    async def model(self, name: str) -> ModelCard:
        """The card of a model."""
        return await self._client.model(name)

    async def segment(self, source: Path, *, progress: Progress = lambda stage, done, total: None, **asked: Any) -> Result:
        """See `AsyncClient.segment`."""
        if not (self._as_job or (is_long(source) and not any(asked.get(name) is not None for name in URGENT))):
            return await self._client.segment(source, **asked)
        job = await self._client.submit(source, **asked)
        try:
            await job.wait(lambda document: _tell(document, progress))
            return await job.result()
        finally:
            # Also where nobody wants it any more: the server need not go on.
            await _remove(job)


def is_long(source: Path) -> bool:
    """Whether this is a large volume or stack, or a zip, whose size does not say how long its images take."""
    if is_zip(source):
        return True
    name = source.name.lower()
    return source.stat().st_size > JOB_BYTES and (name.endswith(VOLUMES) or (name.endswith(TIFFS) and _is_stack(source)))


def _is_stack(source: Path) -> bool:
    import tifffile

    # What is wrong with it the server says.
    with contextlib.suppress(Exception), tifffile.TiffFile(source) as tiff:
        return len(tiff.pages) > 1
    return False


def _tell(document: JobDocument, progress: Progress) -> None:
    windows = document["windows"]
    progress(document["stage"] or document["state"], windows["done"], windows["total"])


async def _remove(job: AsyncJob) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(5):
            await job.cancel()
