"""Multipart forms: files and text that are complete, within limits, and under the names of clients of every kind."""

import contextlib
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
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from server.api.series_parts import SeriesZip
from server.errors import TooLarge, Unreadable

# Text fields of a form where a route does not say how many.
MAX_FIELDS = 2
# Instances of a DICOM series in a form.
MAX_INSTANCES = 1000
MAX_TEXT_BYTES = 1024 * 1024
# Limits of the parser, by its errors.
PART_LIMITS = {
    "Maximum header count exceeded": (DEFAULT_MAX_HEADER_COUNT, "headers"),
    "Maximum header size exceeded": (DEFAULT_MAX_HEADER_SIZE, "bytes in a header"),
}


@contextlib.asynccontextmanager
async def receive_form(
    request: Request, files: tuple[str, ...], hint: str, max_fields: int = MAX_FIELDS
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
    async with read_form(CompleteForm(request, files, hint, max_fields)) as form:
        yield form


@contextlib.asynccontextmanager
async def read_form(parser: "CompleteForm") -> AsyncIterator[FormData]:
    """Reads a form; its files live as long as the block.

    Raises:
        Unreadable: the form is broken, incomplete or over a limit.
        TooLarge: it has too many instances of a series.
    """
    try:
        form = await _parse_form(parser)
        try:
            yield form
        finally:
            await form.close()
    finally:
        parser.close()


async def _parse_form(parser: "CompleteForm") -> FormData:
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


class CompleteForm(MultiPartParser):
    """Starlette's parser, which alone would silently drop a file that is cut off, and take one without a name for text.

    Args:
        request: request with the form.
        files: names of the fields that are files.
        hint: sentence for errors, that says which fields there are.
        max_fields: text fields at most.
        series_field: field of which several files are one series; None without one.

    Attributes:
        files: names of the fields that are files.
        hint: sentence for errors.
        series: zip of the files of a series but the first; None unless there are several.
    """

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
        declared = media_type(Headers(raw=part.item_headers).get("content-type"))
        named = any(name == "filename" for name, _ in parameters)
        expected = any(name == "name" and value in self.files for name, value in parameters)
        is_file = named or (expected and not declared.startswith("text/"))
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
                part.file.file.close()
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


def media_type(content_type: str | None) -> str:
    """The type of a header Content-Type, without parameters."""
    return (content_type or "").split(";")[0].strip().lower()
