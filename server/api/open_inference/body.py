"""Bodies of inference requests: received, decompressed and kept within limits; large ones lie on disk."""

import asyncio
import contextlib
import mmap
import os
import tempfile
import zlib
from collections.abc import AsyncIterator, Iterator
from typing import TypeAlias

from starlette.requests import Request

from server.api.request_headers import header_list
from server.api.upload import SPOOL_BYTES, spool
from server.errors import TooLarge, Unreadable, UnsupportedType

Spooled: TypeAlias = tempfile.SpooledTemporaryFile[bytes]

# Values of Content-Encoding; "deflate" is the zlib format (RFC 9110, 8.4.1.2).
WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}

# Bytes that are inflated at a time.
CHUNK_BYTES = 1024 * 1024

# Members of a gzip body at most, and bytes that are read of each first: what lies behind a member is read again.
MAX_MEMBERS, MEMBER_BYTES = 10_000, 8 * 1024


@contextlib.asynccontextmanager
async def receive(request: Request, max_bytes: int) -> AsyncIterator[memoryview]:
    """Reads the body, decompressed; it lives as long as the block.

    Args:
        request: request whose body has not been read.
        max_bytes: bytes of the decompressed body at most; those of the compressed one are limited before.

    Raises:
        UnsupportedType: the Content-Encoding is not known.
        TooLarge: it has more bytes when decompressed.
        Unreadable: it is not compressed as the header says.
    """
    coding = (header_list(request, "content-encoding") or "identity").strip().lower()
    if coding not in (*WINDOW_BITS, "identity"):
        raise UnsupportedType(
            f"Content-Encoding: {coding:.40} is not read here; send gzip, deflate or the plain body",
            parameter="Content-Encoding",
            value=coding[:40],
            allowed=[*WINDOW_BITS],
        )
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as file:
        received = await spool(request, file)
        if coding == "identity":
            with _mapped(file, received) as body:
                yield body
            return
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as plain:
            size = await asyncio.to_thread(_inflate, file, plain, WINDOW_BITS[coding], max_bytes)
            with _mapped(plain, size) as body:
                yield body


@contextlib.contextmanager
def _mapped(file: Spooled, size: int) -> Iterator[memoryview]:
    """The bytes of a file: in memory, or mapped where it lies on disk."""
    file.seek(0)
    if size <= SPOOL_BYTES:
        yield memoryview(file.read())
        return
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Not closed here, because arrays may still look at it: the last of them that goes closes it.
    yield memoryview(mapped)


def _inflate(source: Spooled, target: Spooled, bits: int, max_bytes: int) -> int:
    """Decompresses one file into another, and returns the bytes written."""
    source.seek(0)
    inflater, size, members = zlib.decompressobj(wbits=bits), 0, 1
    try:
        while True:
            if inflater.eof:
                # A file of gzip may have several members one after the other (RFC 1952, 2.2).
                source.seek(-len(inflater.unused_data), os.SEEK_CUR)
                data = source.read(MEMBER_BYTES)
                if not data:
                    return size
                members += 1
                if bits == zlib.MAX_WBITS or members > MAX_MEMBERS:
                    raise _broken()
                inflater = zlib.decompressobj(wbits=bits)
            else:
                data = inflater.unconsumed_tail or source.read(CHUNK_BYTES)
            part = inflater.decompress(data, CHUNK_BYTES)
            if not data and not part:
                raise _broken()
            size += len(part)
            if size > max_bytes:
                raise TooLarge(
                    f"the request body is limited to {max_bytes:,} bytes, and this one has more when it is decompressed; send fewer "
                    "images at once, or raise UNETPP_LIMITS__MAX_BODY_MB on the server",
                    limit=max_bytes,
                    unit="bytes",
                    setting="UNETPP_LIMITS__MAX_BODY_MB",
                )
            target.write(part)
    except zlib.error as error:
        raise _broken() from error


def _broken() -> Unreadable:
    return Unreadable(
        "the request body is not compressed as Content-Encoding says, or is cut off; send it again",
        reason="compression",
        field="Content-Encoding",
    )
