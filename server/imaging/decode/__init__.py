"""Bytes to `Image`. One row per input format; the bytes decide, not the name or the declared type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from server.arrays import Image
from server.errors import UnetppError, Unreadable, UnsupportedType
from server.imaging.decode import raster, tiff

T = TypeVar("T")


@dataclass(frozen=True)
class Decoder:
    """One row of the table.

    Attributes:
        formats: as a person calls them.
        recognises: whether the first 16 bytes look like it.
        size: open file to (H, W), from the header alone; may raise anything on broken input.
        decode: (open file, most pixels, whether labels are wanted) to Image; may raise anything on broken input.
    """

    formats: str
    recognises: Callable[[bytes], bool]
    size: Callable[[BinaryIO], tuple[int, int]]
    decode: Callable[[BinaryIO, int, bool], Image]


DECODERS: dict[str, Decoder] = {
    "raster": Decoder("PNG, JPEG, BMP, WebP", raster.recognises, raster.size, raster.decode),
    "tiff": Decoder("TIFF", tiff.recognises, tiff.size, tiff.decode),
}


def measure(file: BinaryIO, max_pixels: int) -> int:
    """Pixels of an encoded image, as its header says, without decoding it.

    Raises:
        Unreadable, UnsupportedType, TooLarge: as `decode`.
    """
    height, width = _guarded(file, lambda row: row.size(file))
    raster.check_size(height, width, max_pixels)
    file.seek(0)
    return height * width


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
    return _guarded(file, lambda row: row.decode(file, max_pixels, labels))


def _guarded(file: BinaryIO, work: Callable[[Decoder], T]) -> T:
    """`work` with the row that recognises the file; whatever a decoder raises becomes a sentence."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise Unreadable("the file is empty (0 bytes); send the image itself as the body, or as multipart field 'file'")
    row = next((row for row in DECODERS.values() if row.recognises(head)), None)
    if row is None:
        known = ", ".join(row.formats for row in DECODERS.values())
        raise UnsupportedType(f"not an image format that this server reads; it reads {known}")
    try:
        return work(row)
    except UnetppError:
        raise
    except MemoryError as error:
        raise Unreadable(f"the {row.formats} file asks for more memory than there is") from error
    except Exception as error:  # decoders raise every kind of exception on hostile bytes
        raise Unreadable(
            f"the file starts like {row.formats} but cannot be decoded (truncated or damaged?); "
            "open it in an image viewer and save it again"
        ) from error
