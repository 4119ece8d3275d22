"""The request body: the file itself, or multipart with `file` and optionally `reference`."""

import asyncio
import contextlib
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from typing import Any, BinaryIO, cast

from python_multipart.multipart import (
    DEFAULT_MAX_HEADER_COUNT,
    DEFAULT_MAX_HEADER_SIZE,
    parse_options_header,
)
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from server.api.request_headers import header_list
from server.api.series_parts import SeriesZip, ZipPart, join_series
from server.errors import InvalidParameter, TooLarge, Unreadable, UnsupportedType
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
# Instances of a DICOM series in a form.
MAX_INSTANCES = 1000
MAX_NAME = 500
MAX_TEXT_BYTES = 1024 * 1024
# Values of Content-Transfer-Encoding that change nothing.
PLAIN_ENCODINGS = ("binary", "8bit", "7bit")
# Limits of the parser, by its errors.
PART_LIMITS = {
    "Maximum header count exceeded": (DEFAULT_MAX_HEADER_COUNT, "headers"),
    "Maximum header size exceeded": (DEFAULT_MAX_HEADER_SIZE, "bytes in a header"),
}
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
    declared = _media_type(request.headers.get("content-type"))
    if declared == "multipart/form-data":
        async with _receive_form(request) as upload:
            yield upload
        return
    _check_type(declared)
    with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as file:
        received = 0
        async for chunk in request.stream():
            received += len(chunk)
            if received <= SPOOL_BYTES:
                file.write(chunk)
            else:
                # The file is on disk from here on, and waiting for the disk must not stop the event loop.
                await asyncio.to_thread(file.write, chunk)
        file.seek(0)
        yield Upload(cast("BinaryIO", file), accept=header_list(request, "accept"))


@contextlib.asynccontextmanager
async def _receive_form(request: Request) -> AsyncIterator[Upload]:
    parser = _CompleteForm(request, FILES, FIELDS, MAX_PARTS, series_field="file")
    async with _read_form(parser) as form:
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


@contextlib.asynccontextmanager
async def receive_form(
    request: Request, files: tuple[str, ...], hint: str, max_fields: int = MAX_PARTS
) -> AsyncIterator[FormData]:
    """Reads a multipart form; its files live as long as the block.

    Args:
        request: request with the form.
        files: names of the fields that are files, of which there are no more than names.
        hint: sentence for errors, that says which fields there are.
        max_fields: text fields at most.

    Raises:
        Unreadable: the form is broken, incomplete or over a limit.
    """
    async with _read_form(_CompleteForm(request, files, hint, max_fields)) as form:
        yield form


@contextlib.asynccontextmanager
async def _read_form(parser: "_CompleteForm") -> AsyncIterator[FormData]:
    try:
        form = await _parse_form(parser)
        try:
            yield form
        finally:
            await form.close()
    finally:
        parser.close()


async def _parse_form(parser: "_CompleteForm") -> FormData:
    try:
        return await parser.parse()
    except MultiPartException as error:
        limit, unit = PART_LIMITS.get(str(error.__cause__), (None, ""))
        if limit:
            raise Unreadable(
                f"a part of the form has more than {limit:,} {unit}; send it with fewer or shorter ones",
                limit=limit,
                unit=unit,
            ) from error
        raise Unreadable(
            f"the multipart body cannot be read: {error.message} {parser.hint}", allowed=[*parser.files]
        ) from error


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
    _check_type(_media_type(value.content_type))
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


