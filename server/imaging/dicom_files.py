"""The DICOM instances of an upload, which is one file or a zip: found by their content, and read up to their pixels."""

import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from server.errors import UnetppError, Unreadable
from server.imaging import dicom_library
from server.imaging.dicom_stream import (
    FORMAT,
    Budget,
    Deflated,
    Head,
    Inflating,
    read_exactly,
    skip,
)
from server.imaging.streaming import Stream
from server.imaging.zip_reader import DAMAGE, is_zip, list_files, open_zip

# Bytes by which a DICOM file is recognised.
SNIFF_BYTES = 144
MAGIC_AT, MAGIC = 128, b"DICM"
# Value representations of the first element of a file without a preamble: UI, UL, CS, OB, SH, LO, DA.
FIRST_VRS = (b"UI", b"UL", b"CS", b"OB", b"SH", b"LO", b"DA")
# Length of the first element of a file whose elements do not tell their representation.
MAX_FIRST = 256

PIXEL_DATA, FLOAT_PIXELS, DOUBLE_PIXELS = 0x7FE00010, 0x7FE00008, 0x7FE00009
UNDEFINED = 0xFFFFFFFF
LONG_VRS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN")

DEFLATED_SYNTAX = "1.2.840.10008.1.2.1.99"
DIRECTORY = "1.2.840.10008.1.3.10"

# Kinds of objects that are left out, because their pixels are results and not a picture of a patient: segmentation, dose,
# waveforms, reports. All other objects count as pictures where they have pixels.
NO_PICTURES = {
    "1.2.840.10008.5.1.4.1.1.66": "raw data",
    "1.2.840.10008.5.1.4.1.1.66.4": "SEG",
    "1.2.840.10008.5.1.4.1.1.66.7": "SEG",
    "1.2.840.10008.5.1.4.1.1.481.2": "RTDOSE",
}
STRANGERS = (
    ("1.2.840.10008.5.1.4.1.1.88.59", "KO"),
    ("1.2.840.10008.5.1.4.1.1.88.", "SR"),
    ("1.2.840.10008.5.1.4.1.1.11.", "PR"),
    ("1.2.840.10008.5.1.4.1.1.104.", "PDF"),
    ("1.2.840.10008.5.1.4.1.1.481.", "RT"),
    ("1.2.840.10008.5.1.4.1.1.66.", "spatial objects"),
    ("1.2.840.10008.5.1.4.1.1.9.", "waveforms"),
)


@dataclass(frozen=True)
class Pixels:
    """Says where the pixels of an instance are.

    Attributes:
        tag: Tag of the element.
        start: First byte of its value, in the inflated file.
        length: Bytes of its value; None where it is encapsulated.
        words: Whether bytes are stored in words of 16 bits, which are swapped in big-endian files.
        deflated_at: First deflated byte of a file whose data set is deflated, from where `start` counts; else None.
    """

    tag: int
    start: int
    length: int | None
    words: bool = False
    deflated_at: int | None = None


@dataclass(frozen=True)
class Instance:
    """One DICOM object with pixels.

    Attributes:
        dataset: Header.
        pixels: Where the pixels are.
        entry: Place in the zip; None where the upload is the instance itself.
    """

    dataset: Any
    pixels: Pixels
    entry: zipfile.ZipInfo | None = None


@dataclass
class Instances:
    """Holds what an upload consists of.

    Attributes:
        instances: Objects with pixels.
        skipped: Number of other files by kind.
    """

    instances: list[Instance] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def note(self) -> str:
        """The note on what was left out; "" where that is nothing."""
        if not self.skipped:
            return ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.skipped.items()))
        return f"files of the zip without an image were left out: {kinds}"


def looks_like_dicom(prefix: bytes) -> bool:
    """Returns whether a file is DICOM: by its magic, or by its first element, as old files have no magic."""
    if prefix[MAGIC_AT : MAGIC_AT + 4] == MAGIC:
        return True
    group, element = prefix[:2], prefix[2:4]
    if group in (b"\x02\0", b"\x08\0") and element[1:] == b"\0":
        length = int.from_bytes(prefix[4:8], "little")
        return prefix[4:6] in FIRST_VRS or (len(prefix) > 8 and 0 < length <= MAX_FIRST and length % 2 == 0)
    return group == b"\0\x08" and element[:1] == b"\0" and prefix[4:6] in FIRST_VRS


def holds_dicom(file: BinaryIO, max_files: int) -> bool:
    """Returns whether a zip holds DICOM, so that it is one input rather than many; leaves the file at its start."""
    try:
        with open_zip(file) as archive:
            return any(looks_like_dicom(_prefix(archive, info)) for info, _ in list_files(archive, max_files))
    except UnetppError:
        return False
    finally:
        file.seek(0)


