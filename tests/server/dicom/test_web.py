"""DICOMweb against a server that misbehaves: limits while reading, what is tried again, what is never stored twice."""

import errno
import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from server.dicom.config import parse_config
from server.dicom.pacs import DicomPacs
from server.errors import (
    InvalidParameter,
    PacsRefused,
    PacsUnavailable,
    StoreBroken,
    StoreFull,
    TooLarge,
    Unreadable,
)
from server.settings import DicomSettings, LimitsSettings
from tests.server.dicom.fake_web import SERIES, STUDY, FakeWeb, fake_web, value
from tests.server.dicom.series import write_series

pydicom = pytest.importorskip("pydicom")

SOURCE = f"main/{STUDY}/{SERIES}"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_series(tmp_path_factory.mktemp("series"), 1)


@pytest.fixture
def web(paths: list[Path]) -> Iterator[FakeWeb]:
    with fake_web(paths) as fake:
        yield fake


def pacs_of(
    web: FakeWeb, server: dict[str, Any] | None = None, limits: Any = None, **settings: Any
) -> DicomPacs:
    config = parse_config({"servers": {"main": {"address": web.address} | (server or {})}}, "test")
    return DicomPacs(config, DicomSettings(**{"idle_s": 5, **settings}), limits or LimitsSettings())


async def fetch(pacs: DicomPacs, source: str = SOURCE) -> list[bytes]:
    file = io.BytesIO()
    counted: list[int] = []
    await pacs.fetch(source, file, counted.append)
    with zipfile.ZipFile(file) as archive:
        files = [archive.read(name) for name in archive.namelist()]
    assert sum(counted) >= sum(map(len, files))
    return files


async def test_instances_arrive_as_they_are(web: FakeWeb, paths: list[Path]) -> None:
    assert await fetch(pacs_of(web)) == [path.read_bytes() for path in paths]
    assert await fetch(pacs_of(web), f"main/{STUDY}") == [path.read_bytes() for path in paths]


@pytest.mark.parametrize("status", [401, 403, 404, 400, 501])
async def test_refusal_is_final(web: FakeWeb, status: int) -> None:
    web.statuses = [status]
    with pytest.raises(PacsRefused) as caught:
        await fetch(pacs_of(web))
    assert caught.value.fields["actual"] == status
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("status", [206, 429, 500, 503])
async def test_trouble_may_pass(web: FakeWeb, status: int) -> None:
    web.statuses = [status]
    with pytest.raises(PacsUnavailable) as caught:
        await fetch(pacs_of(web))
    assert caught.value.fields["actual"] == status
    assert "Doe" not in str(caught.value)


async def test_answer_that_ends_early_is_not_taken(web: FakeWeb) -> None:
    web.cut = True
    with pytest.raises(PacsUnavailable):
        await fetch(pacs_of(web))


async def test_answer_without_some_instances_is_not_taken(web: FakeWeb) -> None:
    web.missing = 2
    with pytest.raises(PacsUnavailable, match="7 of 9"):
        await fetch(pacs_of(web))


async def test_server_that_stalls_is_left(web: FakeWeb) -> None:
    web.pause_s = 3
    with pytest.raises(PacsUnavailable, match="in time"):
        await fetch(pacs_of(web, idle_s=0.3))


async def test_server_that_drips_is_left(web: FakeWeb) -> None:
    web.pause_s = 3
    with pytest.raises(PacsUnavailable, match="in time"):
        await fetch(pacs_of(web, idle_s=60, exchange_s=0.5))


async def test_redirection_is_not_followed(web: FakeWeb) -> None:
    with fake_web() as elsewhere:
        web.location = f"{elsewhere.address}/studies/{STUDY}/series"
        with pytest.raises(PacsRefused) as caught:
            await fetch(pacs_of(web))
        assert (caught.value.fields["actual"], elsewhere.seen) == (302, [])


async def test_limits_apply_while_reading(web: FakeWeb) -> None:
    with pytest.raises(TooLarge) as caught:
        await fetch(pacs_of(web, limits=LimitsSettings(max_zip_images=8)))
    assert (caught.value.fields["limit"], caught.value.fields["unit"]) == (8, "instances")
    web.instances = [bytes(1024 * 1024)] * 3
    with pytest.raises(TooLarge) as caught:
        await fetch(pacs_of(web, limits=LimitsSettings(max_body_mb=2)))
    assert caught.value.fields["setting"] == "UNETPP_LIMITS__MAX_BODY_MB"

    def full(size: int) -> None:
        raise StoreFull("full")

    with pytest.raises(StoreFull):
        await pacs_of(web).fetch(SOURCE, io.BytesIO(), full)


