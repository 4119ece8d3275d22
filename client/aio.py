"""`AsyncClient`: the same conversations as `http.py` has, awaited."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from numpy.typing import ArrayLike

from client import calls, jobs
from client.calls import Formats
from client.documents import JobDocument, ModelCard, ModelSummary
from client.result import Result
from client.sources import Source
from client.talk import Close, Command, Lost, Next, Open, Send, Sleep, T, Talk, opened
from client.transport import Configured, Sink, arguments, head, lost


class AsyncClient(Configured):
    """A server. Its methods are those of `Client`, to be awaited; see `Configured` for what it is made with."""

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(url, api_key, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connections."""
        await self._http.aclose()

    async def models(self) -> list[ModelSummary]:
        """What is open there."""
        return await self.run(calls.models(self._retries))

    async def model(self, name: str) -> ModelCard:
        """The card of a model."""
        return await self.run(calls.model(name, self._retries))

    async def segment(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        **parameters: Any,
    ) -> Result:
        """See `Client.segment`."""
        return await self.run(calls.segment(source, formats, reference, affine, parameters, self._retries))

    async def submit(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        **parameters: Any,
    ) -> "AsyncJob":
        """See `Client.submit`."""
        return self.job((await self.run(calls.submit(source, formats, reference, affine, parameters, self._retries)))["id"])

    def job(self, job_id: str) -> "AsyncJob":
        """A job that was submitted before, by this program or another."""
        return AsyncJob(job_id, self)

    async def run(self, talk: Talk[T]) -> T:
        """Carries out a conversation."""
        answer: Any = None
        with contextlib.closing(talk):
            async with _Hands(self._http) as hands:
                while True:
                    try:
                        command = talk.throw(answer) if isinstance(answer, Lost) else talk.send(answer)
                    except StopIteration as end:
                        return end.value  # type: ignore[no-any-return]  # as the generator is annotated
                    try:
                        answer = await hands.do(command)
                    except httpx.HTTPError as error:
                        answer = lost(error)


class _Hands(contextlib.AsyncExitStack):
    """Carries out the commands of one conversation, and holds what it has opened."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        super().__init__()
        self._http = http
        self._pieces: AsyncIterator[bytes]

    async def do(self, command: Command) -> Any:
        """What comes of it."""
        match command:
            case Send(call, limit_s):
                return await self._send(call, limit_s)
            case Open(call, limit_s):
                answer = await self.enter_async_context(self._http.stream(**arguments(call, limit_s)))
                self._pieces = answer.aiter_bytes()
                return head(answer, b"" if answer.status_code == 200 else await answer.aread())
            case Next():
                return await anext(self._pieces, None)
            case Close():
                return await self.aclose()
            case Sleep(seconds):
                return await asyncio.sleep(seconds)

    async def _send(self, call: Any, limit_s: float) -> Any:
        with opened(call.uploads) as files:
            async with self._http.stream(**arguments(call, limit_s, files)) as answer:
                with Sink(call, answer, limit_s) as sink:
                    async for piece in answer.aiter_bytes():
                        sink.write(piece)
                return sink.reply


class AsyncJob:
    """Work in the background; see `Job`."""

    def __init__(self, job_id: str, client: AsyncClient) -> None:
        self.id = job_id
        self._client = client

    async def status(self) -> JobDocument:
        """How far it is."""
        return await self._client.run(jobs.status(self.id, self._client._retries))

    async def wait(self, progress: jobs.Follower = lambda document: None, timeout_s: float | None = None) -> JobDocument:
        """Returns when it is done; see `jobs.wait`."""
        return await self._client.run(jobs.wait(self.id, self._client._retries, progress, timeout_s))

    async def preview(self) -> Result:
        """The mask of level 1, once it is there."""
        return await self._client.run(calls.fetch(self.id, "preview", self._client._retries))

    async def result(self) -> Result:
        """The answer, once it is there."""
        return await self._client.run(calls.fetch(self.id, "result", self._client._retries))

    async def save(self, path: str | Path) -> Path:
        """The answer as a file, without holding it in memory."""
        return await self._client.run(calls.save(self.id, "result", Path(path), self._client._retries))

    async def cancel(self) -> None:
        """Ends it; of a finished one the result is removed."""
        await self._client.run(calls.cancel(self.id, self._client._retries))