def read_instances(file: BinaryIO, max_files: int) -> Instances:
    """Reads the headers of all instances, and no pixels.

    Args:
        file: Instance, or zip of instances and other files.
        max_files: Files of a zip at most.

    Raises:
        Unreadable: A file is damaged, or none has pixels.
        TooLarge: Headers are over a limit.
    """
    dicom_library.load()
    found, budget = Instances(), Budget()
    if not is_zip(file):
        _add(found, file, None, budget)
    else:
        with open_zip(file) as archive:
            for info, _ in list_files(archive, max_files):
                if not looks_like_dicom(_prefix(archive, info)):
                    found.skipped["not DICOM"] += 1
                    continue
                with archive.open(info) as stream:
                    _add(found, stream, info, budget)
    if not found.instances:
        kinds = ", ".join(sorted(found.skipped))
        raise Unreadable(
            f"the input holds DICOM without pictures ({kinds}); send the images of a series",
            reason="no-pixels",
            format=FORMAT,
            value=kinds,
        )
    return found


def open_pixels(file: BinaryIO, instances: Sequence[Instance]) -> Iterator[tuple[Instance, Stream]]:
    """Yields each instance with a stream at the first byte of its pixels' value, open until the next one is requested."""
    if not is_zip(file):
        for instance in instances:
            file.seek(0)
            yield instance, _at_value(file, instance.pixels)
        return
    with open_zip(file) as archive:
        for instance in instances:
            with archive.open(cast("zipfile.ZipInfo", instance.entry)) as stream:
                yield instance, _at_value(stream, instance.pixels)


def _at_value(stream: Any, pixels: Pixels) -> Stream:
    if pixels.deflated_at is not None:
        skip(stream, pixels.deflated_at)
        stream = Inflating(stream)
        skip(stream, pixels.start)
    elif isinstance(stream, zipfile.ZipExtFile):
        skip(stream, pixels.start)
    else:
        stream.seek(pixels.start)
    return cast("Stream", stream)


def _prefix(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Returns the first bytes of a file of a zip; none of a file that cannot be unpacked."""
    try:
        with archive.open(info) as stream:
            return read_exactly(stream, SNIFF_BYTES)
    except (UnetppError, *DAMAGE):
        return b""


def _add(found: Instances, stream: Any, entry: zipfile.ZipInfo | None, budget: Budget) -> None:
    """Reads a header, and adds the instance where it is a picture."""
    dataset, pixels = _read_header(stream, budget)
    kind = _stranger(dataset, has_pixels=pixels is not None)
    if kind or pixels is None:
        found.skipped[kind] += 1
    else:
        found.instances.append(Instance(dataset, pixels, entry))


def _stranger(dataset: Any, *, has_pixels: bool) -> str:
    """Returns the kind of an object that is left out; "" of pictures.

    Raises:
        Unreadable: It is a picture without pixels.
    """
    kind = str(dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID", ""))
    if kind == DIRECTORY:
        return "DICOMDIR"
    if kind in NO_PICTURES:
        return NO_PICTURES[kind]
    if has_pixels and "Rows" in dataset:
        return ""
    if name := next((name for start, name in STRANGERS if kind.startswith(start)), ""):
        return name
    from pydicom.uid import UID

    if not kind or "Rows" in dataset or "Image" in UID(kind).name:
        raise Unreadable(
            "a DICOM image ends before its pixels (truncated?), or has none; send the file again, whole, or without it",
            reason="truncated",
            format=FORMAT,
        )
    return "DICOM without pixels"


def _read_header(stream: Any, budget: Budget) -> tuple[Any, Pixels | None]:
    """Returns the data set up to its pixels, and where these are; None for one without.

    Raises:
        Unreadable: The header is damaged.
        TooLarge: The header is over a limit.
    """
    import pydicom
    from pydicom import filereader

    head = Head(stream, budget)
    file: Any = head
    try:
        dataset: Any = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        return dataset, _find_pixels(head, dataset, None)
    except Deflated:
        deflated_at = head.tell()
    head.seek(0)
    preamble = filereader.read_preamble(file, force=True)
    meta = filereader._read_file_meta_info(file)
    head.seek(deflated_at)
    stream.seek(0)
    skip(stream, deflated_at)
    inflated = Head(Inflating(stream), budget)
    file = inflated
    inner = filereader.read_dataset(file, False, True, stop_when=_is_pixels)
    dataset = pydicom.FileDataset(file, inner, preamble, meta, False, True)
    return dataset, _find_pixels(inflated, dataset, deflated_at)


def _is_pixels(tag: int, _vr: str | None, _length: int) -> bool:
    return tag in (PIXEL_DATA, FLOAT_PIXELS, DOUBLE_PIXELS)


def _find_pixels(head: Head, dataset: Any, deflated_at: int | None) -> Pixels | None:
    """Reads the head of the element at which pydicom has stopped."""
    implicit, little = dataset.original_encoding
    order = "little" if little else "big"
    raw = head.read(12)
    # The reference to the file would keep its first bytes in memory.
    dataset.buffer = None
    if len(raw) < 8:
        return None
    group, element = int.from_bytes(raw[:2], order), int.from_bytes(raw[2:4], order)  # type: ignore[arg-type]
    tag = group << 16 | element
    if not _is_pixels(tag, None, 0):
        return None
    if not implicit and raw[4:6] in LONG_VRS:
        size, start = int.from_bytes(raw[8:12], order), head.tell()  # type: ignore[arg-type]
    else:
        size, start = int.from_bytes(raw[4:8], order), head.tell() - (len(raw) - 8)  # type: ignore[arg-type]
    words = not little and raw[4:6] == b"OW"
    return Pixels(tag, start, None if size == UNDEFINED else size, words, deflated_at)