async def test_list_that_lies_is_not_believed(web: FakeWeb) -> None:
    """What a list says is neither an address nor a text for errors."""
    web.more_series = [{"0020000E": value("../../9"), "00080060": value("Doe^Jane <b>")}, {"0020000E": 5}]
    with pytest.raises(InvalidParameter) as caught:
        await fetch(pacs_of(web), f"main/{STUDY}")
    assert caught.value.fields["allowed"] == [SERIES, "....9", ""]
    assert "^" not in str(caught.value)
    assert "<" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"{}", b"nonsense", b"[" + b"1," * 9_000_000 + b"1]"], ids=["no list", "no JSON", "long"]
)
async def test_list_that_cannot_be_read_may_come_later(web: FakeWeb, data: bytes) -> None:
    web.listing = data
    with pytest.raises(PacsUnavailable):
        await fetch(pacs_of(web))


async def test_list_of_any_depth_is_no_list(web: FakeWeb) -> None:
    web.listing = b"[" * 100_000
    with pytest.raises(PacsUnavailable, match="cannot be read"):
        await fetch(pacs_of(web))


async def test_compressed_answer_is_not_expanded(web: FakeWeb) -> None:
    """Some hundred bytes would become 200 MiB, of which no limit knows before they are in the memory."""
    bomb = bytes(200 * 1024 * 1024)
    for _ in range(2):
        bomb = gzip.compress(bomb, 9)
    assert len(bomb) < 10_000
    web.listing, web.encoding = bomb, "gzip, gzip"
    with pytest.raises(PacsRefused, match="compressed"):
        await fetch(pacs_of(web))
    ((_, headers),) = web.seen
    assert headers["Accept-Encoding"] == "identity"


async def test_compressed_instances_are_refused(web: FakeWeb) -> None:
    web.encoding, web.encoded = "deflate", f"/{SERIES}"
    with pytest.raises(PacsRefused, match="compressed"):
        await fetch(pacs_of(web))
    assert len(web.seen) == 2


async def test_compressed_answer_to_storing_is_refused(web: FakeWeb, paths: list[Path]) -> None:
    web.encoding, web.encoded = "gzip", f"/studies/{STUDY}"
    with pytest.raises(PacsRefused, match="compressed"):
        await pacs_of(web).send("main", opened(paths))


@pytest.mark.parametrize("uid", ["..", ".", "1..2", "1." * 40])
async def test_uid_of_a_list_is_one_before_it_is_asked_for(web: FakeWeb, uid: str) -> None:
    web.listing = json.dumps([{"0020000E": value(uid), "00080060": value("CT")}]).encode()
    with pytest.raises(PacsUnavailable, match="cannot be read"):
        await fetch(pacs_of(web), f"main/{STUDY}")
    assert len(web.seen) == 1


async def test_own_files_are_not_blamed_on_the_pacs(web: FakeWeb, tmp_path: Path) -> None:
    server = {"user": "u", "password_file": tmp_path / "missing"}
    with pytest.raises(PacsUnavailable, match="this server cannot read") as caught:
        await fetch(pacs_of(web, server))
    assert "cannot be called" not in str(caught.value)

    class Full(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.ENOSPC, "no space")

    with pytest.raises(StoreFull):
        await pacs_of(web).fetch(SOURCE, Full(), lambda size: None)

    class Broken(io.BytesIO):
        def write(self, data: Any, /) -> int:
            raise OSError(errno.EIO, "broken")

    with pytest.raises(StoreBroken):
        await pacs_of(web).fetch(SOURCE, Broken(), lambda size: None)


async def test_server_that_is_away_may_return() -> None:
    away = FakeWeb(port=9)
    with pytest.raises(PacsUnavailable):
        await fetch(pacs_of(away))


@pytest.mark.parametrize(
    "source", ["main", "main/", "main/1.2/3.4/5", "main/a", "main/..", "main/1..2", f"main/{'1' * 65}"]
)
def test_addresses_are_uids(web: FakeWeb, source: str) -> None:
    with pytest.raises(InvalidParameter):
        pacs_of(web).check_source(source)


