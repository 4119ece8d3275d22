"""GET /, the page, and GET /web/…: its files, each read, hashed and compressed once.

Nothing is loaded from elsewhere: a foreign script would see keys, and hospitals have no internet.
"""

import functools
import hashlib
import re
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request, Response
from isal import igzip

from server.errors import Misconfigured

HTML, CSS, SCRIPT = "text/html; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8"
PNG, GZIP = "image/png", "application/gzip"
TEXTS = (HTML, CSS, SCRIPT)

INDEX = "index.html"

# Written by hand, and sent as they are.
MODULES = (
    "answers", "api", "card", "compare", "dom", "download", "formats", "inputs", "levels", "main", "masks", "network", "picture", "pixels",
    "result", "stage", "volume", "zip",
)  # fmt: skip

# Everything that is served, by its path under `server/web/`; a test compares it with the folder.
FILES: dict[str, str] = {
    INDEX: HTML,
    "style.css": CSS,
    **{f"{name}.js": SCRIPT for name in MODULES},
    "vendor/niivue.umd.js": SCRIPT,
    "samples/cells.png": PNG,
    "samples/hippocampus.nii.gz": GZIP,
}

# What others have written, as it was when it was chosen.
PINNED = {"vendor/niivue.umd.js": "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"}

# How one text file names another: "/web/x" in the page, "./x" in a module.
NAMED = re.compile(r'"(/web/|\./)([\w./-]+)"')

# NiiVue needs no more: of 0.69.0 what would, WebAssembly, is for Zarr, which this server does not answer with; it has no eval, and
# no workers from blobs.
POLICY = "; ".join((
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self' blob: data:",
    "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
))  # fmt: skip

ALWAYS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}

# A year; the address changes with the content.
FOR_EVER = "public, max-age=31536000, immutable"
ASK_AGAIN = "no-cache"


@dataclass(frozen=True)
class Asset:
    """A file as it is sent.

    Attributes:
        body: its bytes, in which the other files are named with their versions.
        gzipped: the same, smaller; None where it is compressed already.
        media_type: of both.
        version: of the body, for `?v=` and the ETag.
    """

    body: bytes
    gzipped: bytes | None
    media_type: str
    version: str


@functools.cache
def read(folder: Path) -> dict[str, Asset]:
    """The files of the table, by path.

    Raises:
        Misconfigured: one is missing, or is not what was pinned.
    """
    made: dict[str, Asset] = {}

    def asset(path: str) -> Asset:
        # Those that it names come first, as their versions are part of its own. So no two may name each other.
        if path not in made:
            data = _bytes(folder, path)
            if FILES[path] not in TEXTS:
                made[path] = Asset(data, None, FILES[path], _version(data))
            else:
                body = data if path in PINNED else NAMED.sub(versioned, data.decode()).encode()
                made[path] = Asset(body, igzip.compress(body, 3), FILES[path], _version(body))
        return made[path]

    def versioned(name: re.Match[str]) -> str:
        start, path = name.groups()
        return f'"{start}{path}?v={asset(path).version}"' if path in FILES else name[0]

    for path in FILES:
        asset(path)
    return made


def paths() -> frozenset[str]:
    """What is served, as it is asked for; nobody needs a key for it."""
    return frozenset({"/", *(f"/web/{path}" for path in FILES if path != INDEX)})


def router(assets: dict[str, Asset]) -> APIRouter:
    """The routes over the files of `read`."""
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def home(request: Request) -> Response:
        return _answer(request, assets[INDEX])

    @routes.api_route("/web/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, path: str) -> Response:
        if path == INDEX or path not in assets:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return _answer(request, assets[path])

    return routes


def _answer(request: Request, asset: Asset) -> Response:
    headers = ALWAYS | {
        "ETag": f'"{asset.version}"',
        "Cache-Control": FOR_EVER if request.query_params.get("v") == asset.version else ASK_AGAIN,
    }
    # Weak where a proxy has compressed it.
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if headers["ETag"] in known:
        return Response(None, HTTPStatus.NOT_MODIFIED, headers)
    body = asset.body
    if asset.gzipped and "gzip" in request.headers.get("accept-encoding", ""):
        body = asset.gzipped
        headers["Content-Encoding"] = "gzip"
    return Response(body, headers=headers | {"Content-Type": asset.media_type})


def _bytes(folder: Path, path: str) -> bytes:
    try:
        data = (folder / path).read_bytes()
    except OSError as error:
        raise Misconfigured(f"the page's file {path} cannot be read: {error.strerror}; install the server again") from error
    if path in PINNED and hashlib.sha256(data).hexdigest() != PINNED[path]:
        raise Misconfigured(f"the page's file {path} is not the one that this server was made with; install the server again")
    return data


def _version(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]
