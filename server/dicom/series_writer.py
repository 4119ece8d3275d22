"""A DICOMweb answer, multipart/related, becomes a zip of its instances while it streams in."""

import contextlib
import zipfile
from collections.abc import Callable
from email.message import Message
from typing import IO, BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from server.errors import TooLarge
from server.settings import LimitsSettings


class NotComplete(Exception):
    """The answer is broken, or ends early."""


class SeriesWriter:
    """Writes the zip; use as `with`.

    Args:
        file: file that receives the zip.
        media_type: Content-Type of the answer.
        limits: limits of the bytes and the number of instances.
        add_bytes: function that is called with the size of each piece before it is written.

    Attributes:
        count: instances so far.

    Raises:
        NotComplete: the type is not of instances.
    """

    def __init__(
        self, file: BinaryIO, media_type: str, limits: LimitsSettings, add_bytes: Callable[[int], None]
    ) -> None:
        self.count = 0
        self._limits = limits
        self._add_bytes = add_bytes
        self._bytes = 0
        self._ended = False
        self._part: IO[bytes] | None = None
        self._parser: MultipartParser | None = None
        message = Message()
        message["Content-Type"] = media_type
        kind, boundary = message.get_content_type(), message.get_boundary()
        if kind == "multipart/related" and boundary:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_part_data": lambda data, start, end: self._write(data[start:end]),
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )
        elif kind != "application/dicom":
            raise NotComplete(f"its answer is {kind!r:.60}, not multipart/related")
        self._zip = zipfile.ZipFile(file, "w")

    def __enter__(self) -> "SeriesWriter":
        """Begins."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the zip, which is of no use unless `finish` was called."""
        with contextlib.suppress(ValueError, OSError):
            self._end_part()
            self._zip.close()

    def feed(self, data: bytes) -> None:
        """Takes a piece of the answer.

        Raises:
            TooLarge: the series is over a limit.
            NotComplete: the answer is broken.
        """
        self._bytes += len(data)
        limit = self._limits.max_body_mb * 1024 * 1024
        if self._bytes > limit:
            raise TooLarge(
                f"the series has more than {self._limits.max_body_mb:,} MiB; the operator can raise UNETPP_LIMITS__MAX_BODY_MB",
                limit=limit,
                unit="bytes",
                setting="UNETPP_LIMITS__MAX_BODY_MB",
            )
        self._add_bytes(len(data))
        if self._parser is None:
            if self._part is None:
                self._begin()
            self._write(data)
            return
        try:
            self._parser.write(data)
        except MultipartParseError as error:
            raise NotComplete("its answer cannot be read") from error

    def finish(self) -> None:
        """Ends the zip.

        Raises:
            NotComplete: the answer ended early, or is empty.
        """
        if not self.count or (self._parser and not self._ended):
            raise NotComplete("its answer ends early")
        self._end_part()
        self._zip.close()

    def _begin(self) -> None:
        self._end_part()
        self.count += 1
        if self.count > self._limits.max_zip_images:
            raise TooLarge(
                f"the series has more than {self._limits.max_zip_images:,} instances, which is the limit",
                limit=self._limits.max_zip_images,
                unit="instances",
            )
        # Of no name, because names of DICOM files are often those of patients.
        self._part = self._zip.open(f"{self.count:05}", "w", force_zip64=True)

    def _write(self, data: bytes) -> None:
        if self._part:
            self._part.write(data)

    def _end_part(self) -> None:
        if self._part:
            self._part.close()
            self._part = None

    def _end(self) -> None:
        self._ended = True