@pytest.mark.parametrize("source", ["other/1.2", "http://127.0.0.1/1.2", "/1.2"])
def test_unknown_name_lists_the_names(web: FakeWeb, source: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        pacs_of(web).check_source(source)
    assert caught.value.fields.get("allowed") in (["main"], None)
    assert web.seen == []


async def test_credentials_are_read_anew(web: FakeWeb, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    pacs = pacs_of(web, {"token_file": token})
    await fetch(pacs)
    token.write_text("second\n")
    await fetch(pacs)
    sent = [headers["Authorization"] for _, headers in web.seen]
    assert sent == ["Bearer first"] * 2 + ["Bearer second"] * 2


def opened(paths: list[Path]) -> BinaryIO:
    return cast("BinaryIO", io.BytesIO(paths[0].read_bytes()))


async def test_instance_is_stored_once(web: FakeWeb, paths: list[Path]) -> None:
    pacs = pacs_of(web)
    await pacs.send("main", opened(paths))
    (body,) = web.stored
    assert paths[0].read_bytes() in body
    await pacs.send("main", opened(paths))
    assert len(web.stored) == 1


async def test_other_instances_are_not_taken_for_this_one(web: FakeWeb, paths: list[Path]) -> None:
    """A server may ignore a filter that it does not know."""
    web.other_instances = ["1.2.3", "1.2.826.1.1.100"]
    await pacs_of(web).send("main", opened(paths))
    assert len(web.stored) == 1
    await pacs_of(web).send("main", opened(paths))
    assert len(web.stored) == 1


@pytest.mark.parametrize("name", ["StudyInstanceUID", "SOPInstanceUID"])
@pytest.mark.parametrize("uid", ["../../x?y=1#", "1.2/3", "1..2", "1.2\n3", "1" * 65])
@pytest.mark.filterwarnings("ignore:.*")
async def test_uids_of_an_instance_are_uids_before_they_are_an_address(
    web: FakeWeb, paths: list[Path], name: str, uid: str
) -> None:
    dataset = pydicom.dcmread(paths[0])
    dataset.add_new(name, "UI", "1.2.3")
    dataset[name]._value = pydicom.uid.UID(uid, validation_mode=0)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset)
    with pytest.raises(Unreadable):
        await pacs_of(web).send("main", cast("BinaryIO", file))
    assert web.seen == []


@pytest.mark.parametrize("status", [401, 403])
async def test_segmentation_waits_until_it_may_be_stored(
    web: FakeWeb, paths: list[Path], status: int
) -> None:
    """The work of a job is not lost to a password that is replaced."""
    web.query_status = status
    with pytest.raises(PacsUnavailable, match="the operator corrects"):
        await pacs_of(web).send("main", opened(paths))
    web.query_status, web.store_statuses = 200, [status]
    with pytest.raises(PacsUnavailable, match="the operator corrects"):
        await pacs_of(web).send("main", opened(paths))
    await pacs_of(web).send("main", opened(paths))
    assert len(web.stored) == 1


async def test_instance_whose_answer_was_lost_is_not_stored_again(web: FakeWeb, paths: list[Path]) -> None:
    web.fails_after_storing = 1
    pacs = pacs_of(web)
    with pytest.raises(PacsUnavailable):
        await pacs.send("main", opened(paths))
    await pacs.send("main", opened(paths))
    assert len(web.stored) == 1


@pytest.mark.parametrize(
    ("status", "reason", "error"),
    [
        (409, 0x0110, PacsRefused),
        (409, 0xA700, PacsUnavailable),
        (503, None, PacsUnavailable),
        (413, None, PacsRefused),
    ],
)
async def test_store_that_fails_says_so(
    web: FakeWeb, paths: list[Path], status: int, reason: int | None, error: type[Exception]
) -> None:
    web.store_statuses, web.reason = [status], reason
    with pytest.raises(error):
        await pacs_of(web).send("main", opened(paths))
    assert web.stored == []


def test_pauses_grow_until_the_job_gives_up(web: FakeWeb) -> None:
    pacs = pacs_of(web, min_retry_s=2, max_retry_s=300, retry_h=1)
    assert [pacs.pause_s(tries, 0) for tries in (0, 1, 2, 7, 8, 1000)] == [2, 4, 8, 256, 300, 300]
    assert pacs.pause_s(0, 3599) == 2
    assert pacs.pause_s(0, 3600) is None