class _CompleteForm(MultiPartParser):
    """Starlette's parser, which alone would silently drop a file that is cut off, and take one without a name for text."""

    def __init__(
        self,
        request: Request,
        files: tuple[str, ...],
        hint: str,
        max_fields: int,
        series_field: str | None = None,
    ) -> None:
        self.files = files
        self.hint = hint
        self.series: SeriesZip | None = None
        self._ended = False
        self._series_field = series_field
        self._inputs = 0
        super().__init__(
            request.headers,
            self._until_end(request.stream()),
            max_files=len(files) + (MAX_INSTANCES if series_field else 0),
            max_fields=max_fields,
        )

    def close(self) -> None:
        """Removes the zip of a series."""
        if self.series:
            self.series.close()

    def on_headers_finished(self) -> None:
        """Called before the content of a part, which makes it a file or text.

        Raises:
            Unreadable: the form has too many parts.
        """
        disposition, part = Message(), self._current_part
        disposition["Content-Disposition"] = (part.content_disposition or b"").decode("latin-1")
        parameters = disposition.get_params([], "Content-Disposition")
        media_type = _media_type(Headers(raw=part.item_headers).get("content-type"))
        named = any(name == "filename" for name, _ in parameters)
        expected = any(name == "name" and value in self.files for name, value in parameters)
        is_file = named or (expected and not media_type.startswith("text/"))
        # Files of one input are a series, which has a limit of its own.
        is_input = is_file and any(
            name == "name" and value == self._series_field for name, value in parameters
        )
        self._inputs += is_input
        if self._inputs > MAX_INSTANCES:
            raise TooLarge(
                f"the form has more than {MAX_INSTANCES:,} files; send one series, or a part of it",
                limit=MAX_INSTANCES,
                unit="files",
            )
        count, limit, unit = self._current_fields, int(self.max_fields), "text fields"
        if is_file:
            others = self._current_files - max(0, self._inputs - 1 - is_input)
            count, limit, unit = others, len(self.files), "files"
        if count >= limit and not (is_input and self._inputs > 1):
            raise Unreadable(f"the form has more than {limit} {unit}. {self.hint}", limit=limit, unit=unit)
        if is_file and b"filename" not in parse_options_header(part.content_disposition)[1]:
            part.content_disposition = (part.content_disposition or b"") + b'; filename=""'
        super().on_headers_finished()
        if part.file:
            # Browsers, curl and httpx write %22 for a quotation mark.
            plain = _decode_words(part.file.filename or "").replace("%22", '"')
            part.file.filename = _file_name(parameters) or plain
            if is_input and self._inputs > 1:
                self.series = self.series or SeriesZip()
                part.file.file = cast("BinaryIO", self.series.add_part())

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        """Called with a piece of a part.

        Raises:
            Unreadable: the part is text that is too long.
        """
        part = self._current_part
        if part.file is None and len(part.data) + end - start > MAX_TEXT_BYTES:
            raise Unreadable(
                f"the form's field {part.field_name!r:.80} is text of more than {MAX_TEXT_BYTES:,} bytes; a file has a filename "
                f"or a Content-Type such as image/png. {self.hint}",
                limit=MAX_TEXT_BYTES,
                unit="bytes",
                allowed=[*self.files],
            )
        super().on_part_data(data, start, end)

    def on_end(self) -> None:
        """Called at the closing boundary."""
        self._ended = True

    async def _until_end(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._ended:
            # Raised inside of `parse`, which then closes its files.
            raise Unreadable("the multipart body ends early; send all of it again")


def _file_name(parameters: list[tuple[str, Any]]) -> str:
    """The name of filename* (RFC 5987), which clients send beside an ASCII name; "" without one that can be read."""
    for name, value in parameters:
        # The standard library gives an extended parameter as (charset, language, bytes as Latin-1).
        if name == "filename" and isinstance(value, tuple):
            charset, _, text = value
            try:
                return str(text).encode("latin-1").decode(charset or "ascii")
            except (LookupError, ValueError):
                return ""
    return ""


def _decode_words(name: str) -> str:
    """A name as it was before .NET wrote it as a word of RFC 2047, =?utf-8?B?...?=."""
    if not (name.startswith("=?") and name.endswith("?=")):
        return name
    try:
        return str(make_header(decode_header(name)))
    except (HeaderParseError, LookupError, ValueError):
        return name


def _media_type(content_type: str | None) -> str:
    return (content_type or "").split(";")[0].strip().lower()


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
