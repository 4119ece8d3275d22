"""`AsyncClient`: a segmentation server over HTTP."""

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx
import httpx_sse
from numpy.typing import ArrayLike

from client.errors import BadResponse, from_problem
from client.files import replacing
from client.request import FilePart, Formats, Source, file_name, file_parts, segment_params
from client.result import Result, read_result
from client.retry import read_error, send_with_retry, time_limit
from server.errors import CallerError, NotFinished

CONNECT_S = 10.0

# After so long without an event the job itself is requested, because the server may be gone without closing
# the connection.
SILENCE_S = 60.0

# Wait between two requests for a job where there is no event stream; it doubles.
FIRST_POLL_S, LONGEST_POLL_S = 1.0, 15.0

FINISHED = ("done", "failed", "cancelled")


class AsyncClient:
    """A segmentation server. Belongs to one event loop.

    Args:
        url: address, e.g. "http://localhost:8000".
        api_key: API key, where the server requires one.
        api_key_file: path of a file that holds the API key instead.
        timeout_s: seconds for a whole response, with all attempts and the waits between them.
        retries: attempts after the first, for 429, 503, a proxy's 502 and connections that were refused or closed.
        verify: False trusts every certificate; a path names a file of trusted ones (PEM).
        transport: httpx transport instead of the network, e.g. `httpx.ASGITransport(app)`.

    Raises:
        ValueError: the address or the API key cannot be one.
        OSError: a file cannot be read.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        api_key_file: str | Path | None = None,
        timeout_s: float = 300.0,
        retries: int = 6,
        verify: bool | str | Path = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
            raise ValueError(f"{url!r} is not the address of a server; write it as http://localhost:8000")
        key = Path(api_key_file).read_text().strip() if api_key_file else api_key
        if key is not None and not (key.isascii() and key.isprintable() and key):
            raise ValueError("the API key must be one line of printable ASCII characters")
        self._retries, self._timeout_s = retries, timeout_s
        self._http = httpx.AsyncClient(
            base_url=url,
            # Not Authorization, because a proxy may use that header for itself.
            headers={"User-Agent": "unetpp-client"} | ({"X-API-Key": key} if key else {}),
            verify=verify if isinstance(verify, bool) else ssl.create_default_context(cafile=str(verify)),
            transport=transport,
            # `send_with_retry` limits the whole.
            timeout=httpx.Timeout(None, connect=CONNECT_S),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Lists the models that the server serves: name, levels, precisions, whether it is the default."""
        return _json(await self.request("GET", "models"))  # type: ignore[no-any-return]

    async def model(self, name: str) -> dict[str, Any]:
        """Returns the card of a model: levels, classes, calibration, licence, and what serves it.

        Raises:
            UnknownModel: the server has no model of that name.
        """
        return _json(await self.request("GET", f"models/{quote(name, safe='')}"))  # type: ignore[no-any-return]

    async def segment(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        **parameters: Any,
    ) -> Result:
        """Segments an image, a stack, a volume or a zip of images.

        Args:
            source: a path of a file or of a folder with a DICOM series, the bytes of a file, a file open for bytes, or a numpy array of numbers or booleans:
                (H, W) grey, (H, W, 3 or 4) colour (alpha is ignored), (S, H, W) a stack, or with `affine`
                (X, Y, Z) a volume.
            formats: names of `format=`; "mask" is the mask in the format of the input. Each becomes an entry of
                `Result.files`.
            reference: labels to score against, in any form of `source`, on the grid of the input.
            affine: (4, 4) matrix of a volume given as an array, from voxel indices to mm in RAS, and of its
                reference.
            parameters: further request parameters by name, e.g. `level=2`, `model="hippocampus"`,
                `min_size_px=30`, `deadline_ms=2000`.

        Returns:
            The answer, with the mask on the grid of the input.

        Raises:
            InvalidParameter: a parameter is wrong; nothing is sent.
            TypeError, ValueError: the source is of another type or shape; nothing is sent.
            UnetppError: the request failed; its class, of `server.errors` or `client.errors`, names the
                reason.
        """
        params = segment_params(formats, parameters).model_dump(exclude_unset=True)
        response = await self._post("segment", source, reference, affine, params)
        return read_result(response.headers, response.content)

    async def submit(
        self,
        source: Source,
        *,
        formats: Formats = ("mask", "json"),
        reference: Source | None = None,
        affine: ArrayLike | None = None,
        preview: bool = False,
        **parameters: Any,
    ) -> "AsyncJob":
        """Submits work that takes minutes as a job.

        A request that is sent again has the same Idempotency-Key, so that the server has the job once.

        Args:
            source: input as in `segment`.
            formats: names of `format=`.
            reference: labels to score against.
            affine: (4, 4) matrix of a volume given as an array, from voxel indices to mm in RAS.
            preview: whether a mask of level 1 is made first.
            parameters: further request parameters by name, except `deadline_ms` and `min_level`.

        Raises:
            StoreFull: the server has no room for the job.
            UnetppError: the request failed; its class names the reason.
        """
        params = segment_params(formats, parameters).model_dump(exclude_unset=True) | (
            {"preview": True} if preview else {}
        )
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        response = await self._post("jobs", source, reference, affine, params, headers)
        return self.job(_json(response)["id"])

    def job(self, job_id: str) -> "AsyncJob":
        """Returns a job that was submitted before, by this program or another."""
        return AsyncJob(job_id, self)

    async def _post(
        self,
        path: str,
        source: Source,
        reference: Source | None,
        affine: ArrayLike | None,
        params: dict[str, Any],
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        # The server learns a file name only for COCO, whose readers need it, because it may be the name of a
        # patient.
        formats = [part.strip() for part in params.get("format", "").split(",")]
        name = file_name(source) if "coco" in formats else ""
        parts = file_parts(source, reference, affine, name or "upload")
        return await self.request("POST", path, params=params, parts=parts, headers=headers)

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        parts: Mapping[str, FilePart] | None = None,
        headers: Mapping[str, str] | None = None,
        save_as: Path | None = None,
    ) -> httpx.Response:
        """Sends a request with query parameters and files, again if necessary, and reads the response into memory or a file."""

        async def attempt() -> httpx.Response:
            with contextlib.ExitStack() as opened:
                files = {
                    name: (part.name, opened.enter_context(part.open()), "application/octet-stream")
                    for name, part in (parts or {}).items()
                }
                async with self._http.stream(
                    method, path, params=params, files=files or None, headers=headers
                ) as response:
                    if save_as is None or not response.is_success:
                        await response.aread()
                    else:
                        file = opened.enter_context(replacing(save_as))
                        async for chunk in response.aiter_bytes():
                            file.write(chunk)
                return response

        return await send_with_retry(attempt, self._retries, self._timeout_s)

    async def follow(self, job_id: str, progress: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Reads the event stream of a job until it ends, and calls `progress` with each document.

        Returns:
            The last document; None where there was no stream, or no event in it.

        Raises:
            CallerError: the server refuses the request, e.g. because the job is unknown.
        """
        document: dict[str, Any] | None = None
        limits, url = httpx.Timeout(SILENCE_S, connect=CONNECT_S), f"jobs/{job_id}/events"
        # After a broken stream, and one that is refused for now, the caller requests the job itself.
        with contextlib.suppress(httpx.HTTPError):
            async with httpx_sse.aconnect_sse(self._http, "GET", url, timeout=limits) as events:
                if not events.response.is_success:
                    await events.response.aread()
                    if isinstance(error := read_error(events.response), CallerError):
                        raise error
                    return None
                async with contextlib.aclosing(events.aiter_sse()) as stream:
                    async for event in stream:
                        try:
                            document = event.json()
                        except ValueError:
                            break
                        progress(document)
                        if document["state"] in FINISHED:
                            break
        return document


class AsyncJob:
    """Work that a server does in the background.

    Attributes:
        id: name of the job on the server.
    """

    def __init__(self, job_id: str, client: AsyncClient) -> None:
        self.id = job_id
        self._client = client

    async def status(self) -> dict[str, Any]:
        """Returns the job's document.

        It has `state` (queued, running, done, failed, cancelled), `stage`, `windows` (done, total),
        `queue_position`, `eta_s` in seconds, `error` and the times in UTC.

        Raises:
            UnknownJob: the job does not exist, or not any more.
        """
        return _json(await self._client.request("GET", f"jobs/{self.id}"))  # type: ignore[no-any-return]

    async def wait(
        self, progress: Callable[[dict[str, Any]], None] = lambda _: None, timeout_s: float | None = None
    ) -> dict[str, Any]:
        """Waits until the job is done, by its event stream, or by polling where that is refused or breaks.

        Args:
            progress: callback with the job's document at each change.
            timeout_s: seconds to wait; without limit if None.

        Raises:
            UnetppError: the error with which the job failed.
            NotFinished: the job was cancelled.
            UnknownJob: the job does not exist, or not any more.
            TimedOut: the time is over; the job goes on.
        """
        wait_s = FIRST_POLL_S
        async with time_limit(
            timeout_s, f"the job is not done within {timeout_s} s; it goes on, so wait for it again"
        ):
            while True:
                document = await self._client.follow(self.id, progress)
                if document is not None:
                    wait_s = FIRST_POLL_S
                if document is None or document["state"] not in FINISHED:
                    document = await self.status()
                    progress(document)
                if document["state"] == "done":
                    return document
                if document["state"] == "failed":
                    raise from_problem(document["error"])
                if document["state"] == "cancelled":
                    raise NotFinished("the job was cancelled, so it has no result", state="cancelled")
                await asyncio.sleep(wait_s)
                wait_s = min(LONGEST_POLL_S, 2 * wait_s)
        raise AssertionError("unreachable")

    async def preview(self) -> Result:
        """Returns the mask of level 1.

        Raises:
            NotFinished: it is not there yet, or was not requested.
        """
        response = await self._client.request("GET", f"jobs/{self.id}/preview")
        return read_result(response.headers, response.content)

    async def result(self) -> Result:
        """Returns the answer.

        Raises:
            NotFinished: it is not there yet; `retry_after_s` estimates when.
        """
        response = await self._client.request("GET", f"jobs/{self.id}/result")
        return read_result(response.headers, response.content)

    async def save(self, path: str | Path) -> Path:
        """Streams the answer to a file, which appears when it is complete.

        Raises:
            NotFinished: there is no answer yet.
            OSError: the file cannot be written.
        """
        await self._client.request("GET", f"jobs/{self.id}/result", save_as=Path(path))
        return Path(path)

    async def cancel(self) -> None:
        """Cancels the job, or removes a finished one with its result."""
        await self._client.request("DELETE", f"jobs/{self.id}")


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        kind = response.headers.get("content-type", "unknown type")
        raise BadResponse(
            f"the response is {kind} instead of JSON; check the address of the server"
        ) from error
