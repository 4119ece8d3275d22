"""The interface through which jobs use a PACS, whose protocols they do not know."""

from collections.abc import Callable
from typing import BinaryIO, Protocol

from server.errors import InvalidParameter


class Pacs(Protocol):
    """Brings series and takes answers. `server.dicom` has the implementation."""

    def check_source(self, source: str) -> str:
        """Checks an input's address, "NAME/STUDY[/SERIES]", without asking the PACS; returns its NAME.

        Raises:
            InvalidParameter: the name is unknown, or the UIDs are none.
        """
        ...

    async def fetch(self, source: str, file: BinaryIO, add_bytes: Callable[[int], None]) -> None:
        """Writes a series into a file, as a zip of its instances.

        Args:
            source: address of the series.
            file: file that receives the zip.
            add_bytes: function that is called with the size of each piece before it is written.

        Raises:
            PacsUnavailable: it may come later.
            PacsRefused, InvalidParameter, TooLarge: it will not.
        """
        ...

    async def send(self, destination: str, file: BinaryIO) -> None:
        """Stores an instance; one that is there already is not stored again.

        Raises:
            PacsUnavailable: it may be possible later.
            PacsRefused: it will not.
        """
        ...

    def pause_s(self, tries: int, age_s: float) -> float | None:
        """Seconds until a job that found its PACS away tries again; None where it gives up.

        Args:
            tries: tries before, without success in between.
            age_s: seconds since the job was accepted.
        """
        ...


class NoPacs:
    """The PACS of a server that has none."""

    def check_source(self, source: str) -> str:
        """Refuses every address."""
        raise _not_configured(source)

    async def fetch(self, source: str, file: BinaryIO, add_bytes: Callable[[int], None]) -> None:
        """Refuses; a job of an earlier configuration may ask for it."""
        del file, add_bytes
        raise _not_configured(source)

    async def send(self, destination: str, file: BinaryIO) -> None:
        """Refuses; a job of an earlier configuration may ask for it."""
        del file
        raise _not_configured(destination)

    def pause_s(self, tries: int, age_s: float) -> float | None:
        """Gives up."""
        del tries, age_s
        return None


def _not_configured(address: str) -> InvalidParameter:
    return InvalidParameter(
        f"this server has no PACS, so {address!r:.60} cannot be reached; the operator names one in the file UNETPP_DICOM__CONFIG",
        parameter="source",
        value=address[:60],
        allowed=[],
        setting="UNETPP_DICOM__CONFIG",
    )
