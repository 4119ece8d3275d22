"""The DICOM node against pynetdicom as a modality, and a store SCP as the destination of answers."""

import asyncio
import contextlib
import io
import ssl
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from server.dicom import node as module
from server.dicom import store_scu
from server.dicom.config import DicomConfig, NodeTable, parse_config
from server.dicom.instance import read_facts
from server.dicom.node import Node
from server.dicom.spool import Spool
from server.errors import (
    InvalidParameter,
    PacsRefused,
    PacsUnavailable,
    StoreFull,
    TooLarge,
    UnknownModel,
    Unreadable,
)
from server.segment.request import SegmentParams
from server.settings import DicomSettings, LimitsSettings
from tests.server.dicom.series import SIZE, write_series
from tests.support.orthanc import free_port
from tests.support.server import make_certificate

pydicom = pytest.importorskip("pydicom")
pynetdicom = pytest.importorskip("pynetdicom")

# pynetdicom forgets sockets whose connection fails.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

CT = "1.2.840.10008.5.1.4.1.1.2"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
ECHO = "1.2.840.10008.1.1"
ALL = "0.0.0.0"  # noqa: S104 - what operators may write


class Jobs:
    """Takes series; raises what `errors` holds first."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.accepted: list[tuple[int, dict[str, Any], str, str]] = []
        self.changed = asyncio.Event()

    async def __call__(self, file: BinaryIO, params: SegmentParams, destination: str, id_: str) -> None:
        try:
            if self.errors:
                raise self.errors.pop(0)
            with zipfile.ZipFile(file) as archive:
                count = len(archive.namelist())
            self.accepted.append((count, params.model_dump(exclude_none=True), destination, id_))
        finally:
            self.changed.set()

    async def wait(self) -> None:
        async with asyncio.timeout(60):
            await self.changed.wait()
        self.changed.clear()


def config_of(more: dict[str, Any] | None = None, rules: Any = ()) -> DicomConfig:
    table = {"port": free_port(), "forward": "A@127.0.0.1:1", "quiet_s": 0.2} | (more or {})
    return parse_config({"node": table, "rules": list(rules)}, "test")


@contextlib.asynccontextmanager
async def running(
    folder: Path, jobs: Jobs, config: DicomConfig, has_room: Callable[[int], bool] = lambda size: True
) -> AsyncIterator[NodeTable]:
    assert config.node
    async with Node(config, config.node, folder / "arriving", LimitsSettings(), has_room, jobs):
        yield config.node


def send(
    table: NodeTable,
    paths: list[Path],
    called: str = "UNETPP",
    classes: tuple[str, ...] = (CT, ECHO),
    tls: Any = None,
) -> list[int] | None:
    """Statuses of C-ECHO and of C-STORE of each file; None if there was no association."""
    entity = pynetdicom.AE(ae_title="CT1")
    entity.acse_timeout = entity.network_timeout = entity.connection_timeout = 20
    for one in classes:
        entity.add_requested_context(one)
    association = entity.associate(
        "127.0.0.1", table.port, ae_title=called, tls_args=(tls, "localhost") if tls else None
    )
    if not association.is_established:
        return None
    statuses = [association.send_c_echo().Status] if ECHO in classes else []
    statuses += [association.send_c_store(pydicom.dcmread(path)).Status for path in paths]
    association.release()
    return statuses


async def test_series_becomes_one_job(tmp_path: Path) -> None:
    jobs, paths = Jobs(), write_series(tmp_path / "series")
    # Twelve times as long while the association is open.
    async with running(tmp_path, jobs, config_of({"quiet_s": 3})) as table:
        assert await asyncio.to_thread(send, table, paths) == [0] * (1 + SIZE[2])
        hung_up = time.monotonic()
        await jobs.wait()
        assert 2 < time.monotonic() - hung_up < 20
        ((count, params, destination, id_),) = jobs.accepted
        assert (count, params["format"], destination, len(id_)) == (SIZE[2], "dicomseg", "A@127.0.0.1:1", 32)
    assert list((tmp_path / "arriving").iterdir()) == []


def begin(table: NodeTable, paths: list[Path]) -> Any:
    """An association that has sent some files, and is open."""
    entity = pynetdicom.AE(ae_title="CT1")
    entity.add_requested_context(CT)
    association = entity.associate("127.0.0.1", table.port, ae_title="UNETPP")
    for path in paths:
        assert association.send_c_store(pydicom.dcmread(path)).Status == 0
    return association


@pytest.mark.parametrize("end", ["abort", "lost"])
async def test_connection_that_is_lost_is_no_end_of_a_series(tmp_path: Path, end: str) -> None:
    """Half a series is no job; when it is sent again, there is one."""
    jobs, paths = Jobs(), write_series(tmp_path / "series")
    async with running(tmp_path, jobs, config_of({"quiet_s": 0.5})) as table:
        association = await asyncio.to_thread(begin, table, paths[:4])
        if end == "abort":
            await asyncio.to_thread(association.abort)
        else:
            association.dul.socket.close()
        await asyncio.sleep(2)
        assert jobs.accepted == []
        assert await asyncio.to_thread(send, table, paths) == [0] * (1 + SIZE[2])
        await jobs.wait()
    assert [count for count, *_ in jobs.accepted] == [SIZE[2]]


async def test_series_of_which_an_instance_was_refused_is_no_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jobs, paths, room = Jobs(), write_series(tmp_path / "series"), [True, True, False]
    config = config_of()
    async with running(tmp_path, jobs, config, lambda size: not room or room.pop(0)) as table:
        statuses = await asyncio.to_thread(send, table, paths)
        assert statuses == [0, 0, 0, module.OUT_OF_RESOURCES] + [0] * (SIZE[2] - 3)
        await asyncio.sleep(2)
        assert jobs.accepted == []
        assert "1 instances of it were refused" in caplog.text
        # Sent again, it is complete.
        assert await asyncio.to_thread(send, table, paths) == [0] * (1 + SIZE[2])
        await jobs.wait()
    assert [count for count, *_ in jobs.accepted] == [SIZE[2]]
    assert list((tmp_path / "arriving").iterdir()) == []


def send_half(table: NodeTable, path: Path) -> None:
    """Aborts in the middle of an instance."""
    association = begin(table, [])
    # No answer will come.
    association.dimse_timeout = 1
    sent = association.dul.send_pdu
    count = 0

    def send_pdu(pdu: Any) -> None:
        nonlocal count
        count += 1
        if count == 4:
            time.sleep(1)
            association.dul.send_pdu = sent
            association.abort()
        elif count < 4:
            sent(pdu)

    association.dul.send_pdu = send_pdu
    dataset = pydicom.dcmread(path)
    dataset.add_new(0x00091010, "OB", bytes(300_000))
    with contextlib.suppress(RuntimeError, ValueError):
        association.send_c_store(dataset)


async def test_instance_that_ends_early_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    arriving, seen = tmp_path / "arriving", False
    paths = write_series(tmp_path / "series")
    async with running(tmp_path, Jobs(), config_of()) as table:
        sending = asyncio.create_task(asyncio.to_thread(send_half, table, paths[0]))
        while not sending.done():
            seen = seen or any(arriving.rglob("tmp*.dcm"))
            assert list(elsewhere.iterdir()) == []
            await asyncio.sleep(0.05)
        await sending
        await asyncio.sleep(1)
        assert seen
        assert [*arriving.rglob("tmp*.dcm")] == [*elsewhere.iterdir()] == []


async def test_instance_of_a_killed_server_is_removed_at_the_start(tmp_path: Path) -> None:
    left = tmp_path / "arriving" / module.INCOMING / "tmp1.dcm"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"Doe^Jane")
    async with running(tmp_path, Jobs(), config_of()):
        assert not left.exists()


async def test_node_survives_what_it_does_not_expect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "RESTART_S", 0.1)
    take, failures = Spool.take_complete, [ValueError("bug")]

    def fail(spool: Spool) -> Any:
        if failures:
            raise failures.pop()
        return take(spool)

    monkeypatch.setattr(Spool, "take_complete", fail)
    jobs = Jobs()
    async with running(tmp_path, jobs, config_of()) as table:
        await asyncio.to_thread(send, table, write_series(tmp_path / "series"))
        await jobs.wait()
    assert [count for count, *_ in jobs.accepted] == [SIZE[2]]
    assert "bug" in caplog.text


@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"host": ALL}, True),
        ({"host": ALL, "callers": ["CT1"]}, False),
        ({"host": "127.0.0.1"}, False),
    ],
)
async def test_node_that_all_may_call_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, more: dict[str, Any], warned: bool
) -> None:
    async with running(tmp_path, Jobs(), config_of(more)):
        assert ("callers" in caplog.text) == warned


def test_long_element_is_not_read_into_the_memory(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_series(tmp_path)[0])
    dataset.add_new(0x00091010, "OB", bytes(64 * 1024 * 1024))
    path = tmp_path / "long.dcm"
    pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=True)
    del dataset
    tracemalloc.start()
    try:
        facts = read_facts(path)
        with path.open("rb") as file:
            assert read_facts(file) == facts
        assert tracemalloc.get_traced_memory()[1] < 8 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert (facts.study, facts.series) == ("1.2.826.1", "1.2.826.1.1")


async def test_restart_takes_up_what_was_acknowledged(tmp_path: Path) -> None:
    jobs, paths, config = Jobs(), write_series(tmp_path / "series"), config_of({"quiet_s": 600})
    async with running(tmp_path, jobs, config) as table:
        assert await asyncio.to_thread(send, table, paths) == [0] * (1 + SIZE[2])
    assert jobs.accepted == []
    async with running(tmp_path, jobs, config_of()):
        await jobs.wait()
    assert jobs.accepted[0][0] == SIZE[2]


@pytest.mark.parametrize(
    "error", [StoreFull("full"), ValueError("bug"), UnknownModel("gone"), InvalidParameter("no level")]
)
async def test_series_that_is_no_job_yet_is_tried_again(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.1)
    jobs = Jobs()
    jobs.errors = [error]
    async with running(tmp_path, jobs, config_of()) as table:
        await asyncio.to_thread(send, table, write_series(tmp_path / "series"))
        await jobs.wait()
        await jobs.wait()
    assert [count for count, *_ in jobs.accepted] == [SIZE[2]]


@pytest.mark.parametrize("error", [Unreadable("no"), TooLarge("no")])
async def test_series_that_cannot_be_segmented_is_dropped(tmp_path: Path, error: Exception) -> None:
    jobs = Jobs()
    jobs.errors = [error]
    async with running(tmp_path, jobs, config_of()) as table:
        await asyncio.to_thread(send, table, write_series(tmp_path / "series"))
        await jobs.wait()
    async with running(tmp_path, jobs, config_of()):
        await asyncio.sleep(0.5)
    assert jobs.accepted == []
    assert list((tmp_path / "arriving").iterdir()) == []


async def test_what_no_rule_fits_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jobs = Jobs()
    config = config_of(rules=[{"modality": "MR"}])
    async with running(tmp_path, jobs, config) as table:
        path = write_series(tmp_path / "series", SeriesDescription="Doe^Jane")[:1]
        assert await asyncio.to_thread(send, table, path) == [0, module.NO_RULE]
    assert "Doe" not in caplog.text
    assert "CT1" in caplog.text


async def test_disk_that_is_full_is_said(tmp_path: Path) -> None:
    async with running(tmp_path, Jobs(), config_of(), lambda size: False) as table:
        paths = write_series(tmp_path / "series")[:1]
        assert await asyncio.to_thread(send, table, paths) == [0, module.OUT_OF_RESOURCES]
    assert list((tmp_path / "arriving").iterdir()) == []


async def test_associations_that_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path, Jobs(), config_of({"callers": ["CT2"]})) as table:
        assert await asyncio.to_thread(send, table, []) is None
    async with running(tmp_path, Jobs(), config_of()) as table:
        assert await asyncio.to_thread(send, table, [], "OTHER") is None
        # Answers of programs are not segmented.
        assert await asyncio.to_thread(send, table, [], "UNETPP", (SEG,)) is None


async def test_tls_needs_certificates_on_both_sides(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    config = config_of({"tls_cert": cert, "tls_key": key, "tls_ca": cert})
    known = ssl.create_default_context(cafile=str(cert))
    known.load_cert_chain(cert, key)
    jobs = Jobs()
    async with running(tmp_path, jobs, config) as table:
        assert await asyncio.to_thread(send, table, [], tls=known) == [0]
        assert await asyncio.to_thread(send, table, []) is None


@contextlib.contextmanager
def archive(
    status: int = 0, classes: tuple[str, ...] = (CT,), tls: Any = None, aet: str = "ARCHIVE"
) -> Iterator[tuple[int, list[bytes]]]:
    """A destination that answers with a status."""
    stored: list[bytes] = []

    def keep(event: Any) -> int:
        # A node in this process has changed how pynetdicom receives.
        path = getattr(event.request, "_dataset_path", None)
        stored.append(path.read_bytes() if path else event.encoded_dataset())
        return status

    entity = pynetdicom.AE(ae_title=aet)
    entity.require_called_aet = True
    for one in classes:
        entity.add_supported_context(one)
    server = entity.start_server(("127.0.0.1", 0), False, tls, [(pynetdicom.evt.EVT_C_STORE, keep)])
    try:
        yield server.socket.getsockname()[1], stored
    finally:
        server.shutdown()


SETTINGS = DicomSettings(connect_s=5, idle_s=10)


@pytest.mark.parametrize(
    ("status", "classes", "error"),
    [
        (0x0000, (CT,), None),
        (0xB000, (CT,), None),
        (0xA700, (CT,), PacsUnavailable),
        (0xC123, (CT,), PacsRefused),
        (0x0000, (SEG,), PacsUnavailable),
    ],
)
def test_answer_of_the_destination_decides(
    tmp_path: Path, status: int, classes: tuple[str, ...], error: type[Exception] | None
) -> None:
    (path, *_) = write_series(tmp_path)
    with archive(status, classes) as (port, stored), path.open("rb") as file:
        caught = pytest.raises(error) if error else contextlib.nullcontext()
        with caught:
            store_scu.send(f"ARCHIVE@127.0.0.1:{port}", file, None, SETTINGS)
    assert len(stored) == (CT in classes)


def test_destination_that_is_away_or_refuses_may_change_its_mind(tmp_path: Path) -> None:
    data = io.BytesIO(write_series(tmp_path)[0].read_bytes())
    with pytest.raises(PacsUnavailable):
        store_scu.send(f"ARCHIVE@127.0.0.1:{free_port()}", data, None, SETTINGS)
    with archive() as (port, _), pytest.raises(PacsUnavailable, match="AE title"):
        store_scu.send(f"OTHER@127.0.0.1:{port}", data, None, SETTINGS)


def test_answers_are_sent_over_tls(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    more = {"tls_cert": cert, "tls_key": key, "tls_ca": cert, "forward_tls": True}
    table = config_of(more).node
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(cert))
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED
    data = io.BytesIO(write_series(tmp_path / "series")[0].read_bytes())
    with archive(tls=context) as (port, stored):
        store_scu.send(f"ARCHIVE@localhost:{port}", data, table, SETTINGS)
    assert len(stored) == 1
