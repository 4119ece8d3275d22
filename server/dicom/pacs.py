"""The PACS that jobs fetch from and send to, by the names and destinations that the operator has configured."""

import asyncio
import re
from collections.abc import Callable
from typing import BinaryIO

from server.dicom import store_scu
from server.dicom.config import SETTING, DicomConfig
from server.dicom.instance import MAX_UID, UID, read_uids
from server.dicom.web import WebClient
from server.errors import InvalidParameter
from server.settings import DicomSettings, LimitsSettings

SOURCE = re.compile(rf"(?P<name>[^/]*)/(?P<study>{UID})(?:/(?P<series>{UID}))?")


class DicomPacs:
    """Implements `server.jobs.pacs.Pacs`.

    Args:
        config: the operator's file.
        settings: time limits.
        limits: limits of a series.
    """

    def __init__(self, config: DicomConfig, settings: DicomSettings, limits: LimitsSettings) -> None:
        self._config = config
        self._settings = settings
        self._clients = {
            name: WebClient(name, server, settings, limits) for name, server in config.servers.items()
        }

    def check_source(self, source: str) -> str:
        """Checks the address of a series, "NAME/STUDY[/SERIES]", without asking the PACS; returns its NAME.

        Raises:
            InvalidParameter: the name is unknown, or the UIDs are none.
        """
        return self._parse(source)[0]

    async def fetch(self, source: str, file: BinaryIO, add_bytes: Callable[[int], None]) -> None:
        """Writes a series into a file, as a zip of its instances.

        Raises:
            PacsUnavailable: it may come later.
            PacsRefused, InvalidParameter, TooLarge: it will not.
        """
        name, study, series = self._parse(source)
        await self._clients[name].fetch(study, series, file, add_bytes)

    async def send(self, destination: str, file: BinaryIO) -> None:
        """Stores an instance; one that is there already is not stored again.

        Args:
            destination: name of a DICOMweb server, or "AET@HOST:PORT".
            file: instance as a DICOM file.

        Raises:
            PacsUnavailable: it may be possible later.
            PacsRefused, InvalidParameter, Unreadable: it will not.
        """
        if "@" in destination:
            await asyncio.to_thread(store_scu.send, destination, file, self._config.node, self._settings)
            return
        client = self._client(destination)
        study, instance = await asyncio.to_thread(read_uids, file)
        file.seek(0)
        await client.store(study, instance, file)

    def pause_s(self, tries: int, age_s: float) -> float | None:
        """Seconds until a job that found its PACS away tries again; None where it gives up."""
        settings = self._settings
        if age_s >= settings.retry_h * 3600:
            return None
        return float(min(settings.max_retry_s, settings.min_retry_s * 2.0 ** min(tries, 30)))

    def _parse(self, source: str) -> tuple[str, str, str | None]:
        match = SOURCE.fullmatch(source)
        uids = [match["study"], match["series"] or ""] if match else []
        if not match or any(len(uid) > MAX_UID for uid in uids):
            raise InvalidParameter(
                f"source={source!r:.80} is not of the form NAME/STUDY or NAME/STUDY/SERIES, where STUDY and SERIES are UIDs",
                parameter="source",
                value=source[:80],
            )
        self._client(match["name"])
        return match["name"], match["study"], match["series"]

    def _client(self, name: str) -> WebClient:
        if name not in self._clients:
            there = ", ".join(self._clients) or "none"
            raise InvalidParameter(
                f"there is no PACS {name!r:.60} here; there are: {there}. The operator names them in {SETTING}",
                parameter="source",
                value=name[:60],
                allowed=[*self._clients],
                setting=SETTING,
            )
        return self._clients[name]
