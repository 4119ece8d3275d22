"""`Client`: a server asked from ordinary code."""

import contextlib
import time
from collections.abc import Iterator
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


class Client(Configured):
    """A server; may be used from several threads. See `Configured` for what it is made with."""

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(url, api_key, **options)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def models(self) -> list[ModelSummary]:
        """What is open there."""
        return self.run(calls.models(self._retries))

    def model(self, name: str) -> ModelCard:
        """The card of a model."""
        return self.run(calls.model(name, self._retries))

    def segment(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        **parameters: Any,
    ) -> Result:
        """Segments an image, a stack or a volume.

        Args:
            source: see `sources.upload`.
            formats: what the answer shall hold; "mask" is the mask in a format like the input's.
            reference: mask to score against.
            affine: of a volume given as an array, and of its reference.
            parameters: those of POST /segment by name, e.g. level=2, min_size_px=30.

        Raises:
            SegmentError: see `client.errors`.
        """
        return self.run(calls.segment(source, formats, reference, affine, parameters, self._retries))

    def submit(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        **parameters: Any,
    ) -> "Job":
        """The same in the background, for what takes minutes; with preview=True there is soon a mask of level 1, too.

        If the connection breaks before the answer it is sent again, and the server may have the job twice; the one that nobody
        knows of ends by itself.
        """
        return self.job(self.run(calls.submit(source, formats, reference, affine, parameters, self._retries))["id"])

    def job(self, job_id: str) -> "Job":
        """A job that was submitted before, by this program or another."""
        return Job(job_id, self)

    def run(self, talk: Talk[T]) -> T:
        """Carries out a conversation."""
        answer: Any = None
        with contextlib.closing(talk), _Hands(self._http) as hands:
            while True:
                try:
                    command = talk.throw(answer) if isinstance(answer, Lost) else talk.send(answer)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]  # as the generator is annotated
                try:
                    answer = hands.do(command)
                except httpx.HTTPError as error:
                    answer = lost(error)


class _Hands(contextlib.ExitStack):
    """Carries out the commands of one conversation, and holds what it has opened."""

    def __init__(self, http: httpx.Client) -> None:
        super().__init__()
        self._http = http
        self._pieces: Iterator[bytes] = iter(())

    def do(self, command: Command) -> Any:
        """What comes of it."""
        match command:
            case Send(call, limit_s):
                return self._send(call, limit_s)
            case Open(call, limit_s):
                answer = self.enter_context(self._http.stream(**arguments(call, limit_s)))
                self._pieces = answer.iter_bytes()
                return head(answer, b"" if answer.status_code == 200 else answer.read())
            case Next():
                return next(self._pieces, None)
            case Close():
                return self.close()
            case Sleep(seconds):
                return time.sleep(seconds)

    def _send(self, call: Any, limit_s: float) -> Any:
        with opened(call.uploads) as files, self._http.stream(**arguments(call, limit_s, files)) as answer:
            with Sink(call, answer, limit_s) as sink:
                for piece in answer.iter_bytes():
                    sink.write(piece)
            return sink.reply


class Job:
    """Work in the background."""

    def __init__(self, job_id: str, client: Client) -> None:
        self.id = job_id
        self._client = client

    def status(self) -> JobDocument:
        """How far it is."""
        return self._client.run(jobs.status(self.id, self._client._retries))

    def wait(self, progress: jobs.Follower = lambda document: None, timeout_s: float | None = None) -> JobDocument:
        """Returns when it is done; see `jobs.wait`."""
        return self._client.run(jobs.wait(self.id, self._client._retries, progress, timeout_s))

    def preview(self) -> Result:
        """The mask of level 1, once it is there."""
        return self._client.run(calls.fetch(self.id, "preview", self._client._retries))

    def result(self) -> Result:
        """The answer, once it is there.

        Raises:
            NotFinished: it is not; says how long it may take.
        """
        return self._client.run(calls.fetch(self.id, "result", self._client._retries))

    def save(self, path: str | Path) -> Path:
        """The answer as a file, without holding it in memory."""
        return self._client.run(calls.save(self.id, "result", Path(path), self._client._retries))

    def cancel(self) -> None:
        """Ends it; of a finished one the result is removed."""
        self._client.run(calls.cancel(self.id, self._client._retries))
