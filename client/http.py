"""`Client`: `AsyncClient` for blocking code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.aio import AsyncClient, AsyncJob
from client.blocking import Blocking
from client.request import Source
from client.result import Result


class Client(Blocking[AsyncClient]):
    """A segmentation server.

    Args:
        url: address, e.g. "http://localhost:8000".
        api_key: API key, where the server requires one.
        options: further arguments of `AsyncClient`.
    """

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(AsyncClient(url, api_key, **options))

    def segment(self, source: Source, **options: Any) -> Result:
        """Segments an image, a stack, a volume or a zip of images; arguments are those of `AsyncClient.segment`."""
        return self.run(self._client.segment(source, **options))

    def submit(self, source: Source, **options: Any) -> "Job":
        """Submits work that takes minutes as a job; arguments are those of `AsyncClient.submit`."""
        return Job(self.run(self._client.submit(source, **options)), self)

    def job(self, job_id: str) -> "Job":
        """Returns a job that was submitted before, by this program or another."""
        return Job(self._client.job(job_id), self)


class Job:
    """Work that a server does in the background; arguments and errors of its methods are those of `AsyncJob`.

    Attributes:
        id: name of the job on the server.
    """

    def __init__(self, job: AsyncJob, client: Client) -> None:
        self.id = job.id
        self._job, self._client = job, client

    def status(self) -> dict[str, Any]:
        """Returns the job's document: state, stage, windows, ..."""
        return self._client.run(self._job.status())

    def wait(
        self, progress: Callable[[dict[str, Any]], None] = lambda _: None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Waits until the job is done; `progress` is called with its document at each change."""
        return self._client.run_with_progress(lambda put: self._job.wait(put, timeout_s), progress)

    def preview(self) -> Result:
        """Returns the mask of level 1."""
        return self._client.run(self._job.preview())

    def result(self) -> Result:
        """Returns the answer."""
        return self._client.run(self._job.result())

    def save(self, path: str | Path) -> Path:
        """Streams the answer to a file, which appears when it is complete."""
        return self._client.run(self._job.save(path))

    def cancel(self) -> None:
        """Cancels the job, or removes a finished one with its result."""
        self._client.run(self._job.cancel())
