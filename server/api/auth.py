"""API keys, checked before a body is read. Pure ASGI, so that disconnects stay visible.

A key has 256 random bits and cannot be guessed, so a plain SHA-256 of it is as safe in the file as a slow
hash.
"""

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api import problems
from server.api.request_headers import presented_key
from server.errors import Misconfigured, OtherSite, Unauthorized

log = logging.getLogger(__name__)

# Paths that need no key because they say nothing of images: for orchestrators and Prometheus, and
# for people who have yet to enter a key.
HEALTH = frozenset({"/health/live", "/health/ready", "/metrics"})
# Those of the Open Inference Protocol, which its clients ask on the port of inference.
OPEN_INFERENCE_HEALTH = frozenset({"/v2/health/live", "/v2/health/ready"})
STATIC = frozenset({"/docs", "/openapi.json", problems.ERRORS_PATH})

# Lets scanners of published code recognise a key.
PREFIX = "unetpp_"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
ENTRY = re.compile(rf"({NAME.pattern}):([0-9a-f]{{64}})")

DEFAULT_PORTS = {"http": ":80", "https": ":443"}

# Seconds between two looks at the file, and its longest length.
CHECK_INTERVAL_S = 1.0
MAX_FILE_BYTES = 1024 * 1024


def make(name: str) -> tuple[str, str]:
    """Makes a new key.

    Args:
        name: name of its holder, for the operator.

    Returns:
        The key, and the line of the keys file by which the server knows it.

    Raises:
        Misconfigured: the name cannot stand in the file.
    """
    if not NAME.fullmatch(name):
        raise Misconfigured(
            f"{name!r:.80} cannot name a key; take up to 64 letters, digits, dots, dashes and underscores",
            parameter="name",
            value=name[:64],
        )
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


class Keys:
    """The API keys of a file, which is read again when it has changed.

    Args:
        path: file of lines by `make`; empty lines and comments that begin with # are skipped.
        check_interval_s: seconds between two looks at the file.

    Raises:
        Misconfigured: the file does not exist, is broken or has no keys.
    """

    def __init__(self, path: Path, check_interval_s: float = CHECK_INTERVAL_S) -> None:
        self._path = path
        self._check_interval_s = check_interval_s
        self._checked_at = time.monotonic()
        self._version = self._stat()
        self._hashes = self._read()
        if not self._hashes:
            raise self._broken(
                f"the keys file {path} holds no keys; add the line that `unetpp key NAME` prints"
            )

    def __len__(self) -> int:
        """Number of keys that were read last."""
        return len(self._hashes)

    def __contains__(self, key: str) -> bool:
        """Whether the key is in the file; takes equally long for every key."""
        self._reload()
        digest = hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()
        # `any` would stop at the first match, and the time of the answer would tell where in the file it
        # stands.
        return sum(hmac.compare_digest(digest, entry) for entry in self._hashes) > 0

    def _reload(self) -> None:
        """Reads the file again if it has changed; a file that is broken or gone changes nothing."""
        if time.monotonic() < self._checked_at + self._check_interval_s:
            return
        self._checked_at = time.monotonic()
        try:
            if (version := self._stat()) == self._version:
                return
            # Set for a broken file, too, so that it is logged once.
            self._version = version
            self._hashes = self._read()
        except Misconfigured as error:
            log.error("%s; the previous keys stay valid", error)
        else:
            log.info("read the keys file again: %d keys", len(self._hashes))

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError:
            # Reading the file raises the reason.
            return (0, 0, 0)
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise self._broken(f"the keys file {self._path} cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE_BYTES:
            raise self._broken(f"the keys file {self._path} is longer than {MAX_FILE_BYTES:,} bytes")
        hashes = []
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if not (text := line.strip()) or text.startswith("#"):
                continue
            if not (entry := ENTRY.fullmatch(text)):
                # The line itself is never shown, because it may hold a key by mistake.
                raise self._broken(
                    f"line {number} of the keys file {self._path} is not `name:sha256`, as `unetpp key NAME` prints it",
                    number,
                )
            hashes.append(entry[2])
        return hashes

    def _broken(self, detail: str, line: int | None = None) -> Misconfigured:
        return Misconfigured(detail, setting="UNETPP_AUTH__KEYS_FILE", value=str(self._path), line=line)


def unauthorized(key: str) -> Unauthorized:
    """The error of a request with this key, or with none."""
    problem = "this API key is not valid here" if key else "this needs an API key"
    return Unauthorized(
        f"{problem}; send one as `Authorization: Bearer KEY` or `X-API-Key: KEY` (the operator makes them: unetpp key NAME)",
        allowed=["Authorization: Bearer KEY", "X-API-Key: KEY"],
    )


class APIKeyMiddleware:
    """Answers 401 to requests without a valid key, whether the path exists or not.

    Args:
        app: application behind it.
        keys: valid keys.
        free: paths that need no key.
        count_refusal: callback for each refusal.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, free: frozenset[str], count_refusal: Callable[[], None]
    ) -> None:
        self._app = app
        self._keys = keys
        self._free = free
        self._count_refusal = count_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "lifespan" or scope["path"] in self._free:
            await self._app(scope, receive, send)
            return
        key = presented_key(Headers(scope=scope))
        if key and key in self._keys:
            await self._app(scope, receive, send)
            return
        self._count_refusal()
        response = problems.response_of(unauthorized(key))
        response.headers["WWW-Authenticate"] = 'Bearer realm="unetpp"'
        await response(scope, receive, send)


class SameOriginMiddleware:
    """Refuses writes that a browser sends for a page of another site.

    Such a page could not read the response, but would have work done without a key. Reading is left alone, so
    that links from elsewhere to the page work.

    Args:
        app: application behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        writes = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if writes and _is_cross_site(Headers(scope=scope)):
            error = OtherSite(
                "pages of other sites may not use this server; send the request from a program. A proxy in front must pass on "
                "the Host header"
            )
            await problems.response_of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_cross_site(headers: Headers) -> bool:
    """Whether a browser sends the request for a page of another site. Programs send neither header."""
    # Browsers send this header only over HTTPS and on localhost; it is right behind a proxy that changes
    # Host, too.
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    return any(not _same_host(origin, headers.get("host", "")) for origin in headers.getlist("origin"))


def _same_host(origin: str, host: str) -> bool:
    """Whether an origin is that of a Host header; the default port of a scheme may be left out."""
    scheme, _, authority = origin.lower().partition("://")
    port = DEFAULT_PORTS.get(scheme, "")
    return bool(port and authority) and authority.removesuffix(port) == host.lower().removesuffix(port)
