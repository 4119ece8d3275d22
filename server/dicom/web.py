"""DICOMweb, outwards: QIDO-RS, WADO-RS and STOW-RS against a server that the operator has named."""

import asyncio
import contextlib
import errno
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, BinaryIO

import httpx

from server.dicom.config import WebServer
from server.dicom.instance import is_uid
from server.dicom.series_writer import NotComplete, SeriesWriter
from server.errors import InvalidParameter, PacsRefused, PacsUnavailable, StoreBroken, StoreFull
from server.settings import DicomSettings, LimitsSettings

JSON = {"Accept": "application/dicom+json"}
# As the instances are kept, without decompressing and compressing them again.
INSTANCES = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
SERIES, MODALITY, COUNT, FAILED, REASON = "0020000E", "00080060", "00201209", "00081198", "00081197"
INSTANCE = "00080018"
# Of series that hold no pictures, or answers of programs as ours.
NO_PICTURES = ("SEG", "SR", "PR", "KO", "DOC", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG", "AU", "ECG", "HD")
MAX_LISTED = 20
# Bytes of a list: thousands of series.
MAX_JSON = 16 * 1024 * 1024
COPY_BYTES = 256 * 1024
# Statuses after which the same request may succeed later.
LATER = (206, 408, 425, 429, 500, 502, 503, 504)
# Of an exchange that stores what has been worked for, and the operator can still correct the credentials.
DENIED = (401, 403)
# Compressed answers are refused, because their size says nothing about the memory that they take.
PLAIN = {"Accept-Encoding": "identity"}
# Failure reasons of STOW-RS from 0xA700 to 0xA7FF mean that resources are short (PS3.18 I.2.2).
OUT_OF_RESOURCES = 0xA7


class WebClient:
    """Talks to one server.

    Args:
        name: name of the server, for errors.
        server: its address and credentials.
        settings: time limits.
        limits: limits of a series.
    """

    def __init__(self, name: str, server: WebServer, settings: DicomSettings, limits: LimitsSettings) -> None:
        self._name = name
        self._server = server
        self._settings = settings
        self._limits = limits

    async def fetch(
        self, study: str, series: str | None, file: BinaryIO, add_bytes: Callable[[int], None]
    ) -> None:
        """Writes a series into a file, as a zip of its instances.

        Args:
            study: UID of the study.
            series: UID of the series; None for the only one with pictures.
            file: file that receives the zip.
            add_bytes: function that is called with the size of each piece before it is written.

        Raises:
            PacsUnavailable, PacsRefused, InvalidParameter, TooLarge: nothing of use was written.
        """
        async with self._connect() as client:
            series, expected = await self._find(client, study, series)
            path = f"/studies/{study}/series/{series}"
            async with client.stream("GET", path, headers=INSTANCES) as answer:
                self._check(answer, "the series")
                media_type = answer.headers.get("content-type", "")
                with SeriesWriter(file, media_type, self._limits, add_bytes) as writer:
                    async for chunk in self._pieces(answer):
                        await asyncio.to_thread(writer.feed, chunk)
                    await asyncio.to_thread(writer.finish)
        if writer.count < expected:
            raise self._unavailable(f"gave {writer.count} of {expected} instances")

    async def store(self, study: str, instance: str, file: BinaryIO) -> None:
        """Stores an instance, unless it is there already.

        Args:
            study: UID of its study.
            instance: UID of the instance.
            file: instance as a DICOM file, at its start.

        Raises:
            PacsUnavailable: it was not stored, as far as is known, and may be later.
            PacsRefused: it will not.
        """
        before, after, kind = _frame(uuid.uuid4().hex)
        size = len(before) + file.seek(0, 2) + len(after)
        file.seek(0)
        # Of a known length, because not every server reads chunks.
        headers = JSON | {"Content-Type": kind, "Content-Length": f"{size}"}
        async with self._connect() as client:
            if await self._has(client, study, instance):
                return
            body = _one_part(before, file, after)
            async with client.stream("POST", f"/studies/{study}", content=body, headers=headers) as answer:
                if answer.status_code not in (200, 202, 409):
                    self._check(answer, "to store the segmentation", DENIED)
                reason = _failure(await self._read_json(answer), answer.status_code)
            if reason is None or await self._has(client, study, instance):
                return
        if reason >> 8 == OUT_OF_RESOURCES:
            raise self._unavailable(f"is short of resources (0x{reason:04X})")
        raise PacsRefused(
            f"the PACS {self._name!r} does not store the segmentation: failure reason 0x{reason:04X}; its log should say more",
            value=self._name,
            actual=reason,
        )

    async def _find(self, client: httpx.AsyncClient, study: str, series: str | None) -> tuple[str, int]:
        """Returns the UID of a series and the number of its instances, 0 where the server does not say."""
        query = {"includefield": COUNT} | ({"SeriesInstanceUID": series} if series else {})
        rows = await self._query(client, f"/studies/{study}/series", query)
        found = [(_word(row, SERIES), _word(row, MODALITY), _number(row, COUNT)) for row in rows]
        pictures = [row for row in found if row[0] == series or (not series and row[1] not in NO_PICTURES)]
        if not pictures:
            raise PacsRefused(
                f"the PACS {self._name!r} has no series of pictures there: check the UIDs of source, and whether the study has arrived",
                value=self._name,
                actual=404,
            )
        if len(pictures) > 1:
            listed = [uid for uid, *_ in pictures[:MAX_LISTED]]
            shown = ", ".join(f"{modality} {uid}" for uid, modality, _ in pictures[:MAX_LISTED])
            raise InvalidParameter(
                f"the study holds {len(pictures)} series of pictures, and one is segmented at a time: {shown:.600}; name it with "
                "source=NAME/STUDY/SERIES",
                parameter="source",
                allowed=listed,
                limit=1,
                actual=len(pictures),
                unit="series",
            )
        if not is_uid(pictures[0][0]):
            raise self._unavailable("gave a list that cannot be read")
        return pictures[0][0], pictures[0][2]

    async def _has(self, client: httpx.AsyncClient, study: str, instance: str) -> bool:
        query = {"SOPInstanceUID": instance, "includefield": INSTANCE}
        rows = await self._query(client, f"/studies/{study}/instances", query, storing=True)
        # Compared here, because a server may ignore the filter and list others.
        return any(_word(row, INSTANCE) == instance for row in rows)

    async def _query(
        self, client: httpx.AsyncClient, path: str, query: dict[str, str], *, storing: bool = False
    ) -> list[dict[str, Any]]:
        """The rows of QIDO-RS; while `storing`, none where the server does not know the study."""
        async with client.stream("GET", path, params=query, headers=JSON) as answer:
            if answer.status_code == 204 or (storing and answer.status_code == 404):
                return []
            self._check(answer, "the study", DENIED if storing else ())
            rows = await self._read_json(answer)
        if not isinstance(rows, list):
            raise self._unavailable("gave a list that cannot be read")
        return [row for row in rows if isinstance(row, dict)]

    async def _read_json(self, answer: httpx.Response) -> Any:
        """The document of an answer; None if it is not JSON.

        Raises:
            PacsUnavailable: it is too long.
            PacsRefused: it is compressed.
        """
        body = bytearray()
        async for chunk in self._pieces(answer):
            body += chunk
            if len(body) > MAX_JSON:
                raise self._unavailable(f"gave a list of more than {MAX_JSON:,} bytes")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return None

    async def _pieces(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        """Yields the bytes of an answer as they come.

        Raises:
            PacsRefused: they are compressed.
        """
        encoding = answer.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise PacsRefused(
                f"the PACS {self._name!r} sends compressed answers, which are not read; the operator turns off the compression "
                "of DICOMweb there or in the proxy before it",
                value=self._name,
            )
        async for chunk in answer.aiter_raw():
            yield chunk

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[httpx.AsyncClient]:
        """Yields a client, and translates what may happen to it.

        Raises:
            PacsUnavailable, PacsRefused: the server cannot be reached, or not be trusted.
            StoreFull, StoreBroken: a file on the disk of this server cannot be read or written.
        """
        settings, server = self._settings, self._server
        try:
            arguments = _credentials(server) | {"verify": ssl.create_default_context(cafile=server.ca_file)}
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise self._unavailable(
                f"is not asked, because this server cannot read the files of its credentials or ca_file ({why})"
            ) from error
        try:
            async with (
                asyncio.timeout(settings.exchange_s),
                httpx.AsyncClient(
                    base_url=server.address,
                    timeout=httpx.Timeout(settings.idle_s, connect=settings.connect_s),
                    # Neither proxies nor passwords that the operator has not named here, and no other address.
                    trust_env=False,
                    follow_redirects=False,
                    **arguments,
                ) as client,
            ):
                yield client
        except NotComplete as error:
            raise self._unavailable(str(error)) from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise self._unavailable("did not answer in time") from error
        except httpx.RequestError as error:
            if _is_distrusted(error):
                raise PacsRefused(
                    f"the certificate of the PACS {self._name!r} cannot be verified; the operator names its authority with ca_file",
                    value=self._name,
                ) from error
            raise self._unavailable(f"cannot be reached ({type(error).__name__})") from error
        except OSError as error:
            # Those of the network are errors of httpx.
            raise _disk_error(error) from error

    def _check(self, answer: httpx.Response, what: str, later: tuple[int, ...] = ()) -> None:
        """Checks the status of an answer.

        Args:
            answer: the answer.
            what: subject of the request, for errors.
            later: statuses that may pass, too.

        Raises:
            PacsUnavailable: the request may succeed later.
            PacsRefused: it will not.
        """
        status = answer.status_code
        if status == 200:
            return
        if status in LATER:
            raise self._unavailable(f"answered {status}", actual=status)
        remedy = {
            401: "the operator corrects its credentials",
            403: "its user may not do that; the operator corrects its rights",
            404: "check the UIDs of source, and whether the study has arrived",
        }.get(status, "its log should say more")
        if status in later:
            raise self._unavailable(f"refuses {what} with {status}: {remedy}", actual=status)
        raise PacsRefused(
            f"the PACS {self._name!r} refuses {what} with {status}: {remedy}",
            value=self._name,
            actual=status,
        )

    def _unavailable(self, why: str, actual: int | None = None) -> PacsUnavailable:
        hours = self._settings.retry_h
        return PacsUnavailable(
            f"the PACS {self._name!r} {why}; it is tried again until {hours:g} hours after the job was accepted",
            value=self._name,
            limit=hours,
            unit="hours",
            actual=actual,
            setting="UNETPP_DICOM__RETRY_H",
        )


def _credentials(server: WebServer) -> dict[str, Any]:
    """The arguments of a client, read each time because files of secrets are replaced."""
    if server.token_file:
        return {
            "headers": PLAIN | {"Authorization": f"Bearer {server.token_file.read_text('utf-8').strip()}"}
        }
    if server.user and server.password_file:
        password = server.password_file.read_text("utf-8").rstrip("\r\n")
        return {"headers": PLAIN, "auth": httpx.BasicAuth(server.user, password)}
    return {"headers": PLAIN}


def _disk_error(error: OSError) -> StoreFull | StoreBroken:
    """The error of a file that cannot be read or written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull("the disk for temporary files is full; the operator makes room on it")
    return StoreBroken(f"a temporary file cannot be used: {error.strerror}")


def _is_distrusted(error: BaseException | None) -> bool:
    """Whether the cause of an error is a certificate."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _frame(boundary: str) -> tuple[bytes, bytes, str]:
    """The bytes before and after the one part of a body, and its media type."""
    before = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
    kind = f'multipart/related; type="application/dicom"; boundary={boundary}'
    return before, f"\r\n--{boundary}--\r\n".encode(), kind


async def _one_part(before: bytes, file: BinaryIO, after: bytes) -> AsyncIterator[bytes]:
    yield before
    while piece := await asyncio.to_thread(file.read, COPY_BYTES):
        yield piece
    yield after


def _value(row: dict[str, Any], tag: str) -> Any:
    """The first value of an attribute in the JSON model of DICOM; None without one."""
    element = row.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None


def _word(row: dict[str, Any], tag: str) -> str:
    """A UID or code, without characters that neither has."""
    return "".join(c for c in f"{_value(row, tag) or ''}" if c.isascii() and (c.isalnum() or c == "."))[:64]


def _number(row: dict[str, Any], tag: str) -> int:
    """A number, which some servers write as text; 0 without one."""
    text = f"{_value(row, tag)}"
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0


def _failure(body: Any, status: int) -> int | None:
    """The failure reason of the one instance that was sent; None if it was stored."""
    failed = _value(body, FAILED) if isinstance(body, dict) else None
    if isinstance(failed, dict):
        return _number(failed, REASON)
    return 0 if status == 409 else None
