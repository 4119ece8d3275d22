"""Decodes bytes to `Image` or `Volume`. One row per input format; the bytes decide, not the name or the declared type."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from server.arrays import Image, InputHeader, Volume
from server.errors import InvalidParameter, UnetppError, Unreadable, UnsupportedType
from server.imaging import neighbours
from server.imaging.decode import dicom, metaimage, nifti, nrrd, raster, tiff
from server.imaging.decode_options import DecodeOptions

T = TypeVar("T")

# Bytes by which a format is recognised: few for all but MetaImage, which has no magic.
PREFIX_BYTES = 16 * 1024


@dataclass(frozen=True)
class Decoder:
    """Decodes one family of formats; a row of the table.

    Attributes:
        formats: Names of the formats.
        sniff: Function of the first bytes that returns whether the file looks like one of them.
        read_header: Function that returns the header of what `decode` returns, without decoding pixels; may
            raise any exception on broken input.
        decode: Function that returns the decoded image or volume; may raise any exception on broken input.
    """

    formats: str
    sniff: Callable[[bytes], bool]
    read_header: Callable[[BinaryIO, DecodeOptions], InputHeader]
    decode: Callable[[BinaryIO, DecodeOptions], Image | Volume]


DECODERS: dict[str, Decoder] = {
    # First, because the free bytes in front of its magic may be the head of a TIFF.
    "dicom": Decoder("DICOM", dicom.sniff, dicom.read_header, dicom.decode),
    "raster": Decoder("PNG, JPEG, BMP, WebP", raster.sniff, raster.read_header, raster.decode),
    "tiff": Decoder("TIFF", tiff.sniff, tiff.read_header, tiff.decode),
    "nifti": Decoder("NIfTI", nifti.sniff, nifti.read_header, nifti.decode),
    "nrrd": Decoder("NRRD", nrrd.sniff, nrrd.read_header, nrrd.decode),
    "metaimage": Decoder("MetaImage", metaimage.sniff, metaimage.read_header, metaimage.decode),
}


def read_header(file: BinaryIO, options: DecodeOptions) -> InputHeader:
    """Reads what is known of a file before its pixels are decoded, and leaves the file at its start.

    Volumes of any size are accepted here, because their limit depends on what the request costs.

    Args:
        file: File, open at its start, seekable.
        options: Limits and choices.

    Raises:
        Unreadable: The file is empty, truncated or broken.
        UnsupportedType: The format is not in the table.
        TooLarge: An image is over the limit.
        InvalidParameter: The file has no such axes or channel.
    """
    header = _dispatch(file, options, lambda decoder: decoder.read_header(file, options))
    if header.kind == "image":
        options.check_image(*header.size)
    file.seek(0)
    return header


def is_quick(file: BinaryIO, max_bytes: int) -> bool:
    """Returns whether the header of a file is read in no time even if it is hostile; leaves the file at its start.

    Args:
        file: File, open at its start, seekable.
        max_bytes: Size of the largest file for which this is so.
    """
    data = file.read(max_bytes + 1)
    file.seek(0)
    return len(data) <= max_bytes and raster.is_plain_png(data)


def decode(file: BinaryIO, options: DecodeOptions) -> Image | Volume:
    """Decodes an image, a volume or a stack.

    Args:
        file: File, open at its start, seekable.
        options: Limits, checked before pixels are decoded, and choices.

    Raises:
        Unreadable: The file is empty, truncated or broken, or holds values that are not finite.
        UnsupportedType: The format is not in the table.
        TooLarge: The file is over a limit.
        InvalidParameter: The file has no such axes or channel.
    """
    return _dispatch(file, options, lambda decoder: decoder.decode(file, options))


def _unsupported(prefix: bytes) -> UnsupportedType:
    """Returns the error of a file of no format in the table, which names the format where it is known."""
    formats = ", ".join(decoder.formats for decoder in DECODERS.values())
    allowed = formats.split(", ")
    neighbour = neighbours.find(prefix)
    if neighbour is None:
        return UnsupportedType(f"not a format that this server reads; it reads {formats}", allowed=allowed)
    return UnsupportedType(
        f"the file is {neighbour.name}, which this server does not read; {neighbour.remedy}. It reads {formats}",
        value=neighbour.name,
        remedy=neighbour.remedy,
        allowed=allowed,
    )


def _dispatch(file: BinaryIO, options: DecodeOptions, function: Callable[[Decoder], T]) -> T:
    """Calls a function with the decoder of the file, and turns whatever it raises into a domain error."""
    prefix = file.read(PREFIX_BYTES)
    file.seek(0)
    if not prefix:
        raise Unreadable(
            "the file is empty (0 bytes); send the image itself as the body, or as multipart field 'file'",
            reason="empty",
        )
    decoder = next((decoder for decoder in DECODERS.values() if decoder.sniff(prefix)), None)
    if decoder is None or (decoder is DECODERS["dicom"] and not dicom.is_dicom(file, prefix, options)):
        raise _unsupported(prefix)
    if options.axes and decoder is not DECODERS["tiff"]:
        raise InvalidParameter(
            f"axes is for TIFF; the axes of {decoder.formats} are known",
            parameter="axes",
            value=options.axes[:20],
            format=decoder.formats,
        )
    if options.series is not None and decoder is not DECODERS["dicom"]:
        raise InvalidParameter(
            f"series is for DICOM, and the input is {decoder.formats}; leave it out",
            parameter="series",
            value=options.series[:64],
            format=decoder.formats,
        )
    try:
        return function(decoder)
    except UnetppError:
        raise
    except MemoryError as error:
        raise Unreadable(
            f"the {decoder.formats} file asks for more memory than there is",
            reason="memory",
            format=decoder.formats,
        ) from error
    # Decoders raise every kind of exception on hostile bytes.
    except Exception as error:
        raise Unreadable(
            f"the file starts like {decoder.formats} but cannot be decoded (truncated or damaged?); "
            "open it in a viewer and save it again",
            reason="damaged",
            format=decoder.formats,
        ) from error
