"""The request body: the file itself, or multipart with `file` and optionally `reference`."""

import asyncio
import contextlib
import re
import tempfile
from collections.abc import AsyncIterator
from typing import BinaryIO, cast

from starlette.datastructures import UploadFile
from starlette.requests import Request

from server.api.form_parser import MAX_TEXT_BYTES, CompleteForm, media_type, read_form
from server.api.request_headers import header_list
from server.api.series_parts import ZipPart, join_series
from server.errors import InvalidParameter, UnsupportedType
from server.segment.request import Upload

# Larger bodies wait on disk, not in memory.
SPOOL_BYTES = 4 * 1024 * 1024

# Types of a body of unknown kind; curl's --data-binary says form-urlencoded.
UNKNOWN = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
# Types that programs give to NIfTI, for which none is registered, and to NRRD and MetaImage.
VOLUMES = (
    "application/gzip",
    "application/x-gzip",
    "application/x-nifti",
    "application/nifti",
    "application/x-nrrd",
    "application/nrrd",
    "application/x-metaimage",
)
DICOM = ("application/dicom",)
ZIPS = ("application/zip", "application/x-zip-compressed")
# Types that an error message suggests.
SUGGESTED = (
    "image/png",
    "image/tiff",
    "image/jpeg",
    "image/bmp",
    "image/webp",
    "application/gzip",
    "application/x-nrrd",
    "application/x-metaimage",
    "application/dicom",
    "application/zip",
    "application/octet-stream",
)

FILES = ("file", "reference")
# Files of a form, each of which may be as large as a body; and its other fields, none of which is valid.
MAX_PARTS = len(FILES)
MAX_NAME = 500
# Values of Content-Transfer-Encoding that change nothing.
PLAIN_ENCODINGS = ("binary", "8bit", "7bit")
FIELDS = "The fields are file and reference, one of each (several of file for a DICOM series); mode, level and the other parameters belong in the URL"


@contextlib.asynccontextmanager
async def receive(request: Request) -> AsyncIterator[Upload]:
    """Reads the body; its files live as long as the block.

    Raises:
        UnsupportedType: the declared Content-Type is not of an image, a volume or a zip.
        InvalidParameter: the form has no `file`, several, or an unknown field.
        Unreadable: the form is broken or incomplete.
        TooLarge: the body is over the limit, which is found while it streams in.
    """
    declared = media_type(request.headers.get("content-type"))
    if declared == "multipart/form-data":
        async with _receive_form(request) as upload:
            yield upload
        return
    _check_type(declared)
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as file:
        await spool(request, file)
        file.seek(0)
        yield Upload(cast("BinaryIO", file), accept=header_list(request, "accept"))


async def spool(request: Request, file: "tempfile.SpooledTemporaryFile[bytes]") -> int:
    """Writes the body into a file of `SPOOL_BYTES` in memory; returns the number of bytes."""
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received <= SPOOL_BYTES:
            file.write(chunk)
        else:
            # The file is on disk from here on, and waiting for the disk must not stop the event loop.
            await asyncio.to_thread(file.write, chunk)
    return received


@contextlib.asynccontextmanager
async def _receive_form(request: Request) -> AsyncIterator[Upload]:
    parser = CompleteForm(request, FILES, FIELDS, MAX_PARTS, series_field="file")
    async with read_form(parser) as form:
        files: dict[str, UploadFile] = {}
        for name, value in form.multi_items():
            part = await _check_part(name, value, files)
            files.setdefault(name, part)
        if "file" not in files:
            raise InvalidParameter(
                "no file in the request; with curl write -F file=@image.png", parameter="file"
            )
        file = files["file"].file
        if parser.series:
            file = await asyncio.to_thread(join_series, file, parser.series)
        reference = files.get("reference")
        # Without the folders of the caller's machine.
        name = re.split(r"[\\/]", files["file"].filename or "")[-1][:MAX_NAME]
        yield Upload(file, reference.file if reference else None, name, header_list(request, "accept"))


async def _check_part(name: str, value: UploadFile | str, before: dict[str, UploadFile]) -> UploadFile:
    """Checks one part of a form.

    Raises:
        InvalidParameter: its name is unknown or was there before, or it is not a file.
        UnsupportedType: it is declared as something else than an image, a volume or a zip.
    """
    if name not in FILES:
        raise InvalidParameter(
            f"unknown multipart field {name!r:.80}. {FIELDS}", parameter=name[:80], allowed=[*FILES]
        )
    if not isinstance(value, UploadFile) or (
        _is_untyped(value) and not isinstance(value.file, ZipPart) and await _is_text(value)
    ):
        raise InvalidParameter(
            f"multipart field {name!r} is text, not a file; with curl write -F {name}=@image.png",
            parameter=name,
        )
    if name in before and not isinstance(value.file, ZipPart):
        raise InvalidParameter(
            f"two files named {name!r} in one request; send one image per request",
            parameter=name,
            actual=2,
            limit=1,
        )
    _check_type(media_type(value.content_type))
    encoding = value.headers.get("content-transfer-encoding", "binary").strip().lower()
    if encoding not in PLAIN_ENCODINGS:
        raise UnsupportedType(
            f"multipart field {name!r} has Content-Transfer-Encoding {encoding!r:.40}, which forms do not have (RFC 7578); send the "
            "bytes of the file as they are",
            parameter="Content-Transfer-Encoding",
            value=encoding[:40],
            allowed=[*PLAIN_ENCODINGS],
        )
    return value


def _is_untyped(value: UploadFile) -> bool:
    """Whether a part has neither a name nor a type, as one of .NET that is given neither, and as text of a form."""
    return not value.filename and not value.content_type


async def _is_text(value: UploadFile) -> bool:
    """Whether a part holds UTF-8 alone; leaves it at its start."""
    if (value.size or 0) > MAX_TEXT_BYTES:
        return False
    data = await value.read()
    await value.seek(0)
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in data


def _check_type(declared: str) -> None:
    """Refuses a declared type that is certainly wrong.

    Raises:
        UnsupportedType: it is not of an image, a volume or a zip.
    """
    if declared not in (*UNKNOWN, *VOLUMES, *DICOM, *ZIPS) and not declared.startswith("image/"):
        raise UnsupportedType(
            f"Content-Type {declared!r:.80} is not of an image, a volume or a zip of images; send {', '.join(SUGGESTED)}",
            parameter="Content-Type",
            value=declared[:80],
            allowed=[*SUGGESTED],
        )
