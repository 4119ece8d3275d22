"""The DICOM node: series that modalities send become jobs, whose answers go to a PACS."""

import asyncio
import contextlib
import functools
import logging
import shutil
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol, Self

from server.dicom.config import DicomConfig, NodeTable, Rule
from server.dicom.instance import Facts, read_facts
from server.dicom.spool import Key, Series, Spool
from server.dicom.store_scu import silence
from server.errors import Misconfigured, TooLarge, UnetppError, Unreadable, UnsupportedType
from server.segment.request import SegmentParams
from server.settings import LimitsSettings

log = logging.getLogger(__name__)

# Seconds after which a series that could not become a job is tried again.
RETRY_S = 60.0
# Seconds after which the loop goes on that makes jobs, if it has failed.
RESTART_S = 5.0
# Folder of instances that are arriving, in that of series; as it is none, it is removed at the start.
INCOMING = "incoming"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# Associations at once; one more is rejected, and the sender tries again.
MAX_ASSOCIATIONS = 20
# Statuses of C-STORE (PS3.4 B.2.3).
SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND, NO_RULE = 0x0000, 0xA700, 0xC000, 0xC001


class Submit(Protocol):
    """Makes a job of a series; where there is one with this id already, nothing happens."""

    def __call__(
        self, file: BinaryIO, params: SegmentParams, destination: str, id_: str
    ) -> Awaitable[object]:
        """Returns once the job is on the disk."""
        ...


