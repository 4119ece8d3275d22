"""GET /, the page, and GET /web/…, its files.

Files are read, hashed and compressed once. Nothing is loaded from another origin because a foreign script
could read API keys, and because hospital networks have no internet access.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from isal import igzip

from server.api.compression import accepts_gzip
from server.api.request_headers import header_list
from server.errors import Misconfigured
from server.imaging.encode import ENCODERS
from server.segment.request import SegmentParams

HTML, CSS, SCRIPT = "text/html; charset=utf-8", "text/css; charset=utf-8", "text/javascript; charset=utf-8"
PNG, GZIP = "image/png", "application/gzip"
TEXT_TYPES = (HTML, CSS, SCRIPT)

INDEX = "index.html"

# Written by hand and served without a build step.
MODULES = (
    "answers",
    "api",
    "card",
    "compare",
    "dom",
    "download",
    "inputs",
    "jobs",
    "levels",
    "main",
    "masks",
    "models",
    "network",
    "options",
    "picture",
    "pixels",
    "result",
    "viewer",
    "volume",
    "zip",
)

# Media type by path under `server/web/`; a test compares the table with the folder.
FILES: dict[str, str] = {
    INDEX: HTML,
    "style.css": CSS,
    **{f"{name}.js": SCRIPT for name in MODULES},
    "vendor/niivue.umd.js": SCRIPT,
    "samples/cells.png": PNG,
    "samples/hippocampus.nii.gz": GZIP,
}

# SHA-256 of vendored files.
PINNED = {"vendor/niivue.umd.js": "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"}

# References between text files: "/web/x" in the page, "./x" in a module.
REFERENCE = re.compile(r'"(/web/|\./)([\w./-]+)"')

# The element that carries `request_options`: inert text, because the policy forbids inline scripts.
OPTIONS_ELEMENT = '<template id="request-options">'

# NiiVue works under this policy: in 0.69.0 only Zarr needs WebAssembly, and the server does not write Zarr.
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)

SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}

# One year for addresses that name a version, because these change with the content.
CACHE_VERSIONED = "public, max-age=31536000, immutable"
CACHE_REVALIDATE = "no-cache"


@dataclass(frozen=True)
class Asset:
    """A file as it is sent.

    Attributes:
        body: content, with versions in its references to other files.
        gzipped: body compressed; None where the file is compressed already.
        media_type: value of Content-Type.
        version: hash of the body, for `?v=` and the ETag.
    """

    body: bytes
    gzipped: bytes | None
    media_type: str
    version: str


def request_options(params: type[SegmentParams] = SegmentParams) -> dict[str, Any]:
    """Describes the request parameters and the output formats; the page makes its forms of it."""
    properties = params.model_json_schema()["properties"]
    formats = [
        {"name": name, "filename": row.filename, "kinds": row.kinds, "accurate_only": "head_std" in row.needs}
        for name, row in ENCODERS.items()
    ]
    return {
        "parameters": [_parameter(name, schema) for name, schema in properties.items()],
        "formats": formats,
    }


def insert_options(html: str, params: type[SegmentParams] = SegmentParams) -> str:
    """Writes `request_options` into the page."""
    data = escape(json.dumps(request_options(params), separators=(",", ":")), quote=False)
    return html.replace(OPTIONS_ELEMENT, OPTIONS_ELEMENT + data)


def _parameter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    kind = next(kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null")
    keys = ("type", "enum", "minimum", "maximum")
    return {
        "name": name,
        "default": schema["default"],
        "description": schema["description"],
        **{key: kind[key] for key in keys if key in kind},
    }


@functools.cache
def read(folder: Path) -> dict[str, Asset]:
    """Reads the files of the table; gives assets by path.

    Raises:
        Misconfigured: a file is missing, or a vendored one has another hash.
    """
    assets: dict[str, Asset] = {}

    def load(path: str) -> Asset:
        # Referenced files come first because their versions are part of this body; so references must not
        # form a cycle.
        if path not in assets:
            data = _read_bytes(folder, path)
            if FILES[path] not in TEXT_TYPES:
                assets[path] = Asset(data, None, FILES[path], _version(data))
            else:
                body = data if path in PINNED else _render(path, data.decode(), with_version)
                assets[path] = Asset(body, igzip.compress(body, 3), FILES[path], _version(body))
        return assets[path]

    def with_version(reference: re.Match[str]) -> str:
        prefix, path = reference.groups()
        return f'"{prefix}{path}?v={load(path).version}"' if path in FILES else reference[0]

    for path in FILES:
        load(path)
    return assets


def paths() -> frozenset[str]:
    """The URL paths of all files. They need no API key."""
    return frozenset({"/", *(f"/web/{path}" for path in FILES if path != INDEX)})


def router(assets: dict[str, Asset]) -> APIRouter:
    """Makes the routes that serve assets."""
    routes = APIRouter()

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def index(request: Request) -> Response:
        return _respond(request, assets[INDEX])

    @routes.api_route("/web/{path:path}", methods=["GET", "HEAD"], include_in_schema=False)
    async def file(request: Request, path: str) -> Response:
        if path == INDEX or path not in assets:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        return _respond(request, assets[path])

    return routes


def _render(path: str, text: str, with_version: Callable[[re.Match[str]], str]) -> bytes:
    text = REFERENCE.sub(with_version, text)
    return (insert_options(text) if path == INDEX else text).encode()


def _respond(request: Request, asset: Asset) -> Response:
    is_versioned = request.query_params.get("v") == asset.version
    etag = f'"{asset.version}"'
    headers = SECURITY_HEADERS | {
        "ETag": etag,
        "Cache-Control": CACHE_VERSIONED if is_versioned else CACHE_REVALIDATE,
    }
    # Proxies that compress make the tag a weak one.
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if etag in known:
        return Response(None, HTTPStatus.NOT_MODIFIED, headers)
    body = asset.body
    if asset.gzipped and accepts_gzip(header_list(request, "accept-encoding")):
        body = asset.gzipped
        headers["Content-Encoding"] = "gzip"
    return Response(body, headers=headers | {"Content-Type": asset.media_type})


def _read_bytes(folder: Path, path: str) -> bytes:
    try:
        data = (folder / path).read_bytes()
    except OSError as error:
        text = f"the page's file {path} cannot be read: {error.strerror}; install the server again"
        raise Misconfigured(text, value=path, remedy="install the server again") from error
    if path in PINNED and hashlib.sha256(data).hexdigest() != PINNED[path]:
        text = f"the page's file {path} differs from the one that this version was released with; install the server again"
        raise Misconfigured(text, value=path, remedy="install the server again")
    return data


def _version(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]
