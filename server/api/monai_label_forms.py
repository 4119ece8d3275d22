"""The forms that clients of MONAI Label send: `params`, which is a JSON object, and files."""

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any, BinaryIO

from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.requests import Request

from server.api.form_parser import receive_form
from server.api.request_headers import presented_key
from server.errors import InvalidParameter, TooLarge, UnsupportedType
from server.imaging.zip_reader import is_zip

FORM, FIELDS_ONLY = "multipart/form-data", "application/x-www-form-urlencoded"

# Text fields of a form; clients send two.
MAX_FIELDS = 20
# Bytes of a body without files; `params` alone may have a quarter of it.
MAX_FIELDS_BYTES = 256 * 1024

Form = FormData | QueryParams

# A file in a description of a form.
FILE = {"type": "string", "format": "binary"}


def describe_form(**files: Any) -> dict[str, Any]:
    """The description of a multipart body for the documentation."""
    properties = {"params": {"type": "string", "description": "a JSON object"}} | files
    schema = {"type": "object", "properties": properties, "required": [*files]}
    return {"requestBody": {"required": bool(files), "content": {FORM: {"schema": schema}}}}


@contextlib.asynccontextmanager
async def receive(request: Request, files: tuple[str, ...]) -> AsyncIterator[Form]:
    """Reads a form, with or without files.

    Raises:
        UnsupportedType: the body is not a form.
        Unreadable: the form is broken, incomplete or over a limit.
        TooLarge: a form without files is over its limit.
    """
    declared = request.headers.get("content-type", FIELDS_ONLY).split(";")[0].strip().lower()
    if declared == FIELDS_ONLY:
        yield await read_fields(request)
    elif declared == FORM:
        hint = f"The fields are params and {' and '.join(files)}, with one file each"
        async with receive_form(request, files, hint, MAX_FIELDS) as form:
            yield form
    else:
        raise UnsupportedType(
            f"Content-Type {declared!r:.80} is not that of a form; send {FORM}",
            parameter="Content-Type",
            value=declared[:80],
            allowed=[FORM, FIELDS_ONLY],
        )


async def read_fields(request: Request) -> QueryParams:
    """Reads a form without files.

    Raises:
        TooLarge: it is over the limit of such forms.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FIELDS_BYTES:
            raise TooLarge(
                f"a form without files is limited to {MAX_FIELDS_BYTES:,} bytes; send files as {FORM}",
                limit=MAX_FIELDS_BYTES,
                actual=len(body),
                unit="bytes",
            )
    return QueryParams(body)


def text(form: Form, name: str) -> str:
    """A text field of a form; "" without it.

    Raises:
        InvalidParameter: it is a file.
    """
    value = form.get(name, "")
    if not isinstance(value, str):
        raise InvalidParameter(f"the form field {name!r} is a file, not text", parameter=name)
    return value


def file_of(form: Form, name: str) -> BinaryIO | None:
    """A file of a form; None without it.

    Raises:
        InvalidParameter: it is text.
        UnsupportedType: it is a zip.
    """
    value = form.get(name)
    if value is None:
        return None
    if not isinstance(value, UploadFile):
        raise InvalidParameter(
            f"the form field {name!r} is text, not a file; with curl write -F {name}=@image.nii.gz",
            parameter=name,
        )
    _check_image(value.file)
    return value.file


def _check_image(file: BinaryIO) -> None:
    """Refuses a zip, whose answer is a zip, too, which clients of MONAI Label cannot read.

    Raises:
        UnsupportedType: it is one.
    """
    if is_zip(file):
        raise UnsupportedType(
            "this is a zip; over the routes of MONAI Label send one image or volume, or use POST /segment for zips",
            value="application/zip",
        )


def owner_of(request: Request, values: dict[str, Any]) -> str:
    """Owner of an uploaded image, as a hash: a name such as CTChest could otherwise lead to the image of another client."""
    host = request.client.host if request.client else ""
    facts = (host, presented_key(request.headers), f"{values.get('client_id', '')}")
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()
