"""Files of an uploaded zip: listed and inflated, and trusted in nothing."""

import contextlib
import itertools
import struct
import zipfile
import zlib
from typing import BinaryIO, cast

from server.errors import TooLarge, Unreadable

# Of the list of entries at a zip's end; 1,000 with long paths take a tenth of it.
LIST_BYTES = 1024 * 1024
COPY_BYTES = 256 * 1024
MAX_NAME = 500

# First bytes of a zip with files, and of one without.
MAGICS = (b"PK\x03\x04", b"PK\x05\x06")

METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
ENCRYPTED, IS_UTF8 = 0x1, 0x800
# Info-ZIP's extra field with the name in UTF-8: id and length, then version and checksum of the other name.
UNICODE_PATH, FIELD, UNICODE_FIELD = 0x7075, struct.Struct("<HH"), struct.Struct("<BL")

# What zipfile raises on a file that is damaged, encrypted or packed by another method.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
)


class BoundedFile:
    """A file of which no long piece is read at once: zipfile reads the list of entries whole, however long it is."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        """Reads up to `size` bytes, or all that is left.

        Raises:
            TooLarge: the piece is longer than a list of entries may be.
        """
        data = self._file.read(LIST_BYTES + 1 if size < 0 else min(size, LIST_BYTES + 1))
        if len(data) > LIST_BYTES:
            raise TooLarge(
                f"the zip's list of files has more than {LIST_BYTES:,} bytes; send fewer images, with shorter names",
                limit=LIST_BYTES,
                unit="bytes",
            )
        return data


def is_zip(file: BinaryIO) -> bool:
    """Whether a file is a zip; leaves it at its start."""
    file.seek(0)
    head = file.read(4)
    file.seek(0)
    return head in MAGICS


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Opens a zip.

    Raises:
        Unreadable: its list of files is damaged.
        TooLarge: its list of files is too long.
    """
    try:
        return zipfile.ZipFile(cast("BinaryIO", BoundedFile(file)))
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, OSError) as error:
        raise Unreadable(
            "the zip's list of files cannot be read (truncated or damaged?); pack it again"
        ) from error


def list_files(archive: zipfile.ZipFile, max_files: int) -> list[tuple[zipfile.ZipInfo, str]]:
    """Lists the files of a zip with their names; folders and what systems hide among them are left out.

    Raises:
        Unreadable: there are none, or two files lie in one place.
        TooLarge: there are too many; gives the limit.
    """
    infos = [(info, _plain(_name(info))) for info in archive.infolist()]
    infos = [(info, name) for info, name in infos if not name.endswith("/") and not _is_hidden(name)]
    if not infos:
        raise Unreadable("the zip holds no files; pack the images themselves")
    if len(infos) > max_files:
        raise TooLarge(
            f"the zip holds {len(infos):,} files; the limit is {max_files:,}. Send it in parts",
            limit=max_files,
            actual=len(infos),
            unit="files",
        )
    places = sorted((info.header_offset, info.compress_size) for info, _ in infos)
    if any(start + size > after for (start, size), (after, _) in itertools.pairwise(places)):
        raise Unreadable("files of the zip lie over each other, as no packer writes them; pack it again")
    return infos


def _name(info: zipfile.ZipInfo) -> str:
    """Returns the name of a file as its packer meant it.

    Many packers write UTF-8 without its flag (macOS, old jar), or beside a name in
    another character set (Info-ZIP). zipfile then takes the name for code page 437.
    """
    if info.flag_bits & IS_UTF8:
        return info.filename
    raw = info.orig_filename.encode("cp437", "replace")
    with contextlib.suppress(UnicodeDecodeError, struct.error):
        return (_unicode_path(info.extra, raw) or raw).decode()
    return info.filename


def _unicode_path(extra: bytes, raw: bytes) -> bytes:
    """Returns the name in Info-ZIP's extra field; "" without one, or where it belongs to another name."""
    while len(extra) >= FIELD.size:
        kind, length = FIELD.unpack_from(extra)
        body, extra = extra[FIELD.size : FIELD.size + length], extra[FIELD.size + length :]
        if kind == UNICODE_PATH:
            version, checksum = UNICODE_FIELD.unpack_from(body)
            return body[UNICODE_FIELD.size :] if (version, checksum) == (1, zlib.crc32(raw)) else b""
    return b""


def _plain(name: str) -> str:
    """Returns the name with the separators of zips, and without steps that stay where they are (./a.png)."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part != ".")


def _is_hidden(name: str) -> bool:
    parts = name.split("/")
    return "__MACOSX" in parts or any(part.startswith(".") and part != ".." for part in parts)


def problem(info: zipfile.ZipInfo, name: str) -> str:
    """Returns the reason why a file is not read, from its entry alone, because the names of its answers would be as bad."""
    if (
        not name.isprintable()
        or len(name) > MAX_NAME
        or name[1:2] == ":"
        or not all(p and p != ".." for p in name.split("/"))
    ):
        return "its name leads out of the zip, or is none; pack it under a plain one"
    if info.flag_bits & ENCRYPTED:
        return "the file is encrypted; pack it without a password"
    if info.compress_type not in METHODS:
        return "the file is packed by a method that is not read; pack it with deflate or stored"
    return ""
