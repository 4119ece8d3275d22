"""`Client`: `AsyncClient` for blocking code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from client.aio import AsyncClient, AsyncJob
from client.blocking import Blocking
from client.request import Source
from client.result import Result


class Client(Blocking[AsyncClient]):
    """A segmentation server, for blocking code. Use it in a `with` block, or call `close`.

    It may be used from several threads, and inside of a running event loop, e.g. in a notebook. Ctrl-C in a
    blocking call cancels the request, and the server drops its work.

    Args:
        url: address, e.g. "http://localhost:8000".
        api_key: API key, where the server requires one.
        options: further arguments of `AsyncClient`: `api_key_file`, `timeout_s`, `retries`, `verify`,
            `transport`.

    Raises:
        ValueError: the address or the API key cannot be one.
        OSError: a file cannot be read.
    """

    def __init__(self, url: str, api_key: str | None = None, **options: Any) -> None:
        super().__init__(AsyncClient(url, api_key, **options))

    def segment(self, source: Source, **options: Any) -> Result:
        """Segments an image, a stack, a volume or a zip of images.

        Args:
            source: a path, the bytes of a file, a file open for bytes, or a numpy array of numbers or booleans:
                (H, W) grey, (H, W, 3 or 4) colour (alpha is ignored), (S, H, W) a stack, or with `affine`
                (X, Y, Z) a volume.
            options: further arguments of `AsyncClient.segment`: `formats`, `reference`, `affine`, and the request
                parameters by name, e.g. `level=2`.

        Returns:
            The answer, with the mask on the grid of the input.

        Raises:
            InvalidParameter: a parameter is wrong; nothing is sent.
            TypeError, ValueError: the source is of another type or shape; nothing is sent.
            UnetppError: the request failed; its class, of `server.errors` or `client.errors`, names the
                reason.
        """
        return self.run(self._client.segment(source, **options))

    def submit(self, source: Source, **options: Any) -> "Job":
        """Submits work that takes minutes as a job.

        Args:
            source: input as in `segment`.
            options: further arguments of `AsyncClient.submit`: `formats`, `reference`, `affine`, `preview`, and
                the request parameters by name, except `deadline_ms` and `min_level`.

        Raises:
            StoreFull: the server has no room for the job.
            UnetppError: the request failed; its class names the reason.
        """
        return Job(self.run(self._client.submit(source, **options)), self)

    def job(self, job_id: str) -> "Job":
        """Returns a job that was submitted before, by this program or another."""
        return Job(self._client.job(job_id), self)


class Job:
    """Work that a server does in the background.

    Attributes:
        id: name of the job on the server.
    """

    def __init__(self, job: AsyncJob, client: Client) -> None:
        self.id = job.id
        self._job, self._client = job, client

    def status(self) -> dict[str, Any]:
        """Returns the job's document.

        It has `state` (queued, running, done, failed, cancelled), `stage`, `windows` (done, total),
        `queue_position`, `eta_s` in seconds, `error` and the times in UTC.

        Raises:
            UnknownJob: the job does not exist, or not any more.
        """
        return self._client.run(self._job.status())

    def wait(
        self, progress: Callable[[dict[str, Any]], None] = lambda _: None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Waits until the job is done.

        Args:
            progress: callback with the job's document at each change, in the thread that waits.
            timeout_s: seconds to wait; without limit if None.

        Returns:
            The job's document.

        Raises:
            UnetppError: the error with which the job failed.
            NotFinished: the job was cancelled.
            UnknownJob: the job does not exist, or not any more.
            TimedOut: the time is over; the job goes on.
        """
        return self._client.run_with_progress(lambda put: self._job.wait(put, timeout_s), progress)

    def preview(self) -> Result:
        """Returns the mask of level 1.

        Raises:
            NotFinished: it is not there yet, or was not requested.
        """
        return self._client.run(self._job.preview())

    def result(self) -> Result:
        """Returns the answer.

        Raises:
            NotFinished: it is not there yet; `retry_after_s` estimates when, in seconds.
        """
        return self._client.run(self._job.result())

    def save(self, path: str | Path) -> Path:
        """Streams the answer to a file, which appears when it is complete.

        Raises:
            NotFinished: there is no answer yet.
            OSError: the file cannot be written.
        """
        return self._client.run(self._job.save(path))

    def cancel(self) -> None:
        """Cancels the job, or removes a finished one with its result."""
        self._client.run(self._job.cancel())
