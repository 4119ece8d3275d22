"""Content-Encoding: gzip of text-like responses, for clients that accept it. Compressing runs in threads."""

import asyncio
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from isal import igzip, isal_zlib

from server.imaging.encode import ENCODERS

# Media types that shrink to a fraction; images, NIfTI and zips are compressed already.
COMPRESSIBLE = frozenset(row.media_type for row in ENCODERS.values() if row.compressible)

# Bytes below which a response fits into one packet anyway.
MIN_BYTES = 1024

# Level 1 shrinks a JSON report to a quarter at 200 MB/s; higher levels gain little and take longer.
LEVEL = 1

CHUNK_BYTES = 256 * 1024

# Tells caches that the same URL has another body for other clients.
VARY = {"Vary": "Accept-Encoding"}
GZIP = VARY | {"Content-Encoding": "gzip"}


def accepts_gzip(accept_encoding: str | None) -> bool:
    """Whether an Accept-Encoding header allows gzip (RFC 9110, 12.5.3)."""
    return "gzip" in accepted_codings(accept_encoding)


def accepted_codings(accept_encoding: str | None) -> set[str]:
    """Those of gzip and deflate that an Accept-Encoding header allows (RFC 9110, 12.5.3)."""
    weights: dict[str, float] = {}
    for entry in (accept_encoding or "").split(","):
        coding, _, parameter = entry.partition(";")
        weights[coding.strip().lower()] = _weight(parameter)
    return {coding for coding in ("gzip", "deflate") if weights.get(coding, weights.get("*", 0.0)) > 0}


def _weight(parameter: str) -> float:
    """The quality value of `q=0.5`; 1 without one, and 0 where it cannot be parsed."""
    name, _, value = parameter.partition("=")
    if name.strip().lower() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0


async def compress(body: bytes) -> bytes:
    """Compresses a body in a thread; the same body gives the same bytes."""
    return await asyncio.to_thread(igzip.compress, body, LEVEL, mtime=0)


def compress_file(open_file: Callable[[], BinaryIO]) -> Iterator[bytes]:
    """Compresses a file piece by piece, so that memory stays bounded; blocks while it reads.

    The file is opened with the first piece and closed after the last, or when the iterator is dropped.
    """
    compressor = isal_zlib.compressobj(LEVEL, wbits=zlib.MAX_WBITS | 16)
    with open_file() as file:
        for chunk in read_chunks(file):
            if data := compressor.compress(chunk):
                yield data
    yield compressor.flush()


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Reads a file piece by piece."""
    return iter(lambda: file.read(CHUNK_BYTES), b"")


async def encode_body(
    body: bytes, headers: dict[str, str], accept_encoding: str | None
) -> tuple[bytes, dict[str, str]]:
    """Compresses the body of a response where its type and the client allow it.

    Args:
        body: body as it is.
        headers: headers of the response.
        accept_encoding: header of the request.

    Returns:
        The body to send, and its headers.
    """
    if headers["Content-Type"] not in COMPRESSIBLE:
        return body, headers
    if len(body) < MIN_BYTES or not accepts_gzip(accept_encoding):
        return body, headers | VARY
    return await compress(body), headers | GZIP
