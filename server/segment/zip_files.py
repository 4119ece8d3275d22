"""Zips: one is read and trusted in nothing, one is made.

Sizes are counted while inflating, whatever the list of files says, and nothing is ever written under a name
of a zip.
"""

import itertools
import tempfile
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from server.errors import TooLarge, Unreadable
from server.imaging.encode import EPOCH
from server.imaging.zip_reader import COPY_BYTES, DAMAGE, list_files, open_zip, problem
from server.settings import LimitsSettings

# Larger files wait on disk, not in memory.
SPOOL_BYTES = 4 * 1024 * 1024
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


class ZipTooLarge(TooLarge):
    """Not one image is too large, but all together. Callers see the code of its base."""

    code = TooLarge.code


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
        # Answers come as they are done, and lie in the zip in the order of the images, because the same request gives the same bytes.
        self._kept = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 - `close` closes it
        self._places: dict[str, tuple[int, int]] = {}

    def close(self) -> None:
        """Removes what was made."""
        self._kept.close()
        self.out.close()

    def entries(self) -> list[Entry]:
        """Opens the zip that came: its images; folders and what systems hide among them are left out.

        Raises:
            Unreadable: the list is damaged or empty, or two files have one name or lie in one place.
            TooLarge: the zip holds too many files; gives the limit.
        """
        self._zip = open_zip(self._file)
        infos = list_files(self._zip, self._limits.max_zip_images)
        if twice := [name for name, times in Counter(name for _, name in infos).items() if times > 1]:
            raise Unreadable(
                f"the zip holds two files named {twice[0]!r:.80}; give each its own name", file=twice[0][:80]
            )
        stems = _number_duplicates([_stem(name) for _, name in infos])
        return [
            Entry(info, name, stem, problem(info, name))
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
        except DAMAGE as error:
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
            start = self._kept.seek(0, 2)
            if start + len(body) > self._limits.max_zip_mb * 1024 * 1024:
                raise self._full("answers")
            self._kept.write(body)
            self._places[name] = start, len(body)
        return names

    def finish(self, order: Sequence[str], name: str, body: bytes) -> None:
        """Writes the zip: the answers in this order, and one more file."""
        with self._kept, zipfile.ZipFile(self.out, "w") as made:
            for answer in order:
                start, size = self._places[answer]
                self._kept.seek(start)
                _write(made, answer, self._kept.read(size))
            _write(made, name, body)
        self.out.seek(0)

    def _full(self, what: str) -> "ZipTooLarge":
        return ZipTooLarge(
            f"all {what} of the zip together have more than {self._limits.max_zip_mb:,} MiB, which is the limit. Send it in parts",
            limit=self._limits.max_zip_mb,
            unit="MiB",
        )


def _write(made: zipfile.ZipFile, name: str, body: bytes) -> None:
    method = zipfile.ZIP_DEFLATED if name.endswith(TEXTS) else zipfile.ZIP_STORED
    # As in zips of several formats: of no date.
    made.writestr(zipfile.ZipInfo(name, EPOCH), body, method, 1)


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