class Node:
    """Receives series; use as `async with`.

    Args:
        config: the operator's file.
        node: table of the node.
        folder: folder of series that are not complete yet.
        limits: limits of a series.
        has_room: function that returns whether the disk quota allows so many bytes.
        submit: function that makes a job of a series.

    Raises:
        Misconfigured: the extra `dicom` is missing.
    """

    def __init__(
        self,
        config: DicomConfig,
        node: NodeTable,
        folder: Path,
        limits: LimitsSettings,
        has_room: Callable[[int], bool],
        submit: Submit,
    ) -> None:
        self._config = config
        self._node = node
        self._folder = folder
        self._limits = limits
        self._has_room = has_room
        self._submit = submit
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        """Takes up what lies in the folder, and listens.

        Raises:
            Misconfigured: the port is in use, or a certificate cannot be read.
        """
        self._loop = asyncio.get_running_loop()
        node = self._node
        self._spool = Spool(self._folder, node.quiet_s)
        if node.host not in LOOPBACK and not node.callers and not node.tls_ca:
            log.warning(
                "every program that reaches %s:%d may send series to the DICOM node; name its callers, or set tls_ca",
                node.host,
                node.port,
            )
        self._server = await asyncio.to_thread(self._listen)
        self._task = asyncio.create_task(self._work())
        log.info("DICOM node %s listens on %s:%d", self._node.aet, self._node.host, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Hangs up and stops; what is on disk stays there."""
        await asyncio.to_thread(self._shut)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.socket.getsockname()[1])

    def _listen(self) -> Any:
        from pynetdicom import AE, AllStoragePresentationContexts, _config, dimse_messages, evt
        from pynetdicom.sop_class import Verification

        silence()
        # To a file, as it comes, because an instance may be larger than the memory.
        _config.STORE_RECV_CHUNKED_DATASET = True
        # Its name there, because pynetdicom has no setting for the folder: what a crash leaves in that of
        # temporary files would stay there.
        incoming = self._folder / INCOMING
        incoming.mkdir(mode=0o700, exist_ok=True)
        make_file = functools.partial(tempfile.NamedTemporaryFile, dir=incoming)
        dimse_messages.NamedTemporaryFile = make_file
        node = self._node
        entity = self._entity = AE(ae_title=node.aet)
        entity.require_called_aet = True
        entity.require_calling_aet = [*node.callers]
        entity.maximum_associations = MAX_ASSOCIATIONS
        entity.add_supported_context(Verification)
        for context in AllStoragePresentationContexts:
            # Pictures alone: reports, presentation states and segmentations are not segmented.
            if "Image" in context.abstract_syntax.name:
                entity.add_supported_context(context.abstract_syntax, _transfer_syntaxes())
        handlers = [
            (evt.EVT_C_ECHO, lambda event: SUCCESS),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_RELEASED, self._hang_up),
            (evt.EVT_CONN_CLOSE, _remove_half),
        ]
        try:
            tls = _server_context(node)
            return entity.start_server((node.host, node.port), False, tls, handlers)
        except OSError as error:
            raise Misconfigured(
                f"the DICOM node cannot listen on {node.host}:{node.port}: {error.strerror or error}",
                parameter="node",
            ) from error

    def _shut(self) -> None:
        from pynetdicom import _config, dimse_messages

        self._entity.shutdown()
        dimse_messages.NamedTemporaryFile = tempfile.NamedTemporaryFile
        _config.STORE_RECV_CHUNKED_DATASET = False
        shutil.rmtree(self._folder / INCOMING, ignore_errors=True)

    def _store(self, event: Any) -> int:
        """Answers C-STORE, in a thread of the association."""
        try:
            return self._keep(event)
        except Unreadable:
            return CANNOT_UNDERSTAND
        except (OSError, UnetppError):
            log.exception("an instance could not be kept")
            return OUT_OF_RESOURCES

    def _keep(self, event: Any) -> int:
        path = Path(event.dataset_path)
        facts = read_facts(path)
        caller = event.assoc.requestor.ae_title.strip()
        called = event.assoc.acceptor.primitive.called_ae_title.strip()
        key = caller, called, facts.study, facts.series
        status = OUT_OF_RESOURCES
        try:
            status = self._keep_in(key, path, facts, event.assoc)
        finally:
            if status != SUCCESS:
                self._spool.refuse(key, facts.instance)
        return status

    def _keep_in(self, key: Key, path: Path, facts: Facts, sender: object) -> int:
        caller, called, *_ = key
        rule = self._config.choose(facts.rule_facts | {"caller": caller, "called": called})
        if rule is None:
            log.warning("no rule fits a series that %s sends to %s; it is refused", caller, called)
            return NO_RULE
        size = path.stat().st_size
        count, used = self._spool.find(key)
        too_large = (
            count >= self._limits.max_zip_images or used + size > self._limits.max_body_mb * 1024 * 1024
        )
        if too_large or not self._has_room(self._spool.used_bytes + size):
            log.warning(
                "an instance that %s sends is refused: %s",
                caller,
                "its series is too large"
                if too_large
                else "the disk quota UNETPP_JOBS__MAX_DISK_MB is used up",
            )
            return OUT_OF_RESOURCES
        with path.open("rb") as file:
            self._spool.add(key, _plan(rule, self._node), facts.instance, file, sender)
        self._wake()
        return SUCCESS

    def _hang_up(self, event: Any) -> None:
        self._spool.hang_up(event.assoc)
        self._wake()

    def _wake(self) -> None:
        # The loop may be closed already.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def _work(self) -> None:
        """Makes jobs of the series that are complete."""
        while True:
            try:
                self._arrived.clear()
                for series in self._spool.take_complete():
                    await self._accept(series)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._spool.next_s()):
                        await self._arrived.wait()
            except Exception:
                # Instances are acknowledged meanwhile, so it must go on.
                log.exception("the DICOM node makes no jobs for %g s", RESTART_S)
                await asyncio.sleep(RESTART_S)

    async def _accept(self, series: Series) -> None:
        """Makes a job of a series, now or later. Never raises, because other series wait."""
        short = series.id[:8]
        if series.refused:
            log.warning(
                "a series from %s with %d instances is dropped, because %d instances of it were refused and did not come again",
                series.key[0],
                len(series.instances),
                series.refused,
            )
            await asyncio.to_thread(self._spool.discard, series)
            return
        try:
            params = SegmentParams.parse(series.plan["params"])
            await asyncio.to_thread(self._spool.seal, series)
            with tempfile.TemporaryFile() as file:
                await asyncio.to_thread(self._spool.write_zip, series, file)
                file.seek(0)
                await self._submit(file, params, series.plan["forward"], series.id)
        except (Unreadable, TooLarge, UnsupportedType) as error:
            log.warning(
                "a series from %s is dropped, because it cannot be segmented: %s", series.key[0], error
            )
        except Exception:
            # Also of a model that is gone: what was acknowledged is kept until the operator has mended it.
            log.exception("series %s is no job yet; tried again in %g s", short, RETRY_S)
            self._spool.put_back(series, RETRY_S)
            return
        else:
            log.info("series from %s with %d instances: job %s", series.key[0], len(series.instances), short)
        await asyncio.to_thread(self._spool.discard, series)


def _remove_half(event: Any) -> None:
    """Removes the file of an instance that was arriving when its connection ended."""
    message = event.assoc.dimse.message
    file = getattr(message, "_data_set_file", None)
    if file is not None:
        file.close()
        Path(file.name).unlink(missing_ok=True)


def _plan(rule: Rule, node: NodeTable) -> dict[str, Any]:
    """Returns the request and the destination, which are kept with a series so that other rules after a restart change nothing."""
    return {"params": rule.params.model_dump(exclude_unset=True), "forward": rule.forward or node.forward}


def _transfer_syntaxes() -> list[str]:
    from pynetdicom import ALL_TRANSFER_SYNTAXES

    # Deflated ones inflate to any size, and video is not read.
    kept = [str(uid) for uid in ALL_TRANSFER_SYNTAXES]
    return [
        uid
        for uid in kept
        if uid != "1.2.840.10008.1.2.1.99" and not uid.startswith("1.2.840.10008.1.2.4.10")
    ]


def _server_context(node: NodeTable) -> ssl.SSLContext | None:
    if not node.tls_cert or not node.tls_key:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=node.tls_ca)
    context.load_cert_chain(node.tls_cert, node.tls_key)
    if node.tls_ca:
        context.verify_mode = ssl.CERT_REQUIRED
    return context
