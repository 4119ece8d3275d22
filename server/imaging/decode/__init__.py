"""Bytes to `Image`. One row per input format; the bytes decide, not the name or the declared type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from server.arrays import Image
from server.errors import UnetppError, Unreadable, UnsupportedType
from server.imaging.decode import raster, tiff


@dataclass(frozen=True)
class Decoder:
    """One row of the table.

    Attributes:
        formats: as a person calls them.
        recognises: whether the first 16 bytes look like it.
        decode: (open file, most pixels, whether labels are wanted) to Image; may raise anything on broken input.
    """

    formats: str
    recognises: Callable[[bytes], bool]
    decode: Callable[[BinaryIO, int, bool], Image]


DECODERS: dict[str, Decoder] = {
    "raster": Decoder("PNG, JPEG, BMP, WebP", raster.recognises, raster.decode),
    "tiff": Decoder("TIFF", tiff.recognises, tiff.decode),
}


def decode(file: BinaryIO, max_pixels: int, *, labels: bool = False) -> Image:
    """Decodes an image.

    Args:
        file: open at its start, seekable.
        max_pixels: largest height x width; checked before pixels are decoded.
        labels: the values as stored are wanted: the indices of a palette image, not its colours.

    Raises:
        Unreadable: empty, truncated or broken.
        UnsupportedType: not a format of the table.
        TooLarge: over `max_pixels`.
    """
    head = file.read(16)
    file.seek(0)
    if not head:
        raise Unreadable("the file is empty (0 bytes); send the image itself as the body, or as multipart field 'file'")
    for row in DECODERS.values():
        if row.recognises(head):
            try:
                return row.decode(file, max_pixels, labels)
            except UnetppError:
                raise
            except MemoryError as error:
                raise Unreadable(f"the {row.formats} file asks for more memory than there is") from error
            except Exception as error:  # decoders raise every kind of exception on hostile bytes
                raise Unreadable(
                    f"the file starts like {row.formats} but cannot be decoded (truncated or damaged?); "
                    "open it in an image viewer and save it again"
                ) from error
    known = ", ".join(row.formats for row in DECODERS.values())
    raise UnsupportedType(f"not an image format that this server reads; it reads {known}")
