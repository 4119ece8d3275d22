"""Bytes to `Image` or `Volume`. One row per input format; the bytes decide, not the name or the declared type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from server.arrays import Image, InputHeader, Volume
from server.errors import InvalidParameter, UnetppError, Unreadable, UnsupportedType
from server.imaging.decode import metaimage, nifti, nrrd, raster, tiff
from server.imaging.decode_options import DecodeOptions

T = TypeVar("T")


@dataclass(frozen=True)
class Decoder:
    """One row of the table.

    Attributes:
        formats: as a person calls them.
        recognises: whether the first 16 bytes look like it.
        size: open file to its extent as `decode` will find it, from the header alone; may raise anything on broken input.
        decode: open file to Image or Volume; may raise anything on broken input.
    """

    formats: str
    recognises: Callable[[bytes], bool]
    size: Callable[[BinaryIO, DecodeOptions], InputHeader]
    decode: Callable[[BinaryIO, DecodeOptions], Image | Volume]


DECODERS: dict[str, Decoder] = {
    "raster": Decoder("PNG, JPEG, BMP, WebP", raster.recognises, raster.size, raster.decode),
    "tiff": Decoder("TIFF", tiff.recognises, tiff.size, tiff.decode),
    "nifti": Decoder("NIfTI", nifti.recognises, nifti.size, nifti.decode),
    "nrrd": Decoder("NRRD", nrrd.recognises, nrrd.size, nrrd.decode),
    "metaimage": Decoder("MetaImage", metaimage.recognises, metaimage.size, metaimage.decode),
}


def measure(file: BinaryIO, decode_options: DecodeOptions) -> InputHeader:
    """What the header of a file says. Volumes of any size are measured: their limit is a matter of cost, see `segment`.

    Raises:
        Unreadable, UnsupportedType: as `decode`.
        TooLarge: an image over the limit.
    """
    input_header = _guarded(file, decode_options, lambda row: row.size(file, decode_options))
    if input_header.kind == "image":
        decode_options.check_image(*input_header.size)
    file.seek(0)
    return input_header


def is_quick(file: BinaryIO, most: int) -> bool:
    """Whether the header of a file is read in no time, whoever made it; leaves the file at its start.

    Args:
        file: open at its start, seekable.
        most: bytes of such a file.
    """
    data = file.read(most + 1)
    file.seek(0)
    return len(data) <= most and raster.is_plain_png(data)


def decode(file: BinaryIO, decode_options: DecodeOptions) -> Image | Volume:
    """Decodes an image, a volume or a stack.

    Args:
        file: open at its start, seekable.
        decode_options: limits, checked before pixels are decoded, and choices.

    Raises:
        Unreadable: empty, truncated or broken, or values that are not finite.
        UnsupportedType: not a format of the table.
        TooLarge: over a limit.
        InvalidParameter: axes or a channel that the file does not have.
    """
    return _guarded(file, decode_options, lambda row: row.decode(file, decode_options))


def _guarded(file: BinaryIO, decode_options: DecodeOptions, work: Callable[[Decoder], T]) -> T:
    """`work` with the row that recognises the file; whatever a decoder raises becomes a sentence."""
    head = file.read(16)
    file.seek(0)
    if not head:
        raise Unreadable("the file is empty (0 bytes); send the image itself as the body, or as multipart field 'file'")
    row = next((row for row in DECODERS.values() if row.recognises(head)), None)
    if row is None:
        known = ", ".join(row.formats for row in DECODERS.values())
        raise UnsupportedType(f"not a format that this server reads; it reads {known}")
    if decode_options.axes and row is not DECODERS["tiff"]:
        raise InvalidParameter(f"axes is for TIFF; the axes of {row.formats} are known")
    try:
        return work(row)
    except UnetppError:
        raise
    except MemoryError as error:
        raise Unreadable(f"the {row.formats} file asks for more memory than there is") from error
    except Exception as error:  # decoders raise every kind of exception on hostile bytes
        raise Unreadable(
            f"the file starts like {row.formats} but cannot be decoded (truncated or damaged?); "
            "open it in a viewer and save it again"
        ) from error
