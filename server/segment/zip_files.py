"""Zips: one is read and trusted in nothing, one is made.

Sizes are counted while inflating, whatever the list of files says, and nothing is ever written under a name
of a zip.
"""

import contextlib
import itertools
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from server.errors import TooLarge, Unreadable
from server.imaging.encode import EPOCH
from server.settings import LimitsSettings

# Larger files wait on disk, not in memory.
SPOOL_BYTES = 4 * 1024 * 1024
COPY_BYTES = 256 * 1024
# Of the list of entries at a zip's end; 1,000 with long paths take a tenth of it.
LIST_BYTES = 1024 * 1024
MAX_NAME = 500

METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
ENCRYPTED, IS_UTF8 = 0x1, 0x800
# Info-ZIP's extra field with the name in UTF-8: id and length, then version and checksum of the other name.
UNICODE_PATH, FIELD, UNICODE_FIELD = 0x7075, struct.Struct("<HH"), struct.Struct("<BL")
# What is worth compressing once more.
TEXTS = (".json", ".csv", ".geojson")


@dataclass(frozen=True)
class Entry:
    """An image of a zip.

    Attributes:
        info: position and sizes in the zip.
        name: name with its folders.
        stem: beginning of the names of its answers, unique among the images without regard to case.
        problem: reason why it is not read, or "".
    """

    info: zipfile.ZipInfo
    name: str
    stem: str
    problem: str


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


class ZipTooLarge(TooLarge):
    """Not one image is too large, but all together."""


