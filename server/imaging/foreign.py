"""Names files of formats that are not read, so that a refusal can say what to do with them."""

from dataclasses import dataclass
from typing import BinaryIO

OME_TIFF = "export it as OME-TIFF, e.g. with Fiji (Bio-Formats) or QuPath"
PICTURE = "save it as PNG or TIFF"
ARRAY = "save the image as TIFF, or a volume as NIfTI"
DICOM = "convert the series to NIfTI (dcm2niix) and send that"

# Bytes of the start of a file that are compared.
PREFIX_BYTES = 512


@dataclass(frozen=True)
class ForeignFormat:
    """Names a format that is not read; a row of the table.

    Attributes:
        name: Name for the caller.
        remedy: What the caller can do.
        parts: Bytes at offsets, all of which such a file has.
    """

    name: str
    remedy: str
    parts: tuple[tuple[int, bytes], ...]


def _row(name: str, remedy: str, start: bytes, *more: tuple[int, bytes]) -> ForeignFormat:
    return ForeignFormat(name, remedy, ((0, start), *more))


FOREIGN_FORMATS = (
    _row("Zeiss CZI", OME_TIFF, b"ZISRAWFILE"),
    _row("Leica LIF", OME_TIFF, b"\x70\0\0\0", (8, b"\x2a")),
    _row("Nikon ND2", OME_TIFF, b"\xda\xce\xbe\x0a"),
    _row("Olympus OIB or Zeiss ZVI", OME_TIFF, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"),
    _row("Olympus ETS, a part of VSI", OME_TIFF, b"SIS\0"),
    _row("HDF5 (Imaris IMS, ilastik, MATLAB 7.3)", OME_TIFF, b"\x89HDF\r\n\x1a\n"),
    _row("DeltaVision DV", OME_TIFF, b"", (96, b"\xa0\xc0")),
    _row("DeltaVision DV", OME_TIFF, b"", (96, b"\xc0\xa0")),
    _row("MRC", OME_TIFF, b"", (208, b"MAP ")),
    _row("ICS", OME_TIFF, b"\tics_version"),
    _row("ICS", OME_TIFF, b"ics_version"),
    _row("DICOM", DICOM, b"", (128, b"DICM")),
    _row("JPEG 2000, or an early Nikon ND2", OME_TIFF, b"\0\0\0\x0cjP  "),
    _row("JPEG 2000", PICTURE, b"\xff\x4f\xff\x51"),
    _row("JPEG XR", PICTURE, b"II\xbc"),
    _row("JPEG XL", PICTURE, b"\xff\x0a"),
    _row("JPEG XL", PICTURE, b"\0\0\0\x0cJXL "),
    _row("GIF", PICTURE, b"GIF8"),
    _row("AVIF", PICTURE, b"", (4, b"ftypavi")),
    _row("HEIC", PICTURE, b"", (4, b"ftyphe")),
    _row("HEIC or AVIF", PICTURE, b"", (4, b"ftypmif1")),
    _row("a film", "save its frames as a TIFF stack", b"", (4, b"ftyp")),
    _row("a film", "save its frames as a TIFF stack", b"RIFF", (8, b"AVI ")),
    _row("OpenEXR", PICTURE, b"\x76\x2f\x31\x01"),
    _row("Photoshop PSD", PICTURE, b"8BPS"),
    _row("GIMP XCF", PICTURE, b"gimp xcf"),
    _row("PDF", PICTURE, b"%PDF"),
    *(_row("PNM (PGM, PPM, PAM)", PICTURE, b"P%d" % digit, (2, b"\n")) for digit in range(1, 8)),
    _row("FITS", ARRAY, b"SIMPLE  ="),
    _row("NumPy", ARRAY, b"\x93NUMPY"),
    _row("MATLAB", ARRAY, b"MATLAB 5.0"),
    _row("SVG or another XML", PICTURE, b"<?xml"),
    _row("a web page", "send the image itself, not the page that shows it", b"<!DOCTYPE html"),
)


def recognise(file: BinaryIO) -> ForeignFormat | None:
    """Returns the row of a file, and leaves the file at its start; None where it is unknown."""
    prefix = file.read(PREFIX_BYTES)
    file.seek(0)
    rows = (row for row in FOREIGN_FORMATS if all(prefix.startswith(part, at) for at, part in row.parts))
    return next(rows, None)
