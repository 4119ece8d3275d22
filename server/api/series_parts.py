"""A DICOM series that comes as many parts of a form: they are packed into one zip while they stream in."""

import contextlib
import tempfile
import zipfile
from typing import IO, BinaryIO, cast

from server.errors import InvalidParameter
from server.imaging.dicom_files import SNIFF_BYTES, looks_like_dicom

# Larger series wait on disk, not in memory.
SPOOL_BYTES = 4 * 1024 * 1024
COPY_BYTES = 1024 * 1024


class SeriesZip:
    """A zip of the parts named `file` but the first, of which one is written at a time.

    Attributes:
        file: the zip.
        count: number of parts.
        holds_dicom: whether one of them is DICOM.
    """

    def __init__(self) -> None:
        self.file = cast("BinaryIO", tempfile.SpooledTemporaryFile(SPOOL_BYTES))  # noqa: SIM115 - closed by `close`
        self.count = 0
        self.holds_dicom = False
        self._zip = zipfile.ZipFile(self.file, "w")
        self._current: tuple[int, IO[bytes]] | None = None
        self._prefix = b""

    def add_part(self) -> "ZipPart":
        """Returns a file that receives the next part."""
        self.count += 1
        return ZipPart(self, self.count)

    def write(self, number: int, data: bytes) -> None:
        """Writes bytes of a part; those of another are complete then."""
        if self._current is None or self._current[0] != number:
            self._end_part()
            # Of no name, because names of DICOM files are often those of patients.
            self._current = (number, self._zip.open(f"{number:05}", "w", force_zip64=True))
        self._prefix = (self._prefix + data[:SNIFF_BYTES])[:SNIFF_BYTES]
        self._current[1].write(data)

    def finish(self, first: BinaryIO) -> BinaryIO:
        """Adds the first part and returns the zip, at its start."""
        first.seek(0)
        while piece := first.read(COPY_BYTES):
            self.write(0, piece)
        self._end_part()
        self._zip.close()
        self.file.seek(0)
        return self.file

    def close(self) -> None:
        """Removes the zip."""
        if self._current:
            with contextlib.suppress(ValueError, OSError):
                self._current[1].close()
        with contextlib.suppress(ValueError, OSError):
            self._zip.close()
        self.file.close()

    def _end_part(self) -> None:
        if self._current:
            self._current[1].close()
            self._current = None
        self.holds_dicom = self.holds_dicom or looks_like_dicom(self._prefix)
        self._prefix = b""


class ZipPart:
    """The file of one part, as the parser of forms writes it.

    Args:
        archive: zip that receives the bytes.
        number: number of the part.
    """

    def __init__(self, archive: SeriesZip, number: int) -> None:
        self._archive = archive
        self._number = number

    def write(self, data: bytes) -> int:
        """Appends bytes."""
        self._archive.write(self._number, data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:  # noqa: ARG002 - the interface of files
        """Does nothing, because the part is read from the zip."""
        return 0

    def close(self) -> None:
        """Does nothing, because the zip is closed as one."""


def join_series(first: BinaryIO, series: SeriesZip) -> BinaryIO:
    """Joins the parts named `file` to one zip.

    Raises:
        InvalidParameter: they are not DICOM.
    """
    joined = series.finish(first)
    if not series.holds_dicom:
        raise InvalidParameter(
            f"{series.count + 1} files named 'file' in one request; send one image per request, the images in a zip, or the files of "
            "one DICOM series",
            parameter="file",
            actual=series.count + 1,
            limit=1,
        )
    return joined