class ZipFiles:
    """The zip that came and the one that is made. Calls come from one thread at a time.

    Args:
        file: zip that came.
        limits: limits of a request.

    Attributes:
        out: zip that is made.
    """

    def __init__(self, file: BinaryIO, limits: LimitsSettings) -> None:
        self._limits = limits
        self._left = limits.max_zip_mb * 1024 * 1024
        self._file = file
        self.out = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - the answer's, who closes it
        self._made = zipfile.ZipFile(self.out, "w")

    def close(self) -> None:
        """Removes what was made."""
        with contextlib.suppress(ValueError):
            self._made.close()
        self.out.close()

    def entries(self) -> list[Entry]:
        """Opens the zip that came: its images; folders and what systems hide among them are left out.

        Raises:
            Unreadable: the list is damaged or empty, or two files have one name or lie in one place.
            TooLarge: the zip holds too many files; gives the limit.
        """
        try:
            self._zip = zipfile.ZipFile(cast("BinaryIO", BoundedFile(self._file)))
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, ValueError, OSError) as error:
            raise Unreadable(
                "the zip's list of files cannot be read (truncated or damaged?); pack it again"
            ) from error
        infos = [(info, _plain(_name(info))) for info in self._zip.infolist()]
        infos = [(info, name) for info, name in infos if not name.endswith("/") and not _is_hidden(name)]
        if not infos:
            raise Unreadable("the zip holds no files; pack the images themselves")
        if len(infos) > self._limits.max_zip_images:
            raise TooLarge(
                f"the zip holds {len(infos):,} files; the limit is {self._limits.max_zip_images:,}. Send it in parts",
                limit=self._limits.max_zip_images,
                actual=len(infos),
                unit="files",
            )
        if twice := [name for name, times in Counter(name for _, name in infos).items() if times > 1]:
            raise Unreadable(
                f"the zip holds two files named {twice[0]!r:.80}; give each its own name", file=twice[0][:80]
            )
        places = sorted((info.header_offset, info.compress_size) for info, _ in infos)
        if any(start + size > after for (start, size), (after, _) in itertools.pairwise(places)):
            raise Unreadable("files of the zip lie over each other, as no packer writes them; pack it again")
        stems = _number_duplicates([_stem(name) for _, name in infos])
        return [
            Entry(info, name, stem, _problem(info, name))
            for (info, name), stem in zip(infos, stems, strict=True)
        ]

    def extract(self, entry: Entry, target: BinaryIO) -> None:
        """Inflates an image.

        Raises:
            Unreadable: the file is damaged, encrypted or packed by another method.
            TooLarge: the file is over the limit of one.
            ZipTooLarge: all files together are over the limit.
        """
        if entry.problem:
            raise Unreadable(entry.problem)
        most = self._limits.max_body_mb * 1024 * 1024
        for piece in self._pieces(entry.info):
            target.write(piece)
            self._left -= len(piece)
            if target.tell() > most:
                raise TooLarge(
                    f"the file has more than {self._limits.max_body_mb:,} MiB, which is the limit; UNETPP_LIMITS__MAX_BODY_MB on the "
                    "server raises it",
                    limit=self._limits.max_body_mb,
                    unit="MiB",
                    setting="UNETPP_LIMITS__MAX_BODY_MB",
                )
            if self._left < 0:
                raise self._full("files")
        target.seek(0)

    def _pieces(self, info: zipfile.ZipInfo) -> Iterator[bytes]:
        try:
            with self._zip.open(info) as source:
                while piece := source.read(COPY_BYTES):
                    yield piece
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
            ValueError,
            OSError,
        ) as error:
            raise Unreadable("the file cannot be unpacked (damaged?); pack the zip again") from error

    def add(self, entry: Entry, files: Mapping[str, bytes]) -> list[str]:
        """Keeps the answers to an image, and says under which names.

        Args:
            entry: the image.
            files: files by name.

        Raises:
            ZipTooLarge: all answers together are too large.
        """
        names = [f"{entry.stem}_{name}" for name in files]
        for name, body in zip(names, files.values(), strict=True):
            self._write(name, body)
        return names

    def finish(self, order: Sequence[str], name: str, body: bytes) -> None:
        """Writes the last file, and lists the others in this order; they came as they were done."""
        self._write(name, body)
        places = {listed: place for place, listed in enumerate(order)}
        self._made.filelist.sort(key=lambda info: places.get(info.filename, len(places)))
        self._made.close()
        self.out.seek(0)

    def _write(self, name: str, body: bytes) -> None:
        if self.out.tell() + len(body) > self._limits.max_zip_mb * 1024 * 1024:
            raise self._full("answers")
        method = zipfile.ZIP_DEFLATED if name.endswith(TEXTS) else zipfile.ZIP_STORED
        # As in zips of several formats: of no date.
        self._made.writestr(zipfile.ZipInfo(name, EPOCH), body, method, 1)

    def _full(self, what: str) -> "ZipTooLarge":
        return ZipTooLarge(
            f"all {what} of the zip together have more than {self._limits.max_zip_mb:,} MiB, which is the limit. Send it in parts",
            limit=self._limits.max_zip_mb,
            unit="MiB",
        )


def is_zip(file: BinaryIO) -> bool:
    """Whether a file is a zip; leaves it at its start."""
    head = file.read(4)
    file.seek(0)
    return head in (b"PK\x03\x04", b"PK\x05\x06")


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


def _stem(name: str) -> str:
    """Without its suffix, or both of .nii.gz."""
    plain = name.removesuffix(".gz")
    folder, slash, last = plain.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}"


def _number_duplicates(stems: Sequence[str]) -> list[str]:
    """Appends a number to each stem that an earlier one has, in any case of letters, as for a.png and A.png on Windows."""
    alone = [_folded(stem) for stem in stems]
    taken, seen = set(alone), set[str]()
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))
    numbered = []
    for stem, folded in zip(stems, alone, strict=True):
        name = stem
        if folded in seen:
            name = next(
                name for number in numbers[folded] if _folded(name := f"{stem}_{number}") not in taken
            )
            taken.add(_folded(name))
        seen.add(folded)
        numbered.append(name)
    return numbered


def _folded(name: str) -> str:
    """Maps names that Windows or macOS take for one to the same text."""
    return unicodedata.normalize("NFC", name).casefold()


def _problem(info: zipfile.ZipInfo, name: str) -> str:
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
