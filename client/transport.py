"""What both clients tell httpx, and how they read what it says."""

import contextlib
import io
import math
import ssl
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, cast

import httpx

from client.errors import TimedOut
from client.replies import Reply
from client.retry import Retries
from client.talk import Call, Clock, Lost

# Whoever listens answers within seconds.
CONNECT_S = 10.0


class Configured:
    """What a client is made with.

    Args:
        url: the server's address, e.g. "http://localhost:8000".
        api_key: where the server wants one.
        api_key_file: a file that holds it, instead.
        timeout_s: for a whole answer, all tries and waits included.
        retries: further tries after 429, 503, and connections that were refused or closed.
        verify: False trusts every certificate; a path names those of your own authority (PEM).
        transport: of httpx, instead of the network: for tests, or an application in the same process.

    Raises:
        ValueError: the address or the key cannot be one.
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
        transport: Any = None,
    ) -> None:
        if httpx.URL(url).scheme not in ("http", "https") or not httpx.URL(url).host:
            raise ValueError(f"{url!r} is no address of a server; it looks like http://localhost:8000")
        key = Path(api_key_file).read_text().strip() if api_key_file else api_key
        if key is not None and not (key.isascii() and key.isprintable() and key):
            raise ValueError("the API key is empty, or not one line of plain characters")
        self._retries = Retries(most=retries, total_s=timeout_s)
        trusted = verify if isinstance(verify, bool) else ssl.create_default_context(cafile=str(verify))
        # Not Authorization, which a proxy may want for itself.
        headers = {"User-Agent": "unetpp-client"} | ({"X-API-Key": key} if key else {})
        self._options: dict[str, Any] = {"base_url": url, "headers": headers, "verify": trusted, "transport": transport}


def arguments(call: Call, limit_s: float, files: dict[str, Any] | None = None) -> dict[str, Any]:
    """A call in httpx's words."""
    # httpx counts from the last byte that came; `Sink` has the clock for all of them.
    limits = httpx.Timeout(None if limit_s == math.inf else max(limit_s, 0.001), connect=max(0.001, min(CONNECT_S, limit_s)))
    told: dict[str, Any] = {
        "method": call.method,
        "url": call.path,
        "params": call.query,
        "headers": call.headers,
        "timeout": limits,
    }
    return told | ({"files": files} if files else {})


def lost(error: httpx.HTTPError) -> Lost:
    """Why no answer came."""
    if isinstance(error, httpx.ReadTimeout | httpx.WriteTimeout | httpx.PoolTimeout):
        text = "the server did not answer in time; allow more (timeout_s), or submit a job"
        return Lost(text, again=False, kind=TimedOut)
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Lost(f"the server's certificate is not trusted: {cause.verify_message}; name its authority", again=False)
        cause = cause.__cause__ or cause.__context__
    refused = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
    again = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError)
    return Lost(f"{'no server answers at this address' if refused else 'the connection broke'}: {error}", again=again)


def head(answer: httpx.Response, body: bytes = b"") -> Reply:
    """An answer of httpx as ours."""
    return Reply(answer.status_code, {name.lower(): value for name, value in answer.headers.items()}, body)


class Sink:
    """Where an answer goes: into memory, or into a file that appears when it is whole.

    Args:
        call: says where.
        answer: whose body it is.
        limit_s: until its last byte.
    """

    def __init__(self, call: Call, answer: httpx.Response, limit_s: float) -> None:
        self._clock = Clock(limit_s)
        self._answer = answer
        self._path = call.save_as if answer.status_code < 300 else None
        self._out: BinaryIO = io.BytesIO()

    def __enter__(self) -> Self:
        if self._path:
            self._out = self._partial(self._path).open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._path is None:
            return
        self._out.close()
        with contextlib.suppress(FileNotFoundError):
            if kind is None:
                self._partial(self._path).replace(self._path)
            else:
                self._partial(self._path).unlink()

    def write(self, piece: bytes) -> None:
        """Takes a piece.

        Raises:
            httpx.ReadTimeout: the time is over.
        """
        if self._clock.left_s() < 0:
            raise httpx.ReadTimeout("the answer trickles")
        self._out.write(piece)

    @property
    def reply(self) -> Reply:
        """The whole."""
        return head(self._answer, b"" if self._path else cast("io.BytesIO", self._out).getvalue())

    @staticmethod
    def _partial(path: Path) -> Path:
        return path.with_name(f".{path.name}.part")
