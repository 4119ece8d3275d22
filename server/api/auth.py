"""API keys: who may ask is found out before a body is read. Pure ASGI, as in `limits`.

A key has 256 random bits, so nobody guesses one, and a plain SHA-256 of it is as good in the file as a slow hash.
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
from server.errors import Misconfigured, OtherSite, Unauthorized

log = logging.getLogger(__name__)

# What says nothing of anybody's images: for orchestrators and Prometheus, and for whoever has yet to enter a key.
HEALTH = frozenset({"/health/live", "/health/ready", "/metrics"})
STATIC = frozenset({"/docs", "/openapi.json"})

# For tools that look for keys that were published by mistake.
PREFIX = "unetpp_"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
ENTRY = re.compile(rf"({NAME.pattern}):([0-9a-f]{{64}})")

DEFAULT_PORTS = {"http": ":80", "https": ":443"}

# How often the file is looked at, and how long it may be.
EVERY_S = 1.0
MOST_BYTES = 1024 * 1024


def make(name: str) -> tuple[str, str]:
    """A new key, and the line of the file by which it is known.

    Raises:
        Misconfigured: a name that could not stand in the file.
    """
    if not NAME.fullmatch(name):
        raise Misconfigured(f"{name!r:.80} cannot name a key; take up to 64 letters, digits, dots, dashes and underscores")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}:{hashlib.sha256(key.encode()).hexdigest()}"


class Keys:
    """The keys of a file, which is read again when it has changed.

    Args:
        path: lines of `make`, empty ones, and comments that begin with #.

    Raises:
        Misconfigured: the file is not there, broken or empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = time.monotonic()
        self._version = self._stat()
        self._hashes = self._read()
        if not self._hashes:
            raise Misconfigured(f"the keys file {path} holds no keys; add the line that `unetpp key NAME` prints")

    def known(self, key: str) -> bool:
        """Whether it is one of them; takes equally long for every key."""
        self._look()
        given = hashlib.sha256(key.encode("latin-1", "replace")).hexdigest()
        # `any` would stop at the first.
        return sum(hmac.compare_digest(given, entry) for entry in self._hashes) > 0

    def _look(self) -> None:
        """Reads the file again if it has changed; one that is broken or gone changes nothing."""
        if time.monotonic() < self._looked_at + EVERY_S:
            return
        self._looked_at = time.monotonic()
        try:
            if (version := self._stat()) == self._version:
                return
            # Also of a broken file: it is said once.
            self._version = version
            self._hashes = self._read()
        except Misconfigured as error:
            log.error("%s; the keys of before still hold", error)
        else:
            log.info("read the keys file again: %d keys", len(self._hashes))

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = self._path.stat()
        except OSError:
            # Reading it says why.
            return (0, 0, 0)
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                data = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise Misconfigured(f"the keys file {self._path} cannot be read: {error.strerror}") from error
        if len(data) > MOST_BYTES:
            raise Misconfigured(f"the keys file {self._path} is longer than {MOST_BYTES:,} bytes")
        hashes = []
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            if not (text := line.strip()) or text.startswith("#"):
                continue
            if not (entry := ENTRY.fullmatch(text)):
                # Never the line itself: it may hold a key by mistake.
                raise Misconfigured(
                    f"line {number} of the keys file {self._path} is not `name:sha256`, as `unetpp key NAME` prints it"
                )
            hashes.append(entry[2])
        return hashes


class APIKeyMiddleware:
    """Answers 401 to whoever brings no known key, whether the path exists or not.

    Args:
        app: the application behind it.
        keys: those that are known.
        free: paths that need none.
        refused: called for each refusal.
    """

    def __init__(self, app: ASGIApp, keys: Keys, free: frozenset[str], refused: Callable[[], None]) -> None:
        self._app = app
        self._keys = keys
        self._free = free
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "lifespan" or scope["path"] in self._free:
            await self._app(scope, receive, send)
            return
        key = _given(Headers(scope=scope))
        if key and self._keys.known(key):
            await self._app(scope, receive, send)
            return
        self._refused()
        what = "this API key is not known here" if key else "this needs an API key"
        response = problems.of(
            Unauthorized(
                f"{what}; send one as `Authorization: Bearer KEY` or `X-API-Key: KEY` (the operator makes them: unetpp key NAME)"
            )
        )
        response.headers["WWW-Authenticate"] = 'Bearer realm="unetpp"'
        await response(scope, receive, send)


class SameOriginMiddleware:
    """Refuses what a browser sends for a page of another site, which could not read the answer, but have work done without a key.

    Reading is left alone: links from elsewhere to the page shall work.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        writes = scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if writes and _is_foreign(Headers(scope=scope)):
            error = OtherSite(
                "pages of other sites may not use this server; send it from a program. A proxy in front must pass on the Host header"
            )
            await problems.of(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    """Whether a browser sends it for another site's page. Programs send neither header."""
    # Said only over HTTPS and on localhost, and also right behind a proxy that changes Host.
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origins = headers.getlist("origin")
    return any(not _same_host(origin, headers.get("host", "")) for origin in origins)


def _same_host(origin: str, host: str) -> bool:
    """Whether an origin, `scheme://host[:port]` or null, is the one of a Host header; a scheme's own port may be left out."""
    scheme, _, place = origin.lower().partition("://")
    port = DEFAULT_PORTS.get(scheme, "")
    return bool(port and place) and place.removesuffix(port) == host.lower().removesuffix(port)


def _given(headers: Headers) -> str:
    """The key of a request. X-API-Key comes first, as proxies may need Authorization for themselves."""
    if key := headers.get("x-api-key"):
        return key
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
