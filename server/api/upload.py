"""The request body: the file itself, or multipart with `file` and optionally `reference`."""

import asyncio
import contextlib
import re
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator
from typing import BinaryIO, cast

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from server.errors import InvalidParameter, Unreadable, UnsupportedType
from server.segment.request import Upload

# Larger bodies wait on disk, not in memory.
SPOOL_BYTES = 4 * 1024 * 1024

# What tools call a body of unknown kind; curl's --data-binary says form-urlencoded.
UNKNOWN = ("", "application/octet-stream", "binary/octet-stream", "application/x-www-form-urlencoded")
# What tools call NIfTI, for which no type is registered.
VOLUMES = (
    "application/gzip", "application/x-gzip", "application/x-nifti", "application/nifti", "application/x-nrrd", "application/nrrd",
    "application/x-metaimage",
)  # fmt: skip
# And several images.
ZIPS = ("application/zip", "application/x-zip-compressed")

# Of a form's files, each of which may be as large as a body; and of its other fields, none of which is right.
MOST = 2
MAX_NAME = 500
FIELDS = "The fields are file and reference, one of each; mode, level and the other parameters belong in the URL"


@contextlib.asynccontextmanager
async def receive(request: Request) -> AsyncIterator[Upload]:
    """Reads the body; the files live as long as the block.

    Raises:
        UnsupportedType: the declared Content-Type is not an image.
        InvalidParameter: no `file`, several, or an unknown field.
        Unreadable: broken or incomplete multipart.
        TooLarge: from the body limit, while streaming.
    """
    accept = request.headers.get("accept")
    declared = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if declared == "multipart/form-data":
        async with _multipart(request) as upload:
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
                # On disk from here: waiting for it must not stop the event loop.
                await asyncio.to_thread(file.write, chunk)
        file.seek(0)
        yield Upload(cast("BinaryIO", file), accept=accept)


@contextlib.asynccontextmanager
async def _multipart(request: Request) -> AsyncIterator[Upload]:
    try:
        form = await _WholeForm(request).parse()
    except MultiPartException as error:
        raise Unreadable(f"the multipart body cannot be read: {error.message} {FIELDS}") from error
    try:
        fields: dict[str, UploadFile] = {}
        for name, value in form.multi_items():
            if name not in ("file", "reference"):
                raise InvalidParameter(f"unknown multipart field {name!r}. {FIELDS}")
            if not isinstance(value, UploadFile):
                raise InvalidParameter(f"multipart field {name!r} is text, not a file; with curl write -F {name}=@image.png")
            if name in fields:
                raise InvalidParameter(f"two files named {name!r} in one request; send one image per request")
            _check_type((value.content_type or "").split(";")[0].strip().lower())
            fields[name] = value
        if "file" not in fields:
            raise InvalidParameter("no file in the request; with curl write -F file=@image.png")
        reference = fields.get("reference")
        # Without the folders of whoever sent it.
        name = re.split(r"[\\/]", fields["file"].filename or "")[-1][:MAX_NAME]
        yield Upload(fields["file"].file, reference.file if reference else None, name, request.headers.get("accept"))
    finally:
        await form.close()


class _WholeForm(MultiPartParser):
    """Starlette's parser, which alone would drop a file that is cut off in silence."""

    def __init__(self, request: Request) -> None:
        self._ended = False
        super().__init__(request.headers, self._to_its_end(request.stream()), max_files=MOST, max_fields=MOST)

    def on_end(self) -> None:
        """The closing boundary was read."""
        self._ended = True

    async def _to_its_end(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        async for chunk in stream:
            yield chunk
        if not self._ended:
            # Raised here, inside of `parse`, which then closes its files.
            raise Unreadable("the multipart body ends early; send it again, whole")


def _check_type(declared: str) -> None:
    if declared not in (*UNKNOWN, *VOLUMES, *ZIPS) and not declared.startswith("image/"):
        raise UnsupportedType(
            f"Content-Type {declared!r} is neither an image nor a volume nor a zip of them; send image/png, image/tiff, image/jpeg, image/bmp, "
            "image/webp, application/gzip (.nii.gz), application/x-nrrd (.nrrd), application/x-metaimage (.mha), application/zip (of images) "
            "or application/octet-stream"
        )
